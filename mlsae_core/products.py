"""Matrix products in float32 as fast as the processor makes them, and as exact as the default.

PyTorch leads float32 products to oneDNN only under the setting that permits bfloat16. Without
bfloat16 tiles (AMX) oneDNN makes no use of the permission, and reaches twice the speed of the
default on processors with AVX-512. Where the permission would cost precision it is not given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch


@contextmanager
def fast_products(device: torch.device | str = "cpu") -> Iterator[None]:
    """Products on the CPU go to oneDNN while this is entered, if that changes no more than order.

    Sums are added in another order, so results differ by float32 rounding. On other devices, in
    other precisions and on processors without AVX-512 nothing is changed.
    """
    if torch.device(device).type != "cpu" or not onednn_is_exact():
        yield
        return
    with _permitted():
        yield


@contextmanager
def _permitted() -> Iterator[None]:
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@lru_cache(maxsize=1)
def onednn_is_exact() -> bool:
    """Whether oneDNN is worth asking, and keeps single precision when it may use less."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.enabled:
        return False
    a = torch.full((64, 256), 1 + 2.0**-12)  # bfloat16 rounds this to 1
    with _permitted():
        products = torch.mm(a, a.T, out=torch.empty(64, 64)), torch.nn.functional.linear(a, a)
    return all(bool((p / 256 - (1 + 2.0**-12) ** 2).abs().max() < 1e-6) for p in products)
