"""Cards of latents against a dense pass; the slopes of logits against steering."""

import numpy as np
import pytest
import torch
from test_analysis import dense, tiny_sae
from test_lens import random_lens
from tiny_lm import EOS, N_LAYERS, read, reading, tiny_lm, tiny_tokens

from mlsae_book.tables import cards, interventions
from mlsae_core.lens import Lens
from mlsae_core.spec import SiteSpec, SpecError

BATCHES = [tiny_tokens(2, 12, seed=0), tiny_tokens(3, 12, seed=1), tiny_tokens(2, 12, seed=2)]
TEXT = torch.cat(BATCHES)
SIZES = {"strongest": 3, "of_quarter": 2, "window": 6, "bins": 5, "most": 4}


@pytest.fixture(scope="module")
def arrays():
    return cards.cards(reading(tiny_lm(), BATCHES), tiny_sae(), **SIZES, progress=False)


@pytest.fixture(scope="module")
def activations():
    """(layer, sequence · position, latent), 0 at special tokens."""
    lm, sae = tiny_lm(), tiny_sae()
    (batch,) = read(lm, [TEXT])
    full = torch.zeros(N_LAYERS, *TEXT.shape, sae.n_latents)
    full[:, batch.sequence, batch.position] = dense(sae, sae.encode(batch.source)).detach()
    return full.flatten(1, 2).numpy()


def test_counts_histograms_and_tokens_agree_with_a_dense_pass(arrays, activations):
    flat, compared = TEXT.flatten().numpy(), 0
    for latent in range(activations.shape[-1]):
        h = activations[..., latent]
        if not h.any():
            assert arrays["largest"][latent] == arrays["tokens"][latent] == 0
            assert (arrays["place"][latent] == -1).all()
            continue
        assert arrays["largest"][latent] == pytest.approx(h.max(), rel=1e-5)
        strongest = h.max(0)
        active = strongest > 0
        assert arrays["tokens"][latent] == active.sum() == arrays["quarters"][latent].sum()
        edges = np.linspace(0, 1, SIZES["bins"] + 1)
        for layer in range(N_LAYERS):
            expected = np.histogram(h[layer][h[layer] > 0] / h.max(), edges)[0]
            assert arrays["histogram"][latent, layer].sum() == expected.sum()
            assert abs(arrays["histogram"][latent, layer] - expected).sum() <= 2  # at an edge
        counts = np.bincount(flat[active])
        share = np.sort(counts / counts.sum())[::-1][: SIZES["most"]]
        np.testing.assert_allclose(arrays["top_share"][latent][: len(share)], share, atol=1e-3)
        p = counts[counts > 0] / counts.sum()
        assert arrays["spread"][latent] == pytest.approx(np.prod(p**-p), rel=1e-5)
        compared += 1
    assert compared > 20


