"""The architecture of a language model: its configuration, looked at before weights are read.

What no machine could hold, and files that do not belong together, are refused in one line.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mlsae_core import files, models, store
from mlsae_core.spec import ModelSpec, SpecError

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_LAYERS = 1000
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # in configurations


def model_config(model: ModelSpec):
    """The configuration of a language model: its dimensions, without its weights.

    Those of some models of the hub are in ``dimensions.yml``, and need no network.
    """
    from transformers import AutoConfig, PreTrainedConfig

    folder = models.folder(model.path)
    if folder is None and (known := models.dimensions().get(model.path)):
        return AutoConfig.for_model(**known)
    known = ", ".join(models.known())
    with reading(
        f"model.path: expected a shipped name ({known}), a Hugging Face folder or a hub id, got "
        f"{model.path}, whose config.json cannot be read"
    ):
        place, revision = folder or model.path, None if folder else model.revision
        check_layers(PreTrainedConfig.get_config_dict(place, revision=revision)[0])
        found = AutoConfig.from_pretrained(
            place, revision=revision, trust_remote_code=False
        ).get_text_config()
        if min(found.num_hidden_layers, found.hidden_size, found.vocab_size) < 1:
            raise ValueError("a dimension is 0")
    return found


def check_layers(values: dict):
    """Refuse a configuration of more blocks than any model has: transformers makes lists of them.

    Raises ValueError.
    """
    pending = [values]
    while pending:
        for name, value in pending.pop().items():
            if isinstance(value, dict):
                pending.append(value)
            elif name in _LAYERS and isinstance(value, int) and value > MOST_LAYERS:
                raise ValueError(f"expected {name} of at most {MOST_LAYERS}, got {value}")


def empty_model(config, dtype: str):
    """The model of a configuration without memory for its parameters.

    Raises ValueError where there is not enough for them on this machine.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if config.get_text_config().num_hidden_layers < 1:
        raise ValueError("expected at least one block, got none")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    needed, memory = parameters * getattr(torch, dtype).itemsize, memory_of(torch.device("cpu"))
    if needed > memory:
        raise ValueError(
            f"expected a model that fits {memory / 1e9:.0f} GB of memory, got {parameters:,} "
            f"parameters, which need {needed / 1e9:.0f} GB"
        )
    return empty


@contextlib.contextmanager
def reading(failure: str):
    """Errors of other libraries, of many kinds and lengths, become one line.

    Raises:
        SpecError: what is read is not right. Stopped: a hub cannot be reached.
    """
    try:
        yield
    except (SpecError, store.Stopped, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        kind = store.Stopped if store.is_away(error) else SpecError
        raise kind(f"{failure}: {reason}") from error


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device, or of this machine."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_shapes(empty: nn.Module, folder: Path, model: ModelSpec):
    """Refuse weights that are not those of the configuration beside them.

    transformers asks for memory first, and reports at length.
    """
    from safetensors import safe_open

    expected = empty.state_dict()
    for path in folder.glob("*.safetensors") if model.random_weights is None else ():
        with safe_open(path, "pt") as file:
            for name in sorted(expected.keys() & file.keys()):
                shape, wanted = file.get_slice(name).get_shape(), [*expected[name].shape]
                if shape != wanted:
                    raise SpecError(
                        f"model.path: expected {name} of shape {wanted} from config.json of "
                        f"{model.path!r}, got {shape} in {path.name}: the files belong to "
                        "different models"
                    )


def check_shards(folder: Path, path: str):
    """Refuse an index of weights that names others than the shards that are there."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return
    named = set(files.mapping(index)["weight_map"].values())
    there = {file.name for file in folder.glob("*.safetensors")}
    shards = {file.name for file in folder.glob("model-*-of-*.safetensors")}
    for wrong, what in ((named - there, "is not there"), (shards - named, "is not in it")):
        if wrong:
            raise SpecError(
                f"model.path: expected the *.safetensors of {index.name} in {path!r}, and no other "
                f"shards; {min(wrong)} {what}"
            )
