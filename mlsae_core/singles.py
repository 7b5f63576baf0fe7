"""A dictionary for each layer, measured as one for all: that of its layer encodes a vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlsae_core import formats, kernels
from mlsae_core.sae import MLSAE, Output, Stats, TopK


class SingleLayers(nn.Module):
    """Single-layer dictionaries with the interface of one, for vectors of exactly their layers.

    A latent of one is none of another: latent j of the i-th dictionary has the index starts[i] + j.
    Shares of all latents that are not active at a layer count those of the other layers.

    Attributes:
        layers: block indices, increasing.
        saes: the dictionary of each.
        n_inputs, dead_threshold: theirs, which are the same.
        n_latents: of all together.
        k: the largest.
    """

    def __init__(self, saes: Mapping[int, MLSAE]):
        super().__init__()
        self.layers = tuple(sorted(saes))
        self.saes = nn.ModuleList(saes[layer] for layer in self.layers)
        first = self.saes[0]
        for layer, sae in zip(self.layers, self.saes, strict=True):
            for name in ("n_inputs", "dead_threshold"):
                if getattr(sae, name) != getattr(first, name):
                    raise ValueError(
                        f"expected the same {name} at all layers, got {getattr(first, name)} at "
                        f"layer {self.layers[0]} and {getattr(sae, name)} at layer {layer}"
                    )
        self.n_inputs, self.dead_threshold = first.n_inputs, first.dead_threshold
        self.k = max(sae.k for sae in self.saes)
        self.starts = [0]
        for sae in self.saes:
            self.starts.append(self.starts[-1] + sae.n_latents)
        self.n_latents = self.starts.pop()

    @property
    def decoder(self) -> Tensor:
        """(n_latents, n_inputs): the rows of all, one after another; a copy."""
        return torch.cat([sae.decoder for sae in self.saes])

    def encode(self, x: Tensor) -> TopK:
        """x (layer, token, n_inputs) to values and indices (layer, token, k), as `MLSAE.encode`."""
        return self._joined([sae.encode(part) for sae, part in self._parts(x)])

    def decode(self, topk: TopK, stats: Stats | None = None) -> Tensor:
        """Values and indices (layer, token, k) to (layer, token, n_inputs), as `MLSAE.decode`."""
        values, indices = (part.flatten(0, 1) for part in topk)
        y = kernels.decode(values, indices, self.decoder, self.saes[0].kernel)
        biases = torch.stack([sae.pre_bias for sae in self.saes])
        y = y.view(*topk.values.shape[:2], self.n_inputs) + biases[:, None]
        return y if stats is None else stats.restore(y)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Output:
        """Reconstruct x (layer, token, n_inputs), or predict a target, as `MLSAE.forward`."""
        targets = [None] * len(x) if target is None else list(target)
        found = [sae(part, to) for (sae, part), to in zip(self._parts(x), targets, strict=True)]
        return Output(
            torch.stack([out.recon for out in found]), self._joined([out.topk for out in found])
        )

    fired = MLSAE.fired

    def _parts(self, x: Tensor) -> list[tuple[MLSAE, Tensor]]:
        if x.ndim != 3 or len(x) != len(self.layers):
            raise ValueError(
                f"expected vectors (layer, token, {self.n_inputs}) of the {len(self.layers)} "
                f"layers {', '.join(map(str, self.layers))}, got shape {tuple(x.shape)}: each has "
                "a dictionary of its own"
            )
        return list(zip(self.saes, x, strict=True))

    def _joined(self, codes: Sequence[TopK]) -> TopK:
        """Codes (token, k) of every layer as (layer, token, k); what is inactive is filled up with
        latents of the layer that has most active ones, so that indices stay distinct."""
        widths = [code.values.shape[1] for code in codes]
        most = max(widths)
        fill = self.starts[widths.index(most)] + torch.arange(most, device=codes[0].indices.device)
        values = [F.pad(code.values, (0, most - code.values.shape[1])) for code in codes]
        indices = [
            torch.cat([code.indices + start, fill[width:].expand(len(code.indices), -1)], 1)
            for code, start, width in zip(codes, self.starts, widths, strict=True)
        ]
        return TopK(torch.stack(values), torch.stack(indices))


def load(folder: Path, layers: Sequence[int], within: Sequence[str] = ()) -> MLSAE | SingleLayers:
    """The dictionary in a folder; where there is one for each layer below it, those of `layers`.

    That of one layer alone is read as it is, and takes vectors of any. within: see
    `formats.layers`.

    Raises ValueError where there is none of a layer, and as `MLSAE.from_pretrained`.
    """
    found = formats.layers(folder, within)
    if not found:
        return MLSAE.from_pretrained(folder)
    if missing := [str(layer) for layer in layers if layer not in found]:
        raise ValueError(
            f"expected a dictionary for each layer in {folder}, found none of {', '.join(missing)}"
        )
    saes = {layer: MLSAE.from_pretrained(found[layer]) for layer in layers}
    return SingleLayers(saes) if len(saes) > 1 else saes.popitem()[1]
