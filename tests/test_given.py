"""Dictionaries that are there: a folder or a hub id stands where a training would."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_pipeline import CONTEXT, SETTINGS, run_of

from mlsae_book import experiments, stages
from mlsae_core import keys, pipeline, spec, status, store, text, train
from mlsae_core.__main__ import main
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SpecError


def given_of(inputs, path, **changes):
    fields = {
        "model": str(inputs / "gpt_neox"),
        "data": {"path": str(inputs / "text.jsonl"), "context_length": CONTEXT},
        "dictionary": str(path),
    }
    return spec.run_from_dict(fields | changes)


@pytest.fixture
def folder(data):
    """A published dictionary of a model of width 16."""
    generator = torch.Generator().manual_seed(1)
    MLSAE(16, 32, 4, generator=generator).save_pretrained(data / "given")
    return data / "given"


def test_every_stage_measures_given_weights_as_those_of_a_run(inputs, data, monkeypatch):
    monkeypatch.setattr(stages, "PROMPTS", ("lasid mitent",))
    run, session = run_of(inputs), pipeline.Session()
    given = given_of(inputs, session.train(run).path)
    measured = [name for name in pipeline.STAGES if name != "train"]
    assert {"evaluate", "distributions", "transfer", "geometry", "examples"} <= set(measured)
    for stage in measured:
        if stage in stages.CALLED:
            with pytest.raises(SpecError, match=rf"{stage}: expected .* call .*stages\.{stage}"):
                session.make(stage, run, SETTINGS)
            continue
        of_run = session.make(stage, run, SETTINGS)
        of_weights = session.make(stage, given, SETTINGS)
        of_model = stage in ("drift", "predictions")  # alone
        assert (of_weights.key == of_run.key) == of_model, stage
        assert of_weights.meta["files"] == of_run.meta["files"], stage  # hashes


def key_of(run, stage="evaluate"):
    return pipeline.analysis_key(stage, run, SETTINGS)[0]


def test_the_key_is_of_the_content_wherever_it_lies(inputs, folder, tmp_path, monkeypatch):
    first = key_of(given_of(inputs, folder))
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "moved" / "model.safetensors").rename(tmp_path / "moved" / "other.safetensors")
    (tmp_path / "moved" / "README.md").write_text("a card")
    assert key_of(given_of(inputs, "moved")) == first
    asked = []

    def snapshot_download(name, revision, **patterns):
        asked.append((name, revision))
        return str(tmp_path / "moved")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    hub = given_of(inputs, folder, dictionary={"path": "owner/mlsae", "revision": "v1"})
    assert key_of(hub) == first
    assert asked == [("owner/mlsae", "v1")]


def test_the_key_of_a_single_dictionary_is_as_it_was_before_there_were_sets(folder):
    digests = sorted([path.suffix, store.file_hash(path)] for path in folder.iterdir())
    expected = hashlib.sha256(json.dumps(digests, separators=(",", ":")).encode()).hexdigest()
    assert store.dictionary_key(folder) == expected[:16]


def other_weights(folder):
    sae = MLSAE.from_pretrained(folder)
    sae.decoder.data[0, 0] += 1
    sae.save_pretrained(folder)


def other_k(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"k": 3}))


@pytest.mark.parametrize("change", [other_weights, other_k])
@pytest.mark.parametrize("stage", ["evaluate", "transfer"])
def test_another_content_is_another_key(inputs, folder, change, stage):
    first = key_of(given_of(inputs, folder), stage)
    change(folder)
    assert key_of(given_of(inputs, folder), stage) != first


def test_a_session_sees_that_weights_were_replaced(inputs, folder):
    """Else the numbers of the former ones would lie under the key of the new ones."""
    run, session = given_of(inputs, folder), pipeline.Session()
    session.evaluate(run, SETTINGS)
    other_weights(folder)
    fresh = pipeline.Session("force").evaluate(run, SETTINGS).meta["files"]
    shutil.rmtree(store.STORE / "evaluate")
    assert session.evaluate(run, SETTINGS).meta["files"] == fresh


def test_a_session_sees_that_a_model_was_replaced(inputs, tmp_path):
    shutil.copytree(inputs / "gpt_neox", tmp_path / "model")
    model, session = spec.ModelSpec(str(tmp_path / "model")), pipeline.Session()
    first = session.lm(model)
    assert session.lm(model) is first
    path = tmp_path / "model" / "model.safetensors"
    changed = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})
    assert session.lm(model) is not first


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [0]},
        {"target": "mlp_output"},
        {"model": {"path": "gpt_neox", "dtype": "bfloat16"}},
        {"model": {"path": "gpt_neox", "random_weights": 1}},
        {"model": "gpt2"},
        {"data": {"path": "text.jsonl", "context_length": 4}},
        {"data": {"path": "other.txt", "context_length": CONTEXT}},
    ],
)
def test_what_weights_are_measured_on_is_in_the_key(inputs, folder, changes, monkeypatch, tmp_path):
    first = key_of(given_of(inputs, folder))
    (tmp_path / "other.txt").write_text("other text")
    for name in ("gpt_neox", "gpt2"):
        shutil.copytree(inputs / name, tmp_path / name)
    shutil.copyfile(inputs / "text.jsonl", tmp_path / "text.jsonl")
    assert key_of(given_of(inputs, folder, **changes)) != first


def test_a_spec_of_a_result_reads_back_and_the_nearest_is_named(inputs, folder):
    given = given_of(inputs, folder)
    made = pipeline.Session().evaluate(given, SETTINGS)
    written = json.loads((made.path / "spec.json").read_text())
    assert keys.stored_run(written["run"]) == given
    parents = json.loads((made.path / "meta.json").read_text())["parents"]
    assert parents["dictionary"] == store.dictionary_key(folder)
    with pytest.raises(SpecError, match=r"differs in layers \(\[0\], there all\)"):
        pipeline.Session("read-only").evaluate(given_of(inputs, folder, layers=[0]), SETTINGS)


# --- what is refused ------------------------------------------------------------------------------


def test_given_weights_are_not_trained(inputs, folder, monkeypatch):
    monkeypatch.setattr(train, "train", None)
    with pytest.raises(SpecError, match=r"dictionary: expected `expansion_factor`, .* `evaluate`"):
        pipeline.Session().train(given_of(inputs, folder))
    with pytest.raises(SpecError, match="k: expected nothing that says how to train beside `dict"):
        given_of(inputs, folder, k=4)
    with pytest.raises(SpecError, match="dictionry: unknown field; did you mean `dictionary`"):
        given_of(inputs, folder, dictionry="x")


@pytest.mark.parametrize(
    ("width", "changes", "message"),
    [
        (8, {}, r"of width 16, as .*gpt_neox has them, got 8"),
        (16, {"stacked": True, "layers": [0, 2]}, r"of width 32, .* them stacked, got 16"),
        (16, {"layers": [3]}, "layers: expected block indices from 0 to 2"),
        (16, {"dictionary": "nowhere"}, r"expected a folder or a hub id .* got nowhere; rel"),
    ],
)
def test_what_does_not_fit_is_refused_before_text_is_read(
    inputs, data, monkeypatch, width, changes, message
):
    monkeypatch.setattr(text, "packed", None)
    MLSAE(width, 32, 4).save_pretrained(data / "given")
    with pytest.raises(SpecError, match=message):
        pipeline.Session().evaluate(given_of(inputs, data / "given", **changes), SETTINGS)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "expected .*; config.json and .* in .*given or .*, got model.safetensors"),
        ("model.safetensors", "expected .*; config.json and .* in .*given or .*, got config.json"),
    ],
)
def test_folders_that_hold_no_dictionary_are_named(inputs, folder, file, message):
    (folder / file).unlink()
    with pytest.raises(SpecError, match=message):
        pipeline.Session().evaluate(given_of(inputs, folder), SETTINGS)


def test_damaged_weights_are_one_line(inputs, folder):
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SpecError, match=r"dictionary.path: .*given could not be loaded: expected"):
        pipeline.Session().evaluate(given_of(inputs, folder), SETTINGS)


def test_a_hub_that_gives_nothing_is_one_line(inputs, folder, monkeypatch):
    def snapshot_download(name, revision, **patterns):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(SpecError, match=r"owner/mlsae is no folder .* be had: no route to host"):
        key_of(given_of(inputs, "owner/mlsae"))


# --- the command line and experiments -------------------------------------------------------------


def written(folder, fields):
    path = folder / "spec.yml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def test_the_command_line_evaluates_given_weights(inputs, folder, data, capsys):
    values = {
        "model": str(inputs / "gpt_neox"),
        "data": {"path": str(inputs / "text.jsonl"), "context_length": CONTEXT},
        "dictionary": {"path": str(folder)},
    }
    path = written(data, values)
    assert main(["train", path]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: dictionary: expected")
    assert err.count("\n") == 1
    assert main(["status", path]) == 0
    assert "train" not in capsys.readouterr().out
    assert main(["evaluate", path, "--tokens", "128"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "fvu_global" in table[0]
    assert len(table) == 5  # a head, three layers, and where it lies


def test_an_experiment_of_given_weights_has_tables_and_no_log(inputs, folder, data):
    base = {
        "model": str(inputs / "gpt_neox"),
        "data": {"path": str(inputs / "text.jsonl"), "context_length": CONTEXT},
        "dictionary": str(folder),
    }
    fields = {"run": base, "sweep": {"layers": [[0], [1, 2]]}, "evaluate": {"tokens": 128}}
    experiment = spec.load_experiment(written(data, fields))
    before = status.status(experiment)
    assert set(before.stage) == {"evaluate", "distributions"}
    made = experiments.materialise(experiment, ship=True)
    assert made.log.empty
    assert list(made.evaluation.layer) == [0, 1, 2]
    assert "train" not in made.artefacts
    assert set(status.status(experiment).state) == {"shipped"}


def test_a_repository_with_the_transformer_beside_is_measured(inputs, folder):
    """As the paper's authors published theirs."""
    plain = pipeline.Session().evaluate(given_of(inputs, folder), SETTINGS)
    tensors = load_file(folder / "model.safetensors")
    prefixed = {f"autoencoder.{name}": tensor for name, tensor in tensors.items()}
    save_file(prefixed | {"transformer.w": torch.zeros(3)}, folder / "model.safetensors")
    beside = pipeline.Session().evaluate(given_of(inputs, folder), SETTINGS)
    assert beside.key != plain.key
    assert beside.meta["files"] == plain.meta["files"]
