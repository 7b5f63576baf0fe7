"""Carried, rewritten or shared: toys in which the answer is known and differs, and oracles."""

import pandas as pd
import pytest
import torch
from test_analysis import BATCHES, tiny_sae
from test_interventions import hooked
from tiny_lm import CONFIGS, N_LAYERS, reading, tiny_lm

from mlsae_book import toys
from mlsae_book.tables import carried, margins
from mlsae_core.metrics import LayerDistribution, Persistence, Survival, shuffled_updates
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SiteSpec, SpecError


class Found(dict):
    """Both measurements of a toy, when it is asked for: kind → survival, effects and others."""

    def __missing__(self, kind):
        return self.setdefault(kind, toys.measured(kind, 48))


@pytest.fixture(scope="module")
def found():
    return Found()


def at(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    return table


@pytest.mark.parametrize(
    ("kind", "sign"), [("carried", 0), ("amplified", 1), ("erased", -1), ("rewritten", -1)]
)
def test_survival_tells_blocks_that_keep_from_those_that_do_not(found, kind, sign):
    table = at(found[kind]["survival"], of="another token's updates", gap=1)
    for row in table.itertuples():
        if sign:
            assert min(sign * row.excess_low, sign * row.excess_high) > 0.01
        else:
            assert abs(row.excess) < 0.02
            assert row.excess_low - 0.01 < 0 < row.excess_high + 0.01


def test_where_nothing_connects_layers_pairs_are_as_by_chance(found):
    """Features are alike, so each of 8 in 64 is active at a layer whatever it is at others."""
    p, n = toys.ACTIVE / toys.FEATURES, toys.LAYERS
    single = n * p * (1 - p) ** (n - 1) / (1 - (1 - p) ** n)
    table = found["amplified"]["pairs"].set_index("of").single
    for null in carried.APART:
        assert table[null] == pytest.approx(single, abs=0.02)
    assert table[carried.MEASURED] < single - 0.2


def test_a_stream_of_other_tokens_updates_is_the_toy_that_only_adds(found):
    """What `carried` adds asks for no token, so its sums are itself; updates of one step alone, no
    sum, would give 0.03 more."""
    pairs = found["carried"]["pairs"].set_index("of").single
    shuffled = next(iter(carried.UPDATES))
    assert pairs[shuffled] == pytest.approx(pairs[carried.MEASURED], abs=0.01)


def test_over_several_blocks_the_null_model_takes_all_of_their_updates(found):
    toy, generator = toys.Toy("erased", 48), torch.Generator().manual_seed(5)
    for gap in (1, 3):
        expected = Survival(toys.LAYERS - gap, toys.FEATURES)
        for batch in toy.batches(16):
            before = carried.coded(toy.dictionary, batch.source[:-gap])
            null = shuffled_updates(batch.source, generator, gap)
            expected.update(before, carried.coded(toy.dictionary, null))
        table = at(found["erased"]["survival"], of="another token's updates", gap=gap)
        assert table.rate.tolist() == pytest.approx(expected.compute().rate.tolist(), abs=0.02)


def test_intervals_are_around_their_numbers_and_of_the_same_draws(found):
    for kind in ("amplified", "erased"):
        tables = found[kind]
        table = at(tables["survival"], of="another token's updates")
        width = table.excess_high - table.excess_low
        middle = (table.excess_high + table.excess_low) / 2
        assert ((middle - table.excess).abs() < 0.5 * width).all()
        own = at(tables["survival"], of=carried.MEASURED)
        assert (own[["excess_low", "excess_high"]] == 0).all(axis=None)


def recorded(toy, seen):
    """The samples of a toy, whose changes are kept: layer, how far, and in which choice."""
    for sample in toy.samples(16):

        def after(layer, rows, sample=sample):
            seen.append((sample.x[layer] - rows).norm(dim=-1))
            return sample.after(layer, rows)

        yield carried.Sample(sample.x, sample.sequence, after)


def test_null_models_take_out_as_much_and_homes_lie_before_or_after():
    toy, seen = toys.Toy("amplified", 16), []
    zeros = torch.zeros(toys.FEATURES)
    table = carried.effects(recorded(toy, seen), toy.dictionary, zeros, replicates=2)
    for lengths in seen:
        torch.testing.assert_close(lengths[1:], lengths[:1].expand_as(lengths[1:]))
    homes = {layer: set(at(table, layer=layer).home) - {"all"} for layer in (0, 1, 2)}
    assert homes == {0: {"here"}, 1: {"earlier"}, 2: {"earlier"}}


@torch.no_grad()
def test_a_standardised_vector_loses_the_piece_in_its_own_length():
    toy = toys.Toy("carried", 48)
    plain = toy.dictionary
    sae = MLSAE(2 * toys.FEATURES, toys.FEATURES, toys.ACTIVE)
    for mine, rows in ((sae.encoder, plain.encoder), (sae.decoder, plain.decoder)):
        mine.data = rows.data
    zeros = torch.zeros(toys.FEATURES)
    table = carried.effects(toy.samples(16), sae, zeros, replicates=2)
    row = at(table, taken="the latent", after="active there", home="all", layer=0, gap=1).iloc[0]

    def scaled(x):
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)

    # every active latent of every token, not a drawn one
    x, later = torch.cat([batch.source for batch in toy.batches(16)], 1)[:2]
    height, active = scaled(x)[:, : toys.FEATURES].topk(toys.ACTIVE)
    piece = (height * x.std(-1, keepdim=True))[..., None] * torch.eye(x.shape[1])[active]
    less = scaled(later[:, None] - piece).gather(-1, active[..., None])[..., 0]
    a = scaled(later).gather(-1, active)
    stays = a >= scaled(later)[:, : toys.FEATURES].topk(toys.ACTIVE)[0][:, -1:]
    expected = ((a - less) * stays).sum() / (a * stays).sum()
    assert row.direct == pytest.approx(expected.item(), abs=0.02)
    assert row.total == pytest.approx(row.direct, abs=1e-4)


