"""Training a tuned lens: divergences fall, a known map is found, indices and files are right."""

import dataclasses
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny_lm import D_MODEL, EOS, N_LAYERS, VOCAB, tiny_lm, tiny_tokens

from mlsae_book import tune
from mlsae_book.__main__ import main
from mlsae_core import models, pipeline, store
from mlsae_core.lens import Lens
from mlsae_core.spec import DataSpec, SiteSpec, SpecError, run_from_dict
from mlsae_core.store import Stopped
from mlsae_core.text import TokenBlocks

CONTEXT = 16


def text(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (n, CONTEXT), generator=generator)


def settings(**changes):
    values = {"tokens": 40 * 128, "batch_tokens": 128, "learning_rate": 0.03, "precision": "no"}
    return tune.TuneSpec(**{"data": DataSpec(context_length=CONTEXT), **values, **changes})


@pytest.fixture(scope="module")
def trained():
    lm, validation = tiny_lm(), [text(8, seed=1)]
    return lm, validation, tune.tune(lm, TokenBlocks(text()), settings(), validation)


def test_the_divergence_falls_at_every_layer(trained):
    _, _, (lens, log, before, after) = trained
    assert before.shape == after.shape == (N_LAYERS,)
    assert (after < 0.8 * before).all()
    assert list(log.columns) == ["tokens", "kl"]
    assert log.tokens.iloc[-1] == 40 * 128
    assert log.kl.iloc[-1] < log.kl.iloc[0]
    assert lens.weight.shape == (N_LAYERS, D_MODEL, D_MODEL)


def test_divergences_by_hand():
    """One pass of the model by its own code, with the special token of each sequence left out."""
    lm, tokens = tiny_lm(), tiny_tokens(2, 7)
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(N_LAYERS, D_MODEL, D_MODEL, generator=generator)
    bias = 0.1 * torch.randn(N_LAYERS, D_MODEL, generator=generator)
    network = lm.model
    states = network(tokens, output_hidden_states=True).hidden_states  # 0 … n - 1: block inputs
    own = network(tokens).logits.log_softmax(-1)
    expected = []
    for layer in range(N_LAYERS):
        y = states[layer] + states[layer] @ weight[layer].T + bias[layer]
        read = network.lm_head(network.gpt_neox.final_layer_norm(y)).log_softmax(-1)
        kl = (own.exp() * (own - read)).sum(-1)[tokens != EOS]
        expected.append(kl.mean().item())
    found = tune.translator_divergences(lm, weight, bias, [tokens[:1], tokens[1:]])
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_an_exact_affine_relation_is_recovered(monkeypatch):
    """Where the last states are an affine map of each block's input, the divergence goes to 0."""
    lm = tiny_lm()
    generator = torch.Generator().manual_seed(3)
    matrix = torch.eye(D_MODEL) + 0.3 * torch.randn(D_MODEL, D_MODEL, generator=generator)
    shift = 0.3 * torch.randn(D_MODEL, generator=generator)
    real = lm.original

    def affine(tokens):
        original = real(tokens)
        last = original.embeddings @ matrix.T + shift
        original.activations["residual"] = torch.stack(
            [*[original.embeddings] * (N_LAYERS - 1), last]
        )
        return original

    monkeypatch.setattr(lm, "original", affine)
    tuned = tune.tune(
        lm, TokenBlocks(text()), settings(tokens=250 * 128, weight_decay=0.0), [text(8, seed=1)]
    )
    assert (tuned.before > 0.1).all()
    assert (tuned.after < 2e-3 * tuned.before).all()


