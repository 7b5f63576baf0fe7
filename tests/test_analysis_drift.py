import math

import pandas as pd
import pytest
import torch
from test_lens import random_lens
from tiny_lm import D_MODEL, N_LAYERS, read, reading, tiny_lm, tiny_tokens

from mlsae_book import experiments, stages
from mlsae_book.tables import drift
from mlsae_core import pipeline, spec
from mlsae_core.metrics import Drift, LayerMoments
from mlsae_core.spec import EvaluateSpec, SiteSpec

BATCHES = [tiny_tokens(2, seed=0), tiny_tokens(3, seed=1)]
SITE = SiteSpec()


def measured(site=SITE, lens=None, batches=BATCHES):
    return drift.drift(reading(tiny_lm(), batches, site, lens), progress=False)


def activations(site=SITE, lens=None):
    parts = list(read(tiny_lm(), BATCHES, site, lens))
    return torch.cat([batch.source for batch in parts], 1).double()


@pytest.mark.parametrize(
    ("site", "lens"),
    [
        (SITE, None),
        (SiteSpec(layers=(0, 2)), None),
        (SiteSpec(source="mlp_output"), None),
        (SITE, random_lens()),
    ],
    ids=["all", "subset", "mlp_output", "lens"],
)
def test_means_are_those_of_a_loop_over_tokens(site, lens):
    layers, pairs = measured(site, lens)
    x = activations(site, lens)
    centred = x - x.mean(1, keepdim=True)
    names = list(layers.layer)
    for row, layer in enumerate(names):
        norms = [math.sqrt(sum(v * v for v in vector)) for vector in x[row].tolist()]
        assert layers.norm[row] == pytest.approx(sum(norms) / len(norms))
        assert layers.relative_layer[row] == layer / N_LAYERS
        assert layers.tokens[row] == x.shape[1]
    assert len(pairs) == len(names) * (len(names) - 1) / 2
    for pair in pairs.itertuples():
        a, b = names.index(pair.layer), names.index(pair.other)
        for value, y in ((pair.centred, centred), (pair.raw, x)):
            cosines = [
                float(u @ v / (u.norm() * v.norm())) for u, v in zip(y[a], y[b], strict=True)
            ]
            assert value == pytest.approx(sum(cosines) / len(cosines))


def test_perpendicular_updates_give_the_ratio_of_lengths():
    layers, pairs = measured()
    both = [frame.assign(model=name) for name in "ab" for frame in (layers,)]
    frames = pd.concat(both), pd.concat([pairs.assign(model=name) for name in "ab"])
    table = drift.beside_sums(*frames)
    assert list(table.model) == ["a"] * (N_LAYERS - 1) + ["b"] * (N_LAYERS - 1)
    for row in table[table.model == "b"].itertuples():
        before, after = layers.norm[row.layer], layers.norm[row.layer + 1]
        assert row.perpendicular == pytest.approx(before / after)
        pair = pairs[(pairs.layer == row.layer) & (pairs.other == row.layer + 1)]
        assert row.raw == pytest.approx(pair.raw.item())
        assert row.more == pytest.approx(row.raw - row.perpendicular)


def test_adjacent_pairs_agree_with_the_accumulator():
    x = activations()
    moments = LayerMoments(N_LAYERS, D_MODEL)
    moments.update(x)
    accumulator = Drift(moments.mean)
    accumulator.update(x)
    expected = accumulator.compute()
    layers, pairs = measured()
    table = drift.adjacent(pairs.assign(model="m"))
    found = table[table.measure == "centred"]
    assert found.value.tolist() == pytest.approx(expected.centred.diagonal(1).tolist())
    assert found.relative_pair.tolist() == [0, 0.5]
    assert layers.norm.tolist() == pytest.approx(expected.norm.tolist())
    assert ((table.low < table.value) & (table.value < table.high)).all()


def test_intervals_are_two_standard_errors_to_either_side():
    columns = {"model": "m", "layer": [0, 1, 0], "other": [1, 2, 2], "relative_pair": [0.0, 0.5, 0]}
    columns |= {"centred": [0.5, 0.25, 0], "centred_se": [0.01, 0.04, 0]}
    columns |= {"raw": [0.75, 0.8, 0], "raw_se": [0.02, 0.0, 0]}
    table = drift.adjacent(pd.DataFrame(columns)).set_index(["measure", "layer"])
    for row, low, value, high in (
        (("centred", 0), 0.48, 0.5, 0.52),
        (("centred", 1), 0.17, 0.25, 0.33),
        (("raw", 0), 0.71, 0.75, 0.79),
        (("raw", 1), 0.8, 0.8, 0.8),
    ):
        assert table.loc[row, ["low", "value", "high"]].tolist() == pytest.approx(
            [low, value, high]
        )
    assert len(table) == 4  # layers 0 and 2 are not next to each other


