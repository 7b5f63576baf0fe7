"""Dictionaries at other layers: the matrix's diagonal, the MLSAE's row, and brute force."""

import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_analysis import BATCHES, brute_force, tiny_sae
from test_lens import random_lens
from test_pipeline import SETTINGS, run_of
from tiny_lm import D_MODEL, N_LAYERS, Given, reading, tiny_lm, tiny_tokens

from mlsae_book import experiments, stages
from mlsae_book.tables import transfer
from mlsae_book.tables.transfer import Rollouts, Target
from mlsae_core import activations, analysis, pipeline
from mlsae_core.lens import Lens
from mlsae_core.spec import SiteSpec, SpecError


@pytest.mark.parametrize("lens", [Lens.identity(), random_lens()], ids=["identity", "tuned lens"])
@torch.no_grad()
def test_a_single_layer_dictionary_at_every_layer_agrees_with_a_hooked_pass(lens):
    lm, sae = tiny_lm(), tiny_sae()
    source = reading(lm, BATCHES, SiteSpec(layers=(1,)), lens)
    table = transfer.across_layers(source, sae, ablations=True, progress=False)
    expected = brute_force(lm, sae, lens, SiteSpec(), BATCHES)
    pd.testing.assert_frame_equal(
        table[expected.columns].astype(float), expected, atol=1e-5, rtol=1e-5
    )
    assert table.trained_here.tolist() == [False, True, False]
    assert table.fvu_global.nunique() == N_LAYERS


def test_the_diagonal_is_the_evaluation_of_the_single_layer_dictionary():
    lm, sae = tiny_lm(), tiny_sae()
    for layer in range(N_LAYERS):
        arguments = reading(lm, BATCHES, SiteSpec(layers=(layer,))), sae
        own = analysis.evaluate(*arguments, ablations=False, progress=False)
        table = transfer.across_layers(*arguments, progress=False)
        diagonal = table[table.trained_here].drop(columns="trained_here").reset_index(drop=True)
        # A latent that is silent at its own layer may be active at another.
        assert diagonal.dead[0] <= own.dead[0]
        pd.testing.assert_frame_equal(
            diagonal.drop(columns="dead"), own.drop(columns="dead"), atol=1e-6, rtol=1e-6
        )


def test_a_transcoder_keeps_its_source_and_target():
    lm, sae = tiny_lm(), tiny_sae()
    site = SiteSpec(layers=(0,), source="mlp_input", target="mlp_output")
    table = transfer.across_layers(reading(lm, BATCHES, site), sae, progress=False)
    whole = reading(lm, BATCHES, SiteSpec(source="mlp_input", target="mlp_output"))
    expected = analysis.evaluate(whole, sae, ablations=False, progress=False)
    pd.testing.assert_frame_equal(table.drop(columns="trained_here"), expected)


def test_the_stage_measures_every_layer_and_the_row_of_an_mlsae_is_its_evaluation(inputs, data):
    session = pipeline.Session()
    single = run_of(inputs, layers=[1])
    table = pd.read_csv(session.make("transfer", single, SETTINGS).file("transfer.csv"))
    assert list(table.layer) == [0, 1, 2]
    own = pd.read_csv(session.evaluate(single, SETTINGS).file("evaluation.csv"))
    names = ["fvu_global", "fvu_per_dimension", "delta_ce", "kl", "l0", "ce_recovered_mean"]
    diagonal = table[table.trained_here].reset_index(drop=True)
    pd.testing.assert_frame_equal(diagonal[names], own[names], atol=1e-6, rtol=1e-6)

    everything = run_of(inputs)
    row = pd.read_csv(session.make("transfer", everything, SETTINGS).file("transfer.csv"))
    evaluation = pd.read_csv(session.evaluate(everything, SETTINGS).file("evaluation.csv"))
    pd.testing.assert_frame_equal(row.drop(columns="trained_here"), evaluation)
    assert row.trained_here.all()


def test_stacked_dictionaries_are_refused_before_anything_is_computed(inputs, data):
    for stage in ("transfer", "examples", "duplicates", "distributions", "prompts"):
        with pytest.raises(SpecError, match=f"stacked: expected false for the stage {stage}, got"):
            pipeline.Session().make(stage, run_of(inputs, stacked=True), SETTINGS)
    assert not any(data.rglob("*.json"))
    with pytest.raises(SpecError, match="stacked: expected false for a dictionary that is read at"):
        transfer.across_layers(reading(tiny_lm(), BATCHES, SiteSpec(stacked=True)), tiny_sae())


# --- the matrix -----------------------------------------------------------------------------------


def row_of(trained, values):
    """A table of `across_layers`; trained: one layer, or none for an MLSAE."""
    layers = range(len(values))
    here = [trained is None or layer == trained for layer in layers]
    return pd.DataFrame({"layer": layers, "delta_ce": values, "trained_here": here})


