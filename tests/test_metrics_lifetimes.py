"""Lifetimes: correlations against brute force, and planted features whose lifetimes are known."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics_distribution import LATENTS, K, codes

from mlsae_core.metrics import Correlation, best_matches, chain_lengths

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


def both(seed, tokens=40):
    a, b = codes(seed, tokens), codes(seed + 1, tokens, latents=LATENTS + 2, k=K + 1)
    return (a[0][0], a[1][0]), (b[0][0], b[1][0])


def dense(code, latents):
    indices, values = code
    return torch.zeros(len(indices), latents, dtype=torch.float64).scatter_(1, indices, values)


@quick
@given(seeds, st.sampled_from([1, 7, 40]))
def test_correlations_are_those_of_the_dense_activations(seed, size):
    first, second = both(seed)
    total = Correlation(LATENTS, LATENTS + 2)
    for rows in torch.arange(40).split(size):
        part = Correlation(LATENTS, LATENTS + 2)
        part.update(*(tuple(x[rows] for x in code) for code in (first, second)))
        total.merge(pickle.loads(pickle.dumps(part)))
    joint = torch.cat([dense(first, LATENTS), dense(second, LATENTS + 2)], 1)
    expected = torch.corrcoef(joint.T)[:LATENTS, LATENTS:]
    got = total.compute()
    varies = joint.std(0) > 0
    both_vary = varies[:LATENTS, None] & varies[LATENTS:]
    torch.testing.assert_close(got[both_vary], expected[both_vary], rtol=1e-9, atol=1e-9)
    assert got[~both_vary].isnan().all()


def test_matches_are_mutual_and_above_the_least():
    nan = torch.nan
    found = best_matches(
        torch.tensor([[0.9, 0.8, nan], [0.7, 0.95, nan], [0.1, 0.2, nan], [nan] * 3]), 0.5
    )
    assert found.other.tolist() == [0, 1, -1, -1]
    assert found.correlation[:3].tolist() == pytest.approx([0.9, 0.95, 0.2])
    assert found.correlation[3].isnan()
    assert best_matches(torch.tensor([[0.9, 0.8]]), 0.95).other.tolist() == [-1]
    assert best_matches(torch.full((2, 2), 0.5)).other.tolist() == [0, -1]  # of equals the first


def brute(matches, alive):
    """Follow every chain, latent by latent."""
    found, reached = [], set()
    for layer, here in enumerate(alive):
        for latent in here:
            if (layer, latent) in reached:
                continue
            length, at = 1, latent
            while layer + length < len(alive):
                at = int(matches[layer + length - 1][at])
                if at < 0 or at not in alive[layer + length]:
                    break
                reached.add((layer + length, at))
                length += 1
            found.append(length)
    return found


@quick
@given(seeds)
def test_lifetimes_are_what_following_each_chain_gives(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes, matches, alive = [6, 5, 7, 6], [], []
    for a, b in itertools.pairwise(sizes):
        other = torch.full((a,), -1)
        n = int(torch.randint(min(a, b) + 1, (), generator=generator))
        chosen = torch.randperm(a, generator=generator)[:n]
        other[chosen] = torch.randperm(b, generator=generator)[:n]
        matches.append(other)
    masks = [torch.rand(n, generator=generator) > 0.2 for n in sizes]
    alive = [mask.nonzero()[:, 0].tolist() for mask in masks]
    assert chain_lengths(matches, masks).tolist() == brute(matches, alive)
    assert chain_lengths(matches, sizes).tolist() == brute(matches, [range(n) for n in sizes])


def test_planted_lifetimes_are_found_and_shuffled_tokens_have_none():
    """Features that live for 1 to 4 layers, under other names at each, with noisy activations."""
    generator = torch.Generator().manual_seed(0)
    tokens, layers, n = 4000, 4, 24
    begins = torch.arange(n) % layers
    lives = torch.minimum(1 + torch.arange(n) // layers % layers, layers - begins)
    active = (torch.rand(tokens, n, generator=generator) < 0.08).double()
    codes_at, truth = [], 0
    for layer in range(layers):
        alive = (begins <= layer) & (layer < begins + lives)
        truth += int(alive.sum())
        strength = 1 + 0.3 * torch.rand(tokens, n, generator=generator, dtype=torch.float64)
        fresh = (torch.rand(tokens, n, generator=generator) < 0.08).double()
        x = torch.where(alive, active, fresh) * strength  # others are features of this layer alone
        codes_at.append(x[:, torch.randperm(n, generator=generator)].topk(n))

    def measured(shuffled):
        found = []
        for a, b in itertools.pairwise(codes_at):
            total = Correlation(n, n)
            order = torch.randperm(tokens, generator=generator) if shuffled else slice(None)
            total.update((a.indices, a.values), (b.indices[order], b.values[order]))
            found.append(best_matches(total.compute(), 0.5).other)
        return chain_lengths(found, [n] * layers)

    got = measured(shuffled=False).bincount(minlength=layers + 1)
    # What is not alive at a layer is a feature of that layer alone.
    expected = lives.bincount(minlength=layers + 1)
    expected[1] += n * layers - truth
    assert got.tolist() == expected.tolist()
    assert measured(shuffled=True).tolist() == [1] * (n * layers)


def test_codes_and_sizes_that_do_not_fit_are_refused():
    first, second = both(0)
    with pytest.raises(ValueError, match="the same tokens, got 40 and 39"):
        Correlation(LATENTS, LATENTS + 2).update(first, tuple(x[1:] for x in second))
    with pytest.raises(ValueError, match="indices must lie in"):
        Correlation(LATENTS, 2).update(first, second)
    with pytest.raises(ValueError, match="expected 2 sizes for 1 matches, got 1"):
        chain_lengths([torch.tensor([0])], [1])
