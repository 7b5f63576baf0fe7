"""Distributions over layers: known answers, a dense brute force, the laws of total variance."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae_core.metrics import (
    LayerDistribution,
    basic_interval,
    gaussian_like,
    permute_layers,
    permute_tokens,
)
from mlsae_core.metrics.distribution import _variances

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)
LAYERS, LATENTS, K = 4, 9, 3


def codes(seed, tokens=23, layers=LAYERS, latents=LATENTS, k=K, dtype=torch.float64):
    """Distinct latents per vector; about a sixth of the values is zero."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(layers, tokens, latents, generator=generator)
    score = score * torch.rand(1, tokens, latents, generator=generator)  # layers agree a little
    indices = score.topk(k).indices
    values = torch.randn(layers, tokens, k, generator=generator, dtype=dtype).add(1).relu()
    return indices, values


def accumulate(indices, values, sizes, n_blocks=1, latents=LATENTS, sequences=None):
    total = LayerDistribution(len(indices), latents, n_blocks)
    for i, part in enumerate(torch.arange(indices.shape[1]).split(sizes)):
        ids = torch.full((len(part),), i) if sequences is None else sequences[part]
        total.update(indices[:, part], values[:, part], ids)
    return total


def dense(indices, values, latents=LATENTS):
    """Eq. 10, 11, 12 from the definitions, with lists of every distribution."""
    layers, tokens, _ = indices.shape
    h = torch.zeros(layers, tokens, latents, dtype=torch.float64)
    h.scatter_(2, indices, values.double())
    per_latent, within = {}, {}
    for j in range(latents):
        at = [h[:, t, j] / h[:, t, j].sum() for t in range(tokens) if h[:, t, j].sum() > 0]
        if at:
            per_latent[j] = torch.stack(at).mean(0)
            within[j] = sum(variance(p) for p in at) / len(at)
    everything = torch.stack(list(per_latent.values())).mean(0)
    exp_j = sum(variance(p) for p in per_latent.values()) / len(per_latent)
    exp_jt = sum(within.values()) / len(within)
    return h, per_latent, (variance(everything), exp_j, exp_jt)


def variance(p):
    layer = torch.arange(len(p), dtype=torch.float64)
    return (p * (layer - (p * layer).sum()) ** 2).sum().item()


def assert_same(a, b, **tolerance):
    for name in a._fields:
        x, y = getattr(a, name), getattr(b, name)
        if name == "variances":
            x, y = torch.stack(x), torch.stack(y)
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        torch.testing.assert_close(
            x, y, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def test_by_hand():
    # latent 0: token 0 at layers 0 and 2 with 1 and 3; token 1 at layer 1.
    # latent 1: token 1 at layer 2. latent 2: only with value zero. latent 3: never.
    indices = torch.tensor([[[0, 2], [2, 3]], [[2, 3], [0, 2]], [[0, 2], [1, 2]]])
    values = torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [5, 0]], [[3, 0], [2, 0]]])
    result = accumulate(indices, values, 2, latents=4).compute()
    assert result.tokens == 2
    assert result.live.tolist() == [True, True, False, False]
    assert result.active_tokens.tolist() == [2, 1, 0, 0]
    # P(L | 0) = mean of (1/4, 0, 3/4) and (0, 1, 0)
    assert result.probs[:, 0].tolist() == [0.125, 0.5, 0.375]
    assert result.probs[:, 1].tolist() == [0, 0, 1]
    assert result.probs[:, 2:].isnan().all()
    torch.testing.assert_close(result.probs_by_total[:, 0], torch.tensor([1, 5, 3]).double() / 9)
    assert result.counts[:, 0].tolist() == [1, 1, 1]
    assert result.totals[:, 0].tolist() == [1, 5, 3]
    assert result.counts[:, 2:].sum() == 0
    assert result.mean_layer[:2].tolist() == [1.25, 2.0]
    # token 0: E[L²] − E[L]² = 3 − 2.25; token 1: 0. So Var(L | 0, T) has the mean 0.375
    assert result.exp_var_l_given_jt == pytest.approx(0.375 / 2)
    # E[L² | 0] = 0.5 + 1.5 = 2
    assert result.exp_var_l_given_j == pytest.approx((2 - 1.25**2) / 2)
    # P(L) = (1/16, 1/4, 11/16)
    assert result.var_l == pytest.approx(0.25 + 4 * 11 / 16 - (0.25 + 22 / 16) ** 2)
    assert result.ratio_latent == pytest.approx(result.exp_var_l_given_j / result.var_l)
    assert result.ratio_token == pytest.approx(0.1875 / 0.21875)
    entropy = -(math.log(0.125) / 8 + math.log(0.5) / 2 + 0.375 * math.log(0.375)) / math.log(3)
    assert result.entropy[:2].tolist() == pytest.approx([entropy, 0])
    assert result.mean_entropy == pytest.approx(entropy / 2)
    assert result.active_layers(0.4).tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert result.active_layers(0.5).tolist() == [0, 0, 0, 0]