def test_the_matrix_and_its_summary_by_hand():
    rows = [row_of(1, [5.0, 2.0, 9.0]), row_of(0, [1.0, 4.0, 9.0]), row_of(2, [8.0, 8.0, 3.0])]
    cells = transfer.matrix(pd.concat(rows), row_of(None, [1.5, 2.5, 7.0]))
    assert len(cells) == 12
    found = cells.set_index(["trained", "layer"])
    assert found.value["1", 0] == 5
    assert found.value["0", 1] == 4
    assert found.value[transfer.ALL_LAYERS].tolist() == [1.5, 2.5, 7.0]
    assert [found["last"][pair] for pair in (("1", 1), ("1", 2), ("2", 0))] == [False, True, True]
    assert found["last"][transfer.ALL_LAYERS].tolist() == [False, False, True]
    row = transfer.summary(cells).loc["delta_ce"]
    expected = {"own": 1.5, "other": 4.5, "mlsae": 2.0, "spread_own": 1.0, "spread_mlsae": 1.0}
    assert row[list(expected)].to_dict() == expected
    assert (row.best_at_own, row.layers) == (2, 2)


def test_tables_that_make_no_square_are_refused():
    rows = [row_of(0, [1.0, 2.0]), row_of(0, [1.0, 2.0])]
    with pytest.raises(ValueError, match="trained at 0, 0"):
        transfer.matrix(pd.concat(rows), row_of(None, [1.0, 2.0]))


# --- other models ---------------------------------------------------------------------------------


@torch.no_grad()
def test_only_what_follows_the_start_is_replaced_measured_and_scored():
    lm, sae, start = tiny_lm(), tiny_sae(), 2
    tokens = tiny_tokens(3)
    source = reading(lm, [tokens], SiteSpec(layers=(0,)))
    table = transfer.across_layers(source, sae, start=start, progress=False)
    keep = lm.keep_mask(tokens)
    keep[:, :start] = False
    before = lm.model(input_ids=tokens).logits[:, start:-1].double().log_softmax(-1)
    for row in table.itertuples():
        x = lm.capture(tokens, [row.layer])["residual"][0]
        changed = x.clone()
        changed[keep] = sae(x[keep][None]).recon[0]
        error, kept = (changed - x)[keep].double(), x[keep].double()
        assert row.tokens == keep.sum()
        assert row.mse == pytest.approx(float(error.square().mean()), rel=1e-5)
        variance = (kept - kept.mean()).square().mean()
        assert row.fvu_global == pytest.approx(float(error.square().mean() / variance), rel=1e-5)
        with lm._replaced(row.layer, "residual", changed):
            after = lm.model(input_ids=tokens).logits[:, start:-1].double().log_softmax(-1)
        next_tokens = tokens[:, start + 1 :, None]
        delta = (before - after).gather(-1, next_tokens).mean()
        assert row.predictions == next_tokens.numel()
        assert row.delta_ce == pytest.approx(float(delta), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma2"])
@torch.no_grad()
def test_samples_are_those_of_the_whole_model_and_repeat_with_their_seed(architecture):
    lm, given = tiny_lm(architecture), [tiny_tokens(2, 9), tiny_tokens(3, 9, seed=1)]
    rollouts = Rollouts(lm, Given(given), prompt_tokens=4, seed=7)
    first, again = list(rollouts.batches(3)), list(rollouts.batches(3))
    for index, (tokens, prompt) in enumerate(zip(first, given, strict=True)):
        assert torch.equal(tokens[:, :4], prompt[:, :4])
        assert torch.equal(tokens, again[index])
        generator = torch.Generator().manual_seed(7 * 1_000_003 + index)
        expected = prompt[:, :4]
        while expected.shape[1] < 9:  # without a cache, all positions anew
            chances = lm.model(input_ids=expected).logits[:, -1].softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)
            expected = torch.cat([expected, drawn], 1)
        assert torch.equal(tokens, expected)
    other = next(Rollouts(lm, Given(given), prompt_tokens=4, seed=8).batches(3))
    assert not torch.equal(other, first[0])


@torch.no_grad()
def test_sampled_tokens_have_the_models_frequencies():
    lm, n = tiny_lm(), 4000
    prompt = tiny_tokens(1, 4)
    drawn = transfer.sample(lm, prompt.expand(n, -1), 1, torch.Generator().manual_seed(0))[:, -1]
    expected = lm.model(input_ids=prompt).logits[0, -1].softmax(-1)
    found = drawn.bincount(minlength=len(expected)) / n
    assert (found - expected).abs().max() < 4 * 0.5 / n**0.5  # four standard errors at the most


def target_of(inputs, architecture="gpt_neox", **fields):
    text = {"path": str(inputs / "text.jsonl"), "context_length": 8}
    return Target(model=str(inputs / architecture), data=text, **fields)


def test_a_model_is_a_target_of_itself(inputs, data):
    session, run = pipeline.Session(), run_of(inputs)
    own = pd.read_csv(session.make("transfer", run, SETTINGS).file("transfer.csv"))
    same = stages.transfer(session, run, SETTINGS, target_of(inputs))
    pd.testing.assert_frame_equal(pd.read_csv(same.file("transfer.csv")), own)
    assert same.meta["parents"].keys() == {"train", "model", "data"}