def test_what_is_active_later_is_told_by_the_later_layer(found):
    table = at(found["amplified"]["effects"], taken="the latent", layer=0, home="all", gap=1)
    samples = table.set_index("after").samples
    rate = at(found["amplified"]["survival"], of=carried.MEASURED, gap=1, layer=0).rate.item()
    assert samples["active there"] / samples.sum() == pytest.approx(rate, abs=0.04)


def test_how_sequences_are_batched_does_not_change_intervals():
    toy = toys.Toy("erased", 48)
    one, other = (
        margins.margins(toy, toy.dictionary, size, replicates=20, progress=False)["selections"]
        for size in (8, 48)
    )
    columns = ["single", "single_low", "single_high"]
    one, other = (at(t, of=carried.MEASURED, selection="k")[columns] for t in (one, other))
    assert one.to_numpy() == pytest.approx(other.to_numpy())


@pytest.mark.parametrize(
    ("kind", "total", "direct"),
    [("carried", "a", "a"), ("recomputed", 0, "a"), ("amplified", "a", "a / growth")],
)
def test_ablations_tell_carried_recomputed_and_amplified_apart(found, kind, total, direct):
    """What is taken out is the latent's activation before, known by how the toy is made."""
    table = at(found[kind]["effects"], taken="the latent", layer=0, home="all", gap=1)
    ratio = {"a / growth": 1 / toys.GROWTH, "a": 1.0, 0: 0.0}
    means = {}
    for name, expected in (("total", total), ("direct", direct)):
        # of all samples, whether the latent is still active or not
        weight = table.samples * table.activation
        means[name] = float((table[name] * weight).sum() / weight.sum())
        assert means[name] == pytest.approx(ratio[expected], abs=0.03)
    if kind == "amplified":
        assert means["total"] / means["direct"] == pytest.approx(toys.GROWTH, rel=1e-3)
    if kind == "carried":
        assert means["total"] == pytest.approx(means["direct"], abs=1e-5)


def test_the_null_models_of_an_ablation_do_nothing_where_features_do_not_meet(found):
    for kind in ("carried", "recomputed", "amplified"):
        for taken in carried.TAKEN[1:]:
            table = at(found[kind]["effects"], taken=taken, layer=-1, home="all", gap=1)
            assert table[["total", "direct"]].abs().max(axis=None) < 0.02


def test_one_layer_lives_collapse_without_a_margin_only_where_the_margin_made_them(found):
    share = {kind: found[kind]["pairs"].set_index("of").single for kind in ("carried", "rewritten")}
    last = carried.MARGINS[-1]
    assert share["carried"][last] < 0.1 * share["carried"][carried.MEASURED]
    assert share["rewritten"][last] > 0.35 * share["rewritten"][carried.MEASURED]


@pytest.fixture(scope="module")
def beside():
    """Toys again, with their selections beside those of sums and the latents that blocks treat."""
    return {
        kind: margins.margins(toy := toys.Toy(kind, 96), toy.dictionary, replicates=2)
        for kind in ("carried", "amplified", "erased", "rewritten")
    }


