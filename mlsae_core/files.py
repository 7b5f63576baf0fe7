"""What files of weights hold, read without running anything of it.

Every function names the file in a ValueError of one line, and looks at sizes before it asks for
memory: what is read is no larger than the file.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_MAPPING = 2**24
"""Bytes of JSON; real ones have some hundreds."""


def mapping(path: Path) -> dict:
    """What a JSON file maps."""
    if not path.is_file():
        raise ValueError(f"expected {path}, but it does not exist")
    if path.stat().st_size > LARGEST_MAPPING:
        raise ValueError(f"expected at most {LARGEST_MAPPING} bytes of JSON in {path}, got more")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected a mapping in {path}, got another value")
    return config


def count(config: dict, name: str, path: Path) -> int:
    """An integer of a mapping."""
    if type(config.get(name)) is not int:
        raise ValueError(f"expected an integer {name} in {path}, got {config.get(name)!r}")
    return config[name]


def one_of(allowed: tuple, config: dict, name: str, path: Path):
    """A value of a mapping; one that would be computed otherwise than is meant is refused."""
    value = config.get(name)
    if value not in allowed:
        known = " or ".join(map(str, allowed))
        raise ValueError(f"expected {name} {known} in {path}, got {value!r}, which is not read")
    return value


def tensors(
    paths: Sequence[Path], wanted: tuple[str, ...] = ("",), prefix: str = ""
) -> dict[str, Tensor]:
    """Tensors of safetensors files, of which each name is there once.

    wanted: how the names of those that are read begin. prefix: what may stand before them.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    name = key.removeprefix(prefix)
                    if name in found:  # which one counts is in no key
                        folder = path.parent
                        raise ValueError(f"expected {name} once in {folder}, got another in {path}")
                    if name.startswith(wanted):
                        found[name] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"expected a safetensors file, cannot read {path}: {error}") from error
    return found


def arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a .npz file, all of floating-point numbers."""
    import torch

    found: dict[str, Tensor] = {}
    with _archive(path) as archive:
        for name in archive.namelist():
            try:
                array = _array(archive.read(name))
                found[name.removesuffix(".npy")] = torch.from_numpy(array)
            except Exception as error:
                reason = f"{path}: {_line(error)}"
                raise ValueError(f"cannot read the array {name} of {reason}") from error
    return found


def _array(content: bytes):
    """An array from the content of a .npy file, whose header may say anything."""
    import numpy as np
    from numpy.lib import format as npy

    file = io.BytesIO(content)
    header = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}
    shape, transposed, dtype = header[npy.read_magic(file)[0]](file)
    if dtype.kind != "f":
        raise ValueError(f"floating-point numbers are read, not {dtype}")
    array = np.frombuffer(content, dtype, offset=file.tell())
    array = array.reshape(shape, order="F" if transposed else "C")
    return array.astype(dtype.newbyteorder("="))  # a copy, since torch writes


def pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt file, mapped into memory."""
    import torch

    _archive(path).close()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"expected tensors alone, cannot read {path}: {_line(error)}") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(t) for t in state.values()):
        raise ValueError(f"expected tensors by name in {path}, got other things")
    return state


def _archive(path: Path) -> zipfile.ZipFile:
    """A zip archive of which no more can be read than there is."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        raise ValueError(f"expected a zip archive, cannot read {path}: {_line(error)}") from error
    entries = archive.infolist()
    size = sum(entry.file_size for entry in entries)
    if any(entry.compress_type for entry in entries) or size > path.stat().st_size:
        raise ValueError(f"expected arrays that are not compressed in {path}, got others")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError(f"expected every array once in {path}, got one twice")
    return archive


def _line(error: Exception) -> str:
    """What an error of another library says, which may be of any kind and length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_numbers(tensor: Tensor, name: str, path: str | os.PathLike[str]) -> None:
    """Refuse what is not as many floating-point numbers as it says, one by one."""
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise ValueError(
            f"expected floating-point numbers as {name} in {path}, got {tensor.dtype}: quantised "
            "weights are not read"
        )
    if str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        raise ValueError(f"expected plain numbers as {name} in {path}, got {tensor.layout}")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(f"expected {tuple(tensor.shape)} numbers as {name} in {path}, got fewer")
