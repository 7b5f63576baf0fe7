"""Orders and samples that every processor makes alike: rounding decides nothing."""

from __future__ import annotations

import torch
from torch import Tensor

#: Decimals that two numbers must share to count as equal; float64 sums differ in later ones.
DECIMALS = 9


def ascending(values: Tensor) -> Tensor:
    """Indices by rising value, (n,); values equal to `DECIMALS` stay in the order they came in."""
    return values.double().round(decimals=DECIMALS).argsort(stable=True)


def evenly(n: int, most: int) -> Tensor:
    """At most `most` of 0 … n − 1, evenly spaced, the ends among them."""
    return torch.linspace(0, n - 1, min(most, n), dtype=torch.float64).round().long()