def test_the_aligned_lens_reads_what_was_trained(trained):
    """After block l, `aligned` takes translator l + 1; `as-released` takes l, which reads worse."""
    lm, validation, tuned = trained
    aligned = tune.layer_divergences(lm, tuned.lens, validation)
    torch.testing.assert_close(aligned[:-1], tuned.after[1:])
    assert abs(aligned[-1]) < 1e-5  # the identity before the model's own head
    released = Lens(tuned.lens.weight, tuned.lens.bias, "as-released")
    assert (tune.layer_divergences(lm, released, validation) > aligned + 0.01).all()
    identity = tune.layer_divergences(lm, Lens.identity(), validation)
    torch.testing.assert_close(identity[:-1], tuned.before[1:])


def test_bfloat16_gives_the_same_gradient():
    lm, found = tiny_lm(), {}
    for precision in ("no", "bf16"):
        weight = torch.zeros(N_LAYERS, D_MODEL, D_MODEL, requires_grad=True)
        bias = torch.zeros(N_LAYERS, D_MODEL, requires_grad=True)
        kl = tune._gradient(lm, weight, bias, text(8), precision)
        found[precision] = kl, weight.grad
    assert found["bf16"][0] == pytest.approx(found["no"][0], rel=0.01)
    cosine = torch.nn.functional.cosine_similarity(
        found["bf16"][1].flatten(1), found["no"][1].flatten(1)
    )
    assert (cosine > 0.999).all()


def test_the_rate_rises_then_falls_to_almost_nothing():
    rates = [tune._rate(step, 50) for step in range(50)]
    assert rates[0] == pytest.approx(1 / 5)
    assert max(rates) == rates[4] == 1
    assert rates[-1] == pytest.approx(1 / 45)


def test_a_divergence_that_is_not_finite_stops(trained):
    lm, validation, _ = trained
    with pytest.raises(Stopped, match=r"the lens.s divergence is nan at step \d; nothing is kept"):
        tune.tune(lm, TokenBlocks(text()), settings(learning_rate=1e30, tokens=1280), validation)


def test_the_package_reads_what_was_trained(trained, tmp_path):
    from tuned_lens.nn.lenses import TunedLens

    lm, _, tuned = trained
    tuned.lens.write(tmp_path / "pickled")
    tuned.lens.write(tmp_path / "safe", safetensors=True)
    theirs = TunedLens.from_model_and_pretrained(
        lm.model, str(tmp_path / "pickled"), weights_only=True
    )
    tokens = text(2)
    original = lm.original(tokens)
    expected = lm.logits(tuned.lens.apply(original.residual.flatten(1, 2)))[0]
    found = theirs(original.residual[0].flatten(0, 1), 1)
    torch.testing.assert_close(found, expected)
    for folder in ("pickled", "safe"):
        again = Lens.read(tmp_path / folder)
        assert torch.equal(again.weight, tuned.lens.weight)
        assert torch.equal(again.bias, tuned.lens.bias)


def small():
    """A few steps on the tiny text."""
    return tune.TuneSpec(
        data=DataSpec(path=str(store.MODELS / "text.jsonl"), context_length=CONTEXT),
        tokens=512,
        batch_tokens=128,
        validation_tokens=64,
    )


def test_a_lens_is_made_once_and_found_by_its_model(data, inputs, monkeypatch):
    (data / "models").symlink_to(inputs)
    spec = small()
    folder = tune.make("gpt_neox", spec)
    assert folder == data / "lenses" / "gpt_neox"
    names = {"config.json", "params.safetensors", "training.json", "log.csv"}
    assert {file.name for file in folder.iterdir()} == names
    facts = json.loads((folder / "training.json").read_text())
    assert facts["model"] == models.key("gpt_neox", None)
    assert len(facts["kl_before"]) == len(facts["kl_after"]) == N_LAYERS
    assert facts["validation_tokens"] == 64
    assert facts["spec"]["tokens"] == 512
    assert pd.read_csv(folder / "log.csv").tokens.iloc[-1] == 512

    with monkeypatch.context() as patched:
        patched.setattr(tune, "tune", lambda *a: pytest.fail("trained twice"))
        assert tune.make("gpt_neox", spec) == folder
    named = Lens.load(SiteSpec(basis="gpt_neox"))
    assert torch.equal(named.weight, Lens.read(folder).weight)


