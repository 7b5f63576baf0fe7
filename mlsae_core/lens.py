"""The basis in which the autoencoder sees the residual stream: as it is, or through a tuned lens.

A tuned lens (Belrose et al. 2023) has one affine translator per layer towards the basis of the
last layer. The MLSAE paper applies it before the encoder and inverts it after the decoder
(Section 3.3, Eq. 8 and 9).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from mlsae_core import files, store
from mlsae_core.spec import SiteSpec, SpecError

# Beyond this, float32 keeps less than about one digit on the way back.
MAX_CONDITION_NUMBER = 1e6


@dataclass(frozen=True, eq=False)
class Lens:
    r"""An invertible affine map per layer, x' = x + (W_l x + b_l), or the identity.

    Args:
        weight: (translator, d_model, d_model), or nothing for the identity.
        bias: (translator, d_model).
        alignment: which translator belongs to the residual stream after block l. tuned-lens trains
            translator i on the input of block i, which is the output of block i − 1, so ``aligned``
            takes translator l + 1 and the identity after the last block. ``as-released`` takes
            translator l, as the code released with the paper does.
        model_name: the language model for which the lens was trained.
        model: `models.key` of its content, where that is known.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    alignment: Literal["aligned", "as-released"] = "aligned"
    model_name: str = ""
    model: str = ""

    @classmethod
    def identity(cls) -> Lens:
        """The residual stream as it is."""
        return cls()

    @classmethod
    def load(cls, site: SiteSpec, device: str | torch.device = "cpu") -> Lens:
        """The lens that a site names; a tuned lens that cannot be inverted is refused."""
        if site.basis == "identity":
            return cls.identity()
        lens = cls.read(store.lens_folder(site.basis), site.alignment).to(device)
        lens.check()
        return lens

    @classmethod
    def read(cls, folder: str | Path, alignment: str = "aligned") -> Lens:
        """Read a tuned-lens folder: config.json with params.pt or params.safetensors.

        Raises:
            SpecError: a file is missing, or its tensors are not those of a linear tuned lens.
            ValueError: a file that cannot be read, which it names.
        """
        folder = Path(folder)
        place, training = folder / "config.json", folder / "training.json"
        if not place.is_file():
            raise SpecError(f"basis: {folder} has no config.json; expected a tuned-lens folder")
        config = files.mapping(place)
        n, d = (files.count(config, name, place) for name in ("num_hidden_layers", "d_model"))
        made = files.mapping(training) if training.is_file() else {}
        if (folder / "params.safetensors").is_file():
            state = files.tensors([folder / "params.safetensors"])
        elif (folder / "params.pt").is_file():
            state = files.pickled(folder / "params.pt")
        else:
            raise SpecError(f"basis: {folder} has no params.pt or params.safetensors")
        for name, tensor in state.items():
            files.check_numbers(tensor, name, folder)
        own = range(min(n, len(state)))  # as many as there can be, whatever config.json says
        names = [f"{i}.{part}" for i in own for part in ("weight", "bias")]
        if not config.get("bias", True):
            state |= {f"{i}.bias": torch.zeros(len(state["0.weight"])) for i in own}
        if len(own) != n or sorted(state) != sorted(names):
            raise SpecError(
                f"basis: expected tensors 0.weight, 0.bias, … of {n} layers in {folder}, got "
                f"{', '.join(sorted(state)[:4])}, … ({len(state)} tensors)"
            )
        weight, bias = (
            torch.stack([state[f"{i}.{part}"].float() for i in range(n)])
            for part in ("weight", "bias")
        )
        if weight.shape != (n, d, d) or bias.shape != (n, d):
            raise SpecError(
                f"basis: config.json of {folder} says {n} layers of {d} dimensions, the weights "
                f"are {tuple(weight.shape)}"
            )
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise SpecError(f"basis: the weights in {folder} have NaN or infinite values")
        name = config.get("base_model_name_or_path", "")
        return cls(weight, bias, alignment, name, made.get("model", ""))

    def write(self, folder: str | Path, safetensors: bool = False) -> None:
        """Write a tuned-lens folder, which the tuned-lens package reads.

        Args:
            safetensors: params.safetensors in the place of params.pt; :meth:`read` reads both, the
                tuned-lens package only the latter.
        """
        if self.weight is None:
            raise ValueError("the identity lens has no folder; write a tuned lens")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "base_model_name_or_path": self.model_name,
            "d_model": self.weight.shape[-1],
            "num_hidden_layers": len(self.weight),
            "bias": True,
            "base_model_revision": None,
            "unembed_hash": None,
            "lens_type": "linear_tuned_lens",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        state = {}
        for i, (weight, bias) in enumerate(zip(self.weight.cpu(), self.bias.cpu(), strict=True)):
            state |= {f"{i}.weight": weight.clone(), f"{i}.bias": bias.clone()}
        if safetensors:
            save_file(state, folder / "params.safetensors")
        else:
            torch.save(state, folder / "params.pt")

    def to(self, device: str | torch.device) -> Lens:
        """The same lens on another device."""
        if self.weight is None:
            return self
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    @property
    def is_identity(self) -> bool:
        """Whether apply and invert return their argument."""
        return self.weight is None

    def apply(self, x: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Into the lens space (Eq. 8).

        Args:
            x: (layer, token, d_model), residual stream after the blocks `layers`.
            layers: block indices from 0; by default all layers of the lens.
        """
        if self.weight is None:
            return x
        rows = self._rows(x, layers)
        weight, bias = self._aligned
        return x + torch.baddbmm(bias[rows, None], x, weight[rows].mT)

    def invert(self, y: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Back from the lens space (Eq. 9), by one product with the full inverse matrix.

        Args:
            y: (layer, token, d_model), in the lens space of the blocks `layers`.
            layers: block indices from 0; by default all layers of the lens.

        Raises:
            SpecError: I + W is near-singular at one of the lens's layers.
        """
        if self.weight is None:
            return y
        rows = self._rows(y, layers)
        return torch.bmm(y - self._aligned[1][rows, None], self._inverse[rows].mT)

    @cached_property
    def condition_numbers(self) -> Tensor:
        """(layer,) float64: ratio of the extreme singular values of I + W, 1 for an isometry.

        The relative error of a reconstruction can grow by this factor on the way back.
        """
        if self.weight is None:
            raise ValueError("the identity lens has no matrices; its condition numbers are all 1")
        values = torch.linalg.svdvals(self._matrix)
        return (values[:, 0] / values[:, -1]).cpu()

    def check(self) -> None:
        """Refuse a lens that cannot be inverted in float32, with its condition numbers."""
        bad = [i for i, c in enumerate(self.condition_numbers) if not c <= MAX_CONDITION_NUMBER]
        if bad:
            raise SpecError(
                f"basis: expected translators with condition numbers up to "
                f"{MAX_CONDITION_NUMBER:.0e}; I + W is near-singular at layers "
                + ", ".join(f"{i} ({float(self.condition_numbers[i]):.2g})" for i in bad)
            )

    @cached_property
    def _aligned(self) -> tuple[Tensor, Tensor]:
        """Weights and biases by the block after which they apply."""
        if self.alignment == "as-released":
            return self.weight, self.bias
        last = torch.zeros_like(self.weight[:1]), torch.zeros_like(self.bias[:1])
        return torch.cat([self.weight[1:], last[0]]), torch.cat([self.bias[1:], last[1]])

    @property
    def _matrix(self) -> Tensor:
        weight = self._aligned[0].double()
        return weight + torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)

    @cached_property
    def _inverse(self) -> Tensor:
        self.check()
        return torch.linalg.inv(self._matrix).to(self.weight.dtype)

    def _rows(self, x: Tensor, layers: Sequence[int] | None) -> list[int]:
        n, d = self.bias.shape
        rows = list(range(n) if layers is None else layers)
        if x.ndim != 3 or x.shape[0] != len(rows) or x.shape[-1] != d:
            raise ValueError(
                f"expected ({len(rows)} layers, token, {d}) for the lens, got {tuple(x.shape)}"
            )
        if not all(0 <= i < n for i in rows):
            raise SpecError(f"layers: the tuned lens has layers 0 to {n - 1}, got {rows}")
        return rows