@quick
@given(seeds)
def test_equals_the_dense_definition(seed):
    indices, values = codes(seed)
    result = accumulate(indices, values, [5, 1, 17]).compute()
    h, per_latent, variances = dense(indices, values)
    found = (result.var_l, result.exp_var_l_given_j, result.exp_var_l_given_jt)
    assert found == pytest.approx(variances, rel=1e-12)
    assert result.ratio_latent == pytest.approx(variances[1] / variances[0], rel=1e-12)
    assert result.ratio_token == pytest.approx(variances[2] / variances[1], rel=1e-12)
    assert result.live.nonzero()[:, 0].tolist() == list(per_latent)
    for j, p in per_latent.items():
        torch.testing.assert_close(result.probs[:, j], p)
    torch.testing.assert_close(result.totals, h.sum(1))
    assert torch.equal(result.counts, (h > 0).sum(1))
    assert torch.equal(result.active_tokens, (h > 0).any(0).sum(0))


def test_float32_agrees_with_the_dense_definition():
    indices, values = codes(3, dtype=torch.float32)
    result = accumulate(indices, values * 1e-3, 23).compute()
    _, _, variances = dense(indices, values)
    found = (result.var_l, result.exp_var_l_given_j, result.exp_var_l_given_jt)
    assert found == pytest.approx(variances, rel=1e-5)


