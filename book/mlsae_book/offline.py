"""A run as scripts for the explorer's page: model, dictionary, and all that is known of its
latents, so that a browser can run them without a server, from a file too.

The book has those of the default run. They are made when it is built, from what is shipped, so
nothing is stored twice; this module is the Sphinx extension that does so and puts the page
together. A script calls `explorerAsset(name, payload)`; the payload is base64 of bytes that zlib
has deflated.

- ``model``: 24 bits of every weight, which takes the exponents apart from the rest since only they
  can be compressed. Half precision is not enough: it moves probabilities by up to 1.3e-3 and
  activations by 5e-3 of their size, 24 bits by 6e-5 and 2e-4. Models that the page cannot run, or
  that are too large for it, are left out.
- ``index``: the vocabulary, one row of numbers for every latent, and lists worth reading.
- ``latents-00`` and so on: the cards of `SHARD` latents each.
- ``tokens-00`` and so on: for a range of tokens each, the latents that have them in an example.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlsae_book import stages  # noqa: F401 (so that its stages are known)
from mlsae_book.tables.cards import OF_QUARTER, STRONGEST, load
from mlsae_core import pipeline
from mlsae_core.pipeline import Session
from mlsae_core.spec import EvaluateSpec, SpecError, SubjectSpec, load_experiment

if TYPE_CHECKING:
    from mlsae_core.lm import LanguageModel
    from mlsae_core.sae import MLSAE

#: The chapter in which a prompt can be typed, and the place that it has for that.
CHAPTER, PLACE = "explorer", '<div class="latent-explorer"></div>'
#: The page's own markup, scripts and styles, and its scripts in the order in which they are read.
PAGE = Path(__file__).with_name("page")
ENGINE = ("assets", "tokenizer", "model", "engine")
PANELS = ("page", "card", "find", "overview", "prompt", "app")
SCRIPTS = ENGINE + PANELS
#: What they are read with; the second where the book's theme is not.
STYLES = ("explorer", "report")
#: Latents in a file.
SHARD = 64
#: Pairs of a token and a latent in a file, at most, but for those of one token.
PAIRS = 150_000
#: Similar latents and tokens on a card, and latents in a list.
NEAREST, LISTED = 8, 12
#: Tokens at which a latent has to be active to be in a list.
ENOUGH = 1000
#: Latents whose similarities are computed at a time.
ROWS_AT_ONCE = 512
#: Weights of a language model and a dictionary that a page may hold: 16 MB.
MOST_WEIGHTS = 5_000_000
#: Tokens of the text of cards, at most: every activation in it is held.
CARDS_TOKENS = 262_144

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
    """All that the page shows of a run."""

    vocabulary: list[str]
    """The tokens by their id, each as a string with one character for each of its bytes."""
    context: int
    """Tokens that the model reads at most."""
    embedding: np.ndarray
    """(vocabulary, d_model), rows of length 1."""
    decoder: np.ndarray
    """(latent, d_model), rows of length 1."""
    cards: dict[str, np.ndarray]
    """As `tables.cards.cards` made them."""
    cards_tokens: int
    distributions: dict[str, np.ndarray]
    """As `analysis.distributions` made them."""
    distributions_tokens: int
    model: bytes | None
    """As `model` packs it, or nothing."""
    why_no_model: str = ""


def settings_of(settings: EvaluateSpec) -> dict[str, EvaluateSpec]:
    """What is read for each stage that the page shows: stage → settings."""
    few = replace(settings, tokens=min(settings.tokens, CARDS_TOKENS), ablations=False)
    return {"distributions": settings, "cards": few}


def read(session: Session, run: SubjectSpec, settings: EvaluateSpec) -> Run:
    """The results of a run, found or computed as the session may.

    Raises:
        SpecError: a run whose latents have no cards, or a missing result where the session only
            reads.
    """
    from safetensors.numpy import load_file

    from mlsae_core.sae import MLSAE

    lm, sae = session.lm(run.model), session.sae(run)
    if not isinstance(sae, MLSAE):
        raise SpecError("dictionary: expected one for all layers, got one for each")
    made = {name: session.make(name, run, read) for name, read in settings_of(settings).items()}
    packed, why = None, ""
    try:
        _check(lm, sae, run)
        packed = model(lm, sae)
    except ValueError as error:
        why = str(error)
    return Run(
        vocabulary(lm),
        lm.max_positions or run.data.context_length,
        _unit(_numpy(lm.model.get_input_embeddings().weight)),
        _unit(_numpy(sae.decoder)),
        load(made["cards"].file("cards.safetensors")),
        made["cards"].meta["tokens"],
        load_file(made["distributions"].file("distributions.safetensors")),
        made["distributions"].meta["tokens"],
        packed,
        why,
    )


def _numpy(tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def write(run: Run, folder: Path) -> list[Path]:
    """Write the page's scripts and styles into a folder, in the place of earlier ones, and what
    they show of a run into its folder ``data``; gives the paths of the latter."""
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "data").mkdir(parents=True)
    for name in [*(f"{name}.js" for name in SCRIPTS), *(f"{name}.css" for name in STYLES)]:
        shutil.copyfile(PAGE / name, folder / name)
    written = []
    for name, content in _assets(run):
        payload = base64.b64encode(zlib.compress(content, 9)).decode()
        path = folder / "data" / f"{name}.js"
        path.write_text(f'explorerAsset("{name}", "{payload}");\n', encoding="ascii")
        written.append(path)
    return written


def markup() -> str:
    """HTML of the explorer, which its scripts fill."""
    return (PAGE / "app.html").read_text(encoding="utf-8")


def _assets(run: Run) -> Iterator[tuple[str, bytes]]:
    if run.model is not None:
        yield "model", run.model
    yield "index", _json(index(run))
    for number in range(-(-len(run.decoder) // SHARD)):
        yield f"latents-{number:02}", _json(cards(run, number))
    found = postings(run)
    for number, (first, last) in enumerate(itertools.pairwise([*starts(found), len(found)])):
        yield f"tokens-{number:02}", _json(found[first:last])


def _json(value) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# --- model and dictionary -------------------------------------------------------------------------


def _check(lm: LanguageModel, sae: MLSAE, run: SubjectSpec) -> None:
    """Refuse, with ValueError, what the page's own model and dictionary cannot do."""
    config, tokenizer = lm.model.config.to_dict(), _tokenizer(lm)
    needed = {"model_type": "gpt_neox", "hidden_act": "gelu", "use_parallel_residual": True}
    needed |= {"tie_word_embeddings": True, "attention_bias": True}
    for name, value in needed.items():
        if config.get(name) != value:
            raise ValueError(f"{name}: the page runs {value}, this model has {config.get(name)}")
    kind = tokenizer["model"]["type"], tokenizer["pre_tokenizer"], tokenizer["normalizer"]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if kind != ("BPE", plain | {"use_regex": True}, None):
        raise ValueError("tokenizer: the page runs byte-level BPE as GPT-2 has it, this is another")
    if not sae.standardize or sae.activation.name != "topk" or sae.encoder_bias is not None:
        raise ValueError("dictionary: the page runs standardised topk without an encoder's bias")
    if run.site.indices(lm.n_layers) != list(range(lm.n_layers)):
        raise ValueError("layers: the page runs dictionaries of all layers, this is of some")
    size = sum(p.numel() for module in (lm.model, sae) for p in module.parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"size: the page runs {MOST_WEIGHTS:,} weights, these are {size:,}")