def test_examples_are_windows_of_the_text_with_the_activations_there(arrays, activations):
    flat, context, compared = TEXT.flatten().numpy(), TEXT.shape[1], 0
    for latent, slot in np.argwhere(arrays["place"] >= 0):
        at, place = (latent, slot), arrays["place"][latent, slot]
        h, largest = activations[..., latent], arrays["largest"][latent]
        start = place - int(arrays["peak"][at])
        window = np.arange(start, start + SIZES["window"])
        assert len({*(window // context)}) == 1
        np.testing.assert_array_equal(arrays["window"][at], flat[window])
        layer = arrays["layer"][at]
        assert h[layer, place] == pytest.approx(h[:, place].max(), rel=1e-5)
        step = largest / cards.STEPS
        np.testing.assert_allclose(arrays["around"][at] * step, h[layer, window], atol=1.01 * step)
        np.testing.assert_allclose(arrays["by_layer"][at] * step, h[:, place], atol=1.01 * step)
        assert flat[place] != EOS
        if slot >= SIZES["strongest"]:
            quarter = 3 - (slot - SIZES["strongest"]) // SIZES["of_quarter"]
            part = h[:, place].max() / largest
            assert quarter / 4 - 1e-5 <= part <= (quarter + 1) / 4 + 1e-5
        compared += 1
    assert compared > 100
    first = arrays["place"][:, 0]
    strongest = activations.max(0)[first.clip(0), np.arange(len(first))]
    np.testing.assert_allclose(strongest, arrays["largest"], rtol=1e-5)


def test_promoted_tokens_are_those_of_a_small_step_of_steering(arrays):
    lm, sae, latent = tiny_lm(), tiny_sae(), 5
    slopes = cards.logit_slopes(lm, sae, BATCHES[0], 1)
    steered = interventions.intervene(
        lm, sae, Lens.identity(), SiteSpec(), BATCHES[0], 1, latent, [0.01, -0.01]
    )
    change = (steered.logits_after[0] - steered.logits_after[1]).mean((0, 1)) / 0.02
    assert torch.corrcoef(torch.stack([sae.decoder[latent].detach() @ slopes, change]))[0, 1] > 0.99
    change -= change.mean()
    best = arrays["promoted"][1, latent, 0]
    assert change[best] > change.topk(3).values[-1] - 1e-3


def test_effects_on_predictions_are_left_out_where_they_would_take_too_long(arrays, monkeypatch):
    lm, layers, told = tiny_lm(), list(range(tiny_lm().n_layers)), []
    cards.logit_slopes(lm, tiny_sae(), BATCHES[0], 1, told.append)
    assert sum(told) == lm.d_model
    # By hand: two passes for each dimension, of the blocks above each layer and of the logits.
    block, logits = 24 * lm.d_model**2, 2 * lm.d_model * lm.vocab_size
    above = sum(range(lm.n_layers))
    of_token = above * block + len(layers) * logits
    expected = 2 * lm.d_model * BATCHES[0].numel() * of_token
    assert cards._operations(lm, layers, BATCHES[0]) == expected
    source, options = reading(lm, BATCHES), SIZES | {"progress": False}
    monkeypatch.setattr(cards, "MOST_OPERATIONS", expected - 1)
    without = cards.cards(source, tiny_sae(), **options)
    for name in ("promoted", "promoted_by", "suppressed", "suppressed_by"):
        assert len(without[name]) == 0
        assert without[name].dtype == arrays[name].dtype
        assert without[name].shape[1:] == arrays[name].shape[1:]
    np.testing.assert_array_equal(without["place"], arrays["place"])
    monkeypatch.setattr(cards, "MOST_OPERATIONS", expected)
    again = cards.cards(source, tiny_sae(), **options)
    np.testing.assert_array_equal(again["promoted"], arrays["promoted"])


def test_how_pure_latents_look_by_hand(tmp_path):
    slots = cards.STRONGEST + 4 * cards.OF_QUARTER
    made = {
        "place": np.zeros((3, slots), np.int32),
        "peak": np.ones((3, slots), np.uint8),
        "window": np.full((3, slots, 2), 7, np.uint16),
    }
    made["window"][:, :, 0] = np.arange(slots)  # not the peak
    made["window"][0, 2, 1] = 8
    made["place"][1, 1] = -1
    last = slots - cards.OF_QUARTER
    made["window"][:2, last, 1] = 9
    cards.save(made, tmp_path / "cards.safetensors")
    table = cards.one_token(cards.load(tmp_path / "cards.safetensors"))
    assert table.latents.tolist() == [2, 3, 3, 3, 3]
    assert table.one_token.tolist() == pytest.approx([1 / 2, 1, 1, 1, 1 / 3])
    assert table.examples.tolist()[::4] == ["strongest", "0 to 25 %"]


def test_only_dictionaries_of_the_residual_stream_have_cards():
    for site in (SiteSpec(stacked=True), SiteSpec(source="mlp_output")):
        with pytest.raises(SpecError, match="dictionary of the residual stream"):
            cards.cards(reading(tiny_lm(), BATCHES, site), tiny_sae())
    with pytest.raises(SpecError, match="basis"):
        cards.cards(reading(tiny_lm(), BATCHES, SiteSpec(), random_lens()), tiny_sae())
