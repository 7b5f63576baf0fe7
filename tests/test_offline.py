"""The explorer's scripts: what they hold agrees with what is shipped, and they are small enough."""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mlsae_book import offline
from mlsae_book.tables.cards import OF_QUARTER, STRONGEST
from mlsae_core import store

ROOT = Path(__file__).parents[1]
KIB = 1024


@pytest.fixture(scope="module")
def run():
    return offline.read(ROOT / "book/experiments")


@pytest.fixture(scope="module")
def scripts(run, tmp_path_factory):
    return {p.stem: p for p in offline.write(run, tmp_path_factory.mktemp("scripts"))}


def content(script):
    """What a script hands over."""
    call = re.fullmatch(r'explorerAsset\("([\w-]+)", "([\w+/=]*)"\);\n', script.read_text())
    assert call[1] == script.stem
    return zlib.decompress(base64.b64decode(call[2]))


def test_scripts_are_small_enough_and_always_the_same(run, scripts, tmp_path):
    assert scripts["model"].stat().st_size < 8_000_000
    for name, script in scripts.items():
        if name != "model":
            assert script.stat().st_size <= 300 * KIB, name
    again = {p.stem: p.read_bytes() for p in offline.write(run, tmp_path / "again")}
    assert again == {name: script.read_bytes() for name, script in scripts.items()}


def test_weights_are_there_to_24_bits(run, scripts):
    packed = content(scripts["model"])
    length = int.from_bytes(packed[:4], "little")
    header, count = json.loads(packed[4 : 4 + length]), 0
    exponents = np.frombuffer(packed, np.uint8, header["count"], 4 + length).astype(np.uint32)
    rest = np.frombuffer(packed[4 + length + header["count"] :], "<u2").astype(np.uint32)
    bits = (rest & 0x8000) << 16 | exponents << 23 | (rest & 0x7FFF) << 8
    values = bits.view(np.float32)
    own = dict(offline._weights(run))
    for name, start, end in header["tensors"]:
        expected = own.pop(name).ravel()
        np.testing.assert_allclose(values[start:end], expected, rtol=2**-16)
        count += end - start
    assert not own
    assert count == header["count"] == len(values)
    used = {name for name in run.weights if "rotary" not in name and "masked" not in name}
    assert len(header["tensors"]) == len(used) + 3


@pytest.mark.parametrize("value", [0.0, 1.0, -1.5, 1.9999999, -3e-39, 65504.0])
def test_rounding_to_24_bits(value):
    exponent, rest = (int(x[0]) for x in offline.split(np.array([value], np.float32)))
    bits = np.array([(rest & 0x8000) << 16 | exponent << 23 | (rest & 0x7FFF) << 8], np.uint32)
    assert bits.view(np.float32)[0] == pytest.approx(value, rel=2**-16, abs=2**-140)


def test_tokens_are_the_bytes_that_the_tokenizer_writes(run):
    tokenizer = AutoTokenizer.from_pretrained(store.MODELS / "neox-6l-128d")
    text = "é😀 def f(x):\n\treturn x\x00"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    vocabulary = offline.tokens(run.tokenizer)
    assert "".join(vocabulary[i] for i in ids).encode("latin-1") == text.encode()
    assert vocabulary[tokenizer.eos_token_id] == tokenizer.eos_token
    joined = iter(offline.merges(run.tokenizer))
    assert all(
        vocabulary[a] + vocabulary[b] in vocabulary for a, b in zip(joined, joined, strict=True)
    )


def test_other_models_and_dictionaries_are_refused(run):
    for change in ({"hidden_act": "gelu_new"}, {"tie_word_embeddings": False}):
        with pytest.raises(ValueError, match=next(iter(change))):
            offline.config(run._replace(config=run.config | change))
    with pytest.raises(ValueError, match="topk"):
        offline.config(run._replace(settings=run.settings | {"activation": "jumprelu"}))
    with pytest.raises(ValueError, match="byte-level"):
        offline.tokens(run.tokenizer | {"normalizer": {"type": "NFC"}})


def test_every_latent_has_a_card_that_agrees_with_its_numbers(run, scripts):
    index = json.loads(content(scripts["index"]))
    shards = sorted(name for name in scripts if name.startswith("latents-"))
    cards = [card for name in shards for card in json.loads(content(scripts[name]))]
    columns = index["latents"]
    assert len(cards) == len(columns["token"]) == len(run.cards["largest"])
    quarters = dict.fromkeys(range(5), 0)
    for j, card in enumerate(cards):
        assert sum(card["probs"]) == pytest.approx(1, abs=0.01)
        mean = sum(layer * p for layer, p in enumerate(card["probs"]))
        assert columns["mean_layer"][j] == pytest.approx(mean, abs=0.01)
        assert columns["largest"][j] == card["largest"]
        assert columns["token"][j] == card["top"][0][0]
        assert j not in [latent for latent, _ in card["nearest"]]
        assert max(card["density"]) <= columns["density"][j] + 1e-6
        for group, value, layer, peak, ids, around, by_layer in card["examples"]:
            quarters[group] += 1
            assert around[peak] == by_layer[layer] == max(by_layer)
            assert len(ids) == len(around)
            assert value <= card["largest"] + 0.01
    assert quarters[0] == pytest.approx(STRONGEST * len(cards), rel=0.01)
    assert all(0 < quarters[q] <= OF_QUARTER * len(cards) for q in range(1, 5))


def test_lists_are_of_latents_that_are_what_they_say(run):
    lists = {entry["title"]: entry["latents"] for entry in offline.lists(run)}
    columns = offline.index(run)["latents"]
    assert all(0 < len(latents) <= offline.LISTED for latents in lists.values())
    sharp = [columns["sharpness"][j] for j in lists["Sharpest at each layer"]]
    assert min(sharp) > np.median(columns["sharpness"])
    token, context = (
        [columns["spread"][j] for j in lists[title]]
        for title in ("Closest to one token", "Contexts: many different tokens")
    )
    assert max(token) < 5 < 500 < min(context)
    pairs = lists["Pairs most alike"]
    rows = run.dictionary["decoder.weight"].T
    cosines = [float(rows[a] @ rows[b]) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    assert cosines == sorted(cosines, reverse=True)
    off = rows @ rows.T - 2 * np.eye(len(rows))
    assert cosines[0] == pytest.approx(off.max(), rel=1e-5)
