"""The selected (vector, latent) pairs: sums over them, and the gradients that go through them.

Each has a path tuned for a processor and one of plain PyTorch for other devices, on which nothing
makes the host wait.
"""

import warnings
from collections.abc import Sequence
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

PIECE = 2**19
"""Elements of a weight's gradient that are made at a time on a CPU."""

RUN = 256
"""Pairs of a latent that are summed one after another on devices other than a CPU."""

PAIRS = 2**25
"""Pairs of one call for PyTorch's gradient of per-sample weights, which on CUDA counts its threads,
32 a pair, in 32 bits: above 2^26 pairs it reads out of bounds."""


def is_cpu(device: torch.device) -> bool:
    """Whether to take the path tuned for a processor; tests say no to compare it with the other."""
    return device.type == "cpu"


class Pairs:
    """The selected (vector, latent) pairs, sorted by latent once, when a gradient first asks.

    Args:
        parts: the indices (n, k) of each selection; more than one where dead latents are selected
            beside the others. Pair number p is the p-th of all the parts' indices, one after
            another.
        weight: (n_latents, d), for the number of latents only.
    """

    def __init__(self, parts: list[Tensor], weight: Tensor):
        self.parts, self.n_latents = [part.contiguous() for part in parts], len(weight)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pairs by latent: their numbers, and where each latent's begin; and of each pair the
        row of its vector, in one table of n vectors and in a stack of one such table per part."""
        latents = _joined([part.view(-1) for part in self.parts])
        latents, order = latents.int().sort(stable=True)
        n, device = len(self.parts[0]), latents.device
        # Not by torch.bincount, which makes the host wait for the device.
        counts = latents.new_zeros(self.n_latents).index_add_(0, latents, torch.ones_like(latents))
        stacked = torch.cat(
            [
                torch.arange(
                    i * n, (i + 1) * n, dtype=torch.int32, device=device
                ).repeat_interleave(part.shape[1])
                for i, part in enumerate(self.parts)
            ]
        ).index_select(0, order)
        rows = stacked % n if len(self.parts) > 1 else stacked
        offsets = counts.cumsum(0, dtype=torch.int32) - counts
        return order, offsets, rows, stacked

    def sum_by_latent(
        self, weights: Sequence[Tensor], table: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """For each latent, the sum over its pairs of weight times the vector's row of the table.

        Args:
            weights: (n, k) for each part.
            table: (n, d), or (parts * n, d) with rows for each part.
            out: memory for the result (n_latents, d), filled piece by piece.
        """
        order, offsets, rows, stacked = self.by_latent
        weights = _joined([weight.reshape(-1) for weight in weights]).index_select(0, order)
        if len(table) > len(self.parts[0]):
            rows = stacked
        if not is_cpu(table.device):
            return _sums_of_runs(rows, table, offsets, weights)
        if out is None:
            return F.embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=weights)
        size = max(1, PIECE // table.shape[1])
        ends = [*offsets[::size].tolist(), len(rows)]
        for piece, begins, start, end in zip(
            out.split(size), offsets.split(size), ends[:-1], ends[1:], strict=True
        ):
            here = slice(start, end)
            bags = {"mode": "sum", "per_sample_weights": weights[here]}
            piece.copy_(F.embedding_bag(rows[here], table, begins - start, **bags))
        return out

    def products(self, weight: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
        """<table_i, weight_j> for each pair of each part: weight (n_latents, d), a table (n, d)
        for each part, to (n, k) for each part."""
        if not is_cpu(weight.device):
            return list(map(partial(row_products, weight), self.parts, tables))
        # By latent, each row of the large matrix is read once, and the small one stays in cache.
        order, offsets, _, stacked = self.by_latent
        vectors, starts = _joined(tables), F.pad(offsets, (0, 1), value=len(order))
        with warnings.catch_warnings(action="ignore"):  # "sparse CSR tensor support is in beta"
            pairs = torch.sparse_csr_tensor(
                starts, stacked, vectors.new_zeros(len(order)), (len(weight), len(vectors))
            )
        found = torch.sparse.sampled_addmm(pairs, weight, vectors.T, beta=0).values()
        products = torch.empty_like(found).index_copy_(0, order, found)
        sizes = [part.numel() for part in self.parts]
        return [p.view_as(i) for p, i in zip(products.split(sizes), self.parts, strict=True)]


class Encode(torch.autograd.Function):
    """Give the selected values their gradient: that of max(0, <x_i - b, encoder_j>)."""

    @staticmethod
    def forward(ctx, x, pre_bias, encoder, centred, pairs, *values):
        ctx.save_for_backward(centred, encoder, *values)
        ctx.pairs = pairs
        return tuple(value.clone() for value in values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        centred, encoder, *values = ctx.saved_tensors
        pairs = ctx.pairs
        grads = [g.masked_fill(value == 0, 0) for g, value in zip(grads, values, strict=True)]
        grad_x = grad_bias = grad_encoder = None
        if ctx.needs_input_grad[0]:
            grad_x = sum(map(partial(weighted_sums, encoder), pairs.parts, grads))
        if ctx.needs_input_grad[1]:  # -sum_i sum_j grad_ij encoder_j, summed over i first
            totals = pairs.sum_by_latent(grads, torch.ones_like(centred[:, :1]))
            grad_bias = -(totals.T @ encoder).squeeze(0)
        if ctx.needs_input_grad[2]:
            grad_encoder = pairs.sum_by_latent(grads, centred, _gradient_memory(encoder))
        return grad_x, grad_bias, grad_encoder, None, None, *[None for _ in grads]


class Decode(torch.autograd.Function):
    """Sums of decoder rows, weighted by the values: one result (n, d) for each part."""

    @staticmethod
    def forward(ctx, decoder, pairs, *values):
        ctx.save_for_backward(decoder, *values)
        ctx.pairs = pairs
        return tuple(map(partial(weighted_sums, decoder), pairs.parts, values))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        decoder, *values = ctx.saved_tensors
        pairs = ctx.pairs
        grads = [grad.contiguous() for grad in grads]
        grad_decoder, grad_values = None, [None for _ in values]
        if ctx.needs_input_grad[0]:
            grad_decoder = pairs.sum_by_latent(values, _joined(grads), _gradient_memory(decoder))
        if any(ctx.needs_input_grad[2:]):
            grad_values = pairs.products(decoder, grads)
        return grad_decoder, None, *grad_values


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after another; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def weighted_sums(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """sum_j weight_ij table_j: table (m, d), indices and weights (n, k) to (n, d)."""
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights.contiguous())


def _sums_of_runs(rows: Tensor, table: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the table's rows by bag: rows and weights (p,), table (m, d), bags begin at
    offsets (b,), to (b, d).

    A GPU sums one bag's rows in sequence, however many they are, and some latents are active for
    most vectors. So each bag is cut at the multiples of RUN, and the pieces are summed after that.
    How many pieces there are does not depend on the data, which would have to be waited for.
    """
    cuts = torch.arange(0, len(rows), RUN, dtype=torch.int32, device=rows.device)
    begins = torch.cat([offsets, cuts]).sort().values
    pieces = F.embedding_bag(rows, table, begins, mode="sum", per_sample_weights=weights)
    # Before the first piece of bag i lie those of the bags before it and the cuts before it.
    first = torch.arange(len(offsets), dtype=torch.int32, device=rows.device)
    first += offsets.add(RUN - 1).div_(RUN, rounding_mode="floor")
    every = torch.arange(len(pieces), dtype=torch.int32, device=rows.device)
    return F.embedding_bag(every, pieces, first, mode="sum")


