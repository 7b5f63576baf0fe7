"""Persistence and survival: brute force, planted streams where the answer is known and differs."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics_distribution import LATENTS, LAYERS, K, codes

from mlsae_core.metrics import (
    Excess,
    Persistence,
    Survival,
    basic_interval,
    drifted,
    hysteresis,
    of_batch,
    random_updates,
    shuffled_updates,
)

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


def pairs(indices, values):
    """The set of layers of every (token, latent) pair, from the definition."""
    found = {}
    for layer, token, i in itertools.product(*map(range, indices.shape)):
        if values[layer, token, i] > 0:
            found.setdefault((token, int(indices[layer, token, i])), set()).add(layer)
    return found


@quick
@given(seeds)
def test_persistence_is_what_counting_pairs_gives(seed):
    indices, values = codes(seed)
    got = Persistence(LAYERS, LATENTS)
    got.update(indices, values)
    result, found = got.compute(), list(pairs(indices, values).values())
    assert result.pairs == len(found)
    for n in range(1, LAYERS + 1):
        share = sum(len(layers) == n for layers in found) / len(found)
        assert result.layers[n - 1].item() == pytest.approx(share, abs=1e-12)
    assert result.mean_layers == pytest.approx(sum(map(len, found)) / len(found))
    several = [layers for layers in found if len(layers) > 1]
    whole = [layers for layers in several if max(layers) - min(layers) == len(layers) - 1]
    assert result.contiguous == pytest.approx(len(whole) / len(several))
    for a, b in itertools.product(range(LAYERS), repeat=2):
        at_a = [layers for layers in found if a in layers]
        expected = sum(b in layers for layers in at_a) / len(at_a)
        assert result.together[a, b].item() == pytest.approx(expected)


@quick
@given(seeds)
def test_survival_is_what_counting_latents_gives(seed):
    before, after = codes(seed), codes(seed + 1, k=K + 1)
    got = Survival(LAYERS, LATENTS)
    got.update(before, after)
    result = got.compute()
    active, kept = torch.zeros(2, LAYERS, LATENTS, dtype=torch.float64)
    for layer in range(LAYERS):
        left, right = (
            pairs(i[layer : layer + 1], v[layer : layer + 1]) for i, v in (before, after)
        )
        for token, latent in left:
            active[layer, latent] += 1
            kept[layer, latent] += (token, latent) in right
    torch.testing.assert_close(result.rate, kept.sum(1) / active.sum(1))
    torch.testing.assert_close(result.rate_by_latent, kept / active, equal_nan=True)
    assert torch.equal(result.active, active.long())


def test_survival_of_neighbouring_layers_is_the_persistence_of_their_pairs():
    indices, values = codes(3, tokens=400)
    whole, step = Persistence(LAYERS, LATENTS), Survival(LAYERS - 1, LATENTS)
    whole.update(indices, values)
    step.update((indices[:-1], values[:-1]), (indices[1:], values[1:]))
    expected = whole.compute().together.diagonal(1)
    torch.testing.assert_close(step.compute().rate, expected)


@quick
@given(seeds, st.sampled_from([1, 5, 23]))
def test_batches_processes_and_blocks_do_not_change_the_result(seed, size):
    indices, values = codes(seed)
    sequences = torch.arange(23) // 4
    for make, codes_of in (
        (Persistence, lambda rows: (indices[:, rows], values[:, rows])),
        (Survival, lambda rows: ((indices[:, rows], values[:, rows]),) * 2),
    ):
        one = make(LAYERS, LATENTS)
        one.update(*codes_of(slice(None)))
        parts = []
        for rows in torch.arange(23).split(size):
            part = make(LAYERS, LATENTS, 3)
            part.update(*codes_of(rows), sequences[rows])
            parts.append(pickle.loads(pickle.dumps(part)))
        total = parts[0]
        for part in parts[1:]:
            total.merge(part)
        for a, b in zip(one.compute(), total.compute(), strict=True):
            torch.testing.assert_close(
                torch.as_tensor(a), torch.as_tensor(b), rtol=1e-12, atol=1e-12, equal_nan=True
            )


def stream(kind, tokens=6000, width=64, k=8, layers=4, seed=0):
    """A planted residual stream in the basis of its latents, of one of three kinds of block.

    pass: updates that do not depend on the token; carry: they favour what is active already;
    erase: they take away what is active.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, tokens, width, generator=generator)
    for _ in range(layers - 1):
        last = x[-1]
        update = 0.3 * torch.rand(tokens, width, generator=generator)
        active = torch.zeros_like(last).scatter_(1, last.topk(k).indices, 1.0)
        update += {"pass": 0.0, "carry": 0.3, "erase": -0.3}[kind] * active
        x = torch.cat([x, (last + update)[None]])
    return x


