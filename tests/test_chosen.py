"""Latents that are chosen by a rule, and what is shown of them."""

import pytest
import torch
from tiny_lm import N_LAYERS, tiny_lm, tiny_tokens

from mlsae_book.tables import chosen, predictions
from mlsae_core.activations import First, TextSource
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SiteSpec, SpecError
from mlsae_core.text import TokenBlocks

SEQUENCES, LATENTS = 12, 24


def source(**site):
    text = tiny_tokens(SEQUENCES, seed=5).numpy()
    return TextSource(tiny_lm(), First(TokenBlocks(text), SEQUENCES), SiteSpec(**site))


def sae(width=16):
    return MLSAE(width, LATENTS, 3, generator=torch.Generator().manual_seed(0)).eval()


@torch.no_grad()
def test_the_chosen_latents_are_those_of_the_rule_by_brute_force():
    reading, dictionary = source(), sae(source().d_model)
    found = chosen.chosen(reading, dictionary, 5, number=4, texts=3, least=2, progress=False)
    (batch,) = reading.batches(SEQUENCES)
    values, indices = dictionary.encode(batch.source)
    dense = torch.zeros(*values.shape[:2], LATENTS).scatter(-1, indices, values)  # l, t, j
    total = dense.sum(0)
    active = total > 0
    mean = torch.arange(N_LAYERS, dtype=torch.float)[:, None, None] * dense / total
    mean = mean.sum(0).nan_to_num().sum(0) / active.sum(0)
    frequent = [j for j in range(LATENTS) if active[:, j].sum() >= 2]
    order = torch.tensor(sorted(frequent, key=lambda j: float(mean[j])))
    assert len(found) == 4
    for row, group in zip(found, order.tensor_split(4), strict=True):
        expected = int(max(group, key=lambda j: float(dense[:, :, j].max())))
        assert row["latent"] == expected
        assert (row["tokens"], row["of"]) == (int(active[:, expected].sum()), len(batch.tokens))
        assert row["mean_layer"] == pytest.approx(float(mean[expected]))
        by_token = dense[:, :, expected].max(0)
        best = by_token.values.topk(min(3, row["tokens"]))
        for text, value, token in zip(row["texts"], *best, strict=True):
            assert text["activation"] == pytest.approx(float(value))
            assert text["layer"] == int(by_token.indices[token])
            assert text["token"] == reading.lm.tokenizer.decode([int(batch.tokens[token])])


def test_texts_are_shown_as_text_and_the_token_is_marked():
    text = {"before": "<b>\n", "token": "&", "after": "", "activation": 1.0, "layer": 2}
    latent = {"latent": 7, "tokens": 3, "of": 1000, "mean_layer": 1.25, "texts": [text]}
    html = chosen.as_html([latent | {"probs": [0.02, 0.5, 0.48]}], {7: "an <ampersand>"})
    assert "&lt;b&gt;↵<b style='text-decoration:underline'>&amp;</b>" in html
    assert "<td>an &lt;ampersand&gt;</td><td>1.2</td><td>1–2</td><td>3.0</td>" in html
    assert "<td>?</td>" in chosen.as_html([latent | {"probs": [1.0, 0.0]}], {})


def test_stacked_layers_are_refused():
    with pytest.raises(SpecError, match="stacked: expected false for latents"):
        chosen.chosen(source(stacked=True), sae(), progress=False)


def test_next_tokens_are_those_of_the_whole_model():
    lm = source().lm
    table = predictions.next_tokens(lm, ["w1 w2", "w3"], most=3)
    for prompt, rows in table.groupby("prompt"):
        ids = torch.tensor([lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        expected = lm.model(input_ids=ids).logits[0, -1].softmax(-1).topk(3)
        assert rows.probability.tolist() == pytest.approx(expected.values.tolist(), rel=1e-4)
        assert rows.token.tolist() == [lm.tokenizer.decode([int(i)]) for i in expected.indices]
        assert rows["rank"].tolist() == [1, 2, 3]
