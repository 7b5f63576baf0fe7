"""Dictionaries in files: a table of formats, each of which knows its own files and reads them.

All become parameters of `sae.MLSAE`, exactly. With s the standardisation of a vector, or nothing,

    z = W_enc (s(x) - c) + b_enc        x̂ = s⁻¹(W_dec f(z) + b_dec)        c = b_dec or 0

is what they compute. An MLSAE with the pre_bias b_dec has the same scores z if its encoder_bias is
b_enc + W_enc (b_dec - c). ReLU is a JumpReLU with thresholds of 0, and so is a BatchTopK in use.

Nothing in a file is run: of pickles, tensors alone are read, and sizes are looked at before memory
is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlsae_core import files

if TYPE_CHECKING:
    from torch import Tensor

LAYER = re.compile(r"(?:^|[._/-])(?:layers?|blocks|h)[._-]?(\d+)(?=$|[._/-])")
"""A layer in the name of a folder: layer_3, layers.3.mlp, blocks.3.hook_resid_post, h.3."""


class Weights(NamedTuple):
    """What a folder says of a dictionary.

    Args:
        settings: arguments of `sae.MLSAE`: n_inputs, n_latents, k, and what else the files fix.
        tensors: by the names of its parameters and buffers: `encoder` and `decoder` (n_latents,
            n_inputs), `pre_bias` (n_inputs,), `encoder_bias` (n_latents,) where the settings say
            that there is one, and `activation.*`, in any precision.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


class Format(NamedTuple):
    """files : names or patterns of the files that it is made of: a folder that has all is read in
    it, and its content is theirs. read : raises ValueError, which names the file, where it cannot
    be read."""

    files: tuple[str, ...]
    read: Callable[[Path], Weights]

    def found(self, folder: Path) -> list[Path]:
        """Its files in a folder; none where one is missing."""
        found = [sorted(folder.glob(name)) for name in self.files]
        return sorted({path for paths in found for path in paths}) if all(found) else []


def files_of(folder: Path) -> list[Path]:
    """The files of a dictionary in a folder, in the first format that has all; else none."""
    return next((found for known in FORMATS.values() if (found := known.found(folder))), [])


def read(folder: Path) -> Weights:
    """Read a folder in the first format that finds its files there, else as a published MLSAE.

    Raises ValueError where files are missing, unreadable, or do not fit each other.
    """
    for known in FORMATS.values():
        if known.found(folder):
            return known.read(folder)
    return _read_mlsae(folder)


def layers(folder: Path, within: Sequence[str] = ()) -> dict[int, Path]:
    """Folders of single-layer dictionaries below a folder, by layer; none if it is one itself.

    Args:
        within: patterns of their names from `folder` on, such as "layer_3/width_16k/average_*";
            others do not count. By default all do.

    Raises ValueError where a name has no layer (see `LAYER`), or two have the same.
    """
    found: dict[int, Path] = {}
    alone = not within and files_of(folder)
    for path in [] if alone else sorted(path for path in folder.rglob("*") if path.is_dir()):
        name = path.relative_to(folder).as_posix()
        if (within and not any(fnmatch(name, pattern) for pattern in within)) or not files_of(path):
            continue
        named = set(LAYER.findall(name))
        if len(named) != 1:
            raise ValueError(
                f"expected folders that name a layer, as layer_3 or layers.3, in {folder}, got "
                f"{name}: choose some by `folders`"
            )
        layer = int(named.pop()) - ("resid_pre" in name)  # a layer is what is after its block
        if layer in found:
            raise ValueError(
                f"expected one dictionary of layer {layer} in {folder}, got "
                f"{found[layer].relative_to(folder)} and {name}: choose one by `folders`"
            )
        found[layer] = path
    return dict(sorted(found.items()))


# --- published MLSAEs, and what `MLSAE.save_pretrained` writes ------------------------------------


