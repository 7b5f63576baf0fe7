"""Worlds on which surrogates are tried: what they have in common and what sets them apart."""

import dataclasses

import pandas as pd
import pytest
import torch
from test_planted import SMALL

from mlsae_book import controls, planted, surrogates
from mlsae_book.tables import carried
from mlsae_core.spec import SpecError

SHORT = dataclasses.replace(SMALL, training_tokens=49_152)


def vectors(source, seed=0):
    """(token, layer · d_model) of 256 sequences that no pass without a seed has."""
    batches = source.batches(64, seed)
    return torch.cat([next(batches).source for _ in range(4)], 1).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("share", controls.WORLDS.values())
def test_worlds_have_the_moments_of_the_planted_one_whatever_is_gaussian(share):
    world = planted.World(SMALL)
    mean, covariance = surrogates.joint_moments(world)
    x, own = vectors(controls.blend(world, share)), vectors(world)
    torch.testing.assert_close(x.mean(0).double(), mean, atol=0.05, rtol=0)
    assert (x.T.cov() - covariance).norm() < 0.08 * covariance.norm()
    # the part of the world that is left in each vector
    centre = mean.float()
    left = ((x - centre) * (own - centre)).sum() / (own - centre).square().sum()
    assert left.item() == pytest.approx((1 - share) ** 0.5, abs=0.02)
    kurtosis = ((x - x.mean(0)) / x.std(0)).pow(4).mean()
    expected = ((own - own.mean(0)) / own.std(0)).pow(4).mean() - 3
    assert kurtosis.item() - 3 == pytest.approx((1 - share) ** 2 * expected.item(), abs=0.05)
    assert expected > 0.3


def test_the_gaussian_of_a_gaussian_world_is_another_draw_of_it():
    own = controls.blend(planted.World(SMALL), 1)
    x, y = (vectors(source) for source in (own, controls.redrawn(own)))
    alike = torch.cosine_similarity(x - x.mean(0), y - y.mean(0), dim=1)
    assert alike.mean().abs() < 4 * alike.std() / len(alike) ** 0.5
    assert (x.T.cov() - y.T.cov()).norm() < 0.1 * x.T.cov().norm()


def test_worlds_with_and_without_offsets_differ_in_nothing_else():
    world = planted.World(SMALL)
    x = {name: vectors(controls.displaced(world, by)) for name, by in controls.APART.items()}
    by = (x["offsets"] - x["no offsets"]).view(-1, world.n_layers, world.d_model)
    torch.testing.assert_close(by, by[:1].expand_as(by), atol=1e-5, rtol=0)
    lengths = x["no offsets"].view(by.shape).var(0).sum(-1).sqrt()
    torch.testing.assert_close(by[0].norm(dim=-1), 0.5 * lengths, atol=0, rtol=0.02)
    assert by.sum(-1).abs().max() < 1e-4  # standardising takes nothing off them
    apart = torch.cosine_similarity(by[0, :-1], by[0, 1:], dim=-1)
    assert apart.abs().max() < 0.6
    assert x["no offsets"].mean(0).norm() < 0.05 * lengths.norm()


@pytest.fixture(scope="module")
def found():
    tables = controls.controls(SHORT)
    return {
        name: table.pivot_table("value", ["world", "vectors"], "measure", sort=False)
        for name, table in tables.items()
    }


def test_a_gaussian_is_told_from_features_and_not_from_a_gaussian(found):
    table = found["moments"]
    worlds = list(controls.WORLDS)
    assert list(table.index) == [
        (world, vectors) for world in worlds for vectors in (controls.OWN, controls.SURROGATE)
    ]
    change = table.xs(controls.SURROGATE, level=1) - table.xs(controls.OWN, level=1)
    for measure in ("single", "mean layers", "survival", "fvu", "Eq. 12, tokens"):
        features, between, gaussian = change[measure].abs()[worlds]
        assert features > 0.02, measure
        assert gaussian < 0.25 * features, measure
        assert between < features, measure
    # a matter of second moments, but for a mean of ratios being no ratio of means
    assert change["adjacent cosine"].abs().max() < 0.05


def test_taking_the_means_off_changes_what_offsets_change_and_nothing_else(found):
    table = found["offsets"]
    own, without = (table.xs(name, level=1) for name in (controls.OWN, controls.CENTRED))
    for measure in ("single", "Eq. 11, tokens"):
        one, other = (without - own)[measure].abs()[list(controls.APART)]
        assert one < 0.25 * other, measure
    after = without["Eq. 11, tokens"]
    assert after["offsets"] == pytest.approx(after["no offsets"], abs=0.02)


def test_what_vectors_make_of_a_world_is_taken_seed_by_seed(monkeypatch):
    values = {0: (1.0, 2.0), 1: (3.0, 3.5), 2: (2.0, 3.5)}
    rows = [
        {"seed": seed, "world": "w", "vectors": name, "measure": "m", "value": value}
        for seed, pair in values.items()
        for name, value in zip(("b", "a"), pair, strict=True)
    ]
    table = controls.compared(pd.DataFrame(rows))
    assert list(table.vectors) == ["b", "a", controls.DIFFERENCE]
    assert table.value.tolist() == pytest.approx([2.0, 3.0, 1.0])
    last = table.iloc[-1]  # 1, 0.5 and 1.5: standard deviation 0.5
    assert last.high - last.value == pytest.approx(4.303 * 0.5 / 3**0.5)
    monkeypatch.setattr(controls, "SHOWN", ("m",))
    assert controls.differences(table).value.tolist() == pytest.approx([1.0])
    text = controls.in_numbers(table, 2)
    assert text.m.tolist() == ["2.00", "3.00", "1.00 [-0.24, 2.24]"]
    monkeypatch.setattr(controls, "SHOWN", ())
    assert controls.differences(table).empty


def test_trainings_stand_side_by_side_with_the_interval_of_their_mean():
    rows = [(gap, seed, value) for gap in (5, 1) for seed, value in ((1, 0.2 * gap), (0, 0.1))]
    table = pd.DataFrame(rows, columns=["gap", "seed", "excess"])
    found = carried.trainings(table, "excess", ["gap"], 2)
    assert list(found.index) == [1, 5]
    assert found["seed 1"].tolist() == [0.2, 1.0]
    assert found["mean"].tolist() == ["0.15 [-0.49, 0.79]", "0.55 [-5.17, 6.27]"]
    with pytest.raises(SpecError, match="seed: expected 2 to 5 trainings, got 1"):
        carried.over_trainings([1.0])