def test_a_lens_of_another_release_of_its_text_says_so_and_is_not_taken_for_one_of_the_pinned(
    data, inputs, talk, monkeypatch
):
    (data / "models").symlink_to(inputs)
    spec = dataclasses.replace(small(), data=DataSpec(path="talk", context_length=CONTEXT))
    checkpoints, real = [], tune.tune
    monkeypatch.setattr(tune, "tune", lambda *a: checkpoints.append(a[-1]) or real(*a))
    talk.append("two 2.10 → 3.0")
    folder = tune.make("gpt_neox", spec)
    assert json.loads((folder / "training.json").read_text())["differs"] == "two 2.10 → 3.0"
    assert tune.make("gpt_neox", spec) == folder
    talk.clear()
    with pytest.raises(SpecError, match=r"another release of its text or model \(two 2.10 → 3.0\)"):
        tune.make("gpt_neox", spec)
    tune.make("gpt_neox", spec, force=True)
    assert "differs" not in json.loads((folder / "training.json").read_text())
    talk.append("two 2.10 → 3.0")  # that of the pinned text is found, whatever is installed
    assert tune.make("gpt_neox", spec) == folder
    assert len(set(checkpoints)) == len(checkpoints) == 2


def test_a_name_and_its_folder_are_one_basis(data, inputs):
    (data / "models").symlink_to(inputs)
    folder = tune.make("gpt_neox", small())
    base = {"model": "gpt_neox", "expansion_factor": 2, "k": 2, "tokens": 4096}
    base["data"] = {"path": str(inputs / "text.jsonl"), "context_length": CONTEXT}
    keys = {
        pipeline.run_key(run_from_dict({**base, "basis": basis}))[0]
        for basis in ("gpt_neox", str(folder))
    }
    assert len(keys) == 1
    (folder / "training.json").write_text("{}")  # how it was made does not change what it is
    again = pipeline.run_key(run_from_dict({**base, "basis": "gpt_neox"}))[0]
    assert keys == {again}
    with pytest.raises(
        SpecError, match=r"the name of one under data/lenses \(gpt_neox\), got none"
    ):
        pipeline.run_key(run_from_dict({**base, "basis": "none"}))


def test_a_lens_is_trained_on_the_machines_device(data, inputs, monkeypatch):
    (data / "models").symlink_to(inputs)
    monkeypatch.setattr(tune, "process_state", lambda: SimpleNamespace(device="elsewhere"))
    monkeypatch.setattr(
        tune.LanguageModel, "load", lambda *a: (_ for _ in ()).throw(Stopped(a[-1]))
    )
    with pytest.raises(Stopped, match="elsewhere"):
        tune.make("gpt_neox", small())


def test_an_interrupted_training_leaves_nothing(data, inputs, monkeypatch):
    (data / "models").symlink_to(inputs)
    monkeypatch.setattr(Lens, "write", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tune.make("gpt_neox", small())
    assert list((data / "lenses").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none/at/all"], "model.path: expected a shipped name"),
        (["gpt_neox", "--tokens", "10"], "lens.tokens: expected a number of at least 1024, got 10"),
        (["gpt_neox", "--tokens", "x"], "lens.tokens: expected whole number, got 'x'"),
    ],
)
def test_bad_input_is_named(data, inputs, arguments, message, capsys):
    (data / "models").symlink_to(inputs)
    assert main(["lens", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (data / "lenses").exists()


def test_the_command_trains(data, inputs, monkeypatch, capsys):
    (data / "models").symlink_to(inputs)
    monkeypatch.setattr(tune, "make", lambda model, given, force: (model, given.tokens, force))
    assert main(["lens", "gpt_neox", "--tokens", "2048", "--force"]) == 0
    assert capsys.readouterr().out == "('gpt_neox', 2048, True)\n"
