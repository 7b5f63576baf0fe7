"""What went wrong with other people's files, folders, machines and stops, and must not."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import yaml
import zstandard
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from workers import sentences, slow_command, write_jsonl

from mlsae_book import pretrain, stages, tune  # noqa: F401 (stages registers its own)
from mlsae_book.__main__ import main as book
from mlsae_core import (
    architecture,
    cli,
    documents,
    fits,
    pipeline,
    resume,
    stops,
    store,
    text,
    train,
)
from mlsae_core.__main__ import main as core
from mlsae_core.lens import Lens
from mlsae_core.spec import DataSpec, EvaluateSpec, ModelSpec, SpecError, run_from_dict

CONTEXT, CPU = 16, torch.device("cpu")


def refused(capsys, code, message):
    """One line of ours, and nothing that another library has to say."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not any("Traceback" in line for line in lines)
    return code


@pytest.fixture
def base(data, inputs):
    """The fields of a small run on the tiny models' text."""
    (data / "docstrings.yml").write_text("minimum_characters: 32\npackages: {none: 1.0}\n")
    return {
        "model": str(inputs / "llama"),
        "data": {"path": str(inputs / "text.jsonl"), "context_length": CONTEXT},
        "expansion_factor": 2,
        "k": 4,
        "tokens": 512,
        "batch_tokens": 64,
    }


def spec_file(folder, values):
    (folder / "spec.yml").write_text(yaml.safe_dump(values))
    return str(folder / "spec.yml")


def snapshot(folder):
    """Every file of a folder with its content."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- nobody's files are lost ----------------------------------------------------------------------


def quick(inputs, **changes):
    fixed = {"tokens": 256, "batch_tokens": 128, "validation_tokens": 64}
    data = DataSpec(path=str(inputs / "text.jsonl"), context_length=CONTEXT)
    return tune.TuneSpec(**{"data": data} | fixed | changes)


def test_a_lens_is_named_by_its_models_folder_wherever_one_stands(data, inputs, monkeypatch):
    precious = data / "lenses" / "precious" / "config.json"
    precious.parent.mkdir(parents=True)
    precious.write_text("trained for a week")
    shutil.copytree(inputs / "llama", data / "mynet")
    monkeypatch.chdir(data / "mynet")
    assert tune.make(".", quick(inputs)) == data / "lenses" / "mynet"
    assert precious.read_text() == "trained for a week"
    assert sorted(p.name for p in (data / "lenses").iterdir()) == ["mynet", "precious"]


def test_only_a_lens_that_was_made_here_is_replaced(data, inputs):
    precious = data / "lenses" / "llama" / "params.pt"
    precious.parent.mkdir(parents=True)
    precious.write_text("trained for a week")
    for force in (False, True):
        with pytest.raises(SpecError, match=r"expected a folder with training\.json.*move it away"):
            tune.make(str(inputs / "llama"), quick(inputs), force)
    assert precious.read_text() == "trained for a week"


RECIPE = {
    "architecture": {
        "model_type": "gpt_neox",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    },
    "vocab_size": 300,
    "tokens": 6 * 128,
    "batch_tokens": 128,
}


@pytest.fixture
def recipe(data, monkeypatch):
    """The folder of a recipe among things of the user's, as working directory."""
    folder = data / "net"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "a.txt").write_text("x")
    (folder / "notes.md").write_text("mine")
    write_jsonl(folder / "text.jsonl", [{"text": d} for d in sentences(300)])
    values = RECIPE | {"data": {"path": str(folder / "text.jsonl"), "context_length": CONTEXT}}
    (folder / "recipe.yml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(folder)
    return folder


def test_what_lies_beside_a_recipe_stays_and_its_relative_name_will_do(recipe):
    theirs = snapshot(recipe)
    assert pretrain.pretrain("recipe.yml") == recipe
    now = snapshot(recipe)
    assert theirs.items() <= now.items()
    assert {Path("config.json"), Path("model.safetensors"), Path("training.json")} <= now.keys()
    assert Path.cwd() == recipe


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "log.csv", "config.json"])
def test_a_file_of_the_users_is_never_replaced_by_a_model(recipe, name, capsys):
    (recipe / name).write_text("mine")
    theirs = snapshot(recipe)
    assert refused(capsys, book(["pretrain", "recipe.yml"]), name) == 2
    assert snapshot(recipe) == theirs


def test_a_tokenizer_beside_a_recipe_is_used_and_stays(recipe):
    documents = [d for split, d in text.split_documents(DataSpec(path="text.jsonl"))]
    pretrain.train_tokenizer(documents, 280).save_pretrained(recipe)
    theirs = snapshot(recipe)
    for _ in range(2):
        pretrain.pretrain("recipe.yml")
        assert theirs.items() <= snapshot(recipe).items()
        assert json.loads((recipe / "config.json").read_text())["vocab_size"] == 280
        (recipe / "text.jsonl").write_text("".join(f'{{"text": "{d}"}}\n' for d in sentences(200)))
        theirs[Path("text.jsonl")] = (recipe / "text.jsonl").read_bytes()


