"""The default run as scripts for the explorer's page: model, dictionary, and all that is known of
its latents, so that a browser can run them without a server, from a file too.

They are made when the book is built, from what is shipped, so nothing is stored twice, and this
module is the Sphinx extension that does so and puts the page together. A script calls `explorerAsset(name, payload)`; the payload is base64 of bytes that zlib has deflated.

- ``model``: 24 bits of every weight, which takes the exponents apart from the rest since only they
  can be compressed. Half precision is not enough: it moves probabilities by up to 1.3e-3 and
  activations by 5e-3 of their size, 24 bits by 6e-5 and 2e-4.
- ``index``: the vocabulary, one row of numbers for every latent, and lists worth reading.
- ``latents-00`` and so on: the cards of `SHARD` latents each.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from mlsae_book import stages  # noqa: F401 (so that its stages are known)
from mlsae_book.tables.cards import OF_QUARTER, STRONGEST
from mlsae_book.tables.cards import load as read_cards
from mlsae_core import pipeline, store
from mlsae_core.sae import STD_EPS
from mlsae_core.spec import load_experiment

#: The chapter in which a prompt can be typed, and the place that it has for that.
CHAPTER, PLACE = "explorer", '<div class="latent-explorer"></div>'
#: The page's own scripts, in `_theme/explorer`, in the order in which they are read.
SCRIPTS = ("assets", "tokenizer", "model", "engine", "page", "card", "find", "prompt", "app")
#: Latents in a file.
SHARD = 64
#: Similar latents and tokens on a card, and latents in a list.
NEAREST, LISTED = 8, 12
#: Tokens at which a latent has to be active to be in a list.
ENOUGH = 1000

#: Weights of a block: their names in the page, and in GPT-NeoX.
BLOCK = {
    "norm_attention": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
    "qkv": "attention.query_key_value",
    "attention": "attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}


class Run(NamedTuple):
    """All that is shipped of a run."""

    key: str
    """Of its results."""
    config: dict
    """Of the language model."""
    tokenizer: dict
    """Its tokenizer.json."""
    weights: dict[str, np.ndarray]
    """Of the language model."""
    dictionary: dict[str, np.ndarray]
    settings: dict
    """Of the dictionary: its config.json."""
    cards: dict[str, np.ndarray]
    """As `tables.cards.cards` made them."""
    cards_tokens: int
    distributions: dict[str, np.ndarray]
    distributions_tokens: int


def read(experiments: Path) -> Run:
    """The run of ``default.yml`` with its cards of ``explorer.yml``, as they are shipped.

    Raises:
        SpecError: one of its results is not there.
    """
    default, explorer = (load_experiment(experiments / f"{n}.yml") for n in ("default", "explorer"))
    _, run = default.runs[0]
    found = {
        stage: _result(stage, run, experiment.evaluate)
        for stage, experiment in (
            ("train", default), ("distributions", default), ("cards", explorer),
        )
    }  # fmt: skip
    model = store.MODELS / run.model.path
    train, cards, distributions = (found[n] for n in ("train", "cards", "distributions"))
    return Run(
        " ".join(artefact.key for artefact in found.values()),
        json.loads((model / "config.json").read_text()),
        json.loads((model / "tokenizer.json").read_text(encoding="utf-8")),
        load_file(model / "model.safetensors"),
        load_file(train.file("model.safetensors")),
        json.loads(train.file("config.json").read_text()),
        read_cards(cards.file("cards.safetensors")),
        cards.meta["tokens"],
        load_file(distributions.file("distributions.safetensors")),
        distributions.meta["tokens"],
    )


def _result(stage: str, run, settings) -> store.Artefact:
    identity = pipeline.STAGES[stage].key(run, settings)[0]
    found = store.find(stage, identity)
    if found is None:
        raise store.StoreError(
            f"{stage}/{identity}: expected a shipped result for the explorer, found none; run "
            "`python -m mlsae_book materialise experiments/explorer.yml`"
        )
    return found


def write(run: Run, folder: Path) -> list[Path]:
    """Write all scripts of a run into a folder, which is made; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in _assets(run):
        payload = base64.b64encode(zlib.compress(content, 9)).decode()
        path = folder / f"{name}.js"
        path.write_text(f'explorerAsset("{name}", "{payload}");\n', encoding="ascii")
        written.append(path)
    return written


