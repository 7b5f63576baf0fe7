"""The store: keys, whole-or-nothing writes, damage, leftovers, checkpoints."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import workers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mlsae_core import store
from mlsae_core.spec import SpecError


def make(identity="0" * 16, text="x", **options):
    def fill(folder):
        (folder / "table.csv").write_text(text)
        return {"tokens": 3}

    return store.write("tokens", identity, {"a": 1}, {"model": "m"}, fill, **options)


def test_a_key_depends_on_everything_and_on_nothing_else(monkeypatch):
    def key(stage="tokens", spec=None, parents=None):
        return store.key(stage, spec or {"a": 1, "b": 2}, parents or {"p": "x"})

    assert key() == key(spec={"b": 2, "a": 1})
    others = {
        key("models"), key(spec={"a": 1, "b": 3}), key(spec={"a": 1}), key(parents={"p": "y"})
    }  # fmt: skip
    assert len(others | {key()}) == 5
    before = key()
    monkeypatch.setitem(store.STAGES, "tokens", store.STAGES["tokens"] + 1)
    assert key() != before


def test_what_is_written_is_found_with_its_provenance(data):
    made = make()
    found = store.find("tokens", made.key)
    assert found.file("table.csv").read_text() == "x"
    assert (found.spec, found.meta["tokens"]) == ({"a": 1}, 3)
    assert {"commit", "torch", "seconds", "written", "parents", "version"} <= set(found.meta)
    with pytest.raises(store.StoreError, match=r"holds no log\.csv; it has table\.csv"):
        found.file("log.csv")
    assert store.find("tokens", "1" * 16) is None


def test_shipped_results_come_first_and_shipping_keeps_what_is_asked(data):
    made = make()
    store.ship(made)
    (made.path / "table.csv").write_text("damaged")
    assert store.find("tokens", made.key).path.is_relative_to(store.SHIPPED)
    shipped = store.find("tokens", made.key)
    assert store.ship(shipped) == shipped.path
    assert [a.path for a in store.artefacts("tokens")] == [shipped.path, made.path]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "table.csv").write_text("y"), r"table\.csv: damaged"),
        (lambda path: (path / "table.csv").unlink(), r"table\.csv: missing"),
        (lambda path: (path / "meta.json").write_text("{"), r"meta\.json is damaged"),
        (lambda path: (path / "meta.json").write_text("[]"), r"meta\.json is damaged"),
        (lambda path: (path / "meta.json").write_bytes(b"\xff"), r"meta\.json is damaged"),
        (lambda path: (path / "spec.json").write_text("3"), r"spec\.json or"),
        (lambda path: (path / "spec.json").unlink(), r"spec\.json or"),
    ],
)
def test_damage_is_named_with_the_remedy(data, damage, message):
    made = make()
    damage(made.path)
    with pytest.raises(store.StoreError, match=message) as error:
        store.find("tokens", made.key)
    assert f"delete {made.path}; it is computed anew" in str(error.value)
    assert isinstance(error.value, SpecError)


def test_results_carry_their_key_and_spec_and_shipped_ones_must(data):
    made, first = make(), make("1" * 16)
    store.ship(first)
    for name in ("key", "spec"):
        for path in (made.path, store.SHIPPED / "tokens" / first.key):
            meta = json.loads((path / "meta.json").read_text())
            rest = {key: value for key, value in meta.items() if key != name}
            (path / "meta.json").write_text(json.dumps(rest))
            if path is made.path:  # from before they did
                assert store.find("tokens", made.key).file("table.csv").read_text() == "x"
                again = store.read(store.ship(store.read(path)))
                assert {again.meta["key"]: again.meta["spec"]} == {made.key: made.meta["spec"]}
                shutil.rmtree(again.path)
            else:
                with pytest.raises(store.StoreError, match=r"damaged; restore it with `git che"):
                    store.find("tokens", first.key)
            (path / "meta.json").write_text(json.dumps(meta | {name: "0"}))
            with pytest.raises(store.StoreError, match=r"holds another result|spec.json: damaged"):
                store.read(path)
            (path / "meta.json").write_text(json.dumps(meta))


def test_a_failed_computation_leaves_nothing(data):
    def fill(folder):
        (folder / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.write("tokens", "0" * 16, {}, {}, fill)
    assert [path for path in data.rglob("*") if path.is_file()] == []
    assert list((store.STORE / "tokens").iterdir()) == []


def test_a_finished_artefact_is_kept_unless_it_is_to_be_replaced(data):
    make(text="first")
    assert make(text="second").file("table.csv").read_text() == "first"
    assert make(text="third", replace=True).file("table.csv").read_text() == "third"
    assert [path.name for path in (store.STORE / "tokens").iterdir()] == ["0" * 16]


def test_leftovers_of_killed_processes_are_removed_and_never_listed(data):
    ended = subprocess.Popen(["true"])
    ended.wait()
    made = make()
    dead, alive = (
        made.path.with_name(f".{made.key}-{process}-abc") for process in (ended.pid, os.getpid())
    )
    for path in (dead, alive):
        shutil.copytree(made.path, path)
    other = made.path.with_name(f".{'1' * 16}-{ended.pid}-abc")
    other.mkdir()
    assert [a.key for a in store.artefacts("tokens")] == [made.key]
    make(replace=True)
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()

    checkpoint = store.STORE / "checkpoints" / "a.pt"
    store.save_checkpoint(checkpoint, {"a": 1})
    half = checkpoint.with_name(f".a.pt-{ended.pid}")
    half.write_text("half")
    store.save_checkpoint(checkpoint, {"a": 2})
    assert [path.name for path in checkpoint.parent.iterdir()] == ["a.pt"]


def test_processes_that_compute_the_same_do_not_mix(data, processes):
    go = processes.Barrier(3)
    workers_ = [
        processes.Process(target=workers.write_twice, args=(data, text, go)) for text in "abc"
    ]
    for process in workers_:
        process.start()
    for process in workers_:
        process.join(300)
    assert [process.exitcode for process in workers_] == [0, 0, 0]
    (made,) = (store.STORE / "tokens").iterdir()
    assert len({(made / f"{name}.txt").read_text() for name in ("first", "second")}) == 1


_plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_states = st.recursive(
    _plain | st.integers(1, 3).map(torch.arange),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=30)
@given(_states)
def test_a_checkpoint_holds_what_was_saved(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp() / "checkpoints" / "state"
    store.save_checkpoint(path, state)
    assert equal(state, store.load_checkpoint(path))


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_checkpoint_with_one_flipped_bit_is_named(tmp_path_factory, place, bit):
    path = tmp_path_factory.getbasetemp() / "checkpoints" / "checkpoint"
    store.save_checkpoint(path, {"weights": torch.arange(100.0), "step": 3})
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(store.StoreError, match=r"checkpoint: damaged checkpoint.*delete it"):
        store.load_checkpoint(path)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint"
    save_file({"0": torch.ones(3)}, path, metadata={"state": "{}"})  # of an earlier commit
    for content in (path.read_bytes(), b"", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(store.StoreError, match=r"checkpoint: damaged checkpoint.*delete it"):
            store.load_checkpoint(path)


def test_a_result_says_on_which_gpu_it_was_computed(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    said, here = [], store.provenance()["machine"]
    for computed in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda computed=computed: computed)
        made = store.write("tokens", f"{computed}", {}, {}, lambda folder: {})
        said.append(made.meta["machine"].removeprefix(here))
    assert said == ["", ", NVIDIA H100"]
    assert store.provenance()["machine"] == here + said[1]  # as a lens says it
    monkeypatch.delitem(sys.modules, "torch")
    assert store.provenance()["machine"] == here


def test_looking_results_up_needs_neither_torch_nor_transformers():
    heavy = ("torch", "transformers", "accelerate", "datasets")
    code = f"import sys, mlsae_core.pipeline; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout.replace("'", '"')) == []


def test_a_checkpoint_behind_its_end_is_forgotten_and_one_of_a_new_computation_kept(tmp_path):
    checkpoint, result = tmp_path / "checkpoint", tmp_path / "meta.json"
    store.forget_checkpoint(checkpoint, result)  # nothing is there
    for written, forgotten in ((5, True), (10, True), (20, False)):
        left = tmp_path / f".checkpoint-{2**22 + 1}"  # beyond the largest process number
        for path, seconds in ((checkpoint, written), (left, written), (result, 10)):
            path.touch()
            os.utime(path, (seconds, seconds))
        store.forget_checkpoint(checkpoint, result)
        assert left.exists() != forgotten  # it may be another machine's, where that runs
        assert checkpoint.exists() != forgotten
        assert result.exists()
