"""Metrics of groups of tokens: plain loops, what groups add up to, and planted sinks."""

import math
import pickle

import pytest
import torch

from mlsae_core.metrics import Groups, Reconstruction

LAYERS, TOKENS, WIDTH, LATENTS, K = 2, 30, 4, 9, 3


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(LAYERS, TOKENS, *shape, generator=generator, dtype=torch.float64)

    x = 3 + noise(WIDTH)
    indices = noise(LATENTS).argsort(-1)[..., :K]
    values = noise(K).clamp_min(0)
    group = torch.randint(3, (TOKENS,), generator=generator)
    return x, x + 0.3 * noise(WIDTH), indices, values, group


def accumulated(parts, size=7, n_groups=4):
    total = Groups(n_groups, LAYERS, WIDTH, LATENTS)
    x, recon, indices, values, group = parts
    for rows in torch.arange(TOKENS).split(size):
        total.update(x[:, rows], recon[:, rows], indices[:, rows], values[:, rows], group[rows])
    return total


def plain(parts, group, layer):
    """The definitions, one token at a time."""
    x, recon, indices, values, groups = parts
    mean = math.fsum(x[layer].flatten().tolist()) / x[layer].numel()
    rows = [t for t in range(TOKENS) if groups[t] == group]

    def squares(a, b):
        return math.fsum((u - v) ** 2 for u, v in zip(a.tolist(), b.tolist(), strict=True))

    about = {t: squares(x[layer, t], torch.full((WIDTH,), mean)) for t in range(TOKENS)}
    spread = math.fsum(about[t] for t in rows)
    uses = {}
    for t in rows:
        for j, h in zip(indices[layer, t].tolist(), values[layer, t].tolist(), strict=True):
            if h > 0:
                uses[j] = uses.get(j, 0) + 1
    p = [n / sum(uses.values()) for n in uses.values()]
    return {
        "norm": math.fsum(math.sqrt(squares(x[layer, t], torch.zeros(WIDTH))) for t in rows)
        / len(rows),
        "share": spread / math.fsum(about.values()),
        "fvu": math.fsum(squares(x[layer, t], recon[layer, t]) for t in rows) / spread,
        "l1": math.fsum(values[layer, rows].flatten().tolist()) / len(rows),
        "l0": int((values[layer, rows] > 0).sum()) / len(rows),
        "latents": math.exp(-math.fsum(q * math.log(q) for q in p)),
    }


def test_groups_agree_with_plain_loops_and_one_without_tokens_has_no_numbers():
    parts = drawn()
    result = accumulated(parts).compute()
    assert result.tokens.tolist() == [*parts[-1].bincount().tolist(), 0]
    for group in range(3):
        for layer in range(LAYERS):
            for name, value in plain(parts, group, layer).items():
                assert float(getattr(result, name)[group, layer]) == pytest.approx(value), name
    for name in ("norm", "share", "fvu", "l1", "l0", "latents"):
        assert getattr(result, name)[3].isnan().all()


def test_groups_weighted_by_their_shares_add_up_to_the_layer():
    parts = drawn(1)
    result, whole = accumulated(parts).compute(), Reconstruction(LAYERS, WIDTH)
    whole.update(parts[0], parts[1], parts[3])
    expected = whole.compute()
    torch.testing.assert_close((result.share * result.fvu)[:3].sum(0), expected.fvu_global)
    n = result.tokens[:3, None] / TOKENS
    torch.testing.assert_close((n * result.l1[:3]).sum(0), expected.l1)
    torch.testing.assert_close(result.share[:3].sum(0), torch.ones(LAYERS, dtype=torch.float64))


def test_groups_can_be_cut_merged_pickled_and_pooled():
    parts = drawn(2)
    expected = accumulated(parts, TOKENS).compute()
    half = TOKENS // 2
    early, late = (Groups(4, LAYERS, WIDTH, LATENTS) for _ in range(2))
    for total, rows in ((early, slice(0, half)), (late, slice(half, None))):
        total.update(*(part[:, rows] for part in parts[:-1]), parts[-1][rows])
    merged = pickle.loads(pickle.dumps(late)).merge(early).compute()
    for mine, its in zip(merged, expected, strict=True):
        torch.testing.assert_close(mine, its, equal_nan=True)
    pooled = accumulated(parts).pooled([(2,), (0, 1)]).compute()
    coarse = accumulated([*parts[:-1], (parts[-1] < 2).long()]).compute()
    for mine, its in zip(pooled, coarse, strict=True):
        torch.testing.assert_close(mine, its[:2])
    alone = accumulated(parts).pooled([(1,)]).compute()
    assert alone.share.tolist() == [[1.0] * LAYERS]


def test_planted_sinks_carry_the_variance_and_hide_what_the_rest_loses():
    x, _, indices, values, _ = drawn(3)
    x[:, 0] *= 1000
    sink = torch.zeros(TOKENS, dtype=torch.long)
    sink[0] = 1
    recon = x.clone()
    recon[:, sink == 0] = 3.0  # of all others the mean and no more
    total = Groups(2, LAYERS, WIDTH, LATENTS)
    total.update(x, recon, indices, values, sink)
    result, both = total.compute(), total.pooled([(0, 1)]).compute()
    assert result.share[1].min() > 0.9
    assert both.fvu.max() < 1e-3
    assert total.pooled([(0,)]).compute().fvu.min() > 0.9


def test_what_does_not_fit_is_refused():
    x, recon, indices, values, group = drawn()
    total = Groups(3, LAYERS, WIDTH, LATENTS)
    with pytest.raises(ValueError, match="no tokens seen"):
        total.compute()
    with pytest.raises(ValueError, match=r"group must be \(30,\), got \(29,\)"):
        total.update(x, recon, indices, values, group[:-1])
    with pytest.raises(ValueError, match=r"group must lie in \[0, 3\), got 0 to 3"):
        total.update(x, recon, indices, values, group.clone().fill_(0).index_fill_(0, group[:1], 3))
    with pytest.raises(ValueError, match="only accumulators of one size"):
        total.merge(Groups(2, LAYERS, WIDTH, LATENTS))