def model(lm: LanguageModel, sae: MLSAE) -> bytes:
    """The length of a header in 4 bytes, the header as JSON, exponents, and 16 bits for the rest."""
    tensors, at = [], 0
    arrays = list(_weights(lm, sae))
    for name, array in arrays:
        tensors.append([name, at, at + array.size])
        at += array.size
    exponents, rest = split(np.concatenate([array.ravel() for _, array in arrays]))
    text = _json(
        {
            "count": at,
            "tensors": tensors,
            "config": config(lm, sae),
            "vocabulary": vocabulary(lm),
            "merges": merges(_tokenizer(lm)),
        }
    )
    return len(text).to_bytes(4, "little") + text + exponents.tobytes() + rest.tobytes()


def config(lm: LanguageModel, sae: MLSAE) -> dict:
    """What the page has to know of model and dictionary, beside their weights."""
    from mlsae_core.sae import STD_EPS

    c = lm.model.config
    rope = c.rope_parameters
    return {
        "layers": c.num_hidden_layers,
        "width": c.hidden_size,
        "hidden": c.intermediate_size,
        "heads": c.num_attention_heads,
        "context": c.max_position_embeddings,
        "epsilon": c.layer_norm_eps,
        "theta": rope["rope_theta"],
        "rotary": int(c.hidden_size // c.num_attention_heads * rope["partial_rotary_factor"]),
        "k": sae.k,
        "std_epsilon": STD_EPS,
    }


def _weights(lm: LanguageModel, sae: MLSAE) -> Iterator[tuple[str, np.ndarray]]:
    own = {name: _numpy(tensor) for name, tensor in lm.model.named_parameters()}
    yield "embedding", own["gpt_neox.embed_in.weight"]
    for layer in range(lm.n_layers):
        for name, theirs in BLOCK.items():
            for kind in ("weight", "bias"):
                found = own[f"gpt_neox.layers.{layer}.{theirs}.{kind}"]
                yield f"layers.{layer}.{name}.{kind}", found
    for kind in ("weight", "bias"):
        yield f"norm_last.{kind}", own[f"gpt_neox.final_layer_norm.{kind}"]
    yield "dictionary.encoder", _numpy(sae.encoder)
    yield "dictionary.decoder", _numpy(sae.decoder)
    yield "dictionary.bias", _numpy(sae.pre_bias)


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


def _tokenizer(lm: LanguageModel) -> dict:
    return json.loads(lm.tokenizer.backend_tokenizer.to_str())


def vocabulary(lm: LanguageModel) -> list[str]:
    """The tokens by their id, each as a string with one character for each of its bytes.

    Where a tokenizer is not byte-level, the bytes are those of a token's text. Ids of the model
    that the tokenizer does not know are empty.
    """
    tokenizer, characters = lm.tokenizer, byte_characters()
    is_byte_level = '"ByteLevel"' in json.dumps(_tokenizer(lm)["decoder"])
    found = []
    for id, name in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if is_byte_level and all(c in characters for c in name):
            found.append("".join(chr(characters[c]) for c in name))
        else:
            found.append(tokenizer.decode([id]).encode().decode("latin-1"))
    return found + [""] * (lm.vocab_size - len(found))


def merges(tokenizer: dict) -> list[int]:
    """Ids of the pairs that are joined, one after the other, the one learnt first at first."""
    ids = tokenizer["model"]["vocab"]
    return [ids[token] for pair in tokenizer["model"]["merges"] for token in pair]


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
        "vocabulary": run.vocabulary,
        "layers": len(probs),
        "shard": SHARD,
        "token_shards": starts(postings(run)),
        "context": run.context,
        "no_model": None if run.model is not None else run.why_no_model,
        "megabytes": round(len(run.model or b"") / 1e6),
        "tokens": [run.distributions_tokens, run.cards_tokens],
        "latents": columns,
        "lists": lists(run),
    }


