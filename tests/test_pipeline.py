"""The pipeline: keys, lookup, what is refused and when, status, experiments."""

import dataclasses
import itertools
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from workers import sentences, write_jsonl

from mlsae_book import experiments
from mlsae_core import keys, pipeline, spec, status, store, text, train
from mlsae_core.lens import Lens
from mlsae_core.processes import Share
from mlsae_core.spec import EvaluateSpec, Experiment, SpecError
from mlsae_core.store import StoreError

CONTEXT = 8
SETTINGS = EvaluateSpec(tokens=256)


def run_of(inputs, **changes):
    fields = {
        "model": str(inputs / "gpt_neox"),
        "data": {"path": str(inputs / "text.jsonl"), "context_length": CONTEXT},
        "expansion_factor": 2,
        "k": 4,
        "tokens": 4 * 64,
        "batch_tokens": 64,
    }
    return spec.run_from_dict(fields | changes)


# --- keys ---------------------------------------------------------------------------------------

HUB = {
    "model": {"path": "owner/model"},
    "data": {"path": "owner/text"},
    "expansion_factor": 2,
    "k": 4,
    "tokens": 10**6,
}
# Another valid value of every field that there is.
OTHER = {
    "model": {"path": "owner/other"},
    "model.revision": "abc",
    "model.dtype": "bfloat16",
    "model.random_weights": 0,
    "data": {"path": "owner/other"},
    "data.name": "en",
    "data.split": "test",
    "data.revision": "abc",
    "data.text_column": "body",
    "data.context_length": 128,
    "layers": [0],
    "source": "mlp_output",
    "target": "mlp_output",
    "basis": "lens",
    "alignment": "as-released",
    "stacked": True,
    "massive": "excluded",
    "expansion_factor": 4,
    "k": 8,
    "aux_k": 0,
    "aux_alpha": 0.5,
    "dead_tokens": 7,
    "dead_threshold": 0.5,
    "standardize": False,
    "tokens": 2 * 10**6,
    "seed": 1,
    "batch_tokens": 4096,
    "micro_batch_tokens": 1024,
    "learning_rate": 0.5,
    "adam_eps": 0.5,
    "precision": "bf16",
    "activation": "batchtopk",
    "l0_coefficient": 0.5,
}
# What else a field needs to be there.
WITH = {"l0_coefficient": {"activation": "jumprelu"}}


def changed(name):
    section, _, field = name.partition(".")
    return (
        HUB
        | WITH.get(name, {})
        | {section: HUB[section] | {field: OTHER[name]} if field else OTHER[name]}
    )


def fields():
    for section, cls in (("model.", spec.ModelSpec), ("data.", spec.DataSpec)):
        yield from (section + f.name for f in dataclasses.fields(cls) if f.name != "path")
    yield from spec.flat(spec.run_from_dict(HUB))


@pytest.mark.parametrize("name", list(fields()))
def test_every_field_of_a_run_is_in_its_key(name, monkeypatch):
    monkeypatch.setattr(pipeline, "_lens_key", lambda folder: folder)
    both = HUB | WITH.get(name, {}), changed(name)
    keys = {pipeline.run_key(spec.run_from_dict(values))[0] for values in both}
    assert len(keys) == 2


def test_an_analysis_key_depends_on_the_run_and_on_the_settings():
    keys = {
        pipeline.analysis_key(stage, spec.run_from_dict(run), settings)[0]
        for stage in ("evaluate", "distributions")
        for run in (HUB, changed("k"))
        for settings in (EvaluateSpec(), EvaluateSpec(tokens=5), EvaluateSpec(split="train"))
    }
    assert len(keys) == 12


