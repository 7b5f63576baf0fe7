"""The multi-layer sparse autoencoder: one autoencoder for the vectors of every layer.

Lawson et al. (2025), "Residual Stream Analysis with Multi-Layer SAEs", Eqs. 1 and 2, after
Makhzani & Frey (2014) and Gao et al. (2024):

    x' = (x - μ) / (σ + 1e-5)                    mean and standard deviation of the one vector
    h = ReLU(TopK_k(W_enc (x' - b_pre)))
    y = W_dec h + b_pre
    x̂ = y σ + μ

The activation of the second line is one of several: `mlsae_core.activation`.

The paper prints W_enc x - b_pre; b_pre has the model's dimension, so the bracket is meant. There
is no encoder bias, but in weights that come from elsewhere, which are used and not trained. Both
matrices are stored as (n_latents, d_model): row j of each is what latent j listens to and what it
writes.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mlsae_core import files, formats, kernels
from mlsae_core.activation import ACTIVATIONS
from mlsae_core.optimizer import ProjectedAdam
from mlsae_core.store import dictionary_folder

STD_EPS = 1e-5
"""Added to the standard deviation before dividing by it."""

DEAD_TOKENS = 10_000_000
"""A latent without an activation in this many tokens is dead (Lawson et al. 2025, Section 3.2)."""

DEAD_THRESHOLD = 1e-3
"""The activation above which a latent counts as active."""

PAPER_BATCH_TOKENS = 131_072
"""The paper's batch: published configurations count the dead window in these."""


class TopK(NamedTuple):
    """The latents that were selected: `values` ≥ 0 and `indices`, both of shape (…, k).

    Indices are distinct. Where fewer than k are active, the rest have the value 0, and which
    latents they name means nothing. Other activations than ``topk`` select more or fewer than the
    dictionary's k: as many as the vector with the most of them needs.
    """

    values: Tensor
    indices: Tensor


class Stats(NamedTuple):
    """The `mean` and unbiased `std` of each vector over d_model, both of shape (…, 1)."""

    mean: Tensor | None
    std: Tensor | None

    def restore(self, y: Tensor) -> Tensor:
        """Map y (…, d_model) from the standardised space back: y σ + μ."""
        return y if self.mean is None else torch.addcmul(self.mean, y, self.std)


class Output(NamedTuple):
    """A reconstruction `recon` of shape (…, d_model) and the latents it was made from."""

    recon: Tensor
    topk: TopK


