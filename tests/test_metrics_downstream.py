"""Cross-entropy, KL, loss recovered, logit MSE and r_L0."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae_core.metrics import (
    Downstream,
    ce_recovered,
    centred_logit,
    cross_entropy,
    downstream,
    kl_divergence,
    latent_importance,
    logit_mse,
    uniformity,
)
from mlsae_core.metrics.downstream import _plain_effects
from mlsae_core.metrics.resampling import _resampled

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


def draw(seed, layers=3, tokens=11, vocabulary=7):
    generator = torch.Generator().manual_seed(seed)
    original = 2 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    noise = torch.randn(layers, tokens, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return original, original + noise, targets


def test_by_hand():
    original = torch.tensor([[math.log(3.0), 0.0]])  # P = (3/4, 1/4)
    replaced = torch.tensor([[0.0, 0.0]])  # P = (1/2, 1/2)
    target = torch.tensor([1])
    assert cross_entropy(original, target).item() == pytest.approx(math.log(4))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(original, replaced).item() == pytest.approx(kl)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert kl_divergence(replaced, original).item() == pytest.approx(reverse)
    assert logit_mse(original, replaced).item() == pytest.approx(math.log(3) ** 2 / 2)
    assert centred_logit(original, target).item() == pytest.approx(-math.log(3) / 2)

    total = Downstream(1)
    total.update(original, replaced[None], target)
    result = total.compute()
    assert result.ce_original.item() == pytest.approx(math.log(4))
    assert result.ce_replaced.item() == pytest.approx(math.log(2))
    assert result.delta_ce.item() == pytest.approx(-math.log(2))
    assert result.kl.item() == pytest.approx(kl)


@quick
@given(seeds)
def test_accumulator_is_the_mean_over_tokens_in_plain_python(seed):
    original, replaced, targets = draw(seed)
    total = Downstream(3)
    total.update(original, replaced, targets)
    result = total.compute()

    def log_softmax(row):
        log_sum = math.log(math.fsum(math.exp(v) for v in row))
        return [v - log_sum for v in row]

    for layer in range(3):
        ce, kl, mse = [], [], []
        for t, target in enumerate(targets.tolist()):
            log_p = log_softmax(original[t].tolist())
            log_q = log_softmax(replaced[layer, t].tolist())
            ce.append(log_p[target] - log_q[target])
            kl.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
            mse.append((original[t] - replaced[layer, t]).square().mean().item())
        assert result.delta_ce[layer].item() == pytest.approx(math.fsum(ce) / 11)
        assert result.kl[layer].item() == pytest.approx(math.fsum(kl) / 11)
        assert result.logit_mse[layer].item() == pytest.approx(math.fsum(mse) / 11)
    assert result.tokens.tolist() == [11] * 3
    torch.testing.assert_close(result.ce_replaced, result.ce_original + result.delta_ce)


@quick
@given(seeds, st.integers(0, 11))
def test_pieces_layers_and_merging_do_not_matter(seed, cut):
    original, replaced, targets = draw(seed)
    whole, early, late = Downstream(3), Downstream(3), Downstream(3)
    whole.update(original, replaced, targets)
    for layer in (2, 0, 1):
        part = replaced[layer : layer + 1, :cut]
        early.update(original[:cut], part, targets[:cut], layers=[layer])
    late.update(original[cut:], replaced[:, cut:], targets[cut:])
    for mine, other in zip(whole.compute(), late.merge(early).compute(), strict=True):
        torch.testing.assert_close(mine, other)


@quick
@given(seeds, st.floats(-30, 30))
def test_laws_of_kl_and_ce(seed, shift):
    original, replaced, targets = draw(seed)
    kl = kl_divergence(original, replaced)
    assert kl.shape == (3, 11)
    assert (kl > 0).all()
    assert kl_divergence(original, original).abs().max() < 1e-12
    torch.testing.assert_close(kl_divergence(original + shift, replaced), kl)
    torch.testing.assert_close(
        cross_entropy(original + shift, targets), cross_entropy(original, targets)
    )
    # CE averaged over targets drawn from P is entropy, and under Q it is larger by KL(P ‖ Q)
    p = original.softmax(-1)
    every = torch.arange(7).expand(11, 7)
    mean_ce = [
        (p * cross_entropy(logits[:, None].expand(11, 7, 7), every)).sum(-1)
        for logits in (original, replaced[0])
    ]
    torch.testing.assert_close(mean_ce[1] - mean_ce[0], kl[0])


def test_impossible_tokens_and_half_precision():
    original, replaced, targets = draw(0)
    padded = [torch.nn.functional.pad(t, (0, 2), value=-math.inf) for t in (original, replaced)]
    torch.testing.assert_close(kl_divergence(*padded), kl_divergence(original, replaced))
    torch.testing.assert_close(cross_entropy(padded[0], targets), cross_entropy(original, targets))
    half = [t.bfloat16() for t in (original, replaced)]
    assert kl_divergence(*half).dtype == torch.float32
    torch.testing.assert_close(
        kl_divergence(*half).double(),
        kl_divergence(*(t.double() for t in half)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_recovered_is_one_for_perfect_and_zero_for_ablation():
    original, ablated = torch.tensor([3.0, 2.0]), torch.tensor([5.0, 8.0])
    assert ce_recovered(original, original, ablated).tolist() == [1, 1]
    assert ce_recovered(original, ablated, ablated).tolist() == [0, 0]
    assert ce_recovered(original, torch.tensor([4.0, 3.5]), ablated).tolist() == [0.5, 0.75]


def test_wrong_shapes_say_what_was_expected():
    original, replaced, targets = draw(0)
    with pytest.raises(ValueError, match=r"\(2, 11, 7\)"):
        Downstream(2).update(original, replaced, targets)
    message = r"= \(3, 11, 7\) and targets \(11,\), got \(3, 11, 7\) and \(10,\)"
    with pytest.raises(ValueError, match=message):
        Downstream(3).update(original, replaced, targets[:10])
    for wrong in (replaced[:2], replaced[:, :10], replaced[:, :, :6], replaced[0]):
        with pytest.raises(ValueError, match=r"vocabulary\) = \(3, 11, 7\) and targets"):
            Downstream(3).update(original, wrong, targets)
    with pytest.raises(ValueError, match="one size"):
        Downstream(2).merge(Downstream(3))
    with pytest.raises(ValueError, match="equal leading axes"):
        latent_importance(
            torch.zeros(3, 2).long(), torch.ones(3, 2), torch.ones(4, 5), torch.ones(6, 5)
        )


def test_what_is_kept_holds_no_graph():
    original, replaced, targets = draw(0)
    total = Downstream(3)
    total.update(original.requires_grad_(), replaced.requires_grad_(), targets)
    assert not total.sums.requires_grad


def test_uniformity_by_hand():
    y = torch.tensor([[1.0, -1.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0], [3.0, -1.0, 0.0, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = torch.tensor([1.0, 1.0, math.exp(entropy) / 2])
    torch.testing.assert_close(uniformity(y), expected)
    assert uniformity(torch.zeros(1, 3)).isnan().all()


@quick
@given(seeds, st.floats(0.01, 100))
def test_importance_is_the_gradient_times_the_activation(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    indices = torch.rand(2, 5, 9, generator=generator).argsort(-1)[..., :4]
    values = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    recon = (values[..., None] * decoder[indices]).sum(-2)
    recon.retain_grad()
    recon.tanh().sum().backward()
    y = latent_importance(indices, values.detach(), recon.grad, decoder, chunk=3)
    torch.testing.assert_close(y, values.detach() * values.grad)
    r = uniformity(y)
    assert ((r >= 0.25 - 1e-12) & (r <= 1 + 1e-12)).all()
    torch.testing.assert_close(uniformity(y * scale), r)


@quick
@given(seeds, st.sampled_from([0, 1e-3, 1, 30]), st.sampled_from([0.0, 50.0]))
def test_the_fused_sums_are_the_plain_ones(seed, size, shift):
    """Also for a replacement that changes nothing, much, or shifts all logits alike."""
    generator = torch.Generator().manual_seed(seed)
    original = 3 * torch.randn(9, 500, generator=generator)
    replaced = original + size * torch.randn(2, 9, 500, generator=generator) + shift
    targets = torch.randint(500, (9,), generator=generator)
    given = original.clone(), replaced.clone()
    total = Downstream(2)
    total.update(original, replaced, targets)
    assert torch.equal(original, given[0])
    assert torch.equal(replaced, given[1])
    plain = [_plain_effects(original.double(), x.double(), targets).sum(1) for x in replaced]
    torch.testing.assert_close(
        total.sums / 9, torch.stack(plain, 1) / 9, rtol=1e-5, atol=2e-5 if shift else 1e-5
    )


def test_plain_functions_are_asked_for_impossible_tokens_only(monkeypatch):
    """What the fused sums cannot do they would do in their place, unnoticed."""
    asked = []
    monkeypatch.setattr(
        downstream, "_plain_effects", lambda *a: asked.append(0) or _plain_effects(*a)
    )
    original, replaced, targets = draw(0)
    Downstream(3).update(original, replaced, targets)
    assert not asked
    replaced[1, 4, 3] = -math.inf
    Downstream(3).update(original, replaced, targets)
    assert len(asked) == 1


def test_fused_sums_with_impossible_tokens_are_the_plain_ones():
    original, replaced, targets = draw(0)
    original, replaced = original.clone(), replaced.clone()
    original[0, 2] = replaced[1, 4, 3] = -math.inf
    targets[0], targets[4] = 0, 0
    total = Downstream(3)
    total.update(original, replaced, targets)
    plain = [_plain_effects(original, x, targets).sum(1) for x in replaced]
    torch.testing.assert_close(total.sums, torch.stack(plain, 1), equal_nan=True)
    assert total.sums[:, 0].isinf().any()
    assert total.sums[:3, 2].isfinite().all()


def test_intervals_are_of_sequences_drawn_again():
    original, replaced, targets = draw(0, tokens=12)
    sequences = torch.arange(12) // 4
    total, halves = Downstream(3, n_blocks=3), [Downstream(3, n_blocks=3) for _ in range(2)]
    total.update(original, replaced, targets, sequences=sequences)
    for half, rows in zip(halves, (slice(0, 5), slice(5, 12)), strict=True):
        half.update(original[rows], replaced[:, rows], targets[rows], None, sequences[rows])
    drawn = total.bootstrap(40, torch.Generator().manual_seed(1))
    weights = _resampled(3, 40, torch.Generator().manual_seed(1)).long()
    for number, weight in enumerate(weights):
        rows = torch.arange(12).repeat_interleave(weight.repeat_interleave(4))
        once = Downstream(3)
        once.update(original[rows], replaced[:, rows], targets[rows])
        for mine, expected in zip(drawn[1:], once.compute()[1:], strict=True):
            torch.testing.assert_close(mine[number], expected)
    merged = halves[0].merge(halves[1]).bootstrap(40, torch.Generator().manual_seed(1))
    torch.testing.assert_close(merged.kl, drawn.kl)
    with pytest.raises(ValueError, match="needs the sequence ids"):
        total.update(original, replaced, targets)
    with pytest.raises(ValueError, match="only accumulators of one size"):
        total.merge(Downstream(3))
