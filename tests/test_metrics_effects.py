"""Drops of activations: brute force by group, and any order of merging."""

import math

import pytest
import torch

from mlsae_core.metrics import Effects

N, GROUPS = 200, 5


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = torch.rand(3, N, generator=generator)
    group = torch.randint(-1, GROUPS - 1, (N,), generator=generator)  # the last is empty
    return *parts, group, torch.arange(N) // 10


def test_drops_are_ratios_of_sums_within_each_group():
    a, run, kept, group, _ = drawn()
    found = Effects(GROUPS)
    found.update(a, run, kept, group)
    result = found.compute()
    for g in range(GROUPS - 1):
        rows = [i for i in range(N) if group[i] == g]
        total = sum(float(a[i]) for i in rows)
        assert int(found.samples[g]) == len(rows)
        assert result.activation[g].item() == pytest.approx(total / len(rows))
        for got, other in ((result.total, run), (result.direct, kept)):
            expected = sum(float(a[i] - other[i]) for i in rows) / total
            assert got[g].item() == pytest.approx(expected, abs=1e-6)
    assert int(found.samples[-1]) == 0
    assert math.isnan(result.total[-1])


def test_batches_merging_and_pooling_do_not_change_the_result():
    a, run, kept, group, sequences = drawn()
    one, parts = Effects(GROUPS, 8), [Effects(GROUPS, 8) for _ in range(3)]
    one.update(a, run, kept, group, sequences)
    for part, rows in zip(parts, torch.arange(N).split(80), strict=True):
        part.update(*(x[rows] for x in (a, run, kept, group, sequences)))
    merged = parts[2].merge(parts[0]).merge(parts[1])
    torch.testing.assert_close(merged.sums, one.sums)
    pooled = one.pooled(torch.tensor([1, 0, 1, -1, -1]))
    alone = Effects(2, 8)
    coarse = torch.tensor([1, 0, 1, -1, -1, -1])[group]  # a group of −1 is the last
    alone.update(a, run, kept, coarse, sequences)
    torch.testing.assert_close(pooled.sums, alone.sums)


def test_replicates_are_of_resampled_blocks():
    a, run, kept, group, sequences = drawn()
    found = Effects(GROUPS, 20)
    found.update(a, run, kept, group, sequences)
    result, replicates = found.compute(), found.bootstrap(500, torch.Generator().manual_seed(0))
    assert replicates.total.shape == (500, GROUPS)
    spread = replicates.total[:, :4].std(0)
    assert ((replicates.total[:, :4].mean(0) - result.total[:4]).abs() < 0.3 * spread).all()
    assert (spread > 0.01).all()


def test_what_does_not_fit_is_refused():
    a, run, kept, group, _ = drawn()
    with pytest.raises(ValueError, match=r"\(sample,\)"):
        Effects(GROUPS).update(a, run[1:], kept, group)
    with pytest.raises(ValueError, match="group must be below 2"):
        Effects(2).update(a, run, kept, group)
    with pytest.raises(ValueError, match="needs the sequence ids"):
        Effects(GROUPS, 2).update(a, run, kept, group)
