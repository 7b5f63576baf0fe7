"""Text of one split that stands in another: brute force, and measures apart."""

import numpy as np
import pytest
import torch
from test_analysis import tiny_sae
from tiny_lm import N_LAYERS, reading, tiny_lm, tiny_tokens

from mlsae_book.tables import overlap
from mlsae_core import analysis
from mlsae_core.metrics import cross_entropy
from mlsae_core.spec import SiteSpec


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_spans_are_found_as_by_comparing_all(length):
    rng = np.random.default_rng(0)
    there, here = rng.integers(0, 3, (5, 16)), rng.integers(0, 3, (4, 16))
    here[1, 3:14] = there[2, 1:12]  # not only by chance
    known = {tuple(there.flat[i : i + length]) for i in range(there.size - length + 1)}
    expected = np.zeros(here.size, bool)
    for i in range(here.size - length + 1):
        if tuple(here.flat[i : i + length]) in known:
            expected[i : i + length] = True
    found = overlap.repeated(there, here, length)
    assert found.shape == here.shape
    assert (found.ravel() == expected).all()
    assert length < 8 or 0 < expected.mean() < 1
    table = overlap.shares(there, here, [length])
    assert table.share.item() == pytest.approx(expected.mean())


def test_a_length_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        overlap.repeated(np.zeros((1, 9), int), np.zeros((1, 9), int), 6)


@torch.no_grad()
def test_both_parts_together_are_the_whole():
    lm, sae, tokens = tiny_lm(), tiny_sae(), tiny_tokens(4, 12, seed=0)
    source = reading(lm, [tokens], SiteSpec())
    flags = np.zeros(tokens.shape, bool)
    flags[:2] = True
    table = overlap.apart(source, sae, flags).set_index("text")
    logits = lm.logits(lm.capture(tokens, [N_LAYERS - 1])["residual"][0])[:, :-1]
    ce = cross_entropy(logits, tokens[:, 1:])
    assert table.loss["repeated"] == pytest.approx(ce[:2].mean().item())
    assert table.loss["new"] == pytest.approx(ce[2:].mean().item())
    for text, rows in (("repeated", tokens[:2]), ("new", tokens[2:])):
        own = analysis.evaluate(reading(lm, [rows], SiteSpec()), sae, progress=False)
        assert table.fvu[text] == pytest.approx(own.fvu_per_dimension.mean(), abs=1e-5)
    assert table.share.sum() == pytest.approx(1)
