"""Top examples with their windows against a dense pass; tables and HTML."""

import pytest
import torch
from test_analysis import dense, tiny_sae
from tiny_lm import EOS, N_LAYERS, read, reading, tiny_lm, tiny_tokens

from mlsae_book.tables import examples
from mlsae_core.spec import SiteSpec, SpecError
from mlsae_core.text import TokenBlocks

BATCHES = [tiny_tokens(2, 12, seed=0), tiny_tokens(3, 12, seed=1), tiny_tokens(2, 12, seed=2)]
WINDOW = 6


def found(batches=BATCHES, **options):
    options = {"n_examples": 3, "window": WINDOW, "progress": False} | options
    return examples.examples(reading(tiny_lm(), batches), tiny_sae(), **options)


@pytest.fixture(scope="module")
def arrays():
    return found()


@pytest.fixture(scope="module")
def activations():
    """(layer, sequence, position, latent), 0 at special tokens."""
    lm, sae, tokens = tiny_lm(), tiny_sae(), torch.cat(BATCHES)
    (batch,) = read(lm, [tokens])
    full = torch.zeros(N_LAYERS, *tokens.shape, sae.n_latents)
    full[:, batch.sequence, batch.position] = dense(sae, sae.encode(batch.source)).detach()
    return full


def test_examples_agree_with_sorting_all_activations(arrays, activations):
    tokens, compared = torch.cat(BATCHES), 0
    for layer in range(N_LAYERS):
        for latent in range(activations.shape[-1]):
            h = activations[layer, ..., latent]
            pairs = sorted((-v, i) for i, v in enumerate(h.flatten().tolist()) if v > 0)[:3]
            at = layer, latent
            assert (arrays["sequence"][at] >= 0).sum() == len(pairs)
            for slot, (value, place) in enumerate(pairs):
                sequence, position = divmod(place, tokens.shape[1])
                entry = *at, slot
                assert arrays["values"][entry] == pytest.approx(-value, rel=1e-5)
                assert arrays["sequence"][entry] == sequence
                assert arrays["position"][entry] == position
                start = position - int(arrays["place"][entry])
                window = slice(start, start + WINDOW)
                assert arrays["tokens"][entry].tolist() == tokens[sequence, window].tolist()
                close = {"atol": 2e-3, "rtol": 2e-3}
                torch.testing.assert_close(
                    arrays["around"][entry].float(), h[sequence, window], **close
                )
                torch.testing.assert_close(
                    arrays["by_layer"][entry].float(),
                    activations[:, sequence, position, latent],
                    **close,
                )
                compared += 1
    assert compared > 100
    assert EOS in arrays["tokens"]  # special tokens are context …
    peaks = arrays["tokens"].gather(-1, arrays["place"].long()[..., None])[..., 0]
    assert EOS not in peaks[arrays["sequence"] >= 0]  # … and never an example


def test_examples_do_not_depend_on_how_the_text_is_batched(arrays):
    other = found(iter(torch.cat(BATCHES).split(1)))
    for name in ("sequence", "position", "place", "tokens"):
        assert torch.equal(arrays[name], other[name])
    torch.testing.assert_close(arrays["values"], other["values"])


def test_a_window_is_no_longer_than_the_sequence():
    assert found([tiny_tokens(2, 4)], window=16)["tokens"].shape[-1] == 4


def test_files_keep_what_they_are_given(arrays, tmp_path):
    examples.save(arrays, tmp_path / "examples.safetensors")
    read = examples.load(tmp_path / "examples.safetensors")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert torch.equal(read[name].to(array.dtype), array)


def test_the_best_examples_are_distinct_tokens_in_falling_order(arrays, activations):
    latent = int(activations.amax((0, 1, 2)).argmax())
    table = examples.best(arrays, [latent], most=3)
    largest = activations[..., latent].amax(0).flatten().sort(descending=True).values
    assert table.activation.tolist() == pytest.approx(largest[:3].tolist(), rel=1e-5)
    assert not table.duplicated(["sequence", "position"]).any()
    assert table["rank"].tolist() == [1, 2, 3]
    layers = examples.layer_table(arrays, [latent], most=3)
    assert layers.groupby("rank").activation.max().tolist() == pytest.approx(
        table.activation.tolist(), rel=1e-3
    )


def test_tables_hold_the_text_of_the_window(arrays, activations):
    tokenizer, latent = tiny_lm().tokenizer, int(activations.amax((0, 1, 2)).argmax())
    table = examples.best(arrays, [latent], most=2)
    tokens = torch.cat(BATCHES)
    long = examples.token_table(arrays, tokenizer, [latent], most=2)
    assert len(long) == 2 * WINDOW
    for row in table.itertuples():
        mine = long[long["rank"] == row.rank]
        peak = mine[mine.peak]
        assert peak.token.tolist() == [f"w{tokens[row.sequence, row.position]}"]
        assert peak.activation.item() == pytest.approx(row.activation, rel=1e-3)


def test_whole_sequences_of_the_examples_are_read_from_the_split(arrays):
    blocks = TokenBlocks(torch.cat(BATCHES).int().numpy())
    layer, latent = divmod(int(arrays["values"][..., 0].argmax()), arrays["values"].shape[1])
    tokens = examples.sequences(arrays, blocks, layer, latent)
    wanted = sorted(set(arrays["sequence"][layer, latent].tolist()) - {-1})
    assert torch.equal(tokens, torch.cat(BATCHES)[wanted])


def test_html_is_escaped_and_marks_the_peak(arrays):
    latent = int(arrays["values"].amax((0, 2)).argmax())
    table = examples.token_table(arrays, tiny_lm().tokenizer, [latent], most=1)
    table["token"] = '<script>alert(1)</script>&"'
    text = examples.html(table)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == WINDOW
    assert "&amp;&quot;" in text
    assert text.count("<b ") == 1
    assert "color:" not in text.replace("background", "")  # the page's own text colour stays


def test_latents_of_one_token_are_counted_by_hand():
    # One layer; latents: one token, two tokens, an incomplete list, a window's other place.
    arrays = {
        "tokens": torch.tensor([[[[5, 1], [5, 2]], [[5, 1], [6, 1]], [[5, 1], [0, 0]],
                                 [[1, 7], [7, 2]]]]),
        "place": torch.tensor([[[0, 0], [0, 0], [0, 0], [1, 0]]], dtype=torch.int8),
        "sequence": torch.tensor([[[0, 1], [0, 1], [0, -1], [0, 1]]]),
    }  # fmt: skip
    table = examples.one_token(arrays)
    assert table.latents.tolist() == [3]
    assert table.one_token.tolist() == pytest.approx([2 / 3])


def test_control_characters_are_made_visible():
    assert examples.shown("a\n\tb\x1b") == "a↵⇥b·"


def test_stacked_sites_and_no_batches_are_refused():
    with pytest.raises(SpecError, match="stacked: expected false for examples of every layer, got"):
        examples.examples(reading(tiny_lm(), BATCHES, SiteSpec(stacked=True)), tiny_sae())
    with pytest.raises(ValueError, match="source: expected at least one sequence, got none"):
        found([])
