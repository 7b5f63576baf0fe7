import json

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_lm import D_MODEL, N_LAYERS, read, reading, tiny_lm, tiny_tokens

from mlsae_book import as_released
from mlsae_book.tables import layers, sweeps
from mlsae_core import analysis
from mlsae_core.metrics import LayerDistribution, gaussian_like, permute_layers
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SiteSpec, SpecError
from mlsae_core.store import Artefact

BATCHES = [tiny_tokens(2, seed=0), tiny_tokens(3, seed=1)]


def tiny_sae():
    return MLSAE(D_MODEL, 64, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured():
    source = reading(tiny_lm(), BATCHES)
    return analysis.distributions(source, tiny_sae(), 3, replicates=20, progress=False)


def exact():
    """The accumulators themselves: found, permuted, gaussian."""
    sae, parts = tiny_sae(), [LayerDistribution(N_LAYERS, 64) for _ in range(3)]
    generator, noise = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    for batch in read(tiny_lm(), BATCHES):
        values, indices = sae.encode(batch.source)
        parts[0].update(indices, values)
        parts[1].update(*permute_layers(indices, values, generator))
        values, indices = sae.encode(gaussian_like(batch.source, noise))
        parts[2].update(indices, values)
    return [part.compute() for part in parts]


def test_ratios_under_both_weightings_follow_from_what_is_stored(measured):
    arrays = layers.derived(measured[0])
    sums = LayerDistribution(N_LAYERS, 64)
    for batch in read(tiny_lm(), BATCHES):
        values, indices = tiny_sae().encode(batch.source)
        sums.update(indices, values)
    table = layers.weighted_ratio([({"k": 4}, arrays, {})]).set_index("weighting")
    for weighting in ("latents", "tokens"):
        expected = sums.variances(weighting).ratio_latent.item()
        assert table.value[weighting] == pytest.approx(expected, abs=1e-3)
    assert (table.k == 4).all()
    assert abs(table.value["latents"] - table.value["tokens"]) > 0.01


def test_what_is_stored_small_gives_everything_to_three_digits(measured):
    arrays, _ = measured
    found, permuted, gaussian = exact()
    full = layers.derived(arrays)
    for name in ("probs", "probs_by_total", "totals", "counts", "active_tokens"):
        torch.testing.assert_close(
            full[name].double(), getattr(found, name).double(), rtol=1e-3, atol=1e-4, equal_nan=True
        )
    for name in ("mean_layer", "entropy"):
        torch.testing.assert_close(
            full[name].double(), getattr(found, name), rtol=2e-3, atol=2e-3, equal_nan=True
        )
    for name, null in (("permuted", permuted), ("gaussian", gaussian)):
        torch.testing.assert_close(
            full[f"probs_{name}"].double(), null.probs, rtol=1e-3, atol=1e-4, equal_nan=True
        )
    live = full["probs"][:, found.live]
    torch.testing.assert_close(live.sum(0), torch.ones(live.shape[1], dtype=torch.float64))
    assert sum(array.nbytes for array in arrays.values()) <= 64 * (N_LAYERS * 14 + 4)


def test_intervals_are_those_of_the_replicates(measured):
    """Basic bootstrap: as far as a quantile lies above the value, an end lies below it."""
    _, numbers = measured
    sae, found = tiny_sae(), LayerDistribution(N_LAYERS, 64, n_blocks=64)
    generator, seen = torch.Generator().manual_seed(0), 0
    for batch in read(tiny_lm(), BATCHES):
        values, indices = sae.encode(batch.source)
        found.update(indices, values, batch.sequence + seen)
        permute_layers(indices, values, generator)  # which draws from the same generator
        seen += 3  # as many as are read at a time, also where there are fewer
    for name, draws in found.bootstrap(20, generator)._asdict().items():
        value, (below, above) = numbers[name]["value"], np.quantile(draws, [0.025, 0.975])
        assert below < above
        assert numbers[name]["low"] == pytest.approx(2 * value - above)
        assert numbers[name]["high"] == pytest.approx(2 * value - below)


def test_null_models_stand_beside_every_number(measured):
    _, numbers = measured
    found, permuted, gaussian = exact()
    for name in found.variances._fields:
        assert numbers[name]["value"] == pytest.approx(getattr(found, name))
        assert numbers[name]["permuted"] == pytest.approx(getattr(permuted, name))
        assert numbers[name]["gaussian"] == pytest.approx(getattr(gaussian, name))
    for name, null in (("permuted", permuted), ("gaussian", gaussian)):
        assert numbers["nulls"][name]["mean_entropy"] == pytest.approx(null.mean_entropy)
        assert numbers["nulls"][name]["live"] == int(null.live.sum())
    # layers dealt at random prefer none: the more tokens, the nearer both ratios' parts
    assert numbers["ratio_latent"]["permuted"] > numbers["ratio_latent"]["value"]


# --- tables -----------------------------------------------------------------------------------


def arrays_of(probs, totals=None):
    """Stored arrays of four latents, of which the last is dead, with the same null models."""
    probs = torch.tensor(probs).T
    counts = (probs.nan_to_num() > 0).int()
    totals = counts.float() if totals is None else torch.tensor(totals).T
    stored = {f"probs{null}": probs.half() for null in ("", "_permuted", "_gaussian")}
    active = counts.sum(0).int()
    return layers.derived(stored | {"totals": totals, "counts": counts, "active_tokens": active})


NAN = float("nan")
THREE = arrays_of([[0.0, 0, 1], [0.5, 0.5, 0], [1, 0, 0], [NAN, NAN, NAN]])


def test_heatmap_columns_are_live_latents_by_mean_layer():
    table = layers.aggregate_table(THREE)
    assert len(table) == 9
    assert table.query("layer == 0").latent_probs.tolist() == [2, 1, 0]
    assert table.query("order == 1").probs.tolist() == [0.5, 0.5, 0]
    thinned = layers.aggregate_table(THREE, most=2)
    assert thinned.query("layer == 0").latent_probs.tolist() == [2, 0]


def test_rivals_stand_each_in_its_own_order():
    table = layers.guess_table({"A": THREE["probs"], "B": THREE["probs"][:, 1:2]}, most=2)
    columns = {
        where: rows.probability.tolist() for where, rows in table.groupby(["panel", "order"])
    }
    assert columns == {("A", 0): [1, 0, 0], ("A", 1): [0, 0, 1], ("B", 0): [0.5, 0.5, 0]}
    assert table[table.panel == "B"].layer.tolist() == [0, 1, 2]


@torch.no_grad()
def test_the_passage_is_of_the_last_token():
    lm, sae = tiny_lm(), tiny_sae()
    table = layers.passage(lm, sae, "w5 w9 w7")
    stream = lm.original(torch.tensor([[5, 9, 7]])).residual[:, 0, 2]
    values, indices = sae.encode(stream)
    codes = torch.zeros(N_LAYERS, 64).scatter(1, indices, values)
    assert table.latent.nunique() == codes.any(0).sum() == len(table) / N_LAYERS
    for row in table.itertuples():
        assert row.activation == pytest.approx(float(codes[row.layer, row.latent]), rel=1e-5)
    mean = [
        float(torch.arange(float(N_LAYERS)) @ codes[:, j] / codes[:, j].sum()) for j in table.latent
    ]
    assert (np.diff(pd.Series(mean)[table.layer == 0]) >= -1e-6).all()
    assert table[table.layer == 0].order.tolist() == list(range(table.latent.nunique()))
    with pytest.raises(SpecError, match="prompt: expected 1 to"):
        layers.passage(lm, sae, "")


def test_each_source_has_its_own_latents_and_order():
    arrays = dict(THREE)
    arrays["probs_gaussian"] = arrays["probs"].roll(1, 1)  # latents 1, 2, 3; 0 is dead
    arrays["probs_permuted"] = arrays["probs"].clone()
    arrays["probs_permuted"][:, 1] = NAN
    first = layers.aggregate_table(arrays).query("layer == 0")
    assert first.latent_probs_gaussian.tolist() == [3, 2, 1]
    assert first.latent_probs_permuted.tolist()[:2] == [2, 0]
    assert first.probs_permuted.isna().tolist() == [False, False, True]


def test_totals_are_of_the_largest():
    arrays = arrays_of(
        [[0.0, 0, 1], [0.5, 0.5, 0], [1, 0, 0], [NAN, NAN, NAN]],
        [[0.0, 0, 8], [1, 3, 0], [2, 0, 0], [0, 0, 0]],
    )
    table = layers.totals_table(arrays)
    found = table.set_index(["latent", "layer"])
    assert len(table) == 9
    assert found.total[0, 2] == 8
    assert found.share[1, 1] == 3 / 8
    assert found.order[2, 0] == 0


def test_spread_of_known_distributions():
    row = layers.spread_table(THREE).set_index("of").loc["mean over active tokens"]
    half = torch.tensor(2.0).log() / torch.tensor(3.0).log()
    assert (row.latents, row.dead) == (3, 1)
    assert row.one_layer == pytest.approx(2 / 3)
    assert row.largest == pytest.approx(2.5 / 3)
    assert row.entropy == pytest.approx(float(half) / 3)


def test_a_latent_of_one_layer_has_more_than_99_percent_of_its_probability_there():
    rows = [[1.0, 0, 0], [0.995, 0.005, 0], [0.985, 0.015, 0], [0, 0.6, 0.4]]
    table = layers.spread_table(arrays_of(rows)).set_index("of")
    assert table.one_layer["mean over active tokens"] == 0.5


# --- prompts ----------------------------------------------------------------------------------

PROMPTS = ["w5 w6 w7 w5 w9", "w8 w30"]


def dense_codes(prompt, sae):
    lm = tiny_lm()
    ids = torch.tensor([lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    values, indices = sae.encode(lm.capture(ids, range(N_LAYERS))["residual"][:, 0])
    return torch.zeros(*values.shape[:2], 64).scatter_(2, indices, values.detach())


def test_prompts_agree_with_dense_codes():
    table = layers.prompt_distributions(reading(tiny_lm(), []), tiny_sae(), PROMPTS)
    for prompt in PROMPTS:
        codes = dense_codes(prompt, tiny_sae()).double()  # (layer, token, latent)
        kept = codes.amax((0, 1)) > 1e-3
        rows = table[table.prompt == prompt]
        assert set(rows.latent) == set(kept.nonzero()[:, 0].tolist())
        assert len(rows) == int((codes.sum(1)[:, kept] > 0).sum())
        active = codes.sum(0) > 0
        probs = (codes / codes.sum(0).clamp(min=1e-30)).sum(1) / active.sum(0)
        totals = codes.sum(1)
        for row in rows.itertuples():
            at = row.layer, row.latent
            assert row.probs == pytest.approx(float(probs[at]), rel=1e-5)
            assert row.activation == pytest.approx(float(totals[at]), rel=1e-5)
            by_total = totals[at] / totals[:, row.latent].sum()
            assert row.probs_by_total == pytest.approx(float(by_total), rel=1e-5)
            assert row.share == pytest.approx(float(totals[at] / totals.max()), rel=1e-5)
            assert row.tokens == int(active[:, row.latent].sum())
        means = (torch.arange(N_LAYERS).double() @ probs)[rows.sort_values("order").latent.tolist()]
        assert (means.diff() >= -1e-6).all()


def test_weak_latents_are_left_out_and_bad_prompts_refused():
    inputs = reading(tiny_lm(), []), tiny_sae()
    table = layers.prompt_distributions(*inputs, PROMPTS[:1])
    fewer = layers.prompt_distributions(*inputs, PROMPTS[:1], least=2.0)
    assert 0 < fewer.latent.nunique() < table.latent.nunique()
    assert len(layers.prompt_distributions(*inputs, PROMPTS[:1], least=1e9)) == 0
    with pytest.raises(SpecError, match="prompt: expected 1 to"):
        layers.prompt_distributions(*inputs, [""])
    stacked = reading(tiny_lm(), [], SiteSpec(stacked=True))
    with pytest.raises(SpecError, match="stacked: expected false for distributions over layers"):
        layers.prompt_distributions(stacked, tiny_sae(), PROMPTS)


def test_prompts_of_several_runs_are_told_apart_by_their_name():
    one = layers.prompt_distributions(reading(tiny_lm(), []), tiny_sae(), PROMPTS)
    table = pd.concat([one.assign(model=name)[["model", *one]] for name in "ab"])
    named = layers.name_prompts(table, PROMPTS[:1])
    assert set(named.prompt) == {f"{name}: {PROMPTS[0]}" for name in "ab"}
    assert len(named) == 2 * (one.prompt == PROMPTS[0]).sum()


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_a_sample_of_a_prompt_keeps_every_layer_of_its_latents(most):
    one = layers.prompt_distributions(reading(tiny_lm(), []), tiny_sae(), PROMPTS)
    table = pd.concat([one.assign(k=k)[["k", *one]] for k in (4, 8)], ignore_index=True)
    sample = layers.sample_prompt(sweeps.stack({"k": table}), PROMPTS[0], most)
    here = one[one.prompt == PROMPTS[0]]
    for k in ("4", "8"):
        mine = sample[sample.run == k]
        assert sorted(mine.order.unique()) == list(range(min(most, here.latent.nunique())))
        sums = mine.groupby("latent").probability.sum()
        assert sums.to_numpy() == pytest.approx(1)
        firsts = mine.drop_duplicates("order").sort_values("order").latent
        places = here.drop_duplicates("latent").set_index("latent").order[firsts]
        assert places.is_monotonic_increasing  # the order of the mean layer is kept


def test_one_token_with_layers_permuted_is_as_spread_as_without():
    """At a single token permuting layers only renames them."""
    table = layers.prompt_spread(reading(tiny_lm(), []), tiny_sae(), ["w5"], draws=3)
    first, second = table[["latents", "one_layer", "largest", "entropy"]].to_numpy().tolist()
    assert first == pytest.approx(second)


# --- variances --------------------------------------------------------------------------------


@pytest.fixture
def made(measured, tmp_path):
    (tmp_path / "variances.json").write_text(json.dumps(measured[1]))
    artefact = Artefact(tmp_path, {}, {"files": {"variances.json": ""}})
    return [({"k": k}, artefact) for k in (4, 8)]


def test_sweeps_have_a_row_per_run_and_ratio(made, measured):
    numbers = measured[1]
    table = layers.variance_sweep(made)
    assert table.k.tolist() == [4, 4, 8, 8]
    assert table.ratio.tolist() == ["Eq. 11", "Eq. 12"] * 2
    for column in ("value", "low", "high", "permuted", "gaussian"):
        expected = [numbers[name][column] for name in ("ratio_latent", "ratio_token")]
        assert table[column].tolist()[:2] == expected
    both = layers.variance_sweeps({"Sparsity k": made, "Other": made[:1]})
    assert both.sweep.tolist() == ["Sparsity k"] * 4 + ["Other"] * 2
    assert both.position.tolist() == [0, 0, 1, 1, 0, 0]


def test_the_parts_add_up_to_the_variance_and_give_the_ratios(made, measured):
    numbers = measured[1]
    parts = layers.variance_parts(made[:1]).set_index("part")
    assert parts.share.sum() == pytest.approx(1)
    assert parts.variance.sum() == pytest.approx(numbers["var_l"]["value"])
    inside = parts.variance["within one token of a latent"]
    between = parts.variance["between the tokens of a latent"]
    assert inside / (inside + between) == pytest.approx(numbers["ratio_token"]["value"])
    assert 1 - parts.share["between latents"] == pytest.approx(numbers["ratio_latent"]["value"])


def test_definitions_are_compared_on_the_same_tokens():
    sae = tiny_sae()
    table = layers.ratio_definitions(reading(tiny_lm(), BATCHES), sae, batch_tokens=5)
    found, dense = exact()[0], []
    for batch in read(tiny_lm(), BATCHES):
        values, indices = sae.encode(batch.source)
        codes = torch.zeros(*values.shape[:2], 64).scatter_(2, indices, values.detach())
        dense += codes.split(5, 1)
    ours, theirs = table[["Eq. 11", "Eq. 12"]].to_numpy().tolist()
    assert ours == pytest.approx([found.ratio_latent, found.ratio_token])
    assert theirs == pytest.approx(list(as_released.ratios(dense)))
    assert table.tokens.tolist() == [found.tokens] * 2
