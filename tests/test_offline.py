"""The explorer's scripts: what they hold agrees with what is shipped, and they are small enough."""

import base64
import dataclasses
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from tiny_lm import tiny_lm

from mlsae_book import offline
from mlsae_book.tables.cards import OF_QUARTER, STRONGEST
from mlsae_core import pipeline

ROOT = Path(__file__).parents[1]
KIB = 1024


@pytest.fixture(scope="module")
def session():
    return pipeline.Session("read-only")


@pytest.fixture(scope="module")
def subject(session):
    """The language model, the dictionary and the run."""
    run, _ = offline.default(ROOT / "book")
    return session.lm(run.model), session.sae(run), run


@pytest.fixture(scope="module")
def run(session):
    return offline.read(session, *offline.default(ROOT / "book"))


@pytest.fixture(scope="module")
def scripts(run, tmp_path_factory):
    return {p.stem: p for p in offline.write(run, tmp_path_factory.mktemp("scripts") / "explorer")}


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


def test_weights_are_there_to_24_bits(subject, scripts):
    packed = content(scripts["model"])
    length = int.from_bytes(packed[:4], "little")
    header, count = json.loads(packed[4 : 4 + length]), 0
    exponents = np.frombuffer(packed, np.uint8, header["count"], 4 + length).astype(np.uint32)
    rest = np.frombuffer(packed[4 + length + header["count"] :], "<u2").astype(np.uint32)
    bits = (rest & 0x8000) << 16 | exponents << 23 | (rest & 0x7FFF) << 8
    values = bits.view(np.float32)
    lm, sae, _ = subject
    own = dict(offline._weights(lm, sae))
    for name, start, end in header["tensors"]:
        expected = own.pop(name).ravel()
        np.testing.assert_allclose(values[start:end], expected, rtol=2**-16)
        count += end - start
    assert not own
    assert count == header["count"] == len(values)
    assert len(header["tensors"]) == len([*lm.model.parameters()]) + 3
    assert count == sum(p.numel() for module in (lm.model, sae) for p in module.parameters())


@pytest.mark.parametrize("value", [0.0, 1.0, -1.5, 1.9999999, -3e-39, 65504.0])
def test_rounding_to_24_bits(value):
    exponent, rest = (int(x[0]) for x in offline.split(np.array([value], np.float32)))
    bits = np.array([(rest & 0x8000) << 16 | exponent << 23 | (rest & 0x7FFF) << 8], np.uint32)
    assert bits.view(np.float32)[0] == pytest.approx(value, rel=2**-16, abs=2**-140)


def test_tokens_are_the_bytes_that_the_tokenizer_writes(subject, run):
    tokenizer = subject[0].tokenizer
    text = "é😀 def f(x):\n\treturn x\x00"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    vocabulary = run.vocabulary
    assert "".join(vocabulary[i] for i in ids).encode("latin-1") == text.encode()
    assert vocabulary[tokenizer.eos_token_id] == tokenizer.eos_token
    joined = iter(offline.merges(offline._tokenizer(subject[0])))
    pairs = zip(joined, joined, strict=True)
    assert all(vocabulary[a] + vocabulary[b] in vocabulary for a, b in pairs)


def test_tokens_of_a_tokenizer_of_words_are_their_text():
    lm = tiny_lm()
    assert offline.vocabulary(lm)[:4] == ["<eos>", "<pad>", "w2", "w3"]
    lm.vocab_size += 2
    assert offline.vocabulary(lm)[-2:] == ["", ""]


def test_what_the_page_cannot_run_is_left_out_with_the_reason(subject, monkeypatch):
    lm, sae, run = subject
    offline._check(lm, sae, run)
    refused = {
        "hidden_act": (lm.model.config, "hidden_act", "gelu_new"),
        "topk": (sae, "standardize", False),
        "size": (offline, "MOST_WEIGHTS", 1000),
    }
    for name, change in refused.items():
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            with pytest.raises(ValueError, match=name):
                offline._check(lm, sae, run)
    site = dataclasses.replace(run.site, layers=(0, 2))
    with pytest.raises(ValueError, match="layers"):
        offline._check(lm, sae, dataclasses.replace(run, site=site))
    with pytest.raises(ValueError, match=r"model_type|hidden_act"):
        offline._check(tiny_lm("llama"), sae, run)


def test_nearest_rows_are_those_of_the_whole_matrix(monkeypatch):
    generator = np.random.default_rng(0)
    rows, others = map(offline._unit, generator.normal(size=(2, 7, 5)))
    monkeypatch.setattr(offline, "ROWS_AT_ONCE", 3)
    for theirs in (None, others):
        indices, cosines = offline._nearest(rows, theirs, 2)
        part = offline._nearest(rows, theirs, 2, range(2, 6))
        np.testing.assert_array_equal(part[0], indices[2:6])
        full = rows @ (rows if theirs is None else theirs).T
        if theirs is None:
            np.fill_diagonal(full, -2)
        np.testing.assert_array_equal(indices, np.argsort(-full, 1)[:, :2])
        np.testing.assert_allclose(cosines, -np.sort(-full, 1)[:, :2])


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


def test_latents_are_found_by_every_token_of_their_examples(run, scripts):
    begun = json.loads(content(scripts["index"]))["token_shards"]
    shards = sorted(name for name in scripts if name.startswith("tokens-"))
    parts = [json.loads(content(scripts[name])) for name in shards]
    assert [len(part) for part in parts] == np.diff([*begun, len(run.vocabulary)]).tolist()
    found = {}
    for token, steps in enumerate(step for part in parts for step in part):
        latents = np.cumsum([step >> 1 for step in steps])
        found |= {(token, j): step & 1 for j, step in zip(latents.tolist(), steps, strict=True)}
    expected = {}
    c = run.cards
    for j, slot in np.argwhere(c["place"] >= 0).tolist():
        for token, active in zip(c["window"][j, slot].tolist(), c["around"][j, slot], strict=True):
            expected[token, j] = max(expected.get((token, j), 0), int(active > 0))
    assert found == expected


def test_files_of_tokens_hold_as_many_pairs_as_they_may(monkeypatch):
    monkeypatch.setattr(offline, "PAIRS", 3)
    assert offline.starts([[2], [2, 2], [], [2, 2, 2, 2], [], [2]]) == [0, 3, 4]
    assert offline.starts([[], []]) == [0]


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
    rows = run.decoder
    cosines = [float(rows[a] @ rows[b]) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    assert cosines == sorted(cosines, reverse=True)
    off = rows @ rows.T - 2 * np.eye(len(rows))
    assert cosines[0] == pytest.approx(off.max(), rel=1e-5)