def test_standard_errors_are_those_of_sequence_means_and_vanish_for_equal_sequences():
    accumulator = Drift(torch.zeros(1, 2))
    sequences = torch.tensor([0, 0, 2, 2, 3, 3])  # of which the second has no vector
    accumulator.update(torch.tensor([[[n, 0.0] for n in (1, 1, 2, 4, 5, 5)]]), sequences)
    found = accumulator.compute()
    assert found.norm == 3
    assert found.norm_se.item() == pytest.approx(torch.tensor([1.0, 3, 5]).std() / math.sqrt(3))
    layers, pairs = measured(batches=[BATCHES[0][:1].repeat(4, 1)])
    assert layers.norm_se.abs().max() < 1e-12
    assert pairs[["centred_se", "raw_se"]].abs().max(axis=None) < 1e-12
    assert measured(batches=[BATCHES[0][:1]])[0].norm_se.isna().all()


def test_results_do_not_depend_on_batches_targets_or_stacking():
    expected = measured()
    for other in (
        measured(batches=list(torch.cat(BATCHES).split(1))),
        measured(SiteSpec(target="mlp_output", stacked=True)),
    ):
        for one, two in zip(expected, other, strict=True):
            pd.testing.assert_frame_equal(one, two)


def test_the_matrix_is_symmetric():
    pairs = measured()[1].assign(model="m")
    table = drift.matrix(pairs).pivot_table(index="layer", columns="other", values="centred")
    pd.testing.assert_frame_equal(table, table.T, check_names=False)
    assert len(drift.matrix(pairs)) == N_LAYERS * (N_LAYERS - 1)


def test_the_stage_needs_no_dictionary_and_knows_what_it_depends_on(inputs, data):
    fields = {
        "model": str(inputs / "gpt_neox"),
        "data": {"path": str(inputs / "text.jsonl"), "context_length": 8},
        "expansion_factor": 2,
        "k": 4,
        "tokens": 256,
        "batch_tokens": 64,
    }
    run, settings = spec.run_from_dict(fields), EvaluateSpec(tokens=64)
    made = pipeline.Session().make("drift", run, settings)
    assert not (data / "store" / "train").exists()
    table = experiments.tables([({"model": "m"}, made)], "layers.csv")
    assert list(table.model) == ["m"] * 3
    assert len(experiments.tables([({}, made)], "pairs.csv")) == 3

    def key(settings=settings, **changes):
        return stages.drift_key(spec.run_from_dict(fields | changes), settings)[0]

    same = [key(k=2), key(seed=3), key(stacked=True), key(EvaluateSpec(64, ablations=False))]
    assert set(same) == {made.key}
    other = [
        key(layers=[0]),
        key(source="mlp_input"),
        key(EvaluateSpec(tokens=32)),
        key(data=fields["data"] | {"context_length": 16}),
        key(model={"path": fields["model"], "random_weights": 0}),
        key(model={"path": fields["model"], "dtype": "bfloat16"}),
    ]
    assert len({made.key, *other}) == 7


def test_the_summary_takes_the_mean_of_neighbours_and_the_two_ends():
    layers, pairs = measured()
    (row,) = drift.summary(layers.assign(model="m"), pairs.assign(model="m")).to_dict("records")
    value = pairs.set_index(["layer", "other"])
    assert row["model"] == "m"
    assert row["norm_first"] == layers.norm[0]
    assert row["norm_last"] == layers.norm[2]
    assert row["adjacent"] == pytest.approx((value.centred[0, 1] + value.centred[1, 2]) / 2)
    assert row["adjacent_raw"] == pytest.approx((value.raw[0, 1] + value.raw[1, 2]) / 2)
    assert (row["ends"], row["ends_raw"]) == (value.centred[0, 2], value.raw[0, 2])
    assert row["ends_perpendicular"] == layers.norm[0] / layers.norm[2]
