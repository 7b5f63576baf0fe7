"""The variants of the released code against numbers worked out by hand, beside our own."""

import math

import pytest
import torch

from mlsae_book import as_released
from mlsae_core import metrics


def test_special_tokens_that_are_zeroed_still_count():
    x = torch.tensor([[[3.0, 3.0], [5.0, 5.0], [9.0, 9.0]]])
    keep = torch.tensor([True, True, False])
    assert as_released.masked(x, keep).mean().item() == pytest.approx(16 / 6)
    assert x[:, keep].mean().item() == 4


def test_mean_of_the_batches_ratios():
    # error 1 over variance 1, then error 1 over variance 9
    batches = [
        (torch.tensor([[[-1.0], [1.0]]]), torch.tensor([[[0.0], [0.0]]])),
        (torch.tensor([[[-3.0], [3.0]]]), torch.tensor([[[-2.0], [2.0]]])),
    ]
    assert as_released.mean_fvu(batches).tolist() == pytest.approx([(1 + 1 / 9) / 2])
    ours = metrics.fvu(*(torch.cat(part, 1) for part in zip(*batches, strict=True)))
    assert ours.tolist() == pytest.approx([4 / 20])


def test_steps_are_counted_whatever_their_size():
    counters = torch.tensor([4, 7])
    fired = torch.tensor([True, False])
    assert as_released.count_dead_steps(counters, fired).tolist() == [0, 8]


def test_the_diagonal_of_the_inverse_is_not_the_inverse():
    # I + W = [[2, 1], [0, 1]], its inverse [[1/2, -1/2], [0, 1]]
    weight, bias = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0])
    x = torch.tensor([[1.0, 2.0]])
    y = x + x @ weight.T + bias
    assert y.tolist() == [[4, 3]]
    assert as_released.invert_lens(y, weight, bias).tolist() == [[2, 2]]
    diagonal = torch.diag(torch.tensor([1.0, 3.0]))
    y = x + x @ diagonal.T + bias
    torch.testing.assert_close(as_released.invert_lens(y, diagonal, bias), x)


def test_the_translator_has_the_layers_own_index():
    assert [as_released.translator(layer) for layer in range(3)] == [0, 1, 2]


def test_kl_is_the_other_way_round_and_summed():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    original, replaced = p.log().expand(3, 2), q.log().expand(3, 2)
    backward = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert as_released.summed_kl(original, replaced).item() == pytest.approx(3 * backward)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert metrics.kl_divergence(original, replaced).mean().item() == pytest.approx(forward)


CODES = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, 0.0]]])
"""(layer, token, latent): latent 0 at layer 0 of token 0 and layer 1 of token 1; 1 never."""


def test_inactive_tokens_count_as_probability_zero():
    codes = CODES[:, :1]  # a token at which latent 1 is inactive
    assert as_released.layer_probs(codes).tolist() == [[[1, 0], [0, 0]]]
    assert as_released.layer_probs(CODES).mean(0).sum(1).tolist() == [1, 0]


def test_variances_of_what_does_not_sum_to_one():
    # over all: P = (1/4, 1/4), so 1/4 - 1/16. Given the latent: (1/2, 1/2) has 1/4, zeros have 0.
    var, given_j, given_jt = as_released.variances([CODES])
    assert (var, given_j, given_jt) == pytest.approx((3 / 16, 1 / 8, 0))
    indices, values = CODES.topk(1, dim=2)[::-1]
    ours = metrics.LayerDistribution(2, 2)
    ours.update(indices, values)
    found = ours.compute()
    assert (found.var_l, found.exp_var_l_given_j) == pytest.approx((1 / 4, 1 / 4))


def test_ratios_are_averaged_over_batches():
    # At both layers of one token: P = (1/4, 1/4), 3/16; given the latent and the token, 1/8.
    both = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    latent, token = as_released.ratios([CODES, both])
    assert latent == pytest.approx(((1 / 8) / (3 / 16) + (1 / 8) / (3 / 16)) / 2)
    assert token == pytest.approx((0 + 1) / 2)


def test_half_of_the_pairs():
    # Cosines: 0 and 1 are 0 apart, 2 is 0.6 from 0 and 0.8 from 1.
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert as_released.half_mmcs(rows) == pytest.approx((0.6 + 0.8) / 2)
    assert metrics.mmcs(rows).mean == pytest.approx((0.6 + 0.8 + 0.8) / 3)
