"""FVU, MSE, L1 and L0: hand-computed values, brute force, and the laws they obey."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae_core.metrics import LayerMoments, Reconstruction, fvu
from mlsae_core.metrics.resampling import _resampled

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


def activations(seed, layers=3, tokens=29, d_model=5, offset=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(layers, tokens, d_model, generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, layers + 1)[:, None, None]
    x = x + offset * torch.randn(layers, 1, d_model, generator=generator, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x = x.to(dtype)
    return x, x + 0.3 * noise.to(dtype)


def dense_fvu(x, recon, variant):
    """The definition, one layer, token and dimension at a time."""
    ratios = []
    for rows, guesses in zip(x.tolist(), recon.tolist(), strict=True):
        columns = list(zip(*rows, strict=True))
        means = [math.fsum(column) / len(column) for column in columns]
        if variant == "global":
            means = [math.fsum(means) / len(means)] * len(means)
        pairs = [
            pair for a, b in zip(rows, guesses, strict=True) for pair in zip(a, b, strict=True)
        ]
        error = math.fsum((a - b) ** 2 for a, b in pairs)
        total = math.fsum((a - m) ** 2 for row in rows for a, m in zip(row, means, strict=True))
        ratios.append(error / total)
    return torch.tensor(ratios, dtype=torch.float64)


def accumulate(x, recon, sizes, values=None):
    total = Reconstruction(x.shape[0], x.shape[2])
    parts = values.split(sizes, 1) if values is not None else [None] * len(sizes)
    for a, b, h in zip(x.split(sizes, 1), recon.split(sizes, 1), parts, strict=True):
        total.update(a, b, h)
    return total


def test_fvu_by_hand():
    x = torch.tensor([[[0.0, 10.0], [2.0, 12.0]]])
    recon = torch.tensor([[[1.0, 10.0], [2.0, 12.0]]])
    # error 1; about the mean 6: 36 + 16 + 16 + 36 = 104; about the mean vector (1, 11): 4
    torch.testing.assert_close(fvu(x, recon), torch.tensor([1 / 104], dtype=torch.float64))
    torch.testing.assert_close(
        fvu(x, recon, "per_dimension"), torch.tensor([0.25], dtype=torch.float64)
    )


def test_reconstruction_by_hand():
    x = torch.tensor([[[0.0, 10.0], [2.0, 12.0]]])
    recon = torch.tensor([[[1.0, 10.0], [2.0, 12.0]]])
    total = Reconstruction(1, 2)
    total.update(x, recon, torch.tensor([[[3.0, 0.5, 0.0], [1.5, 0.0, 0.0]]]))
    result = total.compute()
    assert result.tokens == 2
    assert result.mse.item() == 0.25
    assert result.l1.item() == 2.5
    assert result.l0.item() == 1.5
    assert result.fvu_global.item() == pytest.approx(1 / 104, abs=1e-15)
    assert result.fvu_per_dimension.item() == 0.25
    total.update(x, recon)  # without values: L1 and L0 stay the means over the first two tokens
    assert (total.compute().l1.item(), total.compute().l0.item()) == (2.5, 1.5)
    assert total.compute().mse.item() == 0.25


@quick
@given(seeds, st.sampled_from(["global", "per_dimension"]))
def test_fvu_is_its_definition(seed, variant):
    x, recon = activations(seed)
    torch.testing.assert_close(
        fvu(x, recon, variant), dense_fvu(x, recon, variant), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("variant", ["global", "per_dimension"])
def test_float32_and_large_offsets_keep_five_digits(variant, offset):
    x, recon = activations(1, offset=offset, dtype=torch.float32)
    exact = dense_fvu(x, recon, variant)
    total = accumulate(x, recon, [1, 15, 13]).compute()
    torch.testing.assert_close(fvu(x, recon, variant), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(getattr(total, f"fvu_{variant}"), exact, rtol=1e-5, atol=0)


@quick
@given(seeds, st.integers(0, 29), st.integers(0, 29))
def test_any_split_and_any_order_of_merging_is_one_pass(seed, a, b):
    a, b = sorted((a, b))
    sizes = [a, b - a, 29 - b]
    x, recon = activations(seed, offset=100.0)
    values = torch.rand(3, 29, 4, generator=torch.Generator().manual_seed(seed)).relu()
    whole = accumulate(x, recon, [29], values).compute()
    split = accumulate(x, recon, sizes, values).compute()
    parts = [
        accumulate(*(t.split(sizes, 1)[i] for t in (x, recon)), [size], values.split(sizes, 1)[i])
        for i, size in enumerate(sizes)
    ]
    merged = pickle.loads(pickle.dumps(parts[2])).merge(parts[0]).merge(parts[1]).compute()
    for mine, other, third in zip(whole, split, merged, strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(other), rtol=1e-9, atol=0)
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(third), rtol=1e-9, atol=0)


@quick
@given(seeds)
def test_accumulator_equals_function_and_ignores_token_order(seed):
    x, recon = activations(seed)
    shuffled = torch.randperm(29, generator=torch.Generator().manual_seed(seed))
    result = accumulate(x[:, shuffled], recon[:, shuffled], [10, 19]).compute()
    torch.testing.assert_close(result.fvu_global, fvu(x, recon))
    torch.testing.assert_close(result.fvu_per_dimension, fvu(x, recon, "per_dimension"))
    torch.testing.assert_close(result.mse, (x - recon).square().mean((1, 2)))


@quick
@given(seeds)
def test_predicting_the_mean_leaves_everything_unexplained(seed):
    x, _ = activations(seed, offset=3.0)
    vector = x.mean(1, keepdim=True).expand_as(x)
    scalar = x.mean((1, 2), keepdim=True).expand_as(x)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(fvu(x, vector, "per_dimension"), ones)
    torch.testing.assert_close(fvu(x, scalar, "global"), ones)
    assert (fvu(x, vector, "global") < 1).all()
    assert (fvu(x, x) == 0).all()


@quick
@given(seeds, st.floats(0.01, 100), st.floats(-100, 100))
def test_per_dimension_fvu_ignores_scale_and_shift(seed, scale, shift):
    x, recon = activations(seed)
    offset = shift * torch.arange(5, dtype=torch.float64)
    moved = [t * scale + offset for t in (x, recon)]
    torch.testing.assert_close(
        fvu(*moved, "per_dimension"), fvu(x, recon, "per_dimension"), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(fvu(x * scale, recon * scale), fvu(x, recon))
    assert (fvu(*moved) <= fvu(*moved, "per_dimension") * (1 + 1e-9)).all()


def test_a_mean_of_ratios_is_not_the_ratio():
    """What the code released with the paper averages differs from the pooled value."""
    x, recon = activations(4)
    x[:, :10] *= 5
    mean_of_ratios = torch.stack(
        [fvu(a, b) for a, b in zip(x.split(10, 1), recon.split(10, 1), strict=True)]
    ).mean(0)
    assert not torch.allclose(mean_of_ratios, fvu(x, recon), rtol=1e-2)


def test_half_precision_is_summed_in_float32_or_better():
    x, recon = activations(2, tokens=4000, offset=2.0)
    x, recon = x.bfloat16(), recon.bfloat16()
    for variant in ("global", "per_dimension"):
        torch.testing.assert_close(
            fvu(x, recon, variant), fvu(x.double(), recon.double(), variant), rtol=1e-5, atol=0
        )


@quick
@given(seeds)
def test_moments_are_mean_and_variance(seed):
    x, _ = activations(seed, offset=1e3)
    moments = LayerMoments(3, 5)
    for part in x.split([0, 1, 12, 16], 1):
        moments.update(part)
    torch.testing.assert_close(moments.mean, x.mean(1))
    torch.testing.assert_close(moments.scatter / 29, x.var(1, correction=0))


def test_accumulators_that_have_seen_nothing_can_be_merged():
    x, recon = activations(0)
    empty = Reconstruction(3, 5).merge(Reconstruction(3, 5))
    whole = accumulate(x, recon, [29])
    for total in (empty.merge(whole), accumulate(x, recon, [29]).merge(Reconstruction(3, 5))):
        result = total.compute()
        assert result.tokens == 29
        torch.testing.assert_close(result.fvu_global, fvu(x, recon))
    with pytest.raises(ValueError, match="no tokens seen"):
        Reconstruction(3, 5).merge(Reconstruction(3, 5)).compute()


def test_what_is_kept_holds_no_graph():
    x, recon = (t.requires_grad_() for t in activations(0))
    total = Reconstruction(3, 5)
    total.update(x, recon, values=x.relu())
    moments = LayerMoments(3, 5)
    moments.update(x)
    kept = (total.sums, *(t for m in (total.moments, moments) for t in (m.mean, m.scatter)))
    assert not any(t.requires_grad for t in kept)
    assert not fvu(x, recon).requires_grad


def test_degenerate_layers_and_wrong_shapes_say_so():
    constant = torch.ones(1, 4, 2)
    assert fvu(constant, constant + 1, "per_dimension").isinf().all()
    assert fvu(constant, constant, "per_dimension").isnan().all()
    assert Reconstruction(1, 2).sums.dtype == torch.float64
    with pytest.raises(ValueError, match="no tokens seen"):
        Reconstruction(1, 2).compute()
    with pytest.raises(ValueError, match=r"\(layer, token, d_model\)"):
        fvu(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="per_dimension"):
        fvu(constant, constant, "per-dimension")
    with pytest.raises(ValueError, match=r"\(2, token, 2\), got \(1, 4, 2\)"):
        Reconstruction(2, 2).update(constant, constant)
    for wrong in (torch.ones(1, 4), torch.ones(1, 4, 2, 1), torch.ones(2, 4, 2), constant[..., :1]):
        with pytest.raises(ValueError, match=r"\(1, token, 2\), got "):
            LayerMoments(1, 2).update(wrong)
    for wrong in (torch.ones(1, 4), torch.ones(4, 2, 1)):
        with pytest.raises(ValueError, match=r"d_model\), got .* and \(1, 4, 2\)"):
            fvu(wrong, constant)
    for wrong in (torch.ones(1, 3, 2), torch.ones(1, 4), torch.ones(1, 4, 2, 1)):
        with pytest.raises(ValueError, match=r"values must be \(layer, token, k\) = \(1, 4, 'k'\)"):
            Reconstruction(1, 2).update(constant, constant, wrong)
    with pytest.raises(ValueError, match="one size"):
        Reconstruction(1, 2).merge(Reconstruction(2, 2))


def test_resampled_blocks_are_what_measuring_them_again_gives():
    x, recon = activations(3, tokens=12, offset=100.0)
    sequences = torch.arange(12) // 4
    total, halves = (
        Reconstruction(3, 5, n_blocks=3),
        [Reconstruction(3, 5, n_blocks=3) for _ in "ab"],
    )
    total.update(x, recon, None, sequences)
    for half, rows in zip(halves, (slice(0, 5), slice(5, 12)), strict=True):
        half.update(x[:, rows], recon[:, rows], None, sequences[rows])
    drawn = total.bootstrap(40, torch.Generator().manual_seed(1))
    assert set(drawn) == {"fvu_global", "fvu_per_dimension", "mse"}
    weights = _resampled(3, 40, torch.Generator().manual_seed(1)).long()
    for number, weight in enumerate(weights):
        rows = torch.arange(12).repeat_interleave(weight.repeat_interleave(4))
        once = Reconstruction(3, 5)
        once.update(x[:, rows], recon[:, rows])
        for name, replicates in drawn.items():
            torch.testing.assert_close(replicates[number], getattr(once.compute(), name))
    merged = halves[0].merge(halves[1]).bootstrap(40, torch.Generator().manual_seed(1))
    torch.testing.assert_close(merged, drawn)
    with pytest.raises(ValueError, match="needs the sequence ids"):
        total.update(x, recon)
    with pytest.raises(ValueError, match="only accumulators of one size"):
        total.merge(Reconstruction(3, 5))