@pytest.mark.parametrize("moved", range(5))
def test_a_kill_while_a_model_is_moved_loses_nothing(recipe, moved, monkeypatch):
    replace, count = os.replace, 0

    def killed(source, target):
        nonlocal count
        if pretrain.MADE in str(source):
            count += 1
            if count > moved:
                raise KeyboardInterrupt
        replace(source, target)

    theirs = snapshot(recipe)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain("recipe.yml")
    assert not (recipe / "config.json").exists()  # no half of a model is one
    with monkeypatch.context() as patched:
        patched.setattr(pretrain._Training, "run", lambda *a: pytest.fail("trained twice"))
        pretrain.pretrain("recipe.yml")
    assert theirs.items() <= snapshot(recipe).items()
    assert (recipe / "config.json").exists()
    assert not (recipe / pretrain.MADE).exists()


def make(identity="0" * 16, content="x", **options):
    def fill(folder):
        (folder / "table.csv").write_text(content)
        return {}

    return store.write("train", identity, {"a": 1}, {}, fill, **options)


def test_a_kill_between_two_renames_loses_nothing(data, monkeypatch):
    path = make(content="old").path
    rename = Path.rename

    def killed(self, target):
        if self.name.startswith(f".{path.name}-") and not path.exists():
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            make(content="new", replace=True)
    assert not path.exists()
    assert store.find("train", path.name).file("table.csv").read_text() == "old"
    assert make(content="new", replace=True).file("table.csv").read_text() == "new"
    assert [left.name for left in path.parent.iterdir()] == [path.name]


def test_a_folder_that_was_not_written_here_is_never_replaced(data):
    theirs = store.STORE / "train" / ("0" * 16) / "notes.md"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    for replace in (False, True):
        with pytest.raises(store.StoreError, match=r"expected a folder with meta\.json"):
            make(replace=replace)
    assert [path.name for path in theirs.parent.parent.iterdir()] == ["0" * 16]
    assert theirs.read_text() == "mine"


def test_the_umask_decides_who_may_read(data):
    for mask, wanted in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:

            def fill(folder):
                save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
                (folder / "b.csv").write_text("x")
                return {}

            made = store.write("train", "0" * 16, {}, {}, fill, replace=True)
        finally:
            os.umask(before)
        modes = {path.stat().st_mode & 0o777 for path in made.path.iterdir()}
        assert modes == {wanted}
        assert made.path.stat().st_mode & 0o777 == 0o777 & ~mask


# --- what a result is made of ---------------------------------------------------------------------


