"""Geometry of decoder rows: by hand, by brute force, and as a stage that reads no text."""

import math

import pandas as pd
import pytest
import torch
from test_pipeline import SETTINGS, run_of
from tiny_lm import D_MODEL, reading, tiny_lm, tiny_tokens

from mlsae_book.tables.geometry import (
    QUANTILES,
    above,
    anisotropic,
    densities,
    dictionaries,
    geometry,
    together,
)
from mlsae_core import pipeline, text
from mlsae_core.metrics import mmcs
from mlsae_core.sae import MLSAE


def brute_force(rows):
    """All cosines of unordered pairs and each row's largest, one product at a time."""
    rows = rows.double().tolist()

    def cosine(a, b):
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    every = [[cosine(a, b) for b in rows] for a in rows]
    pairs = [every[i][j] for i in range(len(rows)) for j in range(i)]
    best = [max(c for j, c in enumerate(row) if j != i) for i, row in enumerate(every)]
    return pairs, best


def quantile(values, q):
    """Linear between order statistics."""
    values = sorted(values)
    low = math.floor(position := q * (len(values) - 1))
    high = min(low + 1, len(values) - 1)
    return values[low] + (position - low) * (values[high] - values[low])


def test_every_column_agrees_with_brute_force():
    decoder = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    summary, cosines = geometry(decoder, n_layers=4, seed=3, n_bins=20)
    assert list(summary["rows"]) == ["dictionary", "independent", "copies"]
    for name, rows in dictionaries(decoder, 4, 3).items():
        pairs, best = brute_force(rows)
        found = summary[summary["rows"] == name].iloc[0]
        mean = math.fsum(best) / 40
        deviation = math.fsum((b - mean) ** 2 for b in best) / 39
        assert found["latents"] == 40
        assert found["mmcs"] == pytest.approx(mean)
        assert found["std"] == pytest.approx(deviation**0.5)
        assert found["least"] == pytest.approx(min(best))
        assert found["most"] == pytest.approx(max(best))
        for q in QUANTILES:
            assert found[f"q{100 * q:02.0f}"] == pytest.approx(quantile(best, q))
        table = cosines[cosines["rows"] == name]
        for column, values in (("pairs", pairs), ("maxima", best)):
            expected = [
                sum(low <= value < high for value in values)
                for low, high in zip(table["low"], table["high"], strict=True)
            ]
            assert table[column].tolist() == expected


@torch.no_grad()
def test_anisotropic_rows_are_as_alike_as_what_they_are_drawn_from():
    sae = MLSAE(D_MODEL, 64, 2, generator=torch.Generator().manual_seed(0))
    source = reading(tiny_lm(), [tiny_tokens(4, seed=0)])
    table = anisotropic(source, sae, [8, 64], threshold=0.5).set_index("latents")
    [batch] = source.batches(4)
    x = sae.standardise(batch.source)[0].flatten(0, 1).double()
    noise = torch.randn(4000, len(x), generator=torch.Generator().manual_seed(1)).double()
    drawn = noise @ x  # N(0, XᵀX), drawn in another way
    assert table.mmcs[64] == pytest.approx(mmcs(drawn[:64]).mean, abs=0.06)
    isotropic = torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(2))
    assert table.mmcs[64] > mmcs(isotropic).mean + 0.05
    assert table.mmcs[64] > table.mmcs[8]
    directions = torch.nn.functional.normalize(drawn[:1000])
    expected = (directions @ directions.T)[tuple(torch.triu_indices(1000, 1000, 1))] > 0.5
    assert table.above[64] == pytest.approx(expected.double().mean().item(), rel=0.2)


def test_duplicates_by_hand():
    """Two rows that are one, and a third at a right angle: the maxima are 1, 1 and 0."""
    decoder = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    summary, cosines = geometry(decoder, n_layers=1, n_bins=4)
    ours = summary.iloc[0]
    assert ours["mmcs"] == pytest.approx(2 / 3)
    assert ours["std"] == pytest.approx((1 / 3) ** 0.5)
    assert (ours["least"], ours["q50"], ours["most"]) == (0, 1, 1)
    table = cosines[cosines["rows"] == "dictionary"]
    assert table["low"].tolist() == [-1, -0.5, 0, 0.5]
    assert table["pairs"].tolist() == [0, 0, 2, 1]
    assert table["maxima"].tolist() == [0, 0, 1, 2]


