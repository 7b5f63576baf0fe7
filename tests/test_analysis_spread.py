"""Tables of many runs: active layers, entropies, samples; sweeps beneath each other."""

import math
import statistics

import pandas as pd
import pytest
import torch

from mlsae_book.tables import geometry, spread, sweeps
from mlsae_core.metrics import LayerDistribution


def read(seed=0, n_layers=3, n_latents=20):
    """What `experiments.read_distributions` gives, and the accumulator's own result."""
    generator = torch.Generator().manual_seed(seed)
    values, indices = torch.rand(n_layers, 400, n_latents, generator=generator).topk(2)
    weight = torch.rand(n_layers, n_latents, generator=generator) ** 4
    values = values * weight.gather(1, indices.flatten(1)).view_as(values)
    values[indices == 7] = 0  # never active
    sums = LayerDistribution(n_layers, n_latents)
    sums.update(indices, values * (values > 0.01))
    result = sums.compute()
    names = ("probs", "counts", "active_tokens", "mean_layer", "entropy")
    arrays = {name: getattr(result, name) for name in names}
    null = torch.ones(n_layers, n_latents, dtype=torch.float64) / n_layers  # a known entropy
    null[:, 0] = torch.nan
    return arrays | {"probs_permuted": null}, {"tokens": 400}, result


def test_active_layers_by_hand():
    arrays = {"counts": torch.tensor([[0, 50, 10], [0, 20, 11]])}
    table = spread.active_layers([({"k": 4}, arrays, {"tokens": 1000})], (0.01, 0.0, 0.02))
    assert list(table.columns) == ["k", "threshold", "active_layers", "nowhere"]
    # more than 10 tokens: both layers of the second latent, one of the third
    assert table["active_layers"].tolist() == pytest.approx([3 / 6, 4 / 6, 1 / 6])
    assert table["nowhere"].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    # the mean count is 91 / 6, a little over 15: the second latent is above it at both layers
    runs = [({}, arrays, {"tokens": n}) for n in (1000, 9)]
    table = spread.active_layers(runs, (1.0, 0.7), relative=True)
    assert table["active_layers"].tolist() == pytest.approx([2 / 6, 3 / 6] * 2)


def test_active_layers_are_the_accumulators_and_fall_with_the_threshold():
    arrays, numbers, result = read()
    assert 1e-3 in spread.THRESHOLDS
    table = spread.active_layers([({}, arrays, numbers)], [i / 50 for i in range(12)])
    for row in table.itertuples():
        mean = result.active_layers(row.threshold).mean().item()
        assert row.active_layers == pytest.approx(mean)
    assert table["active_layers"].is_monotonic_decreasing
    assert table["active_layers"].nunique() > 4


def test_entropies_are_over_live_latents():
    arrays, _, result = read()
    assert not result.live[7]
    table = spread.entropies([({"k": 1}, arrays, {})])
    p = result.probs[:, result.live].T.tolist()
    plain = [-sum(x * math.log(x) for x in row if x) / math.log(3) for row in p]
    assert table["entropy"].item() == pytest.approx(sum(plain) / len(plain))
    assert table["entropy"].item() == pytest.approx(result.mean_entropy)
    assert table["q50"].item() == pytest.approx(statistics.median(plain))
    assert table["permuted"].item() == pytest.approx(1)
    often = result.entropy[result.active_tokens >= spread.OFTEN]
    assert 0 < len(often) < len(plain)
    assert table["often"].item() == pytest.approx(often.mean().item())
    histogram = spread.entropy_histogram([({"k": 1}, arrays, {})], n_bins=5)
    counts = [sum(low / 5 <= x < (low + 1) / 5 for x in plain) for low in range(5)]
    assert histogram["share"].tolist() == pytest.approx([c / len(plain) for c in counts])
    assert histogram.columns[0] == "k"


def test_an_entropy_on_an_edge_counts_above_it():
    """Two of four layers alike: half of the entropy there could be, but for the last digit."""
    half = torch.tensor([0.5 - 1e-16, 0.5, 0.5 + 1e-15], dtype=torch.float64)
    arrays = {"entropy": half, "active_tokens": torch.ones(3)}
    assert spread.entropy_histogram([({}, arrays, {})])["share"][20] == 1