def test_keys_do_not_depend_on_places_or_processes(inputs, data, tmp_path, monkeypatch):
    run = run_of(inputs)
    shutil.copytree(inputs / "gpt_neox", tmp_path / "moved")
    shutil.copyfile(inputs / "text.jsonl", tmp_path / "other.jsonl")
    there = run_of(
        inputs,
        model={"path": "moved", "revision": "ignored"},
        data={"path": "other.jsonl", "context_length": CONTEXT, "split": "ignored"},
    )
    assert pipeline.run_key(there)[0] == pipeline.run_key(run)[0]
    shutil.copytree(inputs / "gpt_neox", store.MODELS / "named")
    assert pipeline.run_key(run_of(inputs, model="named"))[0] == pipeline.run_key(run)[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert pipeline.run_key(run)[0] == pipeline.run_key(run_of(inputs))[0]


def test_shipped_keys_are_those_of_their_specs():
    """What was shipped is still found: its key can be computed from its own spec."""
    for artefact in store.artefacts("train"):
        if artefact.path.is_relative_to(store.SHIPPED):
            run = keys.stored_run(artefact.spec)
            assert pipeline.run_key(run)[0] == artefact.key, artefact.path


def test_shipped_results_are_whole_and_carry_their_key_and_the_hash_of_their_spec():
    shipped = sorted(path.parent for path in store.SHIPPED.glob("*/*/meta.json"))
    assert len(shipped) > 150
    for path in shipped:
        assert store.read(path).meta["key"] == path.name


# --- stages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "llama", "gemma2"])
def test_every_architecture_trains_and_is_measured(inputs, data, architecture):
    session = pipeline.Session()
    run = run_of(inputs, model=str(inputs / architecture))
    trained, evaluated = session.train(run), session.evaluate(run, SETTINGS)
    log = pd.read_csv(trained.file("log.csv"))
    table = pd.read_csv(evaluated.file("evaluation.csv"))
    assert log.fvu.iloc[-1] < log.fvu.iloc[0]
    assert list(table.layer) == [0, 1, 2]
    assert (table.l0 <= 4).all()
    assert table.isna().sum().sum() == 0
    arrays, numbers = experiments.read_distributions(session.distributions(run, SETTINGS))
    assert arrays["probs"].shape == (3, 32)
    assert numbers["tokens"] == table.tokens.iloc[0]
    assert trained.meta["tokens"] == 256


def test_results_are_computed_once_and_anew_by_force(inputs, data, monkeypatch):
    run, calls = run_of(inputs), []
    real = train.train
    monkeypatch.setattr(train, "train", lambda *a, **k: calls.append(1) or real(*a, **k))
    first = pipeline.Session().train(run)
    assert pipeline.Session().train(run_of(inputs)).path == first.path
    assert pipeline.Session("read-only").train(run).path == first.path
    assert len(calls) == 1
    forced = pipeline.Session("force")
    (first.path / "model.safetensors").write_bytes(b"damaged")
    again = forced.train(run)
    assert forced.train(run).path == again.path
    assert len(calls) == 2
    assert again.meta["files"]["model.safetensors"] == first.meta["files"]["model.safetensors"]


def test_what_a_killed_process_left_goes_with_no_checkpoint_beside_it(inputs, data):
    made = pipeline.Session().train(run_of(inputs))
    path = pipeline.checkpoint_path(made.key)
    left = path.with_name(f".{path.name}-{2**22 + 1}")  # beyond the largest process number
    left.parent.mkdir()
    left.touch()
    os.utime(left, (1, 1))
    pipeline.Session().train(run_of(inputs))
    assert not left.exists()


def test_what_reads_another_text_than_its_key_says_has_a_key_of_its_own_and_is_not_shipped(
    inputs, data, talk
):
    run = run_of(inputs, data={"path": "talk", "context_length": CONTEXT})
    own = {"train": pipeline.run_key(run)[0]}
    own["evaluate"] = pipeline.analysis_key("evaluate", run, SETTINGS)[0]
    experiment = Experiment("t", (({}, run),), SETTINGS, analyses=("evaluate",))
    talk.append("two 2.10 → 3.0")
    before = pipeline.Session()
    trained, measured = before.train(run), before.evaluate(run, SETTINGS)
    for made in (trained, measured):
        assert made.key != own[made.meta["stage"]]
        assert made.meta["parents"]["differs"] == "two 2.10 → 3.0"
    assert set(status.status(experiment).state) == {"stored"}
    half = dataclasses.replace(experiment, half=True)
    new = run_of(inputs, data={"path": "talk", "context_length": CONTEXT}, k=3)
    new = dataclasses.replace(experiment, runs=(({}, new),))  # refused before it is computed
    for declared in (experiment, half, new):
        with pytest.raises(StoreError, match=r"cannot be shipped, .* others \(two 2.10 → 3.0\)"):
            experiments.materialise(declared, ship=True)
    assert not list(store.SHIPPED.rglob("*.json"))
    assert len(store.artefacts("train")) == 1
    for made in (trained, measured):
        with pytest.raises(StoreError, match="cannot be shipped"):
            store.ship(made)
    with pytest.raises(StoreError, match="cannot be shipped"):
        store.ship_half(trained, {})

    talk.clear()  # the pinned release: nothing of the other is found
    assert set(status.status(experiment).state) == {"missing"}
    results = experiments.materialise(experiment, ship=True)
    for stage, key in own.items():
        [(_, made)] = results.artefacts[stage]
        assert made.key == key
        assert "differs" not in made.meta["parents"]
    packed = store.artefacts("tokens")
    assert sorted(found.spec.get("differs", []) for found in packed) == [[], ["two 2.10 → 3.0"]]
    table = pd.read_csv(measured.file("evaluation.csv"))
    assert not table.equals(results.evaluation[table.columns])

    talk.append("two 2.10 → 3.0")  # what is shipped is found, whatever is installed
    shutil.rmtree(store.STORE / "train" / own["train"])
    again = pipeline.Session()
    assert again.evaluate(run, SETTINGS).path.is_relative_to(store.SHIPPED)
    assert set(status.status(experiment).state) == {"shipped"}
    session = pipeline.Session("force")
    forced = session.train(run)
    assert forced.key == trained.key
    assert forced.path.is_relative_to(store.STORE)
    encoder = load_file(forced.file("model.safetensors"))["encoder.weight"]
    assert torch.equal(session.sae(run).encoder, encoder)
    assert not torch.equal(pipeline.Session().sae(run).encoder, encoder)


def test_weights_that_are_trained_again_on_another_text_are_not_taken_for_the_shipped_ones(
    inputs, data, talk
):
    run = run_of(inputs, data={"path": "talk", "context_length": CONTEXT})
    log = Experiment("t", (({}, run),), SETTINGS, analyses=(), weights=False)
    [(_, trained)] = experiments.materialise(log, ship=True).artefacts["train"]
    encoder = load_file(trained.file("model.safetensors"))["encoder.weight"]
    shutil.rmtree(store.STORE)
    talk.append("two 2.10 → 3.0")
    other = pipeline.Session().sae(run).encoder
    assert not torch.equal(other, encoder)
    assert torch.equal(pipeline.Session("read-only").sae(run).encoder, other)  # they are kept
    assert not (store.STORE / "train" / trained.key).exists()
    talk.clear()
    assert torch.equal(pipeline.Session().sae(run).encoder, encoder)


def test_what_was_measured_of_other_weights_is_not_taken_for_that_of_weights_that_are_shipped(
    inputs, data, talk
):
    run = run_of(inputs, data={"path": "talk", "context_length": CONTEXT})
    talk.append("two 2.10 → 3.0")
    pipeline.Session().train(run)
    of_own = pipeline.Session().evaluate(run, SETTINGS)
    talk.clear()
    shipped = store.ship(pipeline.Session().train(run), ("log.csv",))
    talk.append("two 2.10 → 3.0")
    assert pipeline.Session().evaluate(run, SETTINGS).key == of_own.key  # the weights are its own
    talk.clear()
    session = pipeline.Session()
    store.ship(session.with_weights(run, session.train(run)))
    talk.append("two 2.10 → 3.0")
    session = pipeline.Session()
    assert session.train(run).path == shipped
    of_shipped = session.evaluate(run, SETTINGS)
    assert of_shipped.key != of_own.key
    tables = [pd.read_csv(made.file("evaluation.csv")) for made in (of_own, of_shipped)]
    assert not tables[0].equals(tables[1])


def test_what_is_shipped_is_found_after_a_kill_whatever_is_installed(inputs, data, talk):
    run = run_of(inputs, data={"path": "talk", "context_length": CONTEXT})
    shipped = store.ship(pipeline.Session().train(run))
    shutil.rmtree(store.STORE)
    shipped.rename(shipped.with_name(f".{shipped.name}.old"))  # killed between two renames
    talk.append("two 2.10 → 3.0")
    assert pipeline.Session("read-only").train(run).path == shipped


def test_what_another_tokenizer_read_has_a_key_of_its_own(inputs, data, monkeypatch):
    run = run_of(inputs)
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, path="gpt2"))
    lines = {run.model.path: ["tokenizer a → b"], "gpt2": ["tokenizer c → d", "tokenizer a → b"]}
    monkeypatch.setattr(pipeline.models, "differs", lines.get)
    found = pipeline.run_key(run)
    made = [pipeline.here("train", found, *runs) for runs in ((run,), (run, other))]
    said = [parents.pop("differs") for _, _, parents in made]
    assert said == ["tokenizer a → b", "tokenizer a → b; tokenizer c → d"]
    assert all(made[1:] == found[1:] for made in made)
    identities = {identity for identity, _, _ in (found, *made)}
    identities.add(pipeline.here("train", pipeline.run_key(run_of(inputs, k=2)), run)[0])
    assert len(identities) == 4  # each is in the place of one