def code(x, k=8):
    found = x.topk(k)
    return found.indices, found.values.clamp(min=0)


def rates(kind, n_blocks=32):
    x = stream(kind)
    generator = torch.Generator().manual_seed(1)
    sequences = torch.arange(x.shape[1]) // 10
    found = {}
    for name, after in {
        "real": x[1:],
        "shuffled": shuffled_updates(x, generator),
        "random": random_updates(x, generator),
    }.items():
        total = Survival(len(x) - 1, x.shape[2], n_blocks)
        total.update(code(x[:-1]), code(after), sequences)
        rate = total.compute().rate
        replicates = total.bootstrap(400, generator)
        found[name] = rate, [basic_interval(r.item(), replicates[:, i]) for i, r in enumerate(rate)]
    return found


def test_passing_through_carrying_and_erasing_are_told_apart():
    """The question has power: three planted kinds of block give three answers."""
    passing, carrying, erasing = map(rates, ("pass", "carry", "erase"))
    for step in range(3):
        (low, high), (least, most) = (passing[name][1][step] for name in ("real", "shuffled"))
        assert max(low, least) <= min(high, most)
        assert high - low < 0.01
        assert carrying["real"][1][step][0] > carrying["shuffled"][1][step][1]
        assert erasing["real"][1][step][1] < erasing["shuffled"][1][step][0]


def test_null_updates_keep_what_they_say():
    x = stream("carry").double()
    update, generator = x[1:] - x[:-1], torch.Generator().manual_seed(0)
    shuffled = shuffled_updates(x, generator) - x[:-1]
    torch.testing.assert_close(shuffled.sum(1), update.sum(1))  # the same updates
    assert (shuffled - update).abs().mean() > 0.05  # at other tokens
    norms = [torch.linalg.vector_norm(u, dim=-1).sort(1).values for u in (shuffled, update)]
    torch.testing.assert_close(*norms)
    drawn = random_updates(x, generator) - x[:-1]
    for measure in (lambda u: torch.linalg.vector_norm(u, dim=-1), lambda u: (u * x[:-1]).sum(-1)):
        torch.testing.assert_close(measure(drawn), measure(update))
    unit = [u / torch.linalg.vector_norm(u, dim=-1, keepdim=True) for u in (drawn, update)]
    along = x[:-1] / torch.linalg.vector_norm(x[:-1], dim=-1, keepdim=True)
    across = [u - (u * along).sum(-1, keepdim=True) * along for u in unit]
    assert (across[0] * across[1]).sum(-1).mean().abs() < 0.01


def test_null_updates_over_several_blocks_are_the_sum_of_their_updates():
    x = stream("carry").double()
    generator = torch.Generator().manual_seed(0)
    for null in (shuffled_updates, random_updates):
        drawn = null(x, generator, gap=2) - x[:-2]
        assert drawn.shape == x[2:].shape
        norms = [
            torch.linalg.vector_norm(u, dim=-1).sort(1).values for u in (drawn, x[2:] - x[:-2])
        ]
        torch.testing.assert_close(*norms)


def test_a_drifted_stream_starts_as_measured_and_takes_nothing_but_null_updates():
    x, generator = stream("carry").double(), torch.Generator().manual_seed(0)
    got = drifted(x, lambda pair: shuffled_updates(pair, generator))
    assert torch.equal(got[0], x[0])
    for block in range(len(x) - 1):
        updates = [(y[block + 1] - y[block]).sort(0).values for y in (x, got)]
        torch.testing.assert_close(*updates)
    assert (got[1:] - x[1:]).abs().mean() > 0.05
    again = drifted(x, lambda pair: pair[1:])  # the stream's own updates
    torch.testing.assert_close(again, x)


def test_one_threshold_keeps_as_many_latents_as_topk_and_the_largest():
    _, values = codes(1, tokens=50, k=6)
    values = values.sort(-1, descending=True).values
    _, got = of_batch(torch.arange(6).expand_as(values), values, 2)
    kept = got > 0
    assert int(kept.sum()) == 2 * LAYERS * 50
    assert values[kept].min() > values[~kept].max()
    assert torch.equal(got[kept], values[kept])
    assert kept.sum(-1).double().var() > 0.1  # not the same number everywhere


def test_hysteresis_keeps_a_latent_on_between_and_around_layers_where_it_is_on():
    # One token; latent 7 is on at layer 1 and held at 0, 2 and 3, but not at 4; 5 is never on.
    order = [[1, 2, 7, 5], [7, 1, 2, 5], [1, 3, 7, 5], [1, 3, 4, 7], [1, 3, 4, 6], [1, 2, 3, 7]]
    indices = torch.tensor(order)[:, None]
    values = torch.tensor([4.0, 3, 2, 1]).expand(6, 1, 4)
    got, on = hysteresis(indices, values, 1, 6)
    assert torch.equal(got, indices)
    active = {layer: set(got[layer, 0][on[layer, 0] > 0].tolist()) for layer in range(6)}
    assert active == {0: {1, 7}, 1: {1, 7}, 2: {1, 7}, 3: {1, 7}, 4: {1}, 5: {1}}
    assert torch.equal(on[on > 0], values[on > 0])
    for bad in (0, 4):
        with pytest.raises(ValueError, match="more than k"):
            hysteresis(indices, values, bad, 6)