def by_hand():
    """Two runs' histograms on eight bins of width 0.25, and of one there are copies as well."""
    low = [-1 + 0.25 * i for i in range(8)]
    rows = {"one": [0, 0, 1, 2, 3, 2, 0, 0], "other": [0, 0, 0, 0, 0, 4, 3, 1]}
    frames = [
        {"run": run, "rows": name, "low": low, "high": [x + 0.25 for x in low]}
        | {"pairs": pairs, "maxima": pairs[::-1]}
        for run, name, pairs in (
            ("a", "dictionary", rows["one"]),
            ("a", "copies", rows["other"]),
            ("b", "dictionary", rows["other"]),
        )
    ]
    return pd.concat([pd.DataFrame(frame) for frame in frames], ignore_index=True)


def test_the_share_above_a_threshold_begins_with_the_bin_whose_lower_edge_it_is():
    for threshold, shares in ((0.25, [2 / 8, 1, 1]), (0.5, [0, 0.5, 0.5]), (-1, [1, 1, 1])):
        table = above(by_hand(), threshold)
        assert table[["run", "rows"]].to_numpy().tolist() == [
            ["a", "dictionary"],
            ["a", "copies"],
            ["b", "dictionary"],
        ]
        assert table.share.tolist() == pytest.approx(shares)


def test_dictionaries_of_one_shape_stand_beside_the_controls_of_one():
    rows = ["dictionary", "copies"] * 2
    table = pd.DataFrame({"run": ["x", "x", "y", "y"], "rows": rows, "low": 0.0, "pairs": range(4)})
    found = together(table)
    assert list(found["rows"]) == ["x", "copies", "y"]
    assert list(found.pairs) == [0, 1, 2]
    assert set(found.run) == {"all"}


def test_bins_are_merged_and_one_empty_one_is_left_at_each_end():
    table = densities(by_hand(), "pairs")
    one = table[(table.run == "a") & (table["rows"] == "dictionary")]
    assert one.low.tolist() == [-1, -0.5, 0, 0.5]
    assert one.high.tolist() == [-0.5, 0, 0.5, 1]
    assert one.share.tolist() == [0, 3 / 8, 5 / 8, 0]
    other = table[table["rows"] == "copies"]
    assert other.low.tolist() == [-0.5, 0, 0.5]
    assert other.share.tolist() == [0, 0.5, 0.5]
    narrow = densities(by_hand(), "maxima", merge=1)
    narrow = narrow[(narrow.run == "b")]
    assert narrow.share.tolist() == [1 / 8, 3 / 8, 4 / 8, 0]
    assert narrow.low.tolist() == [-1, -0.75, -0.5, -0.25]
    assert narrow.high.tolist() == [-0.75, -0.5, -0.25, 0]


def test_controls_have_the_decoders_shape_and_repeat_only_where_they_should():
    decoder = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    made = dictionaries(decoder, 6)
    assert made["dictionary"] is decoder
    assert all(rows.shape == decoder.shape for rows in made.values())
    same = dictionaries(decoder, 6)
    assert all(torch.equal(made[name], same[name]) for name in made)
    summary = geometry(decoder, 6)[0].set_index("rows")["mmcs"]
    # the decoder is another draw of the control without structure; copies have a cosine of 0.5
    assert summary["dictionary"] == pytest.approx(summary["independent"], abs=0.01)
    assert 0.5 < summary["copies"] < 0.7
    assert summary["independent"] < 0.45
    with pytest.raises(ValueError, match="n ≥ 2"):
        geometry(decoder[:1], 6)


def test_the_stage_reads_no_text_and_is_one_result_whatever_is_evaluated(inputs, data, monkeypatch):
    run = run_of(inputs)
    pipeline.Session().train(run)
    monkeypatch.setattr(text, "packed", None)
    monkeypatch.setattr(pipeline.Session, "lm", None)
    made = pipeline.Session().make("geometry", run, SETTINGS)
    decoder = pipeline.Session().sae(run).decoder.detach()
    expected, cosines = geometry(decoder, n_layers=3)
    stored = pd.read_csv(made.file("mmcs.csv"))
    pd.testing.assert_frame_equal(stored, expected, rtol=1e-6)
    stored = pd.read_csv(made.file("cosines.csv"))
    pd.testing.assert_frame_equal(stored, cosines, rtol=1e-6, atol=1e-9)
    assert pipeline.Session("read-only").make("geometry", run).key == made.key
    assert made.meta["parents"] == {"train": pipeline.run_key(run)[0]}
    with pytest.raises(pipeline.StoreError, match="materialise EXPERIMENT"):
        pipeline.Session("read-only").make("geometry", run_of(inputs, seed=1))