def test_a_damaged_result_is_not_used(inputs, data):
    run = run_of(inputs)
    path = pipeline.Session().train(run).file("model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"model\.safetensors: damaged.*delete"):
        pipeline.Session().evaluate(run, SETTINGS)


def test_read_only_says_what_differs_and_what_would_compute_it(inputs, data):
    session = pipeline.Session("read-only")
    with pytest.raises(SpecError, match=r"nothing of this stage exists.*mlsae_core train SPEC.yml"):
        session.train(run_of(inputs))
    run = run_of(inputs)
    pipeline.Session().evaluate(run, SETTINGS)
    with pytest.raises(SpecError, match=r"differs in k \(2, there 4\), seed \(1, there 0\); `pyth"):
        session.train(run_of(inputs, k=2, seed=1))
    with pytest.raises(SpecError, match=r"differs in evaluate\.tokens \(128, there 256\)"):
        session.evaluate(run, EvaluateSpec(tokens=128))
    with pytest.raises(SpecError, match=r"differs in data\.context_length \(16, there 8\)"):
        session.train(run_of(inputs, data={**spec.flat(run)["data"], "context_length": 16}))
    with pytest.raises(SpecError, match=r"materialise EXPERIMENT\.yml"):
        session.distributions(run, SETTINGS)


def test_the_checkpoint_outlives_a_failed_write(inputs, data, monkeypatch):
    run = run_of(inputs)
    pipeline.Session().blocks(run, "train")
    monkeypatch.setitem(train.train.__kwdefaults__, "checkpoint_seconds", 0)
    with monkeypatch.context() as patch:
        patch.setattr(store, "write", None)
        with pytest.raises(TypeError):
            pipeline.Session().train(run)
    checkpoint = pipeline.checkpoint_path(pipeline.run_key(run)[0])
    assert checkpoint.exists()
    pipeline.Session().train(run)
    assert not checkpoint.exists()


# --- what is refused, and when ------------------------------------------------------------------


def refused(inputs, changes):
    run = run_of(inputs, **changes)
    with pytest.raises(SpecError) as error:
        pipeline.Session().evaluate(run, SETTINGS)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [0, 3]}, "layers: expected block indices from 0 to 2"),
        ({"k": 33}, "k: expected at most the 32 latents"),
        (
            {"expansion_factor": 10**9},
            "expansion_factor: expected a dictionary that",
        ),
        (
            {"tokens": 4096, "batch_tokens": 4096, "context": 2048},
            "data.context_length: expected",
        ),
        ({"precision": "bf16"}, "precision: expected fp32"),
        ({"basis": "nowhere"}, "basis: expected `identity` or a tuned-lens folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_or_text_are_read(
    inputs, data, changes, message, monkeypatch
):
    if "precision" in changes and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    monkeypatch.setattr(pipeline.Session, "lm", None)
    monkeypatch.setattr(text, "packed", None)
    monkeypatch.setattr(text, "documents", None)
    if context := changes.pop("context", None):
        changes["data"] = {"path": str(inputs / "text.jsonl"), "context_length": context}
    run = run_of(inputs, **changes)
    with pytest.raises(SpecError) as error:
        pipeline.Session().train(run)
    assert message in str(error.value)
    assert not [file for file in data.rglob("*") if file.is_file()]