def _read_mlsae(folder: Path) -> Weights:
    """Alone, or with the transformer beside it, whose configuration leaves the sizes out."""
    path, paths = folder / "config.json", sorted(folder.glob("*.safetensors"))
    config = _checked(files.mapping(path), path)
    if not paths:
        raise ValueError(f"expected *.safetensors in {folder}, found none")
    needed = ("encoder.weight", "decoder.weight", "pre_encoder_bias")
    wanted = (*needed, "encoder.bias", "activation.", "encoder_lens.", "decoder_lens.")
    found = files.tensors(paths, wanted, prefix="autoencoder.")
    if missing := [name for name in needed if name not in found]:
        raise ValueError(
            f"expected a tensor {missing[0]!r} in {folder}, with or without 'autoencoder.'"
        )
    n, d = (config.get(name) for name in ("n_latents", "n_inputs"))
    if n is None and found["encoder.weight"].ndim == 2:
        n, d = found["encoder.weight"].shape
    shapes = ((n, d), (d, n), (d,), (n,))
    for name, shape in zip((*needed, "encoder.bias"), shapes, strict=True):
        if name in found and tuple(found[name].shape) != shape:
            raise ValueError(
                f"expected {name} of shape {shape} from config.json in {folder}, "
                f"got {tuple(found[name].shape)}: the files belong to different autoencoders"
            )
    settings = {"n_inputs": d, "n_latents": n, "k": config["k"], "aux_k": config.get("auxk") or 0}
    settings |= {"standardize": config.get("standardize", True)}
    published = {"dead_tokens_threshold": "dead_tokens"}
    for name in (*published, "activation", "dead_tokens", "dead_threshold"):
        if name in config:
            settings[published.get(name, name)] = config[name]
    tensors = {
        "encoder": found.pop("encoder.weight"),
        "decoder": found.pop("decoder.weight").T,
        "pre_bias": found.pop("pre_encoder_bias"),
    }
    if "encoder.bias" in found:
        settings["encoder_bias"], tensors["encoder_bias"] = True, found.pop("encoder.bias")
    for name in found:
        if not name.startswith("activation."):
            raise ValueError(f"expected an MLSAE without a learnt lens in {folder}, got {name}")
        if "activation" not in config:  # that of topk has no tensors
            raise ValueError(f"expected an activation in {path}, as there is {name}")
    return Weights(settings, tensors | found)


def _checked(config: dict, path: Path) -> dict:
    """The configuration of an MLSAE, each value of its kind."""
    sizes = ("n_inputs", "n_latents") * any(name in config for name in ("n_inputs", "n_latents"))
    if any(type(config.get(name)) is not int for name in (*sizes, "k")):
        raise ValueError(
            f"expected integers {(*sizes, 'k')} in {path}: is it an MLSAE's configuration?"
        )
    for name in ("auxk", "dead_tokens", "dead_tokens_threshold", "dead_threshold"):
        kinds = (int, float) if name == "dead_threshold" else (int,)
        value = config.get(name, 0)
        if name == "auxk" and value is None:  # as published ones without AuxK have it
            continue
        if type(value) not in kinds or not value >= 0:
            raise ValueError(f"expected {name} of 0 or more in {path}, got {value!r}")
    if not isinstance(standardize := config.get("standardize", True), bool):
        raise ValueError(f"expected standardize: true or false in {path}, got {standardize!r}")
    return config


# --- those of others ------------------------------------------------------------------------------

#: What their tensors are.
NAMES = {
    **dict.fromkeys(("encoder.weight", "W_enc", "w_enc"), "W_enc"),
    **dict.fromkeys(("decoder.weight", "W_dec", "w_dec"), "W_dec"),
    **dict.fromkeys(("encoder.bias", "b_enc"), "b_enc"),
    **dict.fromkeys(("decoder.bias", "b_dec", "bias"), "b_dec"),
    "threshold": "threshold",
}
#: Those of which latents are the columns.
TRANSPOSED = ("W_enc", "w_enc", "decoder.weight")


def _weights(
    path: Path,
    tensors: dict[str, Tensor],
    activation: str,
    *,
    subtracted: bool,
    k: int = 1,
    standardize: bool = False,
    unit: bool = False,
) -> Weights:
    """Parameters of an MLSAE from tensors of which `NAMES` says what they are.

    path: of their file, for messages. activation: "topk", "relu" or "jumprelu", of which the last
    needs thresholds, and the first k. subtracted : whether b_dec is, before the encoder. unit :
    whether scores are multiplied by the norms of the decoder's rows, which are divided by them.
    """
    import torch

    found = {}
    for name, tensor in tensors.items():
        ours = NAMES.get(name)
        if ours is None or ours in found or (ours == "threshold") > (activation == "jumprelu"):
            raise ValueError(f"expected the tensors of one {activation} SAE in {path}, got {name}")
        found[ours] = tensor.mT if name in TRANSPOSED and tensor.ndim == 2 else tensor
    if activation == "relu" and "b_enc" in found:
        found["threshold"] = torch.zeros_like(found["b_enc"])
    n, d = (*found["W_dec"].shape, 0, 0)[:2] if "W_dec" in found else (0, 0)
    shapes = {"W_enc": (n, d), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,), "threshold": (n,)}
    if activation == "topk":
        del shapes["threshold"]
    if missing := [name for name in shapes if name not in found]:
        raise ValueError(f"expected {', '.join(shapes)} in {path}, found no {missing[0]}")
    for name, shape in shapes.items():
        tensor = found[name]
        files.check_numbers(tensor, name, path)
        if tuple(tensor.shape) != shape and (name != "threshold" or tensor.ndim):
            raise ValueError(
                f"expected {name} of shape {shape} in {path}, got {tuple(tensor.shape)}: one "
                "encoder and one decoder of vectors of the same width are read"
            )
        found[name] = tensor.float()
    if unit:
        norms = found["W_dec"].norm(dim=1)
        found["W_enc"], found["b_enc"] = found["W_enc"] * norms[:, None], found["b_enc"] * norms
        found["W_dec"] = found["W_dec"] / norms[:, None]
    if not subtracted:
        found["b_enc"] = found["b_enc"] + found["W_enc"] @ found["b_dec"]
    settings = {"n_latents": n, "n_inputs": d, "k": k, "aux_k": 0, "standardize": standardize}
    settings |= {"encoder_bias": True}
    names = {"W_enc": "encoder", "W_dec": "decoder", "b_enc": "encoder_bias", "b_dec": "pre_bias"}
    ours = {name: found[theirs] for theirs, name in names.items()}
    if activation != "topk":  # how many are active follows from the thresholds, not from k
        settings["activation"] = "jumprelu"
        threshold = found["threshold"].clamp(min=0)  # what is active is positive, in all of them
        ours["activation.threshold"] = threshold.expand(n).clone()
    return Weights(settings, ours)