def _assets(run: Run) -> Iterator[tuple[str, bytes]]:
    yield "model", model(run)
    yield "index", _json(index(run))
    everything = cards(run)
    for first in range(0, len(everything), SHARD):
        yield f"latents-{first // SHARD:02}", _json(everything[first : first + SHARD])


def _json(value) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# --- model and dictionary -------------------------------------------------------------------------


def model(run: Run) -> bytes:
    """The length of a header in 4 bytes, the header as JSON, exponents, and 16 bits for the rest."""
    tensors, at = [], 0
    arrays = list(_weights(run))
    for name, array in arrays:
        tensors.append([name, at, at + array.size])
        at += array.size
    exponents, rest = split(np.concatenate([a.ravel() for _, a in arrays]))
    vocabulary = tokens(run.tokenizer)
    header = {
        "count": at,
        "tensors": tensors,
        "config": config(run),
        "vocabulary": vocabulary,
        "merges": merges(run.tokenizer),
    }
    text = _json(header)
    return len(text).to_bytes(4, "little") + text + exponents.tobytes() + rest.tobytes()


def config(run: Run) -> dict:
    """What the page has to know of model and dictionary, beside their weights.

    Raises:
        ValueError: a model that the page cannot run.
    """
    c = run.config
    needed = {"model_type": "gpt_neox", "hidden_act": "gelu", "use_parallel_residual": True}
    needed["tie_word_embeddings"] = True
    for name, value in needed.items():
        if c[name] != value:
            raise ValueError(f"{name}: the page runs models with {value}, got {c[name]}")
    if not run.settings["standardize"] or "activation" in run.settings:
        raise ValueError("the page runs dictionaries with standardize and topk, got another")
    rope = c["rope_parameters"]
    return {
        "layers": c["num_hidden_layers"],
        "width": c["hidden_size"],
        "hidden": c["intermediate_size"],
        "heads": c["num_attention_heads"],
        "context": c["max_position_embeddings"],
        "epsilon": c["layer_norm_eps"],
        "theta": rope["rope_theta"],
        "rotary": int(c["hidden_size"] // c["num_attention_heads"] * rope["partial_rotary_factor"]),
        "k": run.settings["k"],
        "std_epsilon": STD_EPS,
    }


def _weights(run: Run) -> Iterator[tuple[str, np.ndarray]]:
    own = run.weights
    yield "embedding", own["gpt_neox.embed_in.weight"]
    for layer in range(run.config["num_hidden_layers"]):
        for name, theirs in BLOCK.items():
            for kind in ("weight", "bias"):
                found = own[f"gpt_neox.layers.{layer}.{theirs}.{kind}"]
                yield f"layers.{layer}.{name}.{kind}", found
    for kind in ("weight", "bias"):
        yield f"norm_last.{kind}", own[f"gpt_neox.final_layer_norm.{kind}"]
    yield "dictionary.encoder", run.dictionary["encoder.weight"]
    yield "dictionary.decoder", run.dictionary["decoder.weight"].T
    yield "dictionary.bias", run.dictionary["pre_encoder_bias"]


def split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 rounded to 24 bits: exponents (uint8), and sign and mantissa (little-endian uint16).

    >>> exponents, rest = split(np.array([1.0, -1.5, 0.0], np.float32))
    >>> exponents.tolist(), [hex(x) for x in rest.tolist()]
    ([127, 127, 0], ['0x0', '0xc000', '0x0'])
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x80)  # a carry into the exponent is right
    sign, exponent, mantissa = bits >> 31, (bits >> 23) & 0xFF, (bits >> 8) & 0x7FFF
    return exponent.astype(np.uint8), ((sign << 15) | mantissa).astype("<u2")


# --- tokenizer ------------------------------------------------------------------------------------