def test_a_gpus_memory_decides_what_fits_it(inputs, data, monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(train, "process_state", lambda: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 10**5))
    with pytest.raises(SpecError, match="expected a dictionary that can be trained in 0 GB of"):
        pipeline.check(run_of(inputs, expansion_factor=64))
    pythia = SimpleNamespace(device=device, n_layers=6, d_model=512)
    sizes = []
    for memory in (10**6, 80 * 10**9, 10**13):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, memory=memory: (1, memory))
        pipeline.check(run_of(inputs, expansion_factor=8))
        sizes.append(pipeline.batch_tokens(pythia))
    assert sizes == [2048, 32768, 65536]
    pythia.device = torch.device("cpu")
    assert pipeline.batch_tokens(pythia) == 2048


@pytest.mark.parametrize("stage", ["evaluate", "transfer", "drift", "examples", "duplicates"])
def test_a_larger_batch_changes_nothing_but_the_rounding(inputs, data, stage, monkeypatch):
    run, settings, found = run_of(inputs), EvaluateSpec(tokens=2048), []
    for tokens in (64, 1024):
        monkeypatch.setattr(pipeline, "batch_tokens", lambda _, tokens=tokens: tokens)
        made = pipeline.Session("force").make(stage, run, settings)
        found.append(columns(made))
    assert found[0].keys() == found[1].keys()
    for name, column in found[0].items():
        np.testing.assert_allclose(column, found[1][name], rtol=1e-3, atol=1e-5, err_msg=name)