def _read_gemma_scope(folder: Path) -> Weights:
    """Lieberum et al. (2024)."""
    path = folder / "params.npz"
    return _weights(path, files.arrays(path), "jumprelu", subtracted=False)


def _read_saelens(folder: Path) -> Weights:
    """SAELens from 6 on; a BatchTopK is a JumpReLU in what it writes for inference."""
    path, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    config = files.mapping(path)
    metadata = config.get("metadata")
    version = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    if not re.match(r"([6-9]|\d\d)\.", str(version)):
        raise ValueError(
            f"expected a sae_lens_version of 6 or more in {path}, got {version!r}: load and save "
            "it with SAELens 6"
        )
    kinds = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
    kind = files.one_of(tuple(kinds), config, "architecture", path)
    normalized = files.one_of(("none", "layer_norm"), config, "normalize_activations", path)
    files.one_of(("none",), config, "reshape_activations", path)
    return _weights(
        weights,
        files.tensors([weights]),
        kinds[kind],
        subtracted=files.one_of((True, False), config, "apply_b_dec_to_input", path),
        k=files.count(config, "k", path) if kind == "topk" else 1,
        standardize=normalized == "layer_norm",
        unit=kind == "topk" and bool(config.get("rescale_acts_by_decoder_norm")),
    )


def _read_sparsify(folder: Path) -> Weights:
    """EleutherAI's sparsify, autoencoders and transcoders."""
    path, weights = folder / "cfg.json", folder / "sae.safetensors"
    config = {"activation": "topk", "transcode": False} | files.mapping(path)
    for name in ("signed", "skip_connection"):
        files.one_of((False,), {name: False} | config, name, path)
    files.one_of(("topk",), config, "activation", path)
    transcode = files.one_of((True, False), config, "transcode", path)
    tensors, k = files.tensors([weights]), files.count(config, "k", path)
    return _weights(weights, tensors, "topk", subtracted=not transcode, k=k)


#: Classes of dictionary_learning: their activation, whether b_dec is subtracted, and whether the
#: library brings the decoder's rows to unit norm when it loads them.
CLASSES = {
    "AutoEncoder": ("relu", True, True),
    "AutoEncoderNew": ("relu", False, False),
    "AutoEncoderTopK": ("topk", True, False),
    "BatchTopKSAE": ("jumprelu", True, False),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, False),
    "JumpReluAutoEncoder": ("jumprelu", False, False),
}


def _read_dictionary_learning(folder: Path) -> Weights:
    """What a training of dictionary_learning leaves for each trainer."""
    path, weights = folder / "config.json", folder / "ae.pt"
    trainer = files.mapping(path).get("trainer")
    if not isinstance(trainer, dict):
        raise ValueError(f"expected a mapping `trainer` in {path}, got {trainer!r}")
    kind = files.one_of(tuple(CLASSES), trainer, "dict_class", path)
    activation, subtracted, unit = CLASSES[kind]
    tensors = files.pickled(weights)
    beside = ("k", "group_sizes") + ("threshold",) * (activation == "topk")  # not in use there
    tensors = {name: tensor for name, tensor in tensors.items() if name not in beside}
    k = files.count(trainer, "k", path) if activation == "topk" else 1
    return _weights(weights, tensors, activation, subtracted=subtracted, unit=unit, k=k)


#: The formats by name; a folder is of the first of which it has all files. Other packages add
#: theirs.
FORMATS: dict[str, Format] = {
    "gemma_scope": Format(("params.npz",), _read_gemma_scope),
    "saelens": Format(("cfg.json", "sae_weights.safetensors"), _read_saelens),
    "sparsify": Format(("cfg.json", "sae.safetensors"), _read_sparsify),
    "dictionary_learning": Format(("config.json", "ae.pt"), _read_dictionary_learning),
    "mlsae": Format(("config.json", "*.safetensors"), _read_mlsae),
}