def test_another_text_under_the_same_name_is_trained_on(recipe, monkeypatch):
    pretrain.pretrain("recipe.yml")
    weights = load_file("model.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(pretrain._Training, "run", lambda *a: pytest.fail("trained twice"))
        pretrain.pretrain("recipe.yml")
    facts = json.loads(Path("training.json").read_text())
    write_jsonl(recipe / "text.jsonl", [{"text": d[::-1]} for d in sentences(200)])
    pretrain.pretrain("recipe.yml")
    anew, now = load_file("model.safetensors"), json.loads(Path("training.json").read_text())
    assert any(weights[n].shape != anew[n].shape or (weights[n] != anew[n]).any() for n in weights)
    assert now["identity"] != facts["identity"]
    assert now["distinct_tokens"] < facts["distinct_tokens"]
    assert not [*(store.STORE / "pretrain").iterdir()]  # no finished one stays


def test_a_lens_belongs_to_one_model_by_its_content(data, inputs, base, capsys):
    for parent, seed in (("a", 0), ("b", 1)):
        shutil.copytree(inputs / "llama", data / parent / "net")
        weights = load_file(data / parent / "net" / "model.safetensors")
        name = "model.norm.weight"
        weights[name] = weights[name] + seed
        save_file(weights, data / parent / "net" / "model.safetensors", {"format": "pt"})
    a, b = str(data / "a" / "net"), str(data / "b" / "net")
    folder = tune.make(a, quick(inputs))
    made = snapshot(folder)
    with pytest.raises(SpecError, match=r"lenses/net was made of another model; rename it"):
        tune.make(b, quick(inputs))
    with pytest.raises(SpecError, match=r"lenses/net was made of another spec; rename it"):
        tune.make(a, quick(inputs, tokens=512))
    assert snapshot(folder) == made
    own = run_from_dict(base | {"model": a, "basis": "net"})
    lm = pipeline.Session().lm(own.model)
    assert not fits.load_lens(own, lm).is_identity
    for other in (b, str(inputs / "gpt2")):
        values = base | {"model": other, "basis": "net"}
        code = core(["train", spec_file(data, values)])
        assert refused(capsys, code, "basis: expected a tuned lens of") == 2
    (data / "text.jsonl").write_text('{"text": "another text"}\n')
    with pytest.raises(SpecError, match="of another text"):
        tune.make(a, quick(inputs, data=DataSpec(str(data / "text.jsonl"), context_length=CONTEXT)))
    tune.make(b, quick(inputs), force=True)
    with pytest.raises(SpecError, match=r"trained on another model"):
        fits.load_lens(own, lm)


def test_a_result_under_another_key_is_not_taken(data):
    one = make("1" * 16).path
    shutil.copytree(one, one.with_name("2" * 16))
    with pytest.raises(store.StoreError, match=r"holds another result, train 1111"):
        store.find("train", "2" * 16)
    shutil.copytree(one, store.STORE / "evaluate" / ("1" * 16))
    with pytest.raises(store.StoreError, match=r"holds another result, train 1111"):
        store.find("evaluate", "1" * 16)


def test_a_record_without_what_commands_show_is_damaged(data):
    path = make().path / "meta.json"
    meta = json.loads(path.read_text())
    for name in ("stage", "seconds", "files"):
        path.write_text(json.dumps({key: value for key, value in meta.items() if key != name}))
        with pytest.raises(store.StoreError, match=r"meta\.json is damaged"):
            store.find("train", "0" * 16)


def test_a_spec_that_was_changed_is_named(data):
    path = make().path / "spec.json"
    path.write_text(path.read_text().replace("1", "3"))
    with pytest.raises(store.StoreError, match=r"spec\.json: damaged"):
        store.find("train", "0" * 16)


@pytest.mark.parametrize(
    ("stage", "file"), [("tokens", "tokens.safetensors"), ("train", "model.safetensors")]
)
def test_what_the_remedy_says_works(data, base, capsys, stage, file):
    def evaluate():
        return core(["evaluate", spec_file(data, base), "--tokens", "64"])

    assert evaluate() == 0
    shutil.rmtree(store.STORE / "evaluate")
    [folder] = (store.STORE / stage).iterdir()
    (folder / file).write_bytes(b"damaged")
    capsys.readouterr()
    assert refused(capsys, evaluate(), f"delete {folder}; it is computed anew") == 2
    shutil.rmtree(folder)
    assert evaluate() == 0


# --- input that is not whole ----------------------------------------------------------------------


def test_compressed_text_that_was_cut_is_refused_wherever(tmp_path):
    whole = zstandard.ZstdCompressor().compress("\n\n".join(sentences(500)).encode())
    for name in ("a.txt.zst", "a.jsonl.zst"):
        for size in (1, 4, 10, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(SpecError, match=rf"cannot read .*{name}: Truncated"):
                list(text.documents(DataSpec(str(tmp_path / name))))
    (tmp_path / "b.txt.zst").write_bytes(whole)
    assert list(text.documents(DataSpec(str(tmp_path / "b.txt.zst")))) == sentences(500)


def test_all_frames_of_compressed_text_are_read(tmp_path):
    parts = ["\n\n".join(sentences(500)[part]) + "\n\n" for part in (slice(250), slice(250, None))]
    frames = [zstandard.ZstdCompressor().compress(part.encode()) for part in parts]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert list(text.documents(DataSpec(str(tmp_path / "a.txt.zst")))) == sentences(500)
    (tmp_path / "a.txt.zst").write_bytes(frames[0] + b"rubbish")
    with pytest.raises(SpecError, match="cannot read"):
        list(text.documents(DataSpec(str(tmp_path / "a.txt.zst"))))


def test_what_lies_beside_the_data_is_no_data(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "wanted"}])
    for name in ("README.txt", "LICENSE.txt", ".hidden.txt", ".cache/x.txt", "_meta/x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("unwanted")
    assert list(text.documents(DataSpec(str(tmp_path)))) == ["wanted"]


@pytest.mark.parametrize("first", [0, 1])
def test_shards_are_all_there_and_no_others(tmp_path, first):
    shards = [tmp_path / f"train-{n:05}-of-00003.jsonl" for n in range(first, first + 4)]
    for number, shard in enumerate(shards):
        write_jsonl(shard, [{"text": f"text {number}"}])
    with pytest.raises(SpecError, match=rf"expected the 3 shards .* number {first + 3:05}"):
        text.local_files(DataSpec(str(tmp_path)))
    shards[3].unlink()
    assert text.local_files(DataSpec(str(tmp_path))) == shards[:3]
    for shard in shards[:3]:
        shard.rename(tmp_path / "away")
        with pytest.raises(SpecError, match="expected the 3 shards"):
            text.local_files(DataSpec(str(tmp_path)))
        (tmp_path / "away").rename(shard)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def copied(inputs, folder, change, name="llama"):
    shutil.copytree(inputs / name, folder)
    change(folder)
    return str(folder)


def config(**changes):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))

    return change


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-500])


def nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def index(*names):
    """An index of shards, of which the folder has the second of two."""

    def change(folder):
        (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
        weights = {f"w{i}": name for i, name in enumerate(names)}
        content = json.dumps({"metadata": {}, "weight_map": weights})
        (folder / "model.safetensors.index.json").write_text(content)

    return change


ONE, TWO = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").write_text(POINTER), "is a Git LFS pointer"),
        (lambda f: (f / "tokenizer.json").write_text(POINTER), "is a Git LFS pointer"),
        (cut, "could not be loaded"),
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), "could not be loaded"),
        (config(intermediate_size=48), "mlp.down_proj.weight of shape [16, 48] from config.json"),
        (config(num_hidden_layers=10**9), "expected num_hidden_layers of at most 1000"),
        (config(vocab_size=10**7), "of shape [10000000, 16] from config.json"),
        (config(vocab_size=10**10), "model that fits"),
        (config(intermediate_size=10**6), "of shape [16, 1000000] from config.json"),
        (nan, "have NaN or infinite values"),
        (index(ONE, TWO), f"{ONE} is not there"),
        (index(ONE), f"{ONE} is not there"),
        (index("pytorch_model.bin", TWO), "pytorch_model.bin is not there"),
        (index("other.safetensors"), "other.safetensors is not there"),
        (lambda f: (f / "tokenizer.json").write_text("[" * 10**5), "could not be loaded"),
    ],
)
def test_models_that_cannot_be_read_are_one_line_of_every_command(
    data, inputs, base, capsys, change, message
):
    folder = copied(inputs, data / "broken", change)
    for main, arguments in (
        (core, ["train", spec_file(data, base | {"model": folder})]),
        (book, ["lens", folder, "--tokens", "1024"]),
    ):
        assert refused(capsys, main(arguments), message) == 2


def test_a_model_in_shards_is_read(data, inputs):
    weights = load_file(inputs / "llama" / "model.safetensors")
    folder = data / "sharded"
    shutil.copytree(inputs / "llama", folder)
    (folder / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[part]) for part in (slice(9), slice(9, None))]
    for name, half in zip((ONE, TWO), halves, strict=True):
        save_file(half, folder / name, {"format": "pt"})
    names = {key: name for name, half in zip((ONE, TWO), halves, strict=True) for key in half}
    listed = json.dumps({"metadata": {}, "weight_map": names})
    (folder / "model.safetensors.index.json").write_text(listed)
    run = {"model": str(folder), "expansion_factor": 2, "k": 2, "tokens": 4096}
    assert pipeline.Session().lm(run_from_dict(run).model).n_layers == 3
    save_file(halves[0], folder / "model-00003-of-00003.safetensors")
    with pytest.raises(SpecError, match=r"00003-of-00003\.safetensors is not in it"):
        pipeline.Session().lm(run_from_dict(run).model)


def test_a_lens_of_a_thousand_million_layers_is_one_line(data):
    lens = Lens(torch.zeros(2, 4, 4), torch.zeros(2, 4))
    lens.write(data / "lens", safetensors=True)
    config(num_hidden_layers=10**9)(data / "lens")
    with pytest.raises(SpecError, match=r"tensors 0\.weight, 0\.bias, … of 1000000000 layers"):
        Lens.read(data / "lens")


def test_a_lens_with_nan_says_so(data):
    Lens(torch.full((2, 4, 4), torch.nan), torch.zeros(2, 4)).write(data / "lens")
    with pytest.raises(SpecError, match="have NaN or infinite values"):
        Lens.read(data / "lens")


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.txt.zst"])
def test_a_document_of_any_file_has_a_length_at_most(tmp_path, name, monkeypatch):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 1000)
    for length, fine in ((900, True), (1001, False)):
        document = "a" * (length - 1) + "b"
        if name == "a.parquet":
            import pandas as pd

            pd.DataFrame({"text": [document]}).to_parquet(tmp_path / name)
        elif name == "a.json":
            (tmp_path / name).write_text(json.dumps([{"text": document}]))
        elif name == "a.jsonl":
            write_jsonl(tmp_path / name, [{"text": document}])
        else:
            content = document.encode()
            if name.endswith(".zst"):
                content = zstandard.ZstdCompressor().compress(content)
            (tmp_path / name).write_bytes(content)
        read = text.documents(DataSpec(str(tmp_path / name)))
        if fine:
            assert list(read) == [document]
        else:
            with pytest.raises(SpecError, match=r"lines and documents of at most 1,000 characters"):
                list(read)


def test_a_paragraph_of_many_lines_has_a_length_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 1000)
    (tmp_path / "a.txt").write_text("a line\n" * 200)
    with pytest.raises(SpecError, match="at most 1,000 characters"):
        list(text.documents(DataSpec(str(tmp_path / "a.txt"))))


def test_a_list_has_a_length_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LIST", 100)
    (tmp_path / "a.json").write_text("[\n" + ",\n".join(['{"text": "a"}'] * 9) + "]")
    with pytest.raises(SpecError, match=r"a list of at most 100 characters.*one object per line"):
        list(text.documents(DataSpec(str(tmp_path / "a.json"))))