def test_nothing_to_count_and_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no latent has been active"):
        Persistence(2, 3).compute()
    indices, values = codes(0)
    with pytest.raises(ValueError, match="needs the sequence ids"):
        Persistence(LAYERS, LATENTS, 2).update(indices, values)
    with pytest.raises(ValueError, match=r"sequences must be \(23,\)"):
        Persistence(LAYERS, LATENTS, 2).update(indices, values, torch.arange(3))
    with pytest.raises(ValueError, match="after must have the 23 tokens"):
        Survival(LAYERS, LATENTS).update((indices, values), (indices[:, 1:], values[:, 1:]))
    with pytest.raises(ValueError, match="n_blocks"):
        Survival(LAYERS, LATENTS).bootstrap(3)


# --- survival beside a null model, latent by latent -----------------------------------------------


def excess_by_hand(before, after, null, sequences, latent):
    """Difference and standard error of one latent over one step, sequence by sequence."""
    b, d = [], []
    for sequence in sequences.unique():
        rows = sequences == sequence
        there, stays, chance = (
            ((i[rows] == latent) & (v[rows] > 0)).any(-1) for i, v in (before, after, null)
        )
        b.append(int(there.sum()))
        d.append(int((there & stays).sum()) - int((there & chance).sum()))
    ratio = sum(d) / sum(b)
    squares = sum((y - ratio * x) ** 2 for x, y in zip(b, d, strict=True))
    n = len(b)
    return ratio, (n / (n - 1) * squares) ** 0.5 / sum(b), sum(b), sum(x > 0 for x in b)


@pytest.mark.parametrize("size", [60, 12])
def test_excess_and_its_error_are_those_of_a_ratio_over_sequences(size):
    indices, values = codes(0, tokens=60)
    other, others = codes(1, tokens=60)
    sequences = torch.arange(60) // 4
    total = Excess(LAYERS - 1, LATENTS)
    for rows in torch.arange(60).split(size):
        part = Excess(LAYERS - 1, LATENTS)
        before, after = (
            (indices[s][:, rows], values[s][:, rows]) for s in (slice(-1), slice(1, None))
        )
        part.update(before, after, (other[1:][:, rows], others[1:][:, rows]), sequences[rows])
        total.merge(pickle.loads(pickle.dumps(part)))
    found = total.compute()
    for step, latent in itertools.product(range(LAYERS - 1), range(LATENTS)):
        sides = (indices[step], values[step]), (indices[step + 1], values[step + 1])
        null = other[step + 1], others[step + 1]
        if not (found.active[step, latent]):
            assert found.difference[step, latent].isnan()
            continue
        expected = excess_by_hand(*sides, null, sequences, latent)
        got = [float(part[step, latent]) for part in found]
        assert got == pytest.approx(expected)


def test_errors_over_sequences_hold_where_tokens_depend_on_each_other():
    """What survives is drawn once for a sequence: errors of independent tokens would promise more
    than there is."""
    generator = torch.Generator().manual_seed(0)
    latents, sequences, length = 200, 100, 10
    stays = torch.rand(2, sequences, latents, generator=generator) < 0.5
    stays = stays.repeat_interleave(length, 1).double()
    indices = torch.arange(latents).expand(1, sequences * length, latents)
    active = torch.ones(1, sequences * length, latents)
    found = Excess(1, latents)
    numbers = torch.arange(sequences).repeat_interleave(length)
    found.update((indices, active), (indices, stays[:1]), (indices, stays[1:]), numbers)
    result = found.compute()
    beyond = (result.difference.abs() > 2 * result.error).double().mean()
    assert beyond == pytest.approx(0.05, abs=0.04)
    naive = (0.5 / (sequences * length)) ** 0.5
    assert (result.difference.abs() > 2 * naive).double().mean() > 0.4


def test_excess_of_what_cannot_be_added_is_refused():
    indices, values = codes(0, tokens=8)
    sides = ((indices[:-1], values[:-1]), (indices[1:], values[1:]))
    with pytest.raises(ValueError, match="sequences must be"):
        Excess(LAYERS - 1, LATENTS).update(*sides, sides[1], torch.zeros(7))
    with pytest.raises(ValueError, match="only accumulators of one size"):
        Excess(1, LATENTS).merge(Excess(2, LATENTS))