def test_the_dictionary_is_measured_in_the_target_on_its_rollouts(inputs, data):
    session, run = pipeline.Session(), run_of(inputs)
    target = target_of(inputs, "gpt2", text="rollouts", prompt_tokens=3)
    table = pd.read_csv(stages.transfer(session, run, SETTINGS, target).file("transfer.csv"))
    lm, read = session.lm(target.model), target.read(run)
    source = session.source(read, SETTINGS)
    source = replace(source, blocks=Rollouts(lm, source.blocks, 3, 0))
    expected = analysis.evaluate(source, session.sae(run), 2048 // 8, start=3)
    table = table.drop(columns="trained_here").astype(float)
    pd.testing.assert_frame_equal(table, expected.astype(float), rtol=1e-6)
    assert table.predictions[0] == 256 // 8 * (8 - 3 - 1)


def test_a_stage_of_a_dictionary_is_measured_on_what_the_target_reads(inputs, data, monkeypatch):
    monkeypatch.setattr(activations, "MASSIVE", 1.2)  # so that some vectors are
    session, run = pipeline.Session(), run_of(inputs, massive="excluded")
    own = session.make("evaluate", run, SETTINGS)
    kept = stages.elsewhere(session, "evaluate", run, SETTINGS, target_of(inputs, massive="kept"))
    tables = [pd.read_csv(made.file("evaluation.csv")) for made in (own, kept)]
    assert (tables[1].tokens > tables[0].tokens).all()
    source = session.source(target_of(inputs, massive="kept").read(run), SETTINGS)
    expected = analysis.evaluate(source, session.sae(run), 2048 // 8)
    pd.testing.assert_frame_equal(tables[1].astype(float), expected.astype(float), rtol=1e-6)
    assert own.key != kept.key
    assert kept.path.parent.name == "evaluate"
    with pytest.raises(SpecError, match=r"target\.text: expected given, not rescaled"):
        stages.elsewhere(session, "evaluate", run, SETTINGS, target_of(inputs, rescaled=True))


def test_the_key_has_what_the_target_depends_on_and_no_places(inputs, data, tmp_path):
    run = run_of(inputs)
    shutil.copytree(inputs / "gpt2", tmp_path / "moved")

    def key(target=None):
        if target is None:
            return pipeline.analysis_key("transfer", run, SETTINGS)[0]
        return stages.transfer_key(run, SETTINGS, target)[0]

    def other(**text):
        text = {"path": str(inputs / "text.jsonl"), "context_length": 8} | text
        return Target(model=str(inputs / "gpt2"), data=text)

    rollouts = {"text": "rollouts", "prompt_tokens": 3}
    keys = [
        key(),
        key(target_of(inputs)),
        key(target_of(inputs, "gpt2")),
        key(other(context_length=4)),
        key(other(text_column="body")),
        key(target_of(inputs, "gpt2", **rollouts)),
        key(target_of(inputs, "gpt2", **rollouts | {"prompt_tokens": 4})),
        key(target_of(inputs, "gpt2", **rollouts, seed=1)),
        key(target_of(inputs, massive="kept")),
        key(target_of(inputs, massive="excluded")),
    ]
    assert len(set(keys)) == len(keys)
    moved = Target(model=str(tmp_path / "moved"), data=target_of(inputs).data)
    assert key(moved) == key(target_of(inputs, "gpt2"))
    assert key(target_of(inputs, "gpt2", seed=1)) == key(moved)  # nothing is sampled


def test_targets_that_do_not_fit_are_refused(inputs, data):
    with pytest.raises(SpecError, match=r"target\.prompt_tokens: expected at most 6"):
        target_of(inputs, text="rollouts", prompt_tokens=7)
    with pytest.raises(
        SpecError, match="width 8, that of the dictionary, got gpt_neox of width 16"
    ):
        transfer.across_layers(reading(tiny_lm(), BATCHES), tiny_sae(D_MODEL // 2))


def test_base_and_tuned_model_are_measured_alike_and_shipped(inputs, data):
    text = {"path": str(inputs / "text.jsonl"), "context_length": 8}
    models = [str(inputs / name) for name in ("gpt_neox", "gpt2")]
    targets = transfer.base_and_tuned(*models, text, prompt_tokens=3)
    assert len({(t.model.path, t.text) for t in targets.values()}) == 4
    chosen = {n: t for n, t in targets.items() if t.text == "given"}
    run = run_of(inputs)
    table = experiments.tables(
        experiments.transfers(run, SETTINGS, chosen, ship=True), "transfer.csv"
    ).set_index("target")
    own = pd.read_csv(pipeline.Session().evaluate(run, SETTINGS).file("evaluation.csv"))
    base = table.loc["base, given text"].reset_index(drop=True)
    pd.testing.assert_frame_equal(base[["fvu_global", "kl"]], own[["fvu_global", "kl"]])
    assert (table.loc["tuned, given text"].fvu_global.to_numpy() != own.fvu_global).all()
    several = experiments.transfers_of([({"seed": 0}, run)], SETTINGS, chosen)
    assert [tuple(labels.values()) for labels, _ in several] == [(0, name) for name in chosen]
    shutil.rmtree(data / "store")
    assert len(experiments.transfers(run, SETTINGS, chosen, "read-only")) == 2
