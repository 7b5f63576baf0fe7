"""The modules of a transformer: how they are found, called, watched and replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlsae_core.spec import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def unpacked() -> Iterator[None]:
    """transformers does not look for several sequences in one row while this is entered.

    It would look at the position ids that it has just counted itself, and the host would wait for
    the device to answer.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    if before is None:  # other versions
        yield
        return
    setattr(masking_utils, name, lambda _: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)


class Stop(Exception):
    """Ends a forward pass after the last block that is needed."""


def stop(*_):
    raise Stop


def forward(block: nn.Module, *args, **kwargs):
    return type(block).forward(block, *args, **kwargs)


class Given(nn.Module):
    """Stands for the module that owns the blocks: the final norm of the residual stream given."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, *_, inputs_embeds: Tensor, **__):
        return _BaseOutput((self.norm(inputs_embeds),))


class _BaseOutput(tuple):
    """Output of a module that has a last hidden state and nothing else."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def find_blocks(model: PreTrainedModel, n_layers: int) -> tuple[str, nn.ModuleList, nn.Module]:
    """Name of the module that owns the blocks, the blocks, and the final norm."""
    for name, owner in model.named_modules():
        children = list(owner.children())
        for position, blocks in enumerate(children):
            if isinstance(blocks, nn.ModuleList) and len(blocks) == n_layers:
                after, before = _norms(children[position + 1 :]), _norms(children[:position])
                if len(norms := after or before) == 1:
                    return name, blocks, norms[0]
    raise SpecError(
        f"model.path: {type(model).__name__} does not fit: looked for a ModuleList of "
        f"num_hidden_layers = {n_layers} blocks with one final norm beside it, found in its base "
        f"{', '.join(f'{n} ({type(m).__name__})' for n, m in model.base_model.named_children())}"
    )


def with_submodule(module: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """A copy of `module` that shares everything with it but the submodule at a dotted name."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    child, _, rest = name.partition(".")
    setattr(twin, child, with_submodule(getattr(module, child), rest, new) if rest else new)
    return twin


def _norms(modules: list[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if "norm" in type(module).__name__.lower()]


def first(output):
    return output[0] if isinstance(output, tuple) else output


def split_call(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """A module's input, its other positional and its other keyword arguments."""
    if args:
        return args[0], args[1:], kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def repeater(
    known: Mapping[tuple, bool], batch: int, times: int
) -> Callable[[tuple, Tensor], Tensor]:
    """Repeats what has rows for each sequence; what is shared by the batch broadcasts.

    known: by place in a block's call; one that was never seen has them if their number is right.
    """

    def repeat(place: tuple, tensor: Tensor) -> Tensor:
        if times == 1 or tensor.ndim == 0 or tensor.shape[0] == 1:
            return tensor
        if not known.get(place, tensor.shape[0] == batch):
            return tensor
        if tensor.stride(0) == 0:
            return tensor[:1].expand(times * tensor.shape[0], *tensor.shape[1:])
        return tensor.repeat(times, *[1] * (tensor.ndim - 1))

    return repeat


def map_tensors(function, value, place: tuple = ()):
    """Nested values with `function(place, tensor)` for each tensor."""
    if isinstance(value, Tensor):
        return function(place, value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item, (*place, i)) for i, item in enumerate(value))
    if isinstance(value, dict):
        return {key: map_tensors(function, item, (*place, key)) for key, item in value.items()}
    return value


@contextmanager
def replacing(module: nn.Module, point: str, rows: Tensor) -> Iterator[None]:
    """A module's input or output is `rows` while this is entered; they are never written to."""
    if point == "mlp_input":

        def replace_input(_, args, kwargs):
            _, args, kwargs = split_call(args, kwargs)
            return (rows.clone(), *args), kwargs

        handle = module.register_forward_pre_hook(replace_input, with_kwargs=True)
    else:

        def replace_output(_, __, output):
            return (rows.clone(), *output[1:]) if isinstance(output, tuple) else rows.clone()

        handle = module.register_forward_hook(replace_output)
    try:
        yield
    finally:
        handle.remove()


def keep_call(calls: list, module: nn.Module, args, kwargs, output) -> None:
    """Hook: the module, its input, other arguments and output, before anything changes them."""
    given, *others = split_call(args, kwargs) if args or kwargs else (None, (), {})
    made = first(output)
    calls.append((module, *map_tensors(lambda _, t: t.clone(), (given, tuple(others), made))))


def shifted(noise: Tensor, _, tensor: Tensor) -> Tensor:
    """Another residual stream in the place of what may be one."""
    return tensor + noise if tensor.shape == noise.shape else tensor


def same(one, other) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