def test_without_a_margin_a_stream_that_only_adds_is_as_its_null_model(beside):
    def share(kind, of):
        return at(beside[kind]["selections"], of=of, selection=carried.MARGINS[-1]).single.item()

    shuffled = next(iter(carried.UPDATES))
    assert share("carried", carried.MEASURED) == pytest.approx(share("carried", shuffled), abs=0.02)
    assert share("rewritten", carried.MEASURED) > 2 * share("rewritten", shuffled)


@pytest.mark.parametrize(("kind", "more", "less"), [("amplified", 1, 0), ("erased", 0, 1)])
def test_latents_that_blocks_treat_are_found_and_others_as_often_as_by_chance(
    beside, kind, more, less
):
    for of in (margins.CHANCE, next(iter(carried.UPDATES))):
        by_chance = at(beside["carried"]["treated"], of=of)
        assert by_chance[["more", "less"]].to_numpy().mean() == pytest.approx(0.025, abs=0.02)
    found = at(beside[kind]["treated"], of=next(iter(carried.UPDATES)))
    assert (found.latents == toys.FEATURES).all()
    assert found.more.mean() == pytest.approx(more, abs=0.1)
    assert found.less.mean() == pytest.approx(less, abs=0.1)


def test_tables_for_the_chapter_keep_their_numbers(found):
    tables = found["amplified"]
    classes = carried.rank_classes(tables["ranks"].assign(case="x"))
    assert classes.sum(axis=1).tolist() == pytest.approx([1.0] * 4)
    first = at(tables["ranks"], of="one layer", where="there")
    first = first[first["rank"] <= 4].share.sum()
    assert classes.loc[("one layer", "there"), "1 to 4"] == pytest.approx(first)
    drops = carried.drops(tables["effects"].assign(case="x"))
    taken = at(tables["effects"], taken="the latent", layer=-1, home="all", gap=2)
    taken = at(taken, after="active there").iloc[0]
    row = at(drops, kind="δ: the latent", gap=2).iloc[0]
    assert (row.value, row.low, row.high) == (taken.direct, taken.direct_low, taken.direct_high)


def test_conditions_stand_side_by_side_in_their_order_with_the_range_of_their_seeds():
    rows = [("b", 0, "x", 0.1), ("b", 0, "a", 1.0), ("a", 0, "x", 0.5), ("a", 0, "a", 2.0)]
    rows += [("b", 1, "x", 0.4), ("b", 1, "a", 1.5), ("a", 1, "x", 0.5), ("a", 1, "a", 1.0)]
    table = pd.DataFrame(rows, columns=["condition", "seed", "measure", "value"])
    found = carried.over_seeds(table, 2)
    assert list(found.index) == ["b", "a"]
    assert list(found.columns) == ["x", "a"]
    assert found.x.tolist() == ["0.25 [0.10, 0.40]", "0.50 [0.50, 0.50]"]
    assert found.a["a"] == "1.50 [1.00, 2.00]"


def test_signatures_of_the_toys_differ(monkeypatch, found):
    monkeypatch.setattr(toys, "measured", lambda kind, *_: found[kind])
    table = toys.signatures().set_index("blocks")
    assert list(table.index) == list(toys.KINDS)
    assert table.excess["amplified"] > 0.05 > abs(table.excess["carried"]) + 0.03
    assert table.excess["erased"] < -0.3
    assert table.total["recomputed"] == pytest.approx(0, abs=0.01)
    measured = at(found["erased"]["survival"], of=carried.MEASURED, gap=1).rate.mean()
    assert table.survival["erased"] == pytest.approx(measured)