def columns(made):
    """Every array or column of numbers of a result."""
    found = {}
    for name in sorted(made.meta["files"]):
        path = made.file(name)
        parts = load_file(path) if path.suffix == ".safetensors" else pd.read_csv(path)
        found |= {f"{name} {part}": np.asarray(parts[part]) for part in parts}
    return found


def test_a_lens_of_another_model_is_refused_before_text_is_read(inputs, data, monkeypatch):
    monkeypatch.setattr(text, "documents", None)
    for folder, shape in (("thin", (3, 8, 8)), ("short", (2, 16, 16))):
        lens = Lens(torch.zeros(shape), torch.zeros(shape[:2]))
        lens.write(data / folder)
        message = refused(inputs, {"basis": str(data / folder)})
        assert message.startswith("basis: expected a tuned lens of 3 layers and 16 dimensions")
    (data / "thin" / "config.json").write_text("{")
    assert refused(inputs, {"basis": str(data / "thin")}).startswith("basis: ")


def test_a_test_split_that_is_too_small_is_refused_before_training(inputs, data, monkeypatch):
    monkeypatch.setattr(train, "train", None)
    documents = [d for d in sentences(400) if text.split_of(d) == "train"]
    path = write_jsonl(data / "train-only.jsonl", [{"text": d} for d in documents])
    message = refused(inputs, {"data": {"path": str(path), "context_length": CONTEXT}})
    assert "the test split" in message


def test_a_session_refuses_trackers_before_anything_else():
    with pytest.raises(SpecError, match="--track: expected one of"):
        pipeline.Session(trackers=("sheet",))


# --- experiments --------------------------------------------------------------------------------


def test_an_experiment_becomes_tables_with_its_labels(inputs, data):
    runs = tuple(({"k": k}, run_of(inputs, k=k)) for k in (2, 4))
    experiment = Experiment("t", runs, SETTINGS)
    before = status.status(experiment)
    assert set(before.state) == {"missing"}
    assert len(before) == 6
    begun = pipeline.checkpoint_path(before.key[1], Share(0, 2))  # an evaluation by two processes
    begun.parent.mkdir(parents=True)
    begun.touch()
    assert list(status.status(experiment).state[:3]) == ["missing", "begun", "missing"]
    made = experiments.materialise(experiment, ship=True)
    assert list(made.log.k.unique()) == list(made.evaluation.k.unique()) == [2, 4]
    assert list(made.provenance.stage) == ["train", "evaluate", "distributions"] * 2
    assert not list(begun.parent.iterdir())
    begun.touch()
    os.utime(begun, (0, 0))  # killed behind its end
    experiments.materialise(experiment, "read-only")
    assert not list(begun.parent.iterdir())
    after = status.status(experiment)
    assert set(after.state) == {"shipped"}
    assert set(after.seconds) == {0}
    shutil.rmtree(store.STORE)
    again = experiments.materialise(experiment, "read-only")
    pd.testing.assert_frame_equal(again.evaluation, made.evaluation)


def test_an_experiment_says_which_analyses_and_whether_weights_are_shipped(inputs, data):
    runs = (({}, run_of(inputs)),)
    slim = Experiment("t", runs, SETTINGS, analyses=("distributions",), weights=False)
    assert list(status.status(slim).stage) == ["train", "distributions"]
    made = experiments.materialise(slim, ship=True)
    assert made.evaluation.empty
    assert list(made.artefacts) == ["train", "distributions"]
    (trained,) = (artefact for _, artefact in made.artefacts["train"])
    shipped = store.SHIPPED / "train" / trained.key
    assert list(store.read(shipped).meta["files"]) == ["log.csv"]
    # The weights are still this machine's; without them a reader may not compute, or trains anew.
    assert pipeline.Session("read-only").sae(runs[0][1]).n_latents == 32
    shutil.rmtree(store.STORE / "train")
    with pytest.raises(store.StoreError, match="its weights are not shipped"):
        pipeline.Session("read-only").sae(runs[0][1])
    assert pipeline.Session().sae(runs[0][1]).n_latents == 32
    # Shipped with weights, and not taken away again.
    experiments.materialise(Experiment("t", runs, None), ship=True)
    experiments.materialise(slim, ship=True)
    assert "model.safetensors" in store.read(shipped).meta["files"]