def tokens(tokenizer: dict) -> list[str]:
    """The tokens by their id, each as a string with one character for each of its bytes.

    Raises:
        ValueError: a tokenizer that the page cannot run.
    """
    kind = tokenizer["model"]["type"], tokenizer["pre_tokenizer"]["type"], tokenizer["normalizer"]
    if kind != ("BPE", "ByteLevel", None) or tokenizer["pre_tokenizer"]["add_prefix_space"]:
        raise ValueError(f"the page runs byte-level BPE as it is, got {kind}")
    special = {token["content"] for token in tokenizer["added_tokens"]}
    characters = byte_characters()
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    return [t if t in special else "".join(chr(characters[c]) for c in t) for t, _ in vocabulary]


def merges(tokenizer: dict) -> list[int]:
    """Ids of the pairs that are joined, one after the other, the one learnt first at first."""
    vocabulary = tokenizer["model"]["vocab"]
    return [vocabulary[token] for pair in tokenizer["model"]["merges"] for token in pair]


def byte_characters() -> dict[str, int]:
    """The printable characters that stand for bytes in a byte-level vocabulary, as in GPT-2's."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    plain += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


# --- latents --------------------------------------------------------------------------------------


def index(run: Run) -> dict:
    """What the page lists, sorts and searches: columns of numbers, one for each latent.

    ``probs`` are per cent of P(ℓ | j); ``density`` the fraction of tokens at which the latent is
    active at some layer; ``token`` the one at which it is active most often, ``share`` that
    token's fraction, ``spread`` on how many tokens it is active as if equally often.
    """
    d, c = run.distributions, run.cards
    probs = _probs(run)
    entropy = -np.where(probs > 0, probs * np.log(probs.clip(1e-12)), 0).sum(0)
    columns = {
        "mean_layer": _rounded(np.arange(len(probs)) @ probs, 3),
        "entropy": _rounded(entropy / np.log(len(probs)), 3),
        "sharpness": _rounded(probs.max(0), 3),
        "density": _rounded(d["active_tokens"] / run.distributions_tokens, 6),
        "token": c["top_token"][:, 0].tolist(),
        "share": _rounded(c["top_share"][:, 0], 3),
        "spread": _rounded(c["spread"], 1),
        "largest": _rounded(c["largest"], 3),
        "probs": np.rint(100 * probs.T).astype(int).tolist(),
    }
    return {
        "vocabulary": tokens(run.tokenizer),
        "layers": len(probs),
        "shard": SHARD,
        "context": run.config["max_position_embeddings"],
        "tokens": [run.distributions_tokens, run.cards_tokens],
        "latents": columns,
        "lists": lists(run),
    }


def lists(run: Run) -> list[dict]:
    """Short lists of latents worth reading: ``title`` and ``latents``."""
    probs, c = _probs(run), run.cards
    active, spread = run.distributions["active_tokens"], c["spread"]
    common = active >= ENOUGH
    entropy = -(probs * np.log(probs.clip(1e-12))).sum(0)

    def first(score: np.ndarray, among: np.ndarray, most: int = LISTED) -> list[int]:
        order = np.argsort(-np.where(among, score, -np.inf), kind="stable")
        return [int(j) for j in order[:most] if among[j]]

    each = [first(row, common, LISTED // len(probs)) for row in probs]
    cosines = _cosines(run)
    pairs = np.argsort(-np.triu(cosines, 1), axis=None, kind="stable")[: LISTED // 2]
    alike = [int(j) for pair in zip(*np.divmod(pairs, len(cosines)), strict=True) for j in pair]
    return [
        {"title": "Sharpest at each layer", "latents": [j for row in each for j in row]},
        {"title": "Spread over all layers", "latents": first(entropy, common)},
        {"title": "Closest to one token", "latents": first(-spread, common)},
        {"title": "Contexts: many different tokens", "latents": first(spread, common)},
        {"title": "Rare", "latents": first(-active, c["tokens"] >= 20)},
        {"title": "Pairs most alike", "latents": alike},
    ]


def cards(run: Run) -> list[dict]:
    """The card of every latent, with numbers that are short to write.

    Examples are lists of: group (0 for the strongest, then quarters from the highest), activation
    at the peak, layer, place of the peak, token ids, activations there in steps of 1/255 of the
    largest, and those at the peak at every layer.
    """
    c, d = run.cards, run.distributions
    density = d["counts"].T / run.distributions_tokens
    probs = _probs(run).T
    cosines = _cosines(run)
    near = np.argsort(-cosines, axis=1, kind="stable")[:, :NEAREST]
    embedding = run.weights["gpt_neox.embed_in.weight"]
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    similar = run.dictionary["decoder.weight"].T @ unit.T
    words = np.argsort(-similar, axis=1, kind="stable")[:, :NEAREST]
    found = []
    for j in range(len(c["largest"])):
        found.append(
            {
                "probs": _rounded(probs[j], 3),
                "density": _rounded(density[j], 6),
                "largest": round(float(c["largest"][j]), 3),
                "tokens": int(c["tokens"][j]),
                "quarters": c["quarters"][j].tolist(),
                "histogram": c["histogram"][j].tolist(),
                "top": _paired(c["top_token"][j], c["top_share"][j], c["top_share"][j] > 0),
                "spread": round(float(c["spread"][j]), 1),
                "examples": list(_examples(c, j)),
                "promoted": [_paired(*x) for x in _by_layer(c, "promoted", j)],
                "suppressed": [_paired(*x) for x in _by_layer(c, "suppressed", j)],
                "nearest": _paired(near[j], cosines[j, near[j]]),
                "words": _paired(words[j], similar[j, words[j]]),
            }
        )
    return found


def _examples(c: dict[str, np.ndarray], latent: int) -> Iterator[list]:
    for slot in np.flatnonzero(c["place"][latent] >= 0):
        at = latent, slot
        group = 0 if slot < STRONGEST else 1 + (slot - STRONGEST) // OF_QUARTER
        by_layer = c["by_layer"][at]
        yield [
            int(group),
            round(float(by_layer.max() / 255 * c["largest"][latent]), 2),
            int(c["layer"][at]),
            int(c["peak"][at]),
            c["window"][at].tolist(),
            c["around"][at].tolist(),
            by_layer.tolist(),
        ]


def _by_layer(c: dict[str, np.ndarray], name: str, latent: int):
    return zip(c[name][:, latent], c[f"{name}_by"][:, latent], strict=True)


def _paired(ids: np.ndarray, values: np.ndarray, kept: np.ndarray | None = None) -> list[list]:
    kept = np.full(len(ids), True) if kept is None else kept
    return [list(pair) for pair in zip(ids[kept].tolist(), _rounded(values[kept], 3), strict=True)]


def _probs(run: Run) -> np.ndarray:
    """P(ℓ | j), (layer, latent), 0 for a latent that is never active."""
    probs = run.distributions["probs"].astype(np.float64)
    return np.nan_to_num(probs / probs.sum(0))


def _cosines(run: Run) -> np.ndarray:
    """Of decoder rows, which are of unit norm; a latent is not like itself."""
    rows = run.dictionary["decoder.weight"].T
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -1)
    return cosines


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return [round(x, digits) for x in np.asarray(values, np.float64).tolist()]


# --- the build ------------------------------------------------------------------------------------


def _prepare(app, config) -> None:
    """Lay the scripts beside the static files, unless those of the same results are there."""
    if not (Path(app.srcdir) / f"{CHAPTER}.ipynb").is_file():
        return
    assets = Path(app.outdir).parent / ".explorer"
    run = read(Path(app.srcdir) / "experiments")
    made, sources = assets / "made", (Path(__file__).read_bytes(), run.key.encode())
    version = hashlib.sha256(b"".join(sources)).hexdigest()
    if not made.is_file() or made.read_text() != version:
        write(run, assets / "static/explorer/data")
        made.write_text(version)
    config.html_static_path.append(str(assets / "static"))


def _put_together(app, pagename, templatename, context, doctree) -> None:
    """Put the explorer in the place that its chapter has for it."""
    if pagename != CHAPTER:
        return
    markup = Path(app.confdir) / "book/_theme/explorer/app.html"
    context["body"] = context["body"].replace(PLACE, markup.read_text(encoding="utf-8"))
    app.add_css_file("explorer/explorer.css")
    for name in SCRIPTS:
        app.add_js_file(f"explorer/{name}.js", loading_method="defer")


def setup(app) -> dict:
    """Called by Sphinx, which finds this module in ``sphinx.extra_extensions`` of _config.yml."""
    app.connect("config-inited", _prepare, priority=20)
    app.connect("html-page-context", _put_together)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