@quick
@given(seeds)
def test_laws_of_total_variance(seed):
    """Both forms (Eq. 15 and its like for J), from the parts and to 1e-9."""
    indices, values = codes(seed)
    result = accumulate(indices, values, 23).compute()
    layer = torch.arange(LAYERS, dtype=torch.float64)[:, None]
    p = result.probs[:, result.live]
    torch.testing.assert_close(p.sum(0), torch.ones_like(p[0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        result.probs_by_total[:, result.live].sum(0), torch.ones_like(p[0]), rtol=0, atol=1e-12
    )
    mean = (p * layer).sum(0)
    torch.testing.assert_close(mean, result.mean_layer[result.live])
    given_j = (p * (layer - mean) ** 2).sum(0).mean().item()
    assert result.exp_var_l_given_j == pytest.approx(given_j, abs=1e-9)
    # Var(L) = E[Var(L | J)] + Var(E[L | J]), where Var(L) is that of the mixture
    assert variance(p.mean(1)) == pytest.approx(given_j + mean.var(correction=0).item(), abs=1e-9)
    assert result.var_l == pytest.approx(variance(p.mean(1)), abs=1e-9)
    # E[Var(L | J)] = E[Var(L | J, T)] + E[Var(E[L | J, T] | J)]
    h, _, _ = dense(indices, values)
    m = (h * layer[:, None]).sum(0) / h.sum(0)
    between = [m[~m[:, j].isnan(), j].var(correction=0) for j in range(LATENTS) if result.live[j]]
    total = result.exp_var_l_given_jt + torch.stack(between).mean().item()
    assert result.exp_var_l_given_j == pytest.approx(total, abs=1e-9)
    assert 0 <= result.ratio_token <= 1 + 1e-12
    assert 0 <= result.ratio_latent <= 1 + 1e-12


@quick
@given(seeds, st.integers(0, 23), st.integers(0, 23), st.integers(1, 5))
def test_any_split_and_any_order_of_merging_is_one_pass(seed, a, b, n_blocks):
    a, b = sorted((a, b))
    indices, values = codes(seed)
    sequences = torch.arange(23) // 4
    cuts = [slice(0, a), slice(a, b), slice(b, 23)]
    whole = accumulate(indices, values, 23, n_blocks, sequences=sequences)
    parts = [
        accumulate(indices[:, c], values[:, c], 23, n_blocks, sequences=sequences[c]) for c in cuts
    ]
    merged = pickle.loads(pickle.dumps(parts[1])).merge(parts[2]).merge(parts[0])
    assert_same(merged.compute(), whole.compute(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged.sums, whole.sums)
    assert_same(whole.compute(), accumulate(indices, values, 23).compute(), rtol=1e-9, atol=1e-12)


@quick
@given(seeds, st.floats(1e-3, 1e3))
def test_what_changes_nothing(seed, scale):
    """Order of tokens, of latents in a vector; one factor per token; inactive entries."""
    indices, values = codes(seed)
    expected = accumulate(indices, values, 23).compute()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(23, generator=generator)
    slots = torch.randperm(K, generator=generator)
    shuffled = accumulate(indices[:, tokens][..., slots], values[:, tokens][..., slots], 23)
    assert_same(shuffled.compute(), expected, rtol=1e-9, atol=1e-12)
    factors = scale * torch.rand(1, 23, 1, generator=generator, dtype=torch.float64) + 0.01
    scaled = accumulate(indices, values * factors, 23).compute()
    torch.testing.assert_close(scaled.probs, expected.probs, equal_nan=True)
    torch.testing.assert_close(torch.stack(scaled.variances), torch.stack(expected.variances))
    unused = torch.full((LAYERS, 23, 1), LATENTS - 1)
    padded = accumulate(
        torch.cat([indices, unused], 2), torch.cat([values, torch.zeros(LAYERS, 23, 1)], 2), 23
    )
    assert_same(padded.compute(), expected, rtol=1e-9, atol=1e-12)


def test_known_extremes():
    # every latent at its own single layer: nothing within a latent
    indices = torch.arange(3)[:, None, None].expand(3, 5, 1)
    alone = accumulate(indices, torch.rand(3, 5, 1) + 0.1, 5, latents=3).compute()
    assert (alone.exp_var_l_given_j, alone.exp_var_l_given_jt) == (0, 0)
    assert alone.var_l == pytest.approx(2 / 3)
    assert alone.ratio_latent == 0
    assert math.isnan(alone.ratio_token)
    # one latent at every layer with one activation, everything within the token
    everywhere = accumulate(torch.zeros(3, 5, 1).long(), torch.ones(3, 5, 1), 5).compute()
    assert everywhere.ratio_latent == pytest.approx(1)
    assert everywhere.ratio_token == pytest.approx(1)
    assert everywhere.mean_entropy == pytest.approx(1)
    one_layer = accumulate(torch.zeros(1, 5, 1).long(), torch.ones(1, 5, 1), 5).compute()
    assert (one_layer.var_l, one_layer.mean_entropy) == (0, 0)


def test_many_chunks_and_layers(monkeypatch):
    """More entries than one internal chunk, against the dense definition."""
    indices, values = codes(5, tokens=70, layers=50, latents=64, k=40)
    whole, small = LayerDistribution(50, 64, 3), LayerDistribution(50, 64, 3)
    chunks, add = [], whole._add
    monkeypatch.setattr(whole, "_add", lambda i, *rest: chunks.append(i.shape[1]) or add(i, *rest))
    whole.update(indices, values, torch.arange(70))
    assert chunks == [65, 5]  # tokens of 50 · 40 entries, at most 2^17 together
    for t in range(70):
        small.update(indices[:, t : t + 1], values[:, t : t + 1], torch.tensor([t]))
    assert indices.numel() > 2**17
    result = whole.compute()
    assert_same(small.compute(), result, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(small.sums, whole.sums)
    h = torch.zeros(50, 70, 64, dtype=torch.float64).scatter_(2, indices, values)
    p = h / h.sum(0)
    torch.testing.assert_close(result.probs, p.nanmean(1))


@pytest.mark.parametrize(
    ("tokens", "k", "expected"),
    [(2**17, 1, [2**17]), (2**17 + 1, 1, [2**17, 1]), (2, 2**17 + 1, [1, 1]), (2, 2**16, [2])],
)
def test_a_chunk_holds_so_many_entries_or_one_token(monkeypatch, tokens, k, expected):
    total, chunks = LayerDistribution(1, k), []
    monkeypatch.setattr(total, "_add", lambda indices, *_: chunks.append(indices.shape[1]))
    indices = torch.arange(k).expand(1, tokens, k)
    total.update(indices, torch.ones(indices.shape))
    assert chunks == expected


def test_blocks_are_sequences_dealt_in_turn_and_bootstrap_resamples_them():
    indices, values = codes(7)
    sequences = torch.arange(23) // 2
    total = accumulate(indices, values, 23, n_blocks=3, sequences=sequences)
    for block in range(3):
        mine = sequences % 3 == block
        alone = accumulate(indices[:, mine], values[:, mine], 23)
        torch.testing.assert_close(total.sums[block], alone.sums[0])
    # each replicate is the result of a dataset of three blocks drawn with replacement
    replicates = total.bootstrap(40, torch.Generator().manual_seed(1))
    chosen = torch.randint(3, (40, 3), generator=torch.Generator().manual_seed(1))
    for r in (0, 17, 39):
        tokens = torch.cat([(sequences % 3 == b).nonzero()[:, 0] for b in chosen[r]])
        again = accumulate(indices[:, tokens], values[:, tokens], len(tokens)).compute()
        found = torch.stack([field[r] for field in replicates])
        torch.testing.assert_close(found, torch.stack(again.variances))


def test_intervals_cover_the_truth():
    """95 % basic intervals of Eq. 11 on many samples of one population (percentile ones fail)."""

    def sample(n_sequences, seed):
        generator = torch.Generator().manual_seed(seed)
        frequency = -0.8 * torch.arange(1, 31).log()
        preference = torch.randn(3, 1, 1, 30, generator=torch.Generator().manual_seed(0))
        shape = (3, n_sequences, 8, 30)
        topic = torch.randn(1, n_sequences, 1, 30, generator=generator)
        score = torch.randn(shape, generator=generator) + topic + frequency + preference
        indices = score.topk(3).indices.reshape(3, -1, 3)
        return indices, torch.ones(indices.shape), torch.arange(n_sequences).repeat_interleave(8)

    big, values, _ = sample(4000, 123)
    truth = accumulate(big, values, big.shape[1], latents=30).compute().ratio_latent
    basic, percentile = 0, 0
    for seed in range(60):
        indices, values, sequences = sample(64, seed)
        total = accumulate(indices, values, 512, 32, latents=30, sequences=sequences)
        replicates = total.bootstrap(200, torch.Generator().manual_seed(seed)).ratio_latent
        low, high = basic_interval(total.compute().ratio_latent, replicates)
        basic += low <= truth <= high
        percentile += replicates.quantile(0.025) <= truth <= replicates.quantile(0.975)
    assert basic >= 51  # 57 expected
    assert percentile < basic - 6


def test_basic_interval_mirrors_the_quantiles():
    replicates = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert basic_interval(0.4, replicates, 0.9) == pytest.approx((0.8 - 0.95, 0.8 - 0.05))


def test_permuting_layers_keeps_each_token_and_loses_the_preference():
    generator = torch.Generator().manual_seed(0)
    indices, values = codes(1)
    new_indices, new_values = permute_layers(indices, values, generator)
    tag = lambda i, v: sorted(map(tuple, torch.stack([i.double(), v], -1).flatten(1).tolist()))  # noqa: E731
    for t in range(23):
        assert tag(indices[:, t], values[:, t]) == tag(new_indices[:, t], new_values[:, t])
    assert not torch.equal(indices, new_indices)
    # latents that each live at one layer: from nothing within a latent to nearly everything
    indices = torch.arange(3)[:, None, None].expand(3, 20000, 1)
    indices, values = permute_layers(indices, torch.ones(indices.shape), generator)
    result = accumulate(indices, values, 20000, latents=3).compute()
    torch.testing.assert_close(
        result.probs, torch.full((3, 3), 1 / 3, dtype=torch.float64), atol=0.02, rtol=0
    )
    assert result.ratio_latent > 0.99
    assert result.ratio_token == 0


def test_weights_by_tokens_are_what_listing_every_token_gives():
    indices, values = codes(5, tokens=60)
    found = accumulate(indices, values, 60)
    h, per_latent, _ = dense(indices, values)
    tokens = {j: int((h[..., j].sum(0) > 0).sum()) for j in per_latent}
    every = sum(tokens.values())
    latent = sum(n * variance(per_latent[j]) for j, n in tokens.items()) / every
    total = variance(sum(n * per_latent[j] for j, n in tokens.items()) / every)
    within = [variance(p / p.sum()) for p in h.permute(2, 1, 0).flatten(0, 1) if p.sum() > 0]
    got = found.variances("tokens")
    assert got.var_l.item() == pytest.approx(total)
    assert got.exp_var_l_given_j.item() == pytest.approx(latent)
    assert got.exp_var_l_given_jt.item() == pytest.approx(sum(within) / len(within))
    assert len(within) == every
    assert got.ratio_latent != pytest.approx(found.variances().ratio_latent.item(), rel=1e-4)


@pytest.mark.parametrize("weighting", ["latents", "tokens"])
def test_corrected_variances_do_not_depend_on_the_number_of_tokens(weighting):
    """Latents that are active at one layer at a time, with known chances: samples of 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(LATENTS, LAYERS, generator=generator, dtype=torch.float64) ** 3
    chances /= chances.sum(1, keepdim=True)
    truth = sum(variance(p) for p in chances) / LATENTS, variance(chances.mean(0))
    samples = 4000
    layer = torch.multinomial(chances, 6 * samples, True, generator=generator).T
    indices = torch.arange(LATENTS).expand(LAYERS, *layer.shape)
    values = torch.nn.functional.one_hot(layer, LAYERS).permute(2, 0, 1).double()
    total = LayerDistribution(LAYERS, LATENTS, samples)  # each block is a sample
    total.update(indices, values, torch.arange(6 * samples) // 6)
    found = {c: _variances(total.sums, weighting, c) for c in (False, True)}
    means = {c: v.exp_var_l_given_j.mean().item() for c, v in found.items()}
    assert means[True] == pytest.approx(truth[0], rel=0.005)
    assert means[False] == pytest.approx(truth[0] * 5 / 6, rel=0.005)
    assert found[True].var_l.mean().item() == pytest.approx(truth[1], rel=0.005)
    assert (found[True].ratio_token == 0).all()


def test_a_latent_with_one_token_has_no_variance_between_tokens():
    indices = torch.tensor([[[0]], [[0]]])
    total = LayerDistribution(2, 1)
    total.update(indices, torch.ones(2, 1, 1))
    assert [x.item() for x in total.variances(corrected=True)] == [0.25, 0.25, 0.25, 1, 1]


def test_permuting_tokens_keeps_each_layer_and_loses_the_token():
    indices, values = codes(2, tokens=500)
    got = permute_tokens(indices, values, torch.Generator().manual_seed(0))
    for layer in range(LAYERS):
        rows = [sorted(zip(i[layer].tolist(), v[layer].tolist(), strict=True))
                for i, v in ((indices, values), got)]  # fmt: skip
        assert rows[0] == rows[1]
    together = [
        torch.stack([(i[0, :, :, None] == i[1, :, None]).any(-1)]).double().mean()
        for i in (indices, got[0])
    ]
    assert together[0] > 1.2 * together[1]


def test_equal_draws_leave_the_layers_in_their_order(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
    indices = torch.arange(128)[:, None, None].expand(128, 5, 1)
    assert torch.equal(permute_layers(indices, torch.ones(indices.shape))[0], indices)


def test_gaussian_like_keeps_norms_and_is_isotropic():
    x = torch.randn(2, 5000, 3) * torch.tensor([5.0, 1.0, 0.1]) + torch.tensor([9.0, 0.0, 0.0])
    y = gaussian_like(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    direction = (y / y.norm(dim=-1, keepdim=True)).reshape(-1, 3)
    assert direction.mean(0).abs().max() < 0.03
    torch.testing.assert_close(direction.T @ direction / 10000, torch.eye(3) / 3, atol=0.02, rtol=0)


@pytest.mark.parametrize("empty", [(slice(0, 0), slice(None)), (slice(None), slice(0, 0))])
def test_tokens_without_active_latents_count_as_seen(empty):
    indices, values = codes(0)
    total = LayerDistribution(LAYERS, LATENTS)
    total.update(indices, values)
    expected = total.compute()
    nothing = indices[:, *empty], values[:, *empty]
    total.update(*nothing)
    assert_same(total.compute()._replace(tokens=23), expected)
    assert total.tokens == 23 + nothing[0].shape[1]


def test_what_is_kept_holds_no_graph():
    indices, values = codes(0)
    total = LayerDistribution(LAYERS, LATENTS)
    total.update(indices, values.requires_grad_())
    assert not any(t.requires_grad for t in (total.weights, total.totals, total.sums))


def test_two_blocks_are_enough_to_resample():
    indices, values = codes(0)
    total = accumulate(indices, values, 23, n_blocks=2, sequences=torch.arange(23))
    assert total.bootstrap(50, torch.Generator().manual_seed(0)).var_l.unique().numel() == 3


def test_errors_say_what_was_expected():
    indices, values = codes(0)
    total = LayerDistribution(LAYERS, LATENTS, n_blocks=2)
    with pytest.raises(ValueError, match="no latent has been active"):
        total.compute()
    with pytest.raises(ValueError, match="needs the sequence ids"):
        total.update(indices, values)
    with pytest.raises(ValueError, match=r"sequences must be \(23,\)"):
        total.update(indices, values, torch.zeros(5))
    for wrong, message in ((9, "0 to 9"), (12, "0 to 12"), (-1, "-1 to 4"), (-3, "-3 to 4")):
        with pytest.raises(ValueError, match=rf"\[0, 9\), got {message}"):
            total.update(indices * 0 + torch.tensor([0, 4, wrong]), values, torch.zeros(23))
    with pytest.raises(ValueError, match="negative or nan"):
        total.update(indices, values * torch.nan, torch.zeros(23))
    with pytest.raises(ValueError, match="negative or nan"):
        total.update(indices, values - 1, torch.zeros(23))
    wrong = [(indices[:2], values[:2]), (indices[0], values[0]), (indices, values[:, :, :2])]
    wrong += [(indices[:, :, 0], values[:, :, 0]), (indices[..., None], values[..., None])]
    for pair in wrong:
        with pytest.raises(ValueError, match=r"= \(4, token, k\), got"):
            total.update(*pair, torch.zeros(23))
    with pytest.raises(ValueError, match="one size"):
        total.merge(LayerDistribution(LAYERS, LATENTS))
    with pytest.raises(ValueError, match="n_blocks ≥ 2"):
        LayerDistribution(LAYERS, LATENTS).bootstrap(10)