class MLSAE(nn.Module):
    """An autoencoder whose inputs are vectors of any layer.

    Parameters
    ----------
    n_inputs : dimension d_model of a vector.
    n_latents : number of latents; n_latents / n_inputs is the expansion factor R.
    k : latents kept for each vector; on average, for ``batchtopk``, and with ``jumprelu`` when its
        training starts.
    aux_k : dead latents that AuxK uses for each vector; None takes the power of two nearest to
        n_inputs / 2 on the logarithmic scale (Gao et al. 2024, Appendix A.2), 0 switches AuxK off.
    standardize : whether each vector is standardised before, and mapped back after.
    dead_tokens, dead_threshold : a latent is dead when it had no activation above the threshold,
        at any layer, within this many training tokens.
    activation : "topk", "batchtopk" or "jumprelu", see `mlsae_core.activation`.
    encoder_bias : whether latents have a bias, as in the weights of others. There is no training
        with one.
    kernel : "sparse", "candidates" or "dense", see `mlsae_core.kernels`; an attribute, so it can be
        changed.
    generator : source of the random initial weights; None takes PyTorch's global one.

    Attributes
    ----------
    encoder, decoder : parameters (n_latents, n_inputs). Equal at first, with rows of unit norm;
        the optimiser of `make_optimizer` keeps the decoder's rows so.
    pre_bias : parameter (n_inputs,), in the standardised space.
    encoder_bias : parameter (n_latents,), or None.
    activation : the module with what the activation learns; nothing for ``topk``.
    tokens_since_active : buffer (n_latents,), int64. Only `count_tokens` changes it.
    """

    def __init__(
        self,
        n_inputs: int,
        n_latents: int,
        k: int,
        aux_k: int | None = None,
        standardize: bool = True,
        *,
        dead_tokens: int = DEAD_TOKENS,
        dead_threshold: float = DEAD_THRESHOLD,
        activation: str = "topk",
        encoder_bias: bool = False,
        kernel: kernels.Kernel = "sparse",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        least = 2 if standardize else 1
        if n_inputs < least:
            raise ValueError(f"expected n_inputs of at least {least}, got {n_inputs}")
        if not 1 <= k <= n_latents:
            raise ValueError(
                f"expected k between 1 and n_latents = {n_latents}, got {k}: "
                "choose a smaller k or a larger expansion factor"
            )
        if activation not in tuple(ACTIVATIONS):
            raise ValueError(
                f"expected an activation of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if aux_k is None:
            aux_k = 2 ** max(0, round(math.log2(n_inputs / 2)))
        if aux_k < 0:
            raise ValueError(f"expected aux_k of at least 0 (0 switches AuxK off), got {aux_k}")
        self.n_inputs, self.n_latents, self.k, self.aux_k = n_inputs, n_latents, k, aux_k
        self.standardize = standardize
        self.dead_tokens, self.dead_threshold = dead_tokens, dead_threshold
        self.kernel = kernel
        rows = torch.randn(n_latents, n_inputs, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.encoder = nn.Parameter(rows)
        self.decoder = nn.Parameter(rows.clone())
        self.pre_bias = nn.Parameter(torch.zeros(n_inputs))
        self.encoder_bias = nn.Parameter(torch.zeros(n_latents)) if encoder_bias else None
        unit = math.sqrt(n_inputs) if standardize else 1.0
        self.activation = ACTIVATIONS[activation](n_latents, unit)
        self.tokens_since_active: Tensor
        self.register_buffer("tokens_since_active", torch.zeros(n_latents, dtype=torch.int64))

    @property
    def kernel(self) -> kernels.Kernel:
        return self._kernel

    @kernel.setter
    def kernel(self, name: kernels.Kernel) -> None:
        if name not in kernels.KERNELS:
            raise ValueError(f"expected a kernel of {kernels.KERNELS}, got {name!r}")
        self._kernel = name

    @property
    def dead(self) -> Tensor:
        """(n_latents,) bool: without an activation within the last `dead_tokens` tokens."""
        return self.tokens_since_active >= self.dead_tokens

    def extra_repr(self) -> str:
        return f"{self.n_inputs}, {self.n_latents}, k={self.k}, aux_k={self.aux_k}"

    def standardise(self, x: Tensor) -> tuple[Tensor, Stats]:
        """x (…, n_inputs) in the parameters' precision, standardised, and what undoes it.

        Raises ValueError where the last dimension is not n_inputs or, on a CPU, a number is not
        finite: another device would have to be waited for. There what is computed is not finite.
        """
        if x.ndim == 0 or x.shape[-1] != self.n_inputs:
            raise ValueError(
                f"expected vectors of dimension {self.n_inputs} along the last axis, "
                f"got shape {tuple(x.shape)}: was this autoencoder made for another model?"
            )
        if not x.is_floating_point():
            raise ValueError(f"expected floating-point activations, got {x.dtype}")
        x = x.to(self.encoder.dtype)
        if not self.standardize:
            _check_finite(x)
            return x, Stats(None, None)
        scaled, mean, std = kernels.fused(_standardised, self.kernel, x.device)(x)
        _check_finite(std)  # not finite as soon as one number of the vector is not
        return scaled, Stats(mean, std)

    def encode(self, x: Tensor) -> TopK:
        """The active latents of each vector, in no particular order.

        x (…, n_inputs) gives values and indices (…, k); values are ≥ 0. Changes no state.
        """
        scaled, _ = self.standardise(x)
        vectors, sae = scaled.reshape(-1, self.n_inputs), self
        if self.encoder_bias is not None:
            vectors, sae = self._with_constant(vectors)
        code = self.activation.encode(sae, vectors)
        shape = (*x.shape[:-1], code.values.shape[1])
        return TopK(code.values.view(shape), code.indices.view(shape))

    def _with_constant(self, x: Tensor) -> tuple[Tensor, SimpleNamespace]:
        """Vectors (n, n_inputs) with a 1 more, and what gives them the same scores without a bias.

        So no kernel and no activation has to know of it. Whole groups of 8 columns, some of zeros,
        are what a GPU's products are fast with.
        """
        spare = -(self.n_inputs + 1) % 8
        encoder = torch.cat([self.encoder, F.pad(self.encoder_bias[:, None], (0, spare))], 1)
        pre_bias = F.pad(self.pre_bias, (0, 1 + spare))
        same = {"n_latents": self.n_latents, "k": self.k, "kernel": self.kernel}
        x = F.pad(F.pad(x, (0, 1), value=1.0), (0, spare))
        return x, SimpleNamespace(encoder=encoder, pre_bias=pre_bias, **same)

    def decode(self, topk: TopK, stats: Stats | None = None) -> Tensor:
        """Values and indices (…, k) to (…, n_inputs).

        Without stats the result y is in the standardised space; with them it is mapped back.
        """
        k = topk.values.shape[-1]
        y = kernels.decode(
            topk.values.reshape(-1, k), topk.indices.reshape(-1, k), self.decoder, self.kernel
        )
        y = (y + self.pre_bias).view(*topk.values.shape[:-1], self.n_inputs)
        return y if stats is None else stats.restore(y)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Output:
        """Reconstruct x (…, n_inputs), or predict a target of the same shape from it.

        A transcoder is the same autoencoder with a target that is not its source. The source is
        standardised with its own statistics; the decoder predicts the target in the *target's*
        standardised space, and the prediction is mapped back with the *target's* mean and
        standard deviation. So scale and offset of single vectors need not be learned, and the
        comparison with an autoencoder on the target, which is given the same two numbers for
        each vector, is a fair one. The bias is shared by both sides, as it is without a target.
        """
        topk = self.encode(x)
        stats = self.standardise(x if target is None else target)[1]
        return Output(self.decode(topk, stats), topk)

    @torch.no_grad()
    def fired(self, topk: TopK | kernels.Code) -> Tensor:
        """(n_latents,) bool: the latents with an activation above `dead_threshold` in `topk`."""
        spare = self.n_latents  # where indices of inactive pairs go
        indices = topk.indices.masked_fill(topk.values <= self.dead_threshold, spare)
        active = torch.zeros(spare + 1, dtype=torch.bool, device=indices.device)
        active.scatter_(0, indices.flatten(), True)
        return active[:-1]

    @torch.no_grad()
    def count_tokens(self, fired: Tensor, n_tokens: int) -> None:
        """Advance the dead-latent counters by an optimiser step of n_tokens tokens.

        fired is `Loss.fired`, or the disjunction of several: of the step's micro-batches, and of
        all processes. n_tokens counts a token once, not once for each layer.
        """
        self.tokens_since_active += n_tokens
        self.tokens_since_active.masked_fill_(fired, 0)

    def make_optimizer(self, learning_rate: float = 1e-4, eps: float = 6.25e-10) -> ProjectedAdam:
        """Adam for all parameters, which keeps the decoder's rows at unit norm."""
        learnt = [self.encoder, self.pre_bias, *self.activation.parameters()]
        free = {"params": learnt, "unit_rows": False}
        unit = {"params": [self.decoder], "unit_rows": True}
        return ProjectedAdam([free, unit], lr=learning_rate, eps=eps)

    # --- files --------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, each atomically, as published MLSAEs have them.

        encoder.weight (n_latents, n_inputs), decoder.weight (n_inputs, n_latents) and
        pre_encoder_bias (n_inputs,); encoder.bias (n_latents,) where there is one. The counters of
        dead latents are not part of the format. Only for another activation than ``topk`` there are
        its name and its tensors, activation.*.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "n_inputs": self.n_inputs,
            "n_latents": self.n_latents,
            "k": self.k,
            "auxk": self.aux_k,
            "dead_tokens": self.dead_tokens,
            "dead_steps_threshold": max(1, self.dead_tokens // PAPER_BATCH_TOKENS),
            "dead_threshold": self.dead_threshold,
            "standardize": self.standardize,
        }
        if self.activation.name != "topk":
            config["activation"] = self.activation.name
        tensors = self._activation_tensors() | {
            "encoder.weight": self.encoder.detach(),
            "decoder.weight": self.decoder.detach().T.contiguous(),
            "pre_encoder_bias": self.pre_bias.detach(),
        }
        if self.encoder_bias is not None:
            tensors["encoder.bias"] = self.encoder_bias.detach()
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
            weights, settings = Path(temporary, "weights"), Path(temporary, "config")
            save_file(tensors, weights, metadata={"format": "pt"})
            settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            os.replace(weights, directory / "model.safetensors")
            os.replace(settings, directory / "config.json")

    def _activation_tensors(self) -> dict[str, Tensor]:
        return {f"activation.{name}": t for name, t in self.activation.state_dict().items()}

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, revision: str | None = None, **settings
    ) -> Self:
        """Load a folder or a repository of the Hugging Face hub, in any of `formats.FORMATS`.

        name : a folder, or an id such as "tim-lawson/mlsae-pythia-70m-deduped-x64-k32".
            Repositories that hold the transformer beside the autoencoder load as well.
        revision : branch, tag or commit of a hub repository.
        settings : keyword arguments of the class that the file does not fix, such as `kernel`.
            Published files count the dead window in optimiser steps of unknown size, so it is
            `dead_tokens` here, or the default.

        Raises ValueError where files are missing, unreadable, damaged, or do not fit each other.
        """
        weights = formats.read(dictionary_folder(name, revision))
        sae = cls(**weights.settings | settings)
        own = sae.state_dict(keep_vars=True)
        del own["tokens_since_active"]  # of the training that has ended
        for field, tensor in own.items():
            if field not in weights.tensors:
                raise ValueError(f"expected a tensor for {field} in {name}, found none")
            if weights.tensors[field].shape != tensor.shape:
                raise ValueError(
                    f"expected {field} of shape {tuple(tensor.shape)} in {name}, got "
                    f"{tuple(weights.tensors[field].shape)}: do its files belong together?"
                )
            if tensor.is_floating_point():
                files.check_numbers(weights.tensors[field], field, name)
            tensor.detach().copy_(weights.tensors[field])
            if not tensor.isfinite().all():
                raise ValueError(f"expected finite numbers as {field} in {name}, got others")
            if field == "activation.threshold" and (tensor < 0).any():
                raise ValueError(f"expected thresholds of at least 0 in {name}, got smaller ones")
        return sae


def _standardised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, d) standardised, and the mean and unbiased standard deviation (…, 1) of each vector."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(x.shape[-1] - 1)
    # Fresh memory costs more than dividing.
    divide = centred.div if centred.requires_grad else centred.div_
    return divide(std + STD_EPS), mean, std


def _check_finite(x: Tensor) -> None:
    if x.device.type == "cpu" and not bool(x.isfinite().all()):
        raise ValueError(
            "expected finite activations, got NaN or infinity: check the language model's "
            "precision (half precision overflows above 65504)"
        )