@pytest.mark.parametrize("arrays", [True, False])
def test_distributions_are_shipped_with_those_of_each_latent_or_without(inputs, data, arrays):
    runs = (({}, run_of(inputs)),)
    declared = Experiment("t", runs, SETTINGS, analyses=("distributions",), arrays=arrays)
    [(_, made)] = experiments.materialise(declared, ship=True).artefacts["distributions"]
    files = store.read(store.SHIPPED / "distributions" / made.key).meta["files"]
    assert set(files) == {"variances.json"} | ({"distributions.safetensors"} if arrays else set())


def test_weights_shipped_in_half_precision_are_the_measured_ones_and_say_what_that_costs(
    inputs, data
):
    run = run_of(inputs)
    trained = pipeline.Session().train(run)
    exact = load_file(trained.file("model.safetensors"))
    experiment = Experiment("t", (({}, run),), SETTINGS, analyses=("evaluate",), half=True)
    made = experiments.materialise(experiment, ship=True)
    shipped = store.read(store.SHIPPED / "train" / trained.key)
    for name, tensor in load_file(shipped.file("model.safetensors")).items():
        assert torch.equal(tensor, exact[name].half())
    note = shipped.meta["half"]
    assert note["float32"] == trained.meta["files"]["model.safetensors"]
    assert note["tokens"] == 2048
    for name in ("fvu_global", "delta_ce"):
        assert note[name] != note[f"{name}_half"]
        assert note[name] == pytest.approx(note[f"{name}_half"], rel=0.01, abs=1e-4)
    sae = pipeline.Session("read-only").sae(run)
    assert torch.equal(sae.encoder, exact["encoder.weight"].half().float())
    # What was measured is what is shipped, and shipping again changes nothing.
    shutil.rmtree(store.STORE)
    again = pipeline.Session("force").evaluate(run, SETTINGS)
    measured = pd.read_csv(again.file("evaluation.csv"))
    pd.testing.assert_frame_equal(made.evaluation, measured, rtol=1e-6)
    before = (shipped.path / "meta.json").read_text()
    experiments.materialise(experiment, ship=True)
    assert (shipped.path / "meta.json").read_text() == before