def test_a_bomb_is_refused_by_what_it_becomes(tmp_path):
    """Two thousand MiB of one line in 64 kB: not held."""
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    with open(tmp_path / "a.txt.zst", "wb") as file:
        for _ in range(2000):
            file.write(compressor.compress(bytes(2**20)))
        file.write(compressor.flush())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SpecError, match="characters, got a longer one"):
        list(text.documents(DataSpec(str(tmp_path / "a.txt.zst"))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


# --- one boundary ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: File too large"),
        MemoryError("Unable to allocate 9 GiB"),
        Exception("a tokenizer's"),
        RuntimeError("[pair.cc:553] Connection closed by peer"),
        OSError(28, "No space left on device"),
        KeyError("x"),
        RecursionError("deep"),
    ],
)
def test_an_error_of_any_library_is_one_line(data, base, recipe, capsys, monkeypatch, error):
    def broken(*_, **__):
        raise error

    for name in ("find", "write"):
        monkeypatch.setattr(store, name, broken)
    for main, arguments in (
        (core, ["train", spec_file(data, base)]),
        (core, ["evaluate", spec_file(data, base)]),
        (book, ["materialise", spec_file(data, base)]),
        (book, ["pretrain", "recipe.yml"]),
        (book, ["lens", base["model"], "--tokens", "1024"]),
    ):
        assert refused(capsys, main(arguments), error.args[-1]) == 1


def test_a_message_is_one_line_that_a_terminal_only_shows():
    assert cli.line("a\nb \x1b[31m\u202ered") == "a b \\x1b[31m\\u202ered"
    assert cli.line("x" * 5000) == "x" * cli.LONGEST + " …"


def test_keys_with_escape_codes_and_folders_as_specs_are_one_harmless_line(data, capsys):
    (data / "spec.yml").write_text('"\\e[31mred": 1\n')
    assert refused(capsys, core(["train", str(data / "spec.yml")]), "\\x1b[31mred") == 2
    assert refused(capsys, core(["train", str(data)]), "is a folder; expected a YAML file") == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "x"},
        {"hidden_size": 10**9},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**9},
    ],
)
def test_recipes_of_impossible_models_are_one_line(recipe, changes, capsys):
    values = yaml.safe_load((recipe / "recipe.yml").read_text())
    values["architecture"] |= changes
    (recipe / "recipe.yml").write_text(yaml.safe_dump(values))
    assert refused(capsys, book(["pretrain", "recipe.yml"]), "recipe.architecture: ") == 2


# --- tokens that are no letters, and letters that are no tokens -----------------------------------


