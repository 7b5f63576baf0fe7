"""Dictionaries in files: a table of formats, each of which knows its own folders and reads them.

Weights are read from safetensors; pickles never are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor


class Weights(NamedTuple):
    """What a folder says of a dictionary.

    Args:
        settings: arguments of `sae.MLSAE`: n_inputs, n_latents, k, and what else the files fix.
        tensors: by the names of its parameters and buffers: `encoder` and `decoder` (n_latents,
            n_inputs), `pre_bias` (n_inputs,), and `activation.*`, in any precision.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


class Format(NamedTuple):
    """recognises : whether a folder looks like one of this format. read : raises ValueError, which
    names the file, where it cannot be read."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path], Weights]


def read(folder: Path) -> Weights:
    """Read a folder in the first format that recognises it, else as a published MLSAE.

    Raises ValueError where files are missing, unreadable, or do not fit each other.
    """
    for known in FORMATS.values():
        if known.recognises(folder):
            return known.read(folder)
    return _read_mlsae(folder)


# --- published MLSAEs, and what `MLSAE.save_pretrained` writes ------------------------------------


def _is_mlsae(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _read_mlsae(folder: Path) -> Weights:
    config = _read_config(folder)
    settings = {name: config[name] for name in ("n_inputs", "n_latents", "k")}
    settings |= {"aux_k": config.get("auxk") or 0, "standardize": config.get("standardize", True)}
    for name in ("activation", "dead_tokens", "dead_threshold"):
        if name in config:
            settings[name] = config[name]
    n, d = config["n_latents"], config["n_inputs"]
    shapes = {"encoder.weight": (n, d), "decoder.weight": (d, n), "pre_encoder_bias": (d,)}
    found = _read_tensors(folder, shapes)
    own = [name for name in found if name not in shapes]
    if own and "activation" not in config:  # those of topk have no tensors
        raise ValueError(
            f"expected an activation in {folder / 'config.json'}, as there is {own[0]}"
        )
    tensors = {
        "encoder": found.pop("encoder.weight"),
        "decoder": found.pop("decoder.weight").T,
        "pre_bias": found.pop("pre_encoder_bias"),
    }
    return Weights(settings, tensors | found)


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"expected {path} with n_inputs, n_latents and k, but it does not exist")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}: {error}") from error
    names = ("n_inputs", "n_latents", "k")
    if not isinstance(config, dict) or any(type(config.get(n)) is not int for n in names):
        raise ValueError(f"expected integers {names} in {path}: is it an MLSAE's configuration?")
    for name in ("auxk", "dead_tokens", "dead_threshold"):
        kinds = (int, float) if name == "dead_threshold" else (int,)
        value = config.get(name, 0)
        if name == "auxk" and value is None:  # as published ones without AuxK have it
            continue
        if type(value) not in kinds or not value >= 0:
            raise ValueError(f"expected {name} of 0 or more in {path}, got {value!r}")
    if not isinstance(standardize := config.get("standardize", True), bool):
        raise ValueError(f"expected standardize: true or false in {path}, got {standardize!r}")
    return config


def _read_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the named tensors and an activation's own, all with or without "autoencoder." before."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"expected *.safetensors in {folder}, found none (pickles are not read)")
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    name = key.removeprefix("autoencoder.")
                    if name not in shapes and not name.startswith("activation."):
                        continue
                    if name in found:  # which one counts is in no key
                        raise ValueError(f"expected {name} once in {folder}, got another in {path}")
                    found[name] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"expected a safetensors file, cannot read {path}: {error}") from error
    for name, shape in shapes.items():
        if name not in found:
            raise ValueError(
                f"expected a tensor {name!r} in {folder}, with or without 'autoencoder.'"
            )
        if tuple(found[name].shape) != shape:
            raise ValueError(
                f"expected {name} of shape {shape} from config.json in {folder}, "
                f"got {tuple(found[name].shape)}: the files belong to different autoencoders"
            )
    return found


#: The formats by name; other packages add theirs.
FORMATS: dict[str, Format] = {"mlsae": Format(_is_mlsae, _read_mlsae)}
