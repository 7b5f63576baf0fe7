"""Top activating examples against sorted lists."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae_core.metrics import TopExamples, examples

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


def codes(seed, tokens=40):
    """Few distinct values, so that ties are common; a fifth is zero."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(3, tokens, 7, generator=generator).topk(2).indices
    values = torch.randint(0, 5, indices.shape, generator=generator).float() / 4
    return indices, values, torch.randperm(1000, generator=generator)[:tokens]


def brute_force(indices, values, positions, n_examples):
    lists = {}
    for layer, token, slot in torch.ones_like(indices).nonzero().tolist():
        if (value := values[layer, token, slot].item()) > 0:
            key = (layer, indices[layer, token, slot].item())
            lists.setdefault(key, []).append((-value, positions[token].item()))
    return {key: sorted(pairs)[:n_examples] for key, pairs in lists.items()}


def as_lists(top):
    values, positions = top.compute()
    assert ((values > 0) == (positions >= 0)).all()
    lists = {}
    for layer, latent, slot in (positions >= 0).nonzero().tolist():
        pair = (-values[layer, latent, slot].item(), positions[layer, latent, slot].item())
        lists.setdefault((layer, latent), []).append(pair)
    return lists


def test_by_hand():
    top = TopExamples(1, 3, n_examples=2)
    indices = torch.tensor([[[0, 1], [0, 2], [1, 0], [0, 1]]])
    values = torch.tensor([[[1.0, 5.0], [3.0, 0.0], [4.0, 2.0], [3.0, 6.0]]])
    top.update(indices, values, torch.tensor([10, 11, 12, 3]))
    found = top.compute()
    assert found.values.tolist() == [[[3, 3], [6, 5], [0, 0]]]
    assert found.positions.tolist() == [[[3, 11], [3, 10], [-1, -1]]]


@quick
@given(seeds, st.integers(1, 6), st.integers(0, 40), st.integers(0, 40))
def test_any_split_and_any_order_of_merging_is_the_sorted_list(seed, n_examples, a, b):
    a, b = sorted((a, b))
    indices, values, positions = codes(seed)
    whole = TopExamples(3, 7, n_examples)
    whole.update(indices, values, positions)
    expected = brute_force(indices, values, positions, n_examples)
    assert as_lists(whole) == expected
    in_turn, parts = TopExamples(3, 7, n_examples), []
    for cut in (slice(b, 40), slice(0, a), slice(a, b)):
        part = TopExamples(3, 7, n_examples)
        for top in (part, in_turn):
            top.update(indices[:, cut], values[:, cut], positions[cut])
        parts.append(pickle.loads(pickle.dumps(part)))
    assert as_lists(in_turn) == expected
    assert as_lists(parts[2].merge(parts[0]).merge(parts[1])) == expected


def test_more_entries_than_one_chunk(monkeypatch):
    """Of 2^17 entries at most, so that memory is bounded, but not of much fewer."""
    chunks, best = [], examples._best
    monkeypatch.setattr(examples, "_best", lambda *a: chunks.append(0) or best(*a))
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(3, 24000, 7, generator=generator).topk(2).indices
    values = torch.rand(indices.shape, generator=generator)
    positions = torch.arange(24000)
    top = TopExamples(3, 7, 5)
    top.update(indices, values, positions)
    assert len(chunks) == 2 == math.ceil(indices.numel() / 2**17)
    for layer in range(3):
        for latent in range(7):
            mine = (values[layer] * (indices[layer] == latent)).sum(1)
            best = mine.topk(5)
            assert top.values[layer, latent].tolist() == best.values.tolist()
            assert top.positions[layer, latent].tolist() == best.indices.tolist()


@pytest.mark.parametrize(
    ("tokens", "k", "expected"),
    [(2**17, 1, 1), (2**17 + 1, 1, 2), (2, 2**17 + 1, 2), (2, 2**16, 1)],
)
def test_a_chunk_holds_so_many_entries_or_one_token(monkeypatch, tokens, k, expected):
    chunks, best = [], examples._best
    monkeypatch.setattr(examples, "_best", lambda *a: chunks.append(0) or best(*a))
    indices = torch.arange(k).expand(1, tokens, k)
    TopExamples(1, k, 1).update(indices, torch.ones(indices.shape), torch.arange(tokens))
    assert len(chunks) == expected


@pytest.mark.parametrize("empty", [(slice(0, 0), slice(None)), (slice(None), slice(0, 0))])
def test_tokens_without_active_latents_change_nothing(empty):
    indices, values, positions = codes(0)
    top = TopExamples(3, 7)
    assert top.compute().values.shape == (3, 7, 10)
    top.update(indices, values, positions)
    expected = as_lists(top)
    top.update(indices[:, *empty], values[:, *empty], positions[empty[0]])
    assert as_lists(top) == expected == brute_force(indices, values, positions, 10)


def test_what_is_kept_holds_no_graph():
    indices, values, positions = codes(0)
    top = TopExamples(3, 7)
    top.update(indices, values.requires_grad_(), positions)
    assert not top.values.requires_grad


def test_errors_say_what_was_expected():
    indices, values, positions = codes(0)
    with pytest.raises(ValueError, match=r"positions must be \(40,\), got \(3,\)"):
        TopExamples(3, 7).update(indices, values, positions[:3])
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        TopExamples(3, 2).update(indices, values, positions)
    with pytest.raises(ValueError, match="negative"):
        TopExamples(3, 7).update(indices, -values, positions)
    with pytest.raises(ValueError, match="one size"):
        TopExamples(3, 7, 2).merge(TopExamples(3, 7, 3))