@pytest.mark.parametrize("architecture", CONFIGS)
@torch.no_grad()
def test_samples_of_a_text_are_what_a_hooked_pass_gives(architecture):
    lm = tiny_lm(architecture)
    [tokens] = BATCHES[:1]
    source = reading(lm, [tokens], SiteSpec())
    sample = next(carried.text_samples(source, len(tokens), each=2, progress=False))
    streams = lm.capture(tokens, range(N_LAYERS))["residual"]
    flat = streams.flatten(1, 2)
    changed = sample.x[0] + torch.randn(3, *sample.x[0].shape)
    later = sample.after(0, changed)
    assert later.shape == (N_LAYERS - 1, 3, *sample.x[0].shape)
    for i in range(sample.x.shape[1]):
        # where it was read: the one place with this vector
        place = int((flat[0] - sample.x[0, i]).abs().sum(-1).argmin())
        torch.testing.assert_close(flat[:, place], sample.x[:, i], atol=1e-5, rtol=1e-5)
        row, position = divmod(place, tokens.shape[1])
        assert row == int(sample.sequence[i])
        assert lm.keep_mask(tokens)[row, position]

        def put(x, i=i, row=row, position=position):
            x = x.clone()
            x[row, position] = changed[1, i]
            return x

        _, expected = hooked(lm, 0, put, tokens)
        got = later[:, 1, i]
        torch.testing.assert_close(got, expected[1:, row, position], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_scores_are_the_activations_before_selection():
    sae, x = tiny_sae(), torch.randn(2, 7, 16)
    latent = torch.arange(7)
    scaled = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    expected = ((scaled - sae.pre_bias) @ sae.encoder.T)[:, latent, latent]
    torch.testing.assert_close(carried.score(sae, x, latent), expected)
    values, indices = sae.encode(x[0])
    for token in range(7):
        for value, j in zip(values[token], indices[token], strict=True):
            if value > 0:
                own = carried.score(sae, x[0, token : token + 1], j[None])
                torch.testing.assert_close(own[0], value)


def wide_sae():
    """A dictionary large enough for 4 k latents."""
    return MLSAE(16, 48, 3, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_what_is_measured_of_a_text_is_what_its_codes_give():
    lm, sae = tiny_lm(), wide_sae()
    source = reading(lm, BATCHES, SiteSpec())
    got = carried.persistence(source, sae, len(BATCHES[0]), replicates=20, progress=False)
    pairs, spread = Persistence(N_LAYERS, 48), LayerDistribution(N_LAYERS, 48)
    for batch in source.batches(len(BATCHES[0])):
        values, indices = sae.encode(batch.source)
        pairs.update(indices, values)
        spread.update(indices, values)
    expected = pairs.compute()
    for of in (carried.MEASURED, "k"):
        row = at(got["pairs"], of=of).iloc[0]
        assert row["pairs"] == expected.pairs
        assert row.single == pytest.approx(expected.layers[0].item())
        assert row.contiguous == pytest.approx(expected.contiguous)
        assert row.l0 <= 3
    for gap in range(1, N_LAYERS):
        rates = at(got["survival"], of=carried.MEASURED, gap=gap).rate
        assert rates.tolist() == pytest.approx(expected.together.diagonal(gap).tolist())
        assert (at(got["survival"], of=carried.MEASURED).excess == 0).all()
    ratios = at(got["ratios"], of=carried.MEASURED, ratio="Eq. 11")
    for row in ratios.itertuples():
        value = spread.variances(row.weighting, row.corrected).ratio_latent.item()
        assert row.value == pytest.approx(value)
    assert at(got["pairs"], of="one threshold for all layers").l0.item() <= 3


def test_ranks_by_counting():
    # one token, layers 0 to 2, k = 2 of 8 latents: 7 is active at layer 1 alone, held at layer 2.
    indices = torch.tensor([[1, 2, 3, 4], [1, 7, 2, 3], [1, 3, 4, 7]])[:, None]
    values = torch.tensor([4.0, 3, 2, 1]).expand(3, 1, 4)
    counts = carried._ranks(indices, values, 2)
    # alone: 2 at layer 0 (rank 2), 7 at layer 1 (rank 2), 3 at layer 2 (rank 2)
    assert counts[0, 0].tolist() == [0, 3, 0, 0, 0]
    # next to it: 2 has rank 3, 7 rank 4, 3 rank 4
    assert counts[0, 1].tolist() == [0, 0, 1, 2, 0]
    # 1 is active at all layers, first everywhere
    assert counts[1, 0].tolist() == [3, 0, 0, 0, 0]
    assert counts[1, 1].tolist() == [3, 0, 0, 0, 0]


def test_what_has_no_k_to_change_is_refused():
    source = reading(tiny_lm(), BATCHES, SiteSpec())
    for sae in (MLSAE(16, 48, 13), MLSAE(16, 48, 3, activation="jumprelu")):
        with pytest.raises(SpecError, match="expected topk"):
            carried.persistence(source, sae, progress=False)
    stacked = reading(tiny_lm(), BATCHES, SiteSpec(stacked=True))
    with pytest.raises(SpecError, match="stacked"):
        carried.persistence(stacked, wide_sae(), progress=False)


@pytest.mark.parametrize(
    ("n", "expected"), [(2, [1]), (6, [1, 2, 3, 4, 5]), (30, [1, 2, 3, 4, 5, 10, 20])]
)
def test_survival_is_followed_over_every_gap_of_a_small_model(n, expected):
    assert carried.gaps(n) == expected
