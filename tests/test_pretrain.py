"""Training a language model from a recipe: exact continuation, its folder, bad recipes."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from workers import sentences

from mlsae_book import pretrain
from mlsae_book.__main__ import main
from mlsae_core import spec, store, text
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import ModelSpec, SpecError

RECIPE = {
    "description": "A tiny model.",
    "architecture": {
        "model_type": "gpt_neox",
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "data": {"context_length": 16},
    "vocab_size": 300,
    "tokens": 12 * 128,
    "batch_tokens": 128,
    "micro_batch": 3,
}


@pytest.fixture
def corpus(data, monkeypatch):
    """A small corpus in the place of the docstrings."""
    (data / "docstrings.yml").write_text("minimum_characters: 32\npackages: {none: 1.0}\n")
    monkeypatch.setattr("mlsae_book.corpus.docstrings", lambda: sentences(400))


def write(name, **changes):
    folder = store.MODELS / name
    folder.mkdir(parents=True)
    values = {n: v for n, v in (RECIPE | changes).items() if v is not None}
    (folder / "recipe.yml").write_text(yaml.safe_dump(values))
    return folder


def contents(folder):
    log = pd.read_csv(folder / "log.csv")
    return load_file(folder / "model.safetensors"), log


def test_a_stopped_training_continues_exactly_and_ends_in_a_model_folder(corpus, monkeypatch):
    whole = pretrain.pretrain(write("whole").name)
    stopped = write("stopped")
    for _ in range(11):
        pretrain.pretrain("stopped", stop_after=0)  # one step a call
        assert not (stopped / "config.json").exists()
    pretrain.pretrain("stopped")
    (weights, log), (others, other_log) = contents(whole), contents(stopped)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    pd.testing.assert_frame_equal(log, other_log, check_exact=True)

    assert list(log.tokens) == [128 * step for step in range(1, 13)]
    assert log.train.iloc[-1] < log.train.iloc[0]
    facts = json.loads((whole / "training.json").read_text())
    assert facts["training_tokens"] == 12 * 128
    assert "A tiny model." in (whole / "README.md").read_text()
    assert (whole / "recipe.yml").is_file()
    model = LanguageModel.load(ModelSpec("whole"))
    assert (model.n_layers, model.d_model, model.max_positions) == (2, 16, 16)
    validation = text.blocks(spec.DataSpec(context_length=16), model.tokenizer, "validation")
    loss = pretrain.validation_loss(model.model, validation)
    assert loss == pytest.approx(facts["validation_loss"], abs=1e-3)
    assert loss == pytest.approx(log.validation.iloc[-1], abs=0.5)


def test_a_loss_that_is_not_finite_stops_with_exit_code_1(corpus, monkeypatch, capsys):
    write("model")
    real = pretrain._loss
    monkeypatch.setattr(pretrain, "_loss", lambda *a: real(*a) * float("nan"))
    assert main(["pretrain", "model"]) == 1
    assert "error: loss is nan at step 1" in capsys.readouterr().err


def test_models_share_a_tokenizer(corpus):
    pretrain.pretrain(write("first", tokens=128).name)
    second = write("second", tokens=128, tokenizer="first")
    pretrain.pretrain("second")
    ours, theirs = ((store.MODELS / n / "tokenizer.json").read_text() for n in ("first", "second"))
    assert ours == theirs
    assert (second / "model.safetensors").exists()


def test_a_model_of_another_release_of_its_text_says_so_and_is_trained_anew_on_the_pinned(
    data, talk
):
    folder = write("model", data={"path": "talk", "context_length": 16}, tokens=256)

    def trained():
        pretrain.pretrain("model")
        facts = json.loads((folder / "training.json").read_text())
        return facts, facts.pop("identity"), (folder / "tokenizer.json").read_text()

    talk.append("two 2.10 → 3.0")
    facts, other, tokenizer = trained()
    assert facts["differs"] == "two 2.10 → 3.0"
    assert "| differs | two 2.10 → 3.0 |" in (folder / "README.md").read_text()
    assert trained() == (facts, other, tokenizer)
    talk.clear()
    facts, own, pinned = trained()
    assert "differs" not in facts
    assert own != other
    assert pinned != tokenizer
    talk.append("two 2.10 → 3.0")  # that of the pinned text is found, whatever is installed
    assert trained() == (facts, own, pinned)
    (folder / "config.json").unlink()  # as if it were not there
    facts, again, tokenizer = trained()
    assert facts["differs"] == "two 2.10 → 3.0"
    assert tokenizer == pinned
    assert again not in (own, other)


def test_a_base_gives_weights_and_tokenizer(corpus):
    first = pretrain.pretrain(write("first").name)
    changes = {"architecture": None, "base": "first", "vocab_size": None, "tokens": 4 * 128}
    gentle = {"rate_muon": 1e-9, "rate_adam": 1e-9, "weight_decay": 0.0}
    second = write("second", **changes, **gentle)
    for _ in range(3):
        pretrain.pretrain("second", stop_after=0)  # one step a call, from its checkpoint
    pretrain.pretrain("second")
    (weights, _), (others, log) = contents(first), contents(second)
    assert weights.keys() == others.keys()
    for name in weights:  # where the rates are nothing, the weights are the base's
        torch.testing.assert_close(weights[name], others[name], atol=1e-6, rtol=0)
    assert list(log.tokens) == [0, 128, 256, 384, 512]
    assert log.validation[0] == pytest.approx(log.validation.iloc[-1], abs=1e-3)
    assert (second / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()
    third = write("third", **changes, rate_muon=0.02)
    pretrain.pretrain("third")
    assert contents(third)[1].validation.iloc[-1] < log.validation[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 100}, "recipe.tokens: expected a number of at least 128, got 100"),
        ({"tokens": None}, "recipe.tokens: missing"),
        ({"batch_tokens": 8}, "recipe.batch_tokens: expected a number of at least 16, got 8"),
        ({"micro_batch": 0}, "recipe.micro_batch: expected a number above 0"),
        ({"architecture": {"hidden_size": 4}}, "recipe.architecture: expected `model_type`"),
        ({"architecture": {"model_type": "none"}}, "recipe.architecture: "),
        ({"architecture": 3}, "recipe.architecture: expected fields, got 3"),
        ({"tokenizer": "nobody/nothing"}, "recipe.tokenizer: expected one of"),
        ({"base": "other"}, "recipe.architecture: expected none beside `base`, got {"),
        ({"base": "nobody/nothing", "architecture": None}, "recipe.base: expected one of"),
        ({"base": "a", "architecture": None, "tokenizer": "b"}, "recipe.tokenizer: expected none"),
        ({"tokenizr": "x"}, "recipe.tokenizr: unknown field; did you mean `tokenizer`?"),
        ({"data": {"path": "no.jsonl", "context_length": 16}}, "data.path: expected docstrings"),
    ],
)
def test_bad_recipes_are_named(corpus, changes, message, capsys):
    write("model", **changes)
    assert main(["pretrain", "model"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(store.MODELS.rglob("model.safetensors"))


def test_a_recipe_is_found_by_name_or_path(corpus):
    folder = write("model-1.4b")
    by_name = pretrain.read_recipe("model-1.4b")
    assert by_name == pretrain.read_recipe(folder / "recipe.yml") == (by_name[0], folder)
    with pytest.raises(SpecError, match=r"recipe: expected a YAML file or one of model-1\.4b, got"):
        pretrain.read_recipe("none")


def test_muon_moves_along_an_orthogonal_matrix():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(pretrain.orthogonalize(torch.randn(2, 6, 10)))
    assert ((values > 0.6) & (values < 1.3)).all()
    tall = torch.randn(1, 10, 6)
    u, _, v = torch.linalg.svd(tall[0], full_matrices=False)
    direction = torch.nn.functional.cosine_similarity(
        pretrain.orthogonalize(tall)[0].flatten(), (u @ v).flatten(), dim=0
    )
    assert direction > 0.95


def test_the_rate_rises_then_falls_to_almost_nothing():
    rates = [pretrain._rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[-1] == pytest.approx(1 / 90)


def test_ngram_losses_by_hand():
    """Three tokens; after 0 come 1 (twice) and 2 (once), and a pair never seen falls back."""
    train, validation = np.array([[0, 1], [0, 1], [0, 2]]), np.array([[0, 1], [1, 2]])
    unigram = np.array([4, 3, 2]) / 9  # counts 3, 2, 1 plus one each
    weight = 2 / (3 + 2)  # two followers, three occurrences as a first token
    expected = [(1 - weight) * 2 / 3 + weight * unigram[1], unigram[2]]
    losses = pretrain.ngram_losses(train, validation, 3)
    assert losses["unigram_loss"] == pytest.approx(-np.log(unigram[[1, 2]]).mean(), abs=1e-4)
    assert losses["bigram_loss"] == pytest.approx(-np.log(expected).mean(), abs=1e-4)