def test_a_padding_token_that_is_a_letter_is_a_letter(data, inputs):
    folder = data / "net"
    shutil.copytree(inputs / "llama", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "e"
    tokenizer.save_pretrained(folder)
    run = {"model": str(folder), "expansion_factor": 2, "k": 2, "tokens": 4096}
    lm = pipeline.Session().lm(run_from_dict(run).model)
    [ids] = text.token_ids(lm.tokenizer, ["here we see e e e"])
    assert lm.tokenizer.pad_token_id in ids
    assert lm.keep_mask(torch.tensor([ids])).all()


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_beyond_the_embeddings_is_refused_if_text_can_hold_it(
    data, inputs, base, capsys, special
):
    folder = data / "net"
    shutil.copytree(inputs / "llama", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["latent"], special_tokens=special)
    tokenizer.save_pretrained(folder)
    code = core(["train", spec_file(data, base | {"model": str(folder)})])
    if special:
        assert code == 0
    else:
        size = tokenizer.vocab_size
        assert refused(capsys, code, f"the model has {size} embeddings, none for 'latent'") == 2


# --- stops ----------------------------------------------------------------------------------------


def weights_of(run):
    artefact = pipeline.Session().train(run)
    return load_file(artefact.file("model.safetensors"))


@pytest.mark.parametrize("number", stops.SIGNALS)
def test_a_signal_writes_a_checkpoint_from_which_training_continues(
    data, base, processes, number, monkeypatch
):
    run = run_from_dict(base | {"tokens": 64 * 300})
    path = spec_file(data, base | {"tokens": 64 * 300})
    inside = data / "inside"
    process = processes.Process(target=slow_command, args=(["train", path], inside, 3))
    process.start()
    deadline = time.monotonic() + 120
    while not (inside / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == 128 + number
    [checkpoint] = (inside / "store" / "checkpoints").iterdir()
    step = store.load_checkpoint(checkpoint)["state"]["step"]
    assert 0 < step < 300
    whole = weights_of(run)
    shutil.rmtree(store.STORE / "train")
    (store.STORE / "checkpoints").mkdir(exist_ok=True)
    shutil.copy(checkpoint, pipeline.checkpoint_path(pipeline.run_key(run)[0]))
    rest = weights_of(run)
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


def test_a_signal_between_steps_is_one_line_with_the_checkpoint(data, base, capsys, monkeypatch):
    steps = train._Loop.steps

    def signalled(self, state):
        for row in steps(self, state):
            yield row
            if state.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train._Loop, "steps", signalled)
    assert core(["train", spec_file(data, base)]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("stopped by SIGTERM, after step 3 of 8; the last good checkpoint is")
    assert said.endswith("the same command continues from it")
    [checkpoint] = (store.STORE / "checkpoints").iterdir()
    assert store.load_checkpoint(checkpoint)["state"]["step"] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_signals_wait_for_what_changes_as_a_whole():
    done = []

    def work():
        with stops.held():
            os.kill(os.getpid(), signal.SIGHUP)
            done.append(1)
        done.append(2)

    def rest():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    with stops.raised():
        with pytest.raises(stops.Interrupted) as error:
            work()
        assert done == [1]
        assert error.value.number == signal.SIGHUP
        with pytest.raises(stops.Interrupted):
            rest()


def test_signals_do_not_wait_for_text(data, base, capsys, monkeypatch):
    """One that comes while a batch is read ends training there, at the last whole step."""
    read, count = text.TokenBlocks.batches, 0

    def signalled(self, *arguments):
        nonlocal count
        for rows in read(self, *arguments):
            count += 1
            if count == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("the signal waits")
            yield rows

    monkeypatch.setattr(text.TokenBlocks, "batches", signalled)
    assert core(["train", spec_file(data, base)]) == 143
    assert "stopped by SIGTERM, after step 3 of 8;" in capsys.readouterr().err  # one for the bias


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops.raised():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            assert stops.waiting() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Rows:
    """A hub's data set, which ends in an error after some rows."""

    num_shards = 1

    def __init__(self, rows, last):
        self.rows, self.last = rows, last

    def shard(self, **_):
        return self

    def __iter__(self):
        yield from ({"text": document} for document in self.rows)
        raise self.last


def test_a_hub_that_fails_for_ever_stops_with_a_checkpoint(data, base, capsys, monkeypatch):
    documents = sentences(1024 * 3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    values = base | {"data": {"path": "me/text", "context_length": CONTEXT}, "tokens": 10**5}
    path = spec_file(data, values)
    for rows, last, code, message in (
        (documents, ConnectionError("503"), 1, "cannot be read further than 3,072 documents: 503"),
        ([], ConnectionError("503"), 1, "me/text cannot be read: 503"),
        ([], ValueError("no such file"), 2, "me/text cannot be read: no such file"),
    ):
        found = Rows(rows, last)
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, found=found, **k: found)
        assert refused(capsys, core(["train", path]), message) == code
    [checkpoint] = (store.STORE / "checkpoints").iterdir()
    step = store.load_checkpoint(checkpoint)["state"]["step"]
    assert step > 10
    found = Rows(documents * 9, ConnectionError("503"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: found)
    assert core(["train", path]) == 0


def passed_on(error, kind=LocalEntryNotFoundError):
    """As one library says what another has said."""
    try:
        try:
            raise error
        except type(error):
            raise kind("not cached")  # noqa: B904 (as they do)
    except kind as other:
        return other


def answered(status):
    """The error of the hub's library where it answers so."""
    response = httpx.Response(status, request=httpx.Request("GET", "http://hub/me"))
    return passed_on(HfHubHTTPError("no", response=response))


@pytest.mark.parametrize(
    ("error", "away"),
    [
        *((answered(status), status in (429, 500, 503)) for status in (401, 404, 429, 500, 503)),
        (ConnectionError("refused"), True),
        (TimeoutError("too long"), True),
        (passed_on(httpx.ConnectError("no such host"), OSError), True),
        (OSError("no space left"), False),
        (LocalEntryNotFoundError("not cached"), False),
    ],
    ids=str,
)
def test_a_hub_that_is_away_is_no_bad_input(error, away, monkeypatch):
    def fail(*_, **__):
        raise error

    kind = store.Stopped if away else SpecError
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    for read, message in (
        (lambda: store.dictionary_folder("me/sae"), "me/sae is no folder"),
        (lambda: architecture.model_config(ModelSpec("me/model")), "got me/model, whose config"),
        (lambda: list(text.documents(DataSpec("me/text"))), "me/text cannot be read"),
    ):
        with pytest.raises((SpecError, store.Stopped), match=message) as raised:
            read()
        assert raised.type is kind
        with monkeypatch.context() as offline:  # where nobody is to be asked, nobody is away
            offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            with pytest.raises(SpecError, match=message):
                read()


def test_nobody_waits_for_text_that_is_not_used():
    go, ended = threading.Event(), threading.Event()

    def items():
        yield 1
        go.wait()
        ended.set()

    stopped, made = threading.Event(), []

    def use():
        rows = text.ahead(items(), stopped=stopped)
        made.append(next(rows))
        rows.close()
        made.append("closed")

    user = threading.Thread(target=use, daemon=True)
    user.start()
    user.join(10)
    assert made == [1, "closed"]
    assert stopped.is_set()
    assert not ended.is_set()
    go.set()
    assert ended.wait(10)


def made_by(command, inputs):
    """The file of the model or the lens that a command trains."""
    if command == "pretrain":
        return pretrain.pretrain("recipe.yml") / "model.safetensors"
    return tune.make(str(inputs / "llama"), quick(inputs, tokens=1024)) / "params.safetensors"


@pytest.mark.parametrize("command", ["pretrain", "lens"])
def test_models_and_lenses_continue_where_a_signal_stopped_them(
    command, data, inputs, recipe, monkeypatch
):
    """Stopped at every second step, they are what they are without."""

    call = partial(made_by, command, inputs)
    whole = load_file(call())
    (recipe / "training.json").write_text('{"training_tokens": 1}') if command == "pretrain" else (
        shutil.rmtree(data / "lenses")
    )
    held, count = stops.held, 0

    def stopped():
        nonlocal count
        count += 1
        if count % 2 == 0:
            raise stops.Interrupted(signal.SIGTERM)
        return held()

    with monkeypatch.context() as patched:
        patched.setattr(stops, "held", stopped)
        for step in range(1, 4):
            message = f"stopped by SIGTERM, after step {step} of [68]; the same command continues"
            with pytest.raises(stops.Interrupted, match=message):
                call()
    again = load_file(call())
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize(
    ("stage", "batches"),
    [
        *((name, [10]) for name in ("evaluate", "distributions", "transfer", "duplicates")),
        ("drift", [10, 10]),
        ("geometry", [3]),
        ("examples", [10]),
        ("importance", [10]),
    ],
)
def test_a_measurement_continues_at_the_batch_where_it_was_stopped(
    data, base, stage, batches, monkeypatch
):
    monkeypatch.setattr(pipeline, "EVALUATION_BATCH_TOKENS", 64)
    monkeypatch.setattr(resume, "SECONDS", -1.0)
    run, settings = run_from_dict(base), EvaluateSpec(tokens=640)

    def measure():
        made = pipeline.Session().make(stage, run, settings)
        return {name: made.file(name).read_bytes() for name in made.meta["files"]}

    whole = measure()
    shutil.rmtree(store.STORE / stage)
    counted, calls = resume.Pass.batch_done, []
    expected = [number for count in batches for number in range(1, count + 1)]
    at = {2, 3, len(expected) - 1, len(expected)}

    def stopped(self):
        counted(self)
        calls.append(self.first)
        if len(calls) in at:
            raise stops.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(resume, "EVERY", 0.0)
    monkeypatch.setattr(resume.Pass, "batch_done", stopped)
    for _ in at:
        with pytest.raises(stops.Interrupted):
            measure()
    assert measure() == whole
    assert calls == expected  # no batch twice
    assert not list((store.STORE / "checkpoints").iterdir())
    assert core(["status"]) == 0


@pytest.mark.parametrize("command", ["pretrain", "lens"])
def test_one_that_is_killed_behind_its_last_step_is_finished(
    command, data, inputs, recipe, monkeypatch
):
    call = partial(made_by, command, inputs)
    save, steps = store.save_checkpoint, []

    def killed(path, content):
        save(path, content)
        steps.append(content["step"])
        raise store.Stopped("killed")

    with monkeypatch.context() as patched:
        patched.setattr(store, "save_checkpoint", killed)
        with pytest.raises(store.Stopped, match="killed"):
            call()
    assert steps == [{"pretrain": 6, "lens": 8}[command]]
    last = store.load_checkpoint(next((store.STORE / command).glob("*.pt")))
    made = load_file(call())
    if command == "lens":
        assert torch.equal(made["0.weight"], last["weight"][0])
    else:
        name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
        assert torch.equal(made[name], last["model"][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 9}, "its step is 9 of "),
        ({"step": -1}, "its step is -1 of "),
        ({"step": ...}, "'step'"),
        ({"running": ...}, "'running'"),
        ({"optimizer": {}, "optimizers": [{}, {}]}, "'param_groups'"),
        ({"weight": torch.zeros(7), "model": {}}, ""),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "lens"])
def test_a_checkpoint_that_does_not_fit_is_named(
    command, change, message, data, inputs, recipe, monkeypatch
):
    """As one of another version of the code, which is whole."""

    def call():
        if command == "pretrain":
            return pretrain.pretrain("recipe.yml")
        return tune.make(str(inputs / "llama"), quick(inputs, tokens=1024))

    save = store.save_checkpoint

    def changed(path, content):
        save(path, {name: v for name, v in (content | change).items() if v is not ...})
        raise stops.Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(store, "save_checkpoint", changed)
        patched.setattr(train, "CHECKPOINT_SECONDS", -1.0)
        with pytest.raises(stops.Interrupted):
            call()
    kind = {"pretrain": "recipe", "lens": "lens"}[command]
    expected = rf"\.pt: expected a checkpoint of this {kind}; .*{message}.*; delete it to start"
    with pytest.raises(store.StoreError, match=expected):
        call()


def test_what_is_forced_takes_nothing_of_what_was_begun(data, base):
    run, settings = run_from_dict(base), EvaluateSpec(tokens=64)
    made = pipeline.Session().make("drift", run, settings)
    for name in ("", "-means"):
        path = store.STORE / "checkpoints" / f"{made.key}{name}.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"would be named as damaged")
    again = pipeline.Session("force").make("drift", run, settings)
    assert again.meta["files"] == made.meta["files"]


def test_tokenising_continues_at_the_document_where_it_was_stopped(data, base, monkeypatch):
    monkeypatch.setattr(text, "DOCUMENTS_PER_CHUNK", 16)
    run, seen = run_from_dict(base), []
    tokenise, counted = text.token_ids, resume.Pass.batch_done

    def noted(tokenizer, documents):
        seen.extend(documents)
        return tokenise(tokenizer, documents)

    def packed():
        pipeline.Session().blocks(run, "train")
        [made] = store.artefacts("tokens")
        names = ("documents", "characters", "tokens")
        return made.file("tokens.safetensors").read_bytes(), [made.meta[name] for name in names]

    monkeypatch.setattr(text, "token_ids", noted)
    whole = packed()
    assert len(seen) == 300
    shutil.rmtree(store.STORE / "tokens")
    seen.clear()

    def stopped(self):
        counted(self)
        if self.first in at:
            at.remove(self.first)
            raise stops.Interrupted(signal.SIGTERM)

    at = {7, 150, 300}
    monkeypatch.setattr(resume, "SECONDS", -1.0)
    monkeypatch.setattr(resume, "EVERY", 0.0)
    monkeypatch.setattr(resume.Pass, "batch_done", stopped)
    for _ in tuple(at):
        with pytest.raises(stops.Interrupted):
            packed()
    assert packed() == whole
    assert len(seen) == len(set(seen)) == 300
    [made] = store.artefacts("tokens")
    left = store.STORE / "checkpoints" / f"{made.key}.pt"
    assert not left.exists()
    left.touch()  # of one that was killed behind its end
    os.utime(left, (1, 1))
    assert packed() == whole
    assert not left.exists()


def test_sums_that_grow_are_put_back_where_they_were(tmp_path, monkeypatch):
    """Lists and dictionaries that begin empty, in accumulators too; numbers drawn go on."""

    class Sums:
        def __init__(self):
            self.rows, self.seen = [], 0

    def parts():
        generator = torch.Generator().manual_seed(3)
        return {"sums": Sums(), "found": [], "kept": {}, "generator": generator}

    monkeypatch.setattr(resume, "SECONDS", -1.0)
    before, after = parts(), parts()
    done = resume.Pass(tmp_path / "sums.pt", 8, CPU, **before)
    for name, number in (("a", 1), ("b", 2)):
        drawn = torch.rand(3, generator=before["generator"])
        before["sums"].rows.append(drawn)
        before["sums"].seen += number
        before["found"].append(drawn + 1)
        before["kept"][name] = drawn + 2
    done.batch_done()
    again = resume.Pass(tmp_path / "sums.pt", 8, CPU, **after)
    assert again.first == 1
    assert after["sums"].seen == 3
    for name, of in (("rows", lambda p: p["sums"].rows), ("found", lambda p: p["found"])):
        assert torch.equal(torch.stack(of(after)), torch.stack(of(before))), name
    assert after["kept"].keys() == {"a", "b"}
    assert all(torch.equal(after["kept"][name], before["kept"][name]) for name in "ab")
    drawn = [torch.rand(3, generator=of["generator"]) for of in (before, after)]
    assert torch.equal(*drawn)


def test_sums_of_other_batches_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS", -1.0)
    done = resume.Pass(tmp_path / "sums.pt", 8, CPU, total=torch.zeros(2))
    done.parts["total"] += 3
    done.batch_done()
    for size, device, first in ((8, CPU, 1), (4, CPU, 0), (8, torch.device("meta"), 0)):
        again = resume.Pass(tmp_path / "sums.pt", size, device, total=torch.zeros(2))
        assert again.first == first
        assert again.parts["total"].tolist() == [3 * first] * 2
    for parts in ({"total": torch.zeros(3)}, {"count": torch.zeros(2)}):
        with pytest.raises(store.StoreError, match=r"sums.pt: expected the sums .*delete it to"):
            resume.Pass(tmp_path / "sums.pt", 8, CPU, **parts)


# --- a disk that is full --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "message"), [(2_000, "File too large"), (100_000, "is the disk full?")]
)
def test_no_room_is_one_line_and_nothing_half_is_left(data, base, limit, message):
    """A limit on the size of files, of tokens or of weights, stands for a disk that is full."""
    path = spec_file(data, base | {"expansion_factor": 64})
    ran = subprocess.run(
        [sys.executable, "-m", "mlsae_core", "train", path, "--checkpoint-every", "0"],
        env=os.environ | {"MLSAE_DATA": str(data)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    last = ran.stderr.replace("\r", "\n").splitlines()[-1]
    assert ran.returncode == 1, ran.stderr
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in ran.stderr
    assert [f for f in store.STORE.rglob("*") if f.is_file()] == [
        f for f in store.STORE.glob("tokens/*/*") if limit > 2_000
    ]


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_place_that_is_taken_is_named_before_anything_is_computed(
    data, base, capsys, monkeypatch, force
):
    theirs = store.STORE / "train" / pipeline.run_key(run_from_dict(base))[0] / "notes.md"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    monkeypatch.setattr(train._Loop, "step", lambda *_: pytest.fail("trained for nothing"))
    code = core(["train", spec_file(data, base), *force])
    assert refused(capsys, code, "expected a folder with meta.json") == 2
    assert theirs.read_text() == "mine"