def row_products(table: Tensor, indices: Tensor, a: Tensor) -> Tensor:
    """<a_i, table_j> for each pair: table (m, d), indices (n, k), a (n, d) to (n, k)."""
    n, k = indices.shape
    if n * k > PAIRS and n > 1:
        rows = max(1, PAIRS // k)
        parts = zip(indices.split(rows), a.split(rows), strict=True)
        return torch.cat([row_products(table, *part) for part in parts])
    starts = torch.arange(0, n * k, k, device=a.device)
    bags = torch.arange(n, device=a.device).repeat_interleave(k)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a, table, indices.view(-1), starts, bags, 0
    )
    return products.view(n, k)


def _gradient_memory(weight: Tensor) -> Tensor | None:
    """Memory for the gradient of a weight on a CPU: the last one's, unless it is still in use.

    As with `_kept_buffer`, fresh pages would cost more than to fill them. None on other devices.
    """
    if not is_cpu(weight.device):
        return None
    storage = _gradients.get(weight)
    if storage is None or torch._C._storage_Use_Count(storage._cdata) > 1:
        storage = _gradients[weight] = weight.new_empty(weight.shape).untyped_storage()
    # A tensor of its own, no view of a kept one: autograd takes it for the gradient as it is.
    return weight.new_empty(0).set_(storage, 0, weight.shape)


_gradients = WeakTensorKeyDictionary()