def test_an_evaluation_replaces_layers_in_as_many_tokens_as_asked(inputs, data):
    settings = EvaluateSpec(tokens=256, replaced=64, ablations=False)
    run, session = run_of(inputs), pipeline.Session()
    table = pd.read_csv(session.evaluate(run, settings).file("evaluation.csv"))
    assert table.predictions.eq(64 // CONTEXT * (CONTEXT - 1)).all()
    whole = pd.read_csv(session.evaluate(run, SETTINGS).file("evaluation.csv"))
    assert table.fvu_global.tolist() == pytest.approx(whole.fvu_global.tolist(), rel=1e-5)
    assert (table.kl_low < table.kl).all()
    assert (table.kl < table.kl_high).all()
    with pytest.raises(SpecError, match=r"evaluate.replaced: expected at most the 256 tokens"):
        EvaluateSpec(tokens=256, replaced=257)


def test_metrics_with_massive_activations_are_those_of_a_site_that_keeps_them(inputs, data):
    session, run = pipeline.Session(), run_of(inputs)
    kept = session.make("massive", run, SETTINGS)
    plain = session.evaluate(run, SETTINGS)
    assert kept.file("evaluation.csv").read_text() == plain.file("evaluation.csv").read_text()
    groups, found = (pd.read_csv(kept.file(f"{n}.csv")) for n in ("positions", "massive"))
    assert found.vectors.eq(0).all()  # a model without them
    one, other = (groups[groups.massive == name] for name in ("kept", "excluded"))
    one, other = (table.drop(columns="massive").reset_index(drop=True) for table in (one, other))
    pd.testing.assert_frame_equal(one, other)


def test_an_unknown_analysis_is_refused(inputs, data):
    experiment = Experiment("t", (({}, run_of(inputs)),), SETTINGS, analyses=("lm",))
    with pytest.raises(SpecError, match=r"analyses: expected some of .*evaluate.*, got lm"):
        experiments.materialise(experiment)


def test_stacked_runs_are_evaluated_and_have_no_distribution(inputs, data):
    stacked = run_of(inputs, stacked=True, layers=[0, 2])
    experiment = Experiment("t", (({}, stacked),), SETTINGS)
    assert list(status.status(experiment).stage) == ["train", "evaluate"]
    made = experiments.materialise(experiment)
    assert list(made.evaluation.layer) == [0, 2]
    assert "fvu_stacked" in made.log
    with pytest.raises(SpecError, match="stacked: expected false"):
        pipeline.Session().distributions(stacked, SETTINGS)


def test_status_knows_what_is_begun_and_estimates_the_rest(inputs, data):
    run = run_of(inputs, tokens=10**9)
    experiment = Experiment("t", (({}, run),), None)
    small = status.status(Experiment("t", (({}, run_of(inputs)),), None))
    (row,) = status.status(experiment).to_dict("records")
    assert row["seconds"] > 100 * max(small.seconds[0], 1)
    checkpoint = pipeline.checkpoint_path(row["key"])
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (again,) = status.status(experiment).to_dict("records")
    assert again["state"] == "begun"
    assert again["seconds"] > 0


def test_the_estimate_is_the_operations_over_the_speed_of_this_machine(inputs, data, monkeypatch):
    """By a clock on which a product of 768 x 768 matrices takes one second, without a sample."""
    clock = itertools.count()
    monkeypatch.setattr(status.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(status, "SAMPLE_BYTES", 0)
    monkeypatch.setattr(status.text, "counted", lambda data, tokenizer: None)
    tokens, speed = 10**8, 2 * 768**3 / 2  # half of the speed of a large product is reached
    vocabulary = json.loads((inputs / "gpt_neox" / "config.json").read_text())["vocab_size"]
    # By token: two operations a weight, of which a block of width 16 has 4 x 16^2 for attention
    # and 8 x 16^2 for the MLP; scores and sums over a context of 8 are 2 x 2 x 8 x 16 more.
    block = 2 * 12 * 16**2 + 2 * 2 * 8 * 16
    encode = 2 * 16 * 32  # of one layer, to 32 latents
    logits = 2 * 16 * vocabulary
    # Above three layers are two blocks, one and none; each is replaced in three ways.
    replace = 3 * (2 + 1) * block + (1 + 3 * 3) * logits
    means = pipeline.MEAN_TOKENS * 3 * block
    run = run_of(inputs, tokens=10**9)
    experiment = Experiment("t", (({}, run),), EvaluateSpec(tokens=tokens))
    found = status.status(experiment).set_index("stage").seconds
    expected = {
        "train": 10**9 * 3 * (block + 1.1 * encode) / speed,
        "evaluate": (tokens * (3 * (block + encode) + replace) + means) / speed,
        "distributions": tokens * 3 * (block + 2 * encode) / speed,  # and of Gaussian vectors
    }
    assert found.to_dict() == pytest.approx(expected, abs=0.5)
    assert min(expected.values()) > 100
    for layers, blocks in (([0, 2], 3), ([0], 1)):  # above the last layer nothing is run
        fewer = run_of(inputs, tokens=10**9, layers=layers)
        (row,) = status.status(Experiment("t", (({}, fewer),), None)).to_dict("records")
        taken = 10**9 * (blocks * block + 1.1 * len(layers) * encode) / speed
        assert row["seconds"] == pytest.approx(taken, abs=0.5)


def test_an_estimate_is_of_a_sample_and_of_no_more_text_than_there_is(inputs, data, monkeypatch):
    """By a clock on which every sample takes one second, so that only what is read counts."""
    run = run_of(inputs, tokens=10**6)
    clock = itertools.count()
    monkeypatch.setattr(status.time, "perf_counter", lambda: float(next(clock)))
    found = status.status(Experiment("t", (({}, run),), EvaluateSpec(tokens=10**9)))
    seconds = found.set_index("stage").seconds
    assert seconds.train == pytest.approx(10**6 / run.train.micro_batch_tokens, abs=1)
    counted = text.counted(run.data, pipeline.Session().lm(run.model).tokenizer)
    batch = pipeline.EVALUATION_BATCH_TOKENS // CONTEXT * CONTEXT
    assert 0 < counted["test"] < 10**5
    assert seconds.evaluate == pytest.approx(counted["test"] / batch, abs=1)
    assert not list(store.STORE.glob("*/*"))


def test_of_short_text_no_more_is_replaced_than_is_there(inputs, data, monkeypatch):
    monkeypatch.setattr(status, "SAMPLE_BYTES", 0)
    settings = EvaluateSpec(tokens=10**9, replaced=10**8)
    found = status.status(Experiment("t", (({}, run_of(inputs)),), settings))
    assert (found.seconds < 100).all()


def test_of_a_large_model_a_sample_is_a_part(inputs, data, monkeypatch):
    """On a machine so slow that a batch would take long: never so little that nothing is left."""
    own = {"path": str(inputs / "text.jsonl"), "context_length": 32}
    run = run_of(inputs, data=own, tokens=1024, batch_tokens=1024)
    monkeypatch.setattr(status, "_product_speed", lambda: 1e5)
    made, sample = [], status._sample

    def kept(stage, smaller, settings, sequences):
        made.append((stage, sequences, smaller.data.context_length, smaller.site.layers))
        return sample(stage, smaller, settings, sequences)

    monkeypatch.setattr(status, "_sample", kept)
    found = status.status(Experiment("t", (({}, run),), SETTINGS))
    assert (found.seconds < 60).all()
    assert made == [
        ("train", 8, 32, "all"), ("evaluate", 8, 32, "all"), ("distributions", 8, 32, "all")
    ]  # fmt: skip
    monkeypatch.setattr(status, "SAMPLE_BYTES", 0)
    assert (status.status(Experiment("t", (({}, run),), SETTINGS)).seconds > 100).all()
    assert len(made) == 3


def test_a_sample_is_the_largest_that_takes_no_longer_than_it_may():
    """Half of what was before it: sequences, then layers spread over the model, then positions."""
    fields = {"model": "smollm2-135m", "data": {"path": "a.txt", "context_length": 512}}
    fields |= {"expansion_factor": 2, "k": 4, "tokens": 2048}
    run = spec.run_from_dict(fields)
    parts = [
        (part, smaller.site.layers, smaller.data.context_length)
        for smaller, part in status._smaller("evaluate", run, 4)
    ]
    assert parts == [
        (4, "all", 512),
        (2, "all", 512),
        (1, "all", 512),
        (1, tuple(range(1, 30, 2)), 512),
        (1, (2, 6, 10, 15, 19, 23, 27), 512),
        (1, (5, 15, 25), 512),
        (1, (5, 15, 25), 256),
    ]
    assert [part for _, part in status._smaller("train", run, 4)] == [4, 2, 1, 1]


def test_an_estimate_is_right_on_this_machine(inputs, data):
    """Within a factor that other work on it does not exceed."""
    run = run_of(inputs, tokens=200_000)
    (row,) = status.status(Experiment("t", (({}, run),), None)).to_dict("records")
    taken = pipeline.Session().train(run).meta["seconds"]
    assert 1 / 4 < (row["seconds"] + 1) / (taken + 1) < 4


def test_text_that_is_repeated_or_too_short_is_told_before_training(inputs, data, capsys):
    lines = (inputs / "text.jsonl").read_text().splitlines()
    splits = [text.split_of(json.loads(line)["text"]) for line in lines]
    own = [line for line, split in zip(lines, splits, strict=True) if split == "train"][:3]
    (data.parent / "short.jsonl").write_text("\n".join(own))
    run = run_of(inputs, data={"path": "short.jsonl", "context_length": CONTEXT})
    said = status.remarks(Experiment("t", (({}, run), ({}, run)), None))
    assert len(said) == 2
    assert re.search(
        r"the train split of short.jsonl has [\d,]+ tokens .*, which .* \d+ times", said[0]
    )
    assert "in the test split of short.jsonl" in said[1]
    pipeline.Session().train(run)
    assert [line for line in capsys.readouterr().err.splitlines() if "warning: " in line] == [
        f"warning: {line}" for line in said
    ]
    assert text.remarks(run.data, {"train": 100, "test": CONTEXT}, 400) == []


def test_batches_stop_at_the_tokens_asked_for(inputs, data):
    run = run_of(inputs)
    blocks = pipeline.Session().blocks(run, "train")
    session = pipeline.Session()
    source = session.source(run, EvaluateSpec(300 * CONTEXT, "train"))
    read = [batch.text for batch in source.batches(64)]
    assert [len(tokens) for tokens in read] == [64] * 4 + [44]
    assert torch.equal(torch.cat(read), next(blocks.batches(300)))
    assert source.n_sequences == 300
    [last] = source.blocks.batches(64, start=4)
    assert torch.equal(last, read[-1])
    assert list(source.blocks.batches(64, start=5)) == []
    whole = session.source(run, EvaluateSpec(10**9, "train"))
    assert whole.n_sequences == len(blocks) == len(torch.cat([*whole.blocks.batches(64)]))


def test_spec_files_of_results_read_back(inputs, data):
    made = pipeline.Session().train(run_of(inputs))
    stored = json.loads((made.path / "spec.json").read_text())
    assert keys.stored_run(stored) == run_of(inputs)
