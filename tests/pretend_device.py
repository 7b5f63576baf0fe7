"""A pretend accelerator: a device of PyTorch's own, strict as a GPU is, on a machine without one.

Its tensors hold a CPU's and compute there. What a GPU refuses is refused: operations on tensors of
two devices, numbers drawn by another device's generator. Where the host would wait for a GPU is
counted. `install` changes PyTorch for the rest of a process, so call it in one of its own.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

import mlsae_core

PACKAGE = str(Path(mlsae_core.__file__).parent)
aten = torch.ops.aten
COPIES = (aten._to_copy, aten.copy_)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
UNKNOWN = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}

waits: Counter[str] = Counter()
"""How often the host has waited, by place: file and function of the package, and the operation."""


def install() -> None:
    """Register the device, and make it the one that accelerate finds on this machine."""
    from accelerate import PartialState

    _setup_privateuseone_for_python_backend("pretend", _Module())
    PartialState.default_device = torch.device("pretend")
    _Functions().__enter__()
    _Operations().__enter__()


class _Module(_DummyBackendModule):
    """`torch.pretend`: the device has no global generator."""

    def get_rng_state(self, device=None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state, device=None) -> None:
        pass


class Pretend(Tensor):
    """A tensor of the device; `inner` is where its numbers are."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("pretend:0"),
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    # Lists of numbers become tensors, and the reverse, where no operation can be intercepted.
    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        parts = [torch.tensor(i, device=self.device) if isinstance(i, list) else i for i in parts]
        return super().__getitem__(tuple(parts))

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data):
        return torch.tensor(data, dtype=self.dtype, device=self.device)


class Generator(torch.Generator):
    """A generator of the device, which draws what the CPU's draws from the same seed."""

    @property
    def device(self) -> torch.device:
        return torch.device("pretend:0")


class _Functions(TorchFunctionMode):
    """Sees what becomes of an argument before there is an operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and "device" in kwargs:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if (generator := kwargs.get("generator")) is not None:
            device = (
                getattr(next(iter(args), None), "device", None) or kwargs.get("device") or "cpu"
            )
            if generator.device.type != torch.device(device).type:
                raise RuntimeError(f"expected a generator of device {device}, got the other's")
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Sees operations without tensors too, which are asked to make one on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args: tuple, kwargs: dict):
    packet = function.overloadpacket
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, Pretend)]
    here = bool(ours)  # whether the result is the device's
    if packet is aten.copy_:
        here = isinstance(args[0], Pretend)
    elif (device := kwargs.get("device")) is not None:
        here = device.type == "pretend"
    _refuse_mixtures(packet, args, tensors)
    if _waits(function, args, kwargs, ours, here):
        waits[f"{_place()} {packet.__name__}"] += 1
    plain, options = tree_map_only(Pretend, lambda x: x.inner, (args, kwargs))
    if not here:
        return function(*plain, **options)
    if "device" in options:
        options["device"] = torch.device("cpu")
    result = function(*plain, **options)
    result = tree_map_only(Tensor, Pretend, result)
    return return_and_correct_aliasing(function, args, kwargs, result)


def _refuse_mixtures(packet, args, tensors: list[Tensor]) -> None:
    """As on a GPU: of the CPU's tensors, single numbers may take part, copies, and indices."""
    if packet in INDEXING and isinstance(args[0], Pretend):
        tensors = [args[0], *args[2:3]]
    shapes = [tuple(x.shape) for x in tensors if not isinstance(x, Pretend) and x.ndim > 0]
    if shapes and any(isinstance(x, Pretend) for x in tensors) and packet not in COPIES:
        raise RuntimeError(f"{packet}: expected tensors of one device, got the CPU's {shapes}")


def _waits(function, args, kwargs, ours: list[Tensor], here: bool) -> bool:
    """Whether a GPU's result decides how the host goes on, or memory that is not pinned is read."""
    packet = function.overloadpacket
    if packet in COPIES:
        source = args[1] if packet is aten.copy_ else args[0]
        leaves, arrives = isinstance(source, Pretend), here
        queued = kwargs.get("non_blocking") or args[2:3] == (True,)
        return (leaves and not arrives) or (arrives and not leaves and not queued)
    if not ours:
        return False
    if packet in INDEXING:  # a mask has to be counted, indices of the CPU to be copied
        indices = [i for i in args[1] if i is not None]
        return any(i.dtype is torch.bool or not isinstance(i, Pretend) for i in indices)
    if packet is aten.repeat_interleave and kwargs.get("output_size") is not None:
        return False
    return not UNKNOWN.isdisjoint(function.tags)


def _place() -> str:
    """The innermost function of the package that is being executed."""
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            return f"{Path(code.co_filename).name}:{code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"