def test_samples_keep_both_ends_and_stay_distributions():
    runs = [({"k": k}, *read(seed=k)[:2]) for k in (1, 2)]
    table = spread.sampled(runs, most=5)
    assert list(table.columns) == ["k", "latent", "layer", "probability", "order"]
    assert len(table) == 2 * 5 * 3
    sums = table.groupby(["k", "latent"])["probability"].sum()
    assert sums.tolist() == pytest.approx([1.0] * 10)
    means = runs[0][1]["mean_layer"].nan_to_num(99)
    first = table.query("k == 1 and order == 0")["latent"].unique()
    assert first.tolist() == [means.argmin().item()]


def test_sweeps_stand_beneath_each_other():
    a = pd.DataFrame({"k": [16, 16, 4], "x": [1, 2, 3]})
    b = pd.DataFrame({"model": ["m", "l"], "x": [4, 5]})
    table = sweeps.stack({"Sparsity": a, "Model": b})
    assert table.to_dict("list") == {
        "sweep": ["Sparsity"] * 3 + ["Model"] * 2,
        "run": ["16", "16", "4", "m", "l"],
        "position": [0, 0, 1, 0, 1],
        "x": [1, 2, 3, 4, 5],
    }
    with pytest.raises(ValueError, match="at least one sweep"):
        sweeps.stack({})


def test_across_is_a_table_of_every_sweep_beneath_each_other():
    def ends(runs, times):
        return pd.DataFrame({"k": runs, "end": [times * k for k in runs]})

    table = sweeps.across(ends, {"few": [1, 2], "many": [8]}, 10)
    assert table.to_dict("list") == {
        "sweep": ["few", "few", "many"],
        "run": ["1", "2", "8"],
        "position": [0, 1, 0],
        "end": [10, 20, 80],
    }


def test_densities_merge_bins_and_leave_out_empty_ends():
    decoder = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    cosines = geometry.geometry(decoder, 5, n_bins=20)[1]
    table = sweeps.stack({"R": cosines.assign(R=1)[["R", *cosines.columns]]})
    found = geometry.densities(table, "pairs", merge=4)
    for rows, part in found.groupby("rows"):
        assert part["share"].sum() == pytest.approx(1)
        assert (part["high"] - part["low"]).tolist() == pytest.approx([0.4] * len(part))
        whole = cosines[cosines["rows"] == rows]
        for row in part.itertuples():
            inside = (whole["low"] > row.low - 1e-9) & (whole["high"] < row.high + 1e-9)
            assert row.share == pytest.approx(whole["pairs"][inside].sum() / (50 * 49 / 2))
    fine = geometry.densities(table, "maxima", merge=1).query("rows == 'independent'")
    assert (fine["share"].iloc[1:-1] > 0).any()
    assert fine["share"].iloc[0] == 0
    assert fine["share"].iloc[-2] > 0
    assert len(fine) < 20


def test_pairs_above_a_threshold():
    unit = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    cosines = geometry.geometry(unit, 1, n_bins=10)[1]
    found = geometry.above(cosines, 0.4).set_index("rows")["share"]
    assert found["dictionary"] == pytest.approx(1 / 3)


def test_latents_at_the_first_and_the_last_layer_by_hand():
    probs = torch.tensor([[0.95, 0.5, 0.0, 1.0], [0.05, 0.5, 1.0, 0.0]])
    arrays = {"probs": probs, "active_tokens": torch.tensor([3, 1, 2, 0])}  # the last one is dead
    (row,) = spread.at_the_ends([({"model": "a"}, arrays, {})]).to_dict("records")
    assert row == {"model": "a", "first": 1 / 3, "last": 1 / 3, "latents": 3}
    (row,) = spread.at_the_ends([({}, arrays, {})], least=0.4).to_dict("records")
    assert (row["first"], row["last"]) == pytest.approx((2 / 3, 2 / 3))
