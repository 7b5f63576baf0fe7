"""Orders and samples: ties and rounding errors change nothing, whatever order things come in."""

import math
from fractions import Fraction

import pandas as pd
import pytest
import torch

from mlsae_book.tables import latent_table, latents, layers, total_variance
from mlsae_book.tables.order import ascending, evenly

#: Three groups of equal values, in an order of their own.
TIED = torch.tensor([2.0, 0.1, 2.0, 0.1, 1.5] * 40, dtype=torch.float64)


def noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return 1e-13 * torch.randn(TIED.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_differs_by_rounding_alone_stays_in_its_order(seed):
    expected = sorted(range(len(TIED)), key=lambda i: (TIED[i].item(), i))
    assert ascending(TIED + noise(seed)).tolist() == expected
    assert ascending(TIED + 1e-6 * torch.arange(len(TIED)).flip(0)).tolist() != expected


SIZES = [(5, 9), (9, 5), (8192, 600), (65536, 3000), (1, 4), (0, 4)]


@pytest.mark.parametrize(("n", "most"), SIZES)
def test_samples_are_the_nearest_to_even_steps(n, most):
    size = min(n, most)
    steps = [Fraction(i * (n - 1), max(size - 1, 1)) for i in range(size)]
    assert evenly(n, most).tolist() == [round(step) for step in steps]


def tied_arrays(seed=0):
    """Stored arrays of 200 latents of two layers, many of which share their mean layer."""
    probs = torch.stack([1 - TIED / 4, TIED / 4]).half()
    other = dict.fromkeys(("probs_permuted", "probs_gaussian"), probs)
    counts = torch.ones(probs.shape, dtype=torch.int32)
    arrays = layers.derived(
        {"probs": probs, **other, "totals": probs.float(), "counts": counts}
        | {"active_tokens": torch.full(TIED.shape, 2000)}
    )
    return arrays | {"mean_layer": arrays["mean_layer"] + noise(seed)}


@pytest.mark.parametrize("most", [200, 7])
def test_heatmaps_show_the_same_latents_in_the_same_order(most):
    one, other = (latent_table(tied_arrays(seed), most=most) for seed in (0, 1))
    assert one.latent.tolist() == other.latent.tolist()
    first = one[one.layer == 0]
    assert first.latent.tolist() == ascending(TIED)[evenly(200, most)].tolist()
    assert layers.aggregate_table(tied_arrays(), most).latent_probs[::2].tolist() == list(
        first.latent
    )


def test_the_chosen_latent_is_the_first_of_those_alike():
    assert latents.sharpest(tied_arrays(), 0) == 1


def test_derived_numbers_have_more_digits_than_are_shown():
    probs = torch.tensor([[0.1], [0.2], [0.7]]).half()
    stored = {"probs": probs, "totals": probs.float(), "active_tokens": torch.ones(1)}
    found = layers.derived(stored)
    parts = [Fraction(p) for p in probs[:, 0].tolist()]
    p = [part / sum(parts) for part in parts]
    assert abs(Fraction(found["mean_layer"].item()) - p[1] - 2 * p[2]) < 1e-14
    entropy = -sum(float(x) * math.log(x) for x in p) / math.log(3)
    assert found["entropy"].item() == pytest.approx(entropy, abs=1e-14)


def test_pairs_equal_as_shown_stand_by_their_latents():
    latent = range(60)
    pairs = pd.DataFrame({"latent": latent, "cosine": [0.5 + 1e-7 * (i % 7) for i in latent]})
    pairs.loc[41, "cosine"] = 0.9
    for seed in range(3):
        found = latents.most_alike(pairs.sample(frac=1, random_state=seed), most=5)
        assert found.latent.tolist() == [41, 0, 1, 2, 3]
        assert found.cosine.tolist() == [0.9, 0.5, 0.5, 0.5, 0.5]


def test_latents_of_equal_variance_stand_by_their_number():
    table = pd.DataFrame({"latent": range(200), "within": 0.25, "between": 0.5})
    expected = ascending(TIED)[evenly(200, 30)].tolist()
    for seed in range(3):
        shuffled = table.assign(var=(TIED + noise(seed)).numpy()).sample(frac=1, random_state=seed)
        ranks = total_variance.by_rank(shuffled, most=30)
        assert ranks[ranks.part == "at one token"].latent.tolist() == expected
