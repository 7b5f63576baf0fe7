"""The planted world against its specification, and estimators on its true codes."""

import dataclasses
import itertools
import math

import pandas as pd
import pytest
import torch
from test_charts import assert_drawn, chosen

from mlsae_book import planted
from mlsae_book.charts import planted as charts
from mlsae_book.planted import PlantedSpec, World
from mlsae_book.tables import handover
from mlsae_core import metrics, store
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SpecError

SMALL = PlantedSpec(
    n_features=24,
    d_model=32,
    n_layers=3,
    active=3,
    expansion_factor=2,
    k=2,
    training_tokens=131_072,
    tokens=8192,
    context_length=64,
)


def sample(spec, size=128):
    world = World(spec)
    tokens = next(world.tokens(size))
    return world, *(part.flatten(1, 2) for part in world.draw(tokens))


def test_distributions_over_layers_converge_to_the_specified_ones():
    world, codes, _, _ = sample(SMALL)
    shares = codes.double() / codes.double().sum(0)
    seen = torch.stack([shares[:, codes.sum(0)[:, f] > 0, f].mean(1) for f in range(24)])
    fires = (codes.sum(0) > 0).double()
    # Each is a mean over about 1000 tokens of shares in [0, 1]: at most 0.016 standard error.
    torch.testing.assert_close(seen, world.weights, atol=0.08, rtol=0)
    assert fires.mean().item() == pytest.approx(SMALL.active / 24, abs=0.004)
    alone = ((codes > 0).sum(0) == 1)[:, 16:][fires[:, 16:] > 0].double()
    assert alone.mean().item() == pytest.approx(1 - SMALL.persistence, abs=0.03)
    assert set(world.kinds[:8]) == {"single"}
    assert set(world.kinds[16:]) == {"everywhere"}
    assert world.weights[9].tolist() == [0.25, 0.5, 0.25]
    assert world.weights[8].tolist() == pytest.approx([2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("angle", [0, 30, 90])
def test_directions_turn_by_the_angle(angle):
    world = World(dataclasses.replace(SMALL, drift=angle))
    d = world.directions
    torch.testing.assert_close(d.norm(dim=-1), torch.ones(3, 24))
    for step in (1, 2):
        cosine = (d[step:] * d[:-step]).sum(-1)
        expected = torch.full_like(cosine, math.cos(math.radians(step * angle)))
        torch.testing.assert_close(cosine, expected, atol=1e-5, rtol=0)
    assert d.sum(-1).abs().max() < 1e-5  # standardising takes nothing off them


def test_the_stream_is_a_function_of_the_seed_not_of_the_batches():
    world, other = World(SMALL), World(dataclasses.replace(SMALL, seed=1))
    four = next(world.tokens(4))
    pairs = list(itertools.islice(world.tokens(2, start=0), 2))
    assert torch.equal(torch.cat(pairs), four)
    assert torch.equal(next(world.tokens(2, start=1)), pairs[1])
    for whole, part in zip(world.draw(four), world.draw(pairs[1]), strict=True):
        assert torch.equal(whole[:, 2:], part)
    assert not torch.equal(world.draw(four)[0], other.draw(four)[0])
    training = next(world.tokens(4, seed=0))
    assert not torch.equal(world.draw(four)[0], world.draw(training)[0])
    second, fourth = itertools.islice(world.batches(2, start=1, every=2), 2)
    for batch, number in ((second, 1), (fourth, 3)):
        tokens = next(world.tokens(2, start=number))
        assert torch.equal(batch.source, world.draw(tokens)[1].flatten(1, 2))
        assert batch.target is batch.source
        assert torch.equal(batch.tokens, tokens.flatten())
        assert torch.equal(tokens[batch.sequence, batch.position], batch.tokens)


def test_layers_grow_and_noise_has_its_length():
    world, codes, x, clean = sample(SMALL)
    by_hand = torch.stack(
        [1.3**layer * (codes[layer] @ world.directions[layer]) for layer in range(3)]
    )
    torch.testing.assert_close(clean, by_hand)
    lengths = (x - clean).square().sum(-1).mean(1).sqrt() / world.scale
    torch.testing.assert_close(lengths, torch.full((3,), SMALL.noise), atol=0.005, rtol=0)


@pytest.mark.parametrize("angle", [0, 60])
def test_estimators_on_the_true_codes_give_the_truth(angle):
    world, codes, x, clean = sample(dataclasses.replace(SMALL, drift=angle), 256)
    truth = world.truth()
    distribution = metrics.LayerDistribution(3, 24)
    indices, values = planted.top_codes(codes)
    distribution.update(indices, values)
    found = distribution.compute()
    names = {
        "ratio_latent": found.ratio_latent,
        "ratio_token": found.ratio_token,
        "mean_entropy": found.mean_entropy,
        "active_layers": float(found.active_layers().mean()),
        "fvu": float(metrics.fvu(x, clean).mean()),
        "l0": float((codes > 0).sum(-1).double().mean()),
    }
    assert names == pytest.approx({name: truth[name] for name in names}, rel=0.03)
    # Closed form: products and energies of the centred stream, each averaged before dividing.
    y = (x - x.mean(1, keepdim=True)).double()
    product, energy = (y[1:] * y[:-1]).sum(-1).mean(1), y.square().sum(-1).mean(1)
    cosine = (product / (energy[1:] * energy[:-1]).sqrt()).mean()
    assert truth["adjacent_cosine"] == pytest.approx(cosine.item(), abs=0.02)


def test_ratios_by_hand():
    # Two features, one at each of two layers; then two that are at both.
    apart = World(dataclasses.replace(SMALL, n_layers=2, single=1, neighbours=0)).truth()
    assert (apart["ratio_latent"], apart["mean_entropy"]) == (0, 0)
    assert math.isnan(apart["ratio_token"])
    everywhere = World(dataclasses.replace(SMALL, single=0, neighbours=0, drift=90)).truth()
    assert everywhere["ratio_latent"] == pytest.approx(1)
    assert everywhere["mean_entropy"] == pytest.approx(1)
    assert everywhere["adjacent_cosine"] == pytest.approx(0)


@pytest.fixture(scope="module")
def learned():
    return planted.score(*planted.learn(SMALL))


def test_training_recovers_the_features(learned):
    estimators, features = learned
    table = estimators.set_index("estimator")
    assert table.estimate["recovered"] > 0.8
    assert table.estimate["mmcs_recall"] > 0.9
    assert table.estimate["fvu"] > table.oracle["fvu"]
    assert 0 < table.low["ratio_token"] < table.high["ratio_token"] < 1
    assert list(table.index) == list(World(SMALL).truth())
    assert features.recovered.mean() == pytest.approx(table.estimate["recovered"])


def test_a_feature_with_a_latent_for_each_layer_is_seen_to_be_handed_on():
    """Directions at 45° from layer to layer, and the dictionary that has exactly these."""
    world = World(dataclasses.replace(SMALL, single=0, neighbours=0, drift=45, persistence=1))
    rows = world.directions.flatten(0, 1)
    sae = MLSAE(world.d_model, len(rows), SMALL.k)
    sae.encoder.data, sae.decoder.data = rows, rows
    table = handover.handover(world, sae).set_index("pair")
    assert (
        table.latents["all"] == table.latents["one feature"] + table.latents["not of one feature"]
    )
    assert table.latents["one feature"] > 0.5 * table.latents["all"] > 10
    assert table.neighbouring["one feature"] == 1
    assert table.next["one feature"] > 2 * table.null_next["one feature"]
    still = World(dataclasses.replace(SMALL, single=1, neighbours=0))
    rows = still.directions[0]
    sae = MLSAE(still.d_model, len(rows), SMALL.k)
    sae.encoder.data, sae.decoder.data = rows, rows
    assert handover.handover(still, sae).set_index("pair").latents["one feature"] == 0


def test_marks_are_those_of_the_chosen_estimator_with_its_interval():
    series = ["truth", "oracle", "estimate"]
    names = ["mean_entropy", "fvu"]
    rows = itertools.product(names, series, (0, 30))
    table = pd.DataFrame(rows, columns=["estimator", "series", "drift"])
    table["value"] = [0.1 + 0.05 * i for i in range(12)]
    found = table.series == "estimate"
    table["low"], table["high"] = ((table.value + x).where(found) for x in (-0.01, 0.02))
    drift = "Drift (degrees from a layer to the next)"
    for name, rows in table.groupby("estimator"):
        spec = chosen(charts.estimators(table, "t").to_dict(), estimator=name)
        where = {"series": rows.series, drift: rows.drift}
        assert_drawn(spec, "point", **where, value=rows.value)
        ends = {"least": rows.low.fillna(rows.value), "most": rows.high.fillna(rows.value)}
        assert_drawn(spec, "rule mark", **where, **ends)
    [choice] = charts.estimators(table, "t").to_dict()["params"]
    assert choice["bind"]["options"] == names
    assert choice["bind"]["labels"] == ["Mean entropy of P(layer | latent)", "FVU, global variance"]


def test_splits_show_the_chosen_number():
    table = pd.DataFrame({"drift": [0, 30], "latents": [1.0, 2.5], "recovered": [0.9, 0.6]})
    table = pd.concat([table.assign(kind="single"), (table / 2).assign(kind="everywhere")])
    title = "Mean over features (latents, or fraction of layers)"
    spec = charts.splits(table, "t").to_dict()
    [choice] = spec["params"]
    assert choice["bind"]["labels"] == ["Different latents", "Share of layers recovered"]
    for column in choice["bind"]["options"]:
        shown = {"kind": table.kind, "drift": table.drift, title: table[column]}
        assert_drawn(chosen(spec, split_value=column), "point", **shown)


def test_a_planted_dictionary_is_recovered_whole_and_split_by_drift():
    spec = dataclasses.replace(SMALL, drift=90, expansion_factor=3)
    world = World(spec)
    sae = planted.train.build_sae(spec.run, world)
    with torch.no_grad():
        rows = planted._all_directions(world)
        sae.decoder[: len(rows)] = sae.encoder[: len(rows)] = rows
    features = planted.score(world, sae)[1]
    assert features.cosine.min() > 0.99
    spread = features[features.kind == "everywhere"]
    assert (spread.latents == 3).all()
    assert (features[features.kind == "single"].latents == 1).all()


def test_ratios_of_known_directions_are_right_only_of_the_true_codes():
    world = World(SMALL)
    table = planted.mechanism(world).set_index("codes")
    truth, k = world.truth(), SMALL.k
    for name, ratio in (("Eq. 11", "ratio_latent"), ("Eq. 12", "ratio_token")):
        assert table[name]["true"] == pytest.approx(truth[ratio], abs=0.04)
    assert table.l0["true"] == pytest.approx(truth["l0"], rel=0.05)
    assert table.l0["true directions, k latents"] <= k
    assert table.l0["true, the k largest"] <= min(k, table.l0["true"])
    number = table.l0["true directions, the true number"]
    assert number == pytest.approx(table.l0["true"], rel=0.05)


def test_results_are_kept_under_the_key_of_their_spec(data, monkeypatch):
    monkeypatch.setattr(planted, "learn", lambda spec: (World(spec), None))
    frame = pd.DataFrame({"estimator": ["fvu"], "truth": [0.0]})
    monkeypatch.setattr(planted, "score", lambda world, sae: (frame, frame))
    with pytest.raises(store.StoreError, match="does not exist"):
        planted.find_or_compute(SMALL, "read-only")
    made = planted.find_or_compute(SMALL)
    assert planted.find_or_compute(SMALL, "read-only").key == made.key
    tables = planted.worlds(SMALL, "drift", [0, 30])
    assert set(tables) == {"estimators", "features", "provenance"}
    assert [list(table.drift) for table in tables.values()] == [[0, 30]] * 3
    keys = tables["provenance"].key
    assert keys[0] == made.key != keys[1]


def test_other_worlds_differ_in_one_field_each(data, monkeypatch):
    asked = []

    def score(world, sae):
        asked.append(world.spec)
        ratio = {"truth": 0.5, "oracle": 0.25, "estimate": 0.125 * world.spec.k}
        frame = pd.DataFrame({"estimator": ["ratio_latent", "ratio_token", "fvu"], **ratio})
        return frame, frame

    monkeypatch.setattr(planted, "learn", lambda spec: (World(spec), None))
    monkeypatch.setattr(planted, "score", score)
    monkeypatch.setattr(planted, "OTHERS", {"k": (SMALL.k, 3), "tokens": (SMALL.tokens, 2048)})
    table = planted.others(SMALL).set_index(["field", "value"])
    assert asked == [
        SMALL,
        dataclasses.replace(SMALL, k=3),
        dataclasses.replace(SMALL, tokens=2048),
    ]  # that of the default once
    assert table.loc[("k", 3)].tolist() == [0.5, 0.25, 0.375] * 2 + [0.375]
    assert len(table) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active": 24}, "planted.active: expected above 0 and below n_features 24, got 24"),
        ({"drift": -5}, "planted.drift: expected degrees from 0 to 180, got -5"),
        ({"persistence": 2}, "planted.persistence: expected a share from 0 to 1"),
        ({"single": 0.7, "neighbours": 0.7}, "planted.neighbours: expected a share that with"),
        ({"n_layers": 1}, "planted.n_layers: expected at least 2"),
        ({"k": 65}, "planted.k: expected at most the 64 latents"),
        ({"tokens": 100}, "planted.tokens: expected at least two sequences"),
        ({"n_features": 0}, "planted.n_features: expected a number above 0"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(SMALL, **change)