def lists(run: Run) -> list[dict]:
    """Short lists of latents worth reading: ``title`` and ``latents``."""
    probs, c = _probs(run), run.cards
    active, spread = run.distributions["active_tokens"], c["spread"]
    common = active >= min(ENOUGH, np.median(active))
    entropy = -(probs * np.log(probs.clip(1e-12))).sum(0)

    def first(score: np.ndarray, among: np.ndarray, most: int = LISTED) -> list[int]:
        order = np.argsort(-np.where(among, score, -np.inf), kind="stable")
        return [int(j) for j in order[:most] if among[j]]

    each = [first(row, common, LISTED // len(probs)) for row in probs]
    partners, cosines = _nearest(run.decoder, None, 1)
    falling = np.argsort(-cosines[:, 0], kind="stable").tolist()
    pairs = dict.fromkeys(tuple(sorted((j, int(partners[j, 0])))) for j in falling)
    alike = [j for pair in list(pairs)[: LISTED // 2] for j in pair]
    return [
        {"title": "Sharpest at each layer", "latents": [j for row in each for j in row]},
        {"title": "Spread over all layers", "latents": first(entropy, common)},
        {"title": "Closest to one token", "latents": first(-spread, common)},
        {"title": "Contexts: many different tokens", "latents": first(spread, common)},
        {"title": "Rare", "latents": first(-active, c["tokens"] >= 20)},
        {"title": "Pairs most alike", "latents": alike},
    ]


def cards(run: Run, shard: int) -> list[dict]:
    """The cards of `SHARD` latents, with numbers that are short to write.

    Examples are lists of: group (0 for the strongest, then quarters from the highest), activation
    at the peak, layer, place of the peak, token ids, activations there in steps of 1/255 of the
    largest, and those at the peak at every layer.
    """
    c = run.cards
    density = run.distributions["counts"].T / run.distributions_tokens
    probs = _probs(run).T
    latents = range(shard * SHARD, min((shard + 1) * SHARD, len(run.decoder)))
    near = _nearest(run.decoder, None, NEAREST, latents)
    words = _nearest(run.decoder, run.embedding, NEAREST, latents)
    found = []
    for row, j in enumerate(latents):
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
                "nearest": _paired(*(x[row] for x in near)),
                "words": _paired(*(x[row] for x in words)),
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


def postings(run: Run) -> list[list[int]]:
    """For every token the latents that have it in an example, so that they can be searched.

    Latents ascend. Of each, twice the step from the one before, and 1 more where it is active at
    the token in one of them.
    """
    c, n_tokens = run.cards, len(run.vocabulary)
    there = np.broadcast_to((c["place"] >= 0)[..., None], c["window"].shape)
    latent = np.nonzero(there)[0]
    token, active = c["window"][there].astype(np.int64), c["around"][there] > 0
    pairs, first = np.unique(token * len(there) + latent, return_inverse=True)
    is_active = np.bincount(first, active) > 0
    token, latent = np.divmod(pairs, len(there))
    parts = np.split(np.arange(len(pairs)), np.searchsorted(token, np.arange(1, n_tokens)))
    return [(2 * np.diff(latent[part], prepend=0) + is_active[part]).tolist() for part in parts]


def starts(found: list[list[int]]) -> list[int]:
    """The tokens with which the files of `postings` begin: as many in each as fit `PAIRS`."""
    begun, held = [0], 0
    for token, latents in enumerate(found):
        if held and held + len(latents) > PAIRS:
            begun.append(token)
            held = 0
        held += len(latents)
    return begun


def _by_layer(c: dict[str, np.ndarray], name: str, latent: int):
    return zip(c[name][:, latent], c[f"{name}_by"][:, latent], strict=True)


def _paired(ids: np.ndarray, values: np.ndarray, kept: np.ndarray | None = None) -> list[list]:
    kept = np.full(len(ids), True) if kept is None else kept
    return [list(pair) for pair in zip(ids[kept].tolist(), _rounded(values[kept], 3), strict=True)]


def _probs(run: Run) -> np.ndarray:
    """P(ℓ | j), (layer, latent), 0 for a latent that is never active."""
    probs = run.distributions["probs"].astype(np.float64)
    return np.nan_to_num(probs / probs.sum(0))


def _nearest(
    rows: np.ndarray, others: np.ndarray | None, most: int, chosen: range | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices and cosine similarities, (row, most), of the most similar other rows, all of length 1.

    others: of another matrix, or None for the rest of the same. chosen: rows, or None for all.
    """
    theirs = rows if others is None else others
    chosen = range(len(rows)) if chosen is None else chosen
    indices, cosines = [], []
    for first in range(0, len(chosen), ROWS_AT_ONCE):
        own = np.array(chosen[first : first + ROWS_AT_ONCE])
        similar = rows[own] @ theirs.T
        if others is None:  # a latent is not like itself
            similar[np.arange(len(own)), own] = -np.inf
        best = np.argsort(-similar, axis=1, kind="stable")[:, :most]
        indices.append(best)
        cosines.append(np.take_along_axis(similar, best, 1))
    return np.concatenate(indices), np.concatenate(cosines)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return [round(x, digits) for x in np.asarray(values, np.float64).tolist()]


# --- the build ------------------------------------------------------------------------------------


def default(book: Path) -> tuple[SubjectSpec, EvaluateSpec]:
    """The run that the book studies by default, and what its results read."""
    experiment = load_experiment(book / "experiments/default.yml")
    return experiment.runs[0][1], experiment.evaluate


def _prepare(app, config) -> None:
    """Lay the scripts beside the static files, unless those of the same results are there."""
    if not (Path(app.srcdir) / f"{CHAPTER}.ipynb").is_file():
        return
    assets = Path(app.outdir).parent / ".explorer"
    run, settings = default(Path(app.srcdir))
    read_for = settings_of(settings).items()
    keys = " ".join(pipeline.STAGES[stage].key(run, read)[0] for stage, read in read_for)
    sources = [Path(__file__), *sorted(PAGE.iterdir())]
    code = b"".join(source.read_bytes() for source in sources)
    version = hashlib.sha256(code + keys.encode()).hexdigest()
    made = assets / "made"
    if not made.is_file() or made.read_text() != version:
        write(read(Session("read-only"), run, settings), assets / "static/explorer")
        made.write_text(version)
    config.html_static_path.append(str(assets / "static"))


def _put_together(app, pagename, templatename, context, doctree) -> None:
    """Put the explorer in the place that its chapter has for it."""
    if pagename != CHAPTER:
        return
    context["body"] = context["body"].replace(PLACE, markup())
    app.add_css_file("explorer/explorer.css")
    for name in SCRIPTS:
        app.add_js_file(f"explorer/{name}.js", loading_method="defer")


def setup(app) -> dict:
    """Called by Sphinx, which finds this module in ``sphinx.extra_extensions`` of _config.yml."""
    app.connect("config-inited", _prepare, priority=20)
    app.connect("html-page-context", _put_together)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
