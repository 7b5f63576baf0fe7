"""What is put on the hub, against a hub that only takes notes."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file
from test_given import given_of, written
from test_pipeline import run_of

from mlsae_core import pipeline, publish, store
from mlsae_core.__main__ import main
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SpecError


class Hub:
    """`HfApi` with the two calls that are made, and what was in the folder at that time."""

    taken = ()

    def create_repo(self, repo, **settings):
        self.taken.append((repo, settings))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        sae = MLSAE.from_pretrained(folder_path)
        card = Path(folder_path, "README.md").read_text(encoding="utf-8")
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.taken.append((repo_id, commit_message, names, sae, card))
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "taken", [])
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub.taken


def spec_file(inputs, data):
    fields = {
        "model": str(inputs / "gpt_neox"),
        "data": {"path": str(inputs / "text.jsonl"), "context_length": 8},
        "expansion_factor": 2,
        "k": 4,
        "tokens": 256,
        "batch_tokens": 64,
        "layers": [0, 2],
    }
    return written(data, fields)


def test_a_run_is_pushed_with_a_card_that_says_what_it_is(inputs, data, hub, capsys):
    arguments = ["push", spec_file(inputs, data), "someone/mlsae-tiny", "--licence", "mit"]
    assert main([*arguments, "--private"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://huggingface.co/someone/mlsae-tiny"
    run = run_of(inputs, layers=[0, 2])
    trained = pipeline.Session("read-only").train(run)
    (repo, settings), (to, message, names, sae, card) = hub
    assert repo == to == "someone/mlsae-tiny"
    assert settings == {"private": True, "exist_ok": True}
    assert message == f"Dictionary {trained.key}"
    assert names == ["README.md", "config.json", "model.safetensors"]
    ours = load_file(trained.path / "model.safetensors")
    assert sae.encoder.equal(ours["encoder.weight"])
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front) == {"license": "mit", "tags": ["sparse-autoencoder", "mlsae"]}
    table = pipeline.Session("read-only").evaluate(run, publish.EvaluateSpec())
    measured = table.file("evaluation.csv").read_text().splitlines()
    for row in (
        "| language model | gpt_neox |",
        "| layers | 0, 2 |",
        "| reads | residual |",
        "| text | text.jsonl |",
        "| tokens | 256 |",
        "| R | 2 |",
        "| latents | 32 |",
        "| k | 4 |",
        "| activation | topk |",
    ):
        assert row in text, row
    for line in measured[1:]:
        layer, fvu = (
            line.split(",")[0],
            float(line.split(",")[measured[0].split(",").index("fvu_global")]),
        )
        assert f"| {layer} | {fvu:.4g} |" in text
    assert 'MLSAE.from_pretrained("someone/mlsae-tiny")' in text
    assert str(inputs) not in card


def test_a_model_of_the_hub_is_what_the_card_is_based_on(inputs, data, monkeypatch):
    run = run_of(
        inputs,
        model="EleutherAI/pythia-70m-deduped",
        data={"path": "owner/text", "context_length": 8},
    )
    config = pipeline.model_config(run_of(inputs).model)
    monkeypatch.setattr(publish, "model_config", lambda model: config)
    columns = ["layer", "fvu_global", "fvu_per_dimension", "l0", "delta_ce", "kl", "tokens"]
    table = pd.DataFrame([[0, 0.25, 0.5, 4, 0.1, 0.2, 64]], columns=columns)
    card = publish.card(run, "a/b", "mit", table, {"tokens": 10**9, "commit": "abc", "parents": {}})
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "EleutherAI/pythia-70m-deduped"
    for row in ("| tokens | 1,000,000,000 |", "| text | owner/text |", "| mean FVU | 0.2500 |"):
        assert row in card
    assert "| 0 | 0.25 | 0.5 | 4 | 0.1 | 0.2 |" in card


def test_the_card_is_of_the_weights_that_are_pushed_and_says_what_other_text_they_read(
    inputs, data, hub, talk
):
    run = run_of(inputs, data={"path": "talk", "context_length": 8})
    shipped = store.ship(pipeline.Session().train(run), ("log.csv",))
    shutil.rmtree(store.STORE)
    talk.append("two 2.10 → 3.0")
    publish.push(pipeline.Session(), run, "someone/mlsae-tiny", "mit")
    _, (_, message, _, _, card) = hub
    [trained] = [made for made in store.artefacts("train") if "differs" in made.meta["parents"]]
    assert message == f"Dictionary {trained.key}" != f"Dictionary {shipped.name}"
    assert "| other than pinned | two 2.10 → 3.0 |" in card


def test_what_cannot_be_pushed_is_one_line(inputs, data, hub, monkeypatch, capsys):
    MLSAE(16, 32, 4).save_pretrained(data / "given")
    with pytest.raises(SpecError, match="trained here, got the weights of others"):
        publish.push(pipeline.Session(), given_of(inputs, data / "given"), "a/b", "mit")

    def refused(self, repo, **settings):
        raise OSError("401: who\nare you?")

    monkeypatch.setattr(Hub, "create_repo", refused)
    assert main(["push", spec_file(inputs, data), "a/b", "--licence", "mit"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert error == ["error: a/b: the hub did not take it: 401: who are you?"]
    assert hub == []
    assert not (store.STORE / "train").exists()  # the hub is asked before anything is computed


@pytest.mark.parametrize("licence", ["", "mit\ntags: x", "my own", "a: b"])
def test_a_licence_that_would_break_the_card_is_refused_first(inputs, hub, licence):
    with pytest.raises(SpecError, match="licence: expected the hub's name of one, as `mit`, got"):
        publish.push(None, run_of(inputs), "a/b", licence)


def test_an_export_never_replaces_a_folder(tmp_path):
    saes = {0: MLSAE(8, 16, 4)}
    (folder,) = publish.write_saelens(saes, tmp_path, "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SpecError, match=f"does not exist yet, got {folder}; name another"):
        publish.write_saelens(saes, tmp_path, "model")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
