"""The sparse kernels for CUDA devices, in Triton: the same functions as in `mlsae_core.kernels`.

What a vector's k latents cost on a GPU is memory traffic, so each of these passes over its operands
once: group maxima and the choice among the members of the k best groups; weighted sums of decoder
rows; and, latent by latent, all that the backward pass needs of the selected pairs. The large
products are cuBLAS's, in the precision of autocast; tables whose rows are gathered are kept in
bfloat16 under autocast and in float32 otherwise; every sum is accumulated in float32, in an order
that does not depend on chance. So under autocast scores, and with them values, are rounded to that
precision (2^-9 of a value in bfloat16), and without it everything is float32.

Triton's interpreter runs the same code on a CPU (TRITON_INTERPRET=1), which the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlsae_core import kernels
from mlsae_core.kernels import Code

RUN = 256
"""Pairs of a latent that one program sums; longer runs are cut and the pieces summed after that."""

WIDEST = 2**14
"""Columns of a row that are held at once where the largest are kept in place."""

_BITS = {torch.int16: 15, torch.int32: 31}


# --- selection --------------------------------------------------------------------------------


@triton.jit
def _chosen(key, count, bits: tl.constexpr):
    """Which are the `count` largest keys (1 or 0): of equal ones the first. Keys below 0 never are.

    The bits of the least chosen one are found from the highest on.
    """
    least = tl.full((), 0, tl.int32)
    for bit in tl.static_range(bits):
        higher = least | (1 << (bits - 1 - bit))
        least = tl.where(tl.sum((key >= higher).to(tl.int32)) >= count, higher, least)
    above = (key > least).to(tl.int32)
    equal = (key == least).to(tl.int32)
    room = count - tl.sum(above)
    return above | (equal & (tl.cumsum(equal, 0) <= room).to(tl.int32))


@triton.jit
def _group_maxima(keys, maxima, width, groups, group: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * block + tl.arange(0, block)
    column = g[:, None] * group + tl.arange(0, group)[None, :]
    key = tl.load(keys + row * width + column, mask=column < width, other=-1)
    tl.store(maxima + row * groups + g, tl.max(key, 1), mask=g < groups)


@triton.jit
def _select(
    scores, keys, maxima, values, indices, width, groups, k,
    group: tl.constexpr, all_groups: tl.constexpr, all_k: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """One row: the k groups with the largest maxima, and the k largest of their members."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, all_groups)
    key = tl.load(maxima + row * groups + g, mask=g < groups, other=-1).to(tl.int32)
    key = tl.where(g < groups, tl.maximum(key, 0), -1)  # a ReLU: of all below 0 any may be taken
    best = _chosen(key, k, bits)
    # The result's own memory passes the groups from the threads that found them to all.
    tl.store(indices + row * k + tl.cumsum(best, 0) - 1, g.to(tl.int64), mask=best > 0)
    tl.debug_barrier()
    place = tl.arange(0, all_k)
    mine = tl.load(indices + row * k + place, mask=place < k, other=0)
    tl.debug_barrier()
    column = tl.reshape(mine[:, None] * group + tl.arange(0, group)[None, :], (all_k * group,))
    member = tl.arange(0, all_k * group)
    inside = (member < k * group) & (column < width)
    key = tl.load(keys + row * width + column, mask=inside, other=-1).to(tl.int32)
    key = tl.where(inside, tl.maximum(key, 0), -1)
    best = _chosen(key, k, bits)
    score = tl.load(scores + row * width + column, mask=best > 0, other=0).to(tl.float32)
    out = row * k + tl.cumsum(best, 0) - 1
    tl.store(values + out, tl.where(score < 0, 0.0, score), mask=best > 0)
    tl.store(indices + out, column, mask=best > 0)


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `kernels.group_topk`: scores (n, width) to values, after a ReLU, and indices (n, k).

    Exact, and among equal scores the first ones' groups are preferred. Values are float32.
    """
    n, width = scores.shape
    group = 32 if width <= 2**16 else 64  # measured; as many groups as members, or so
    groups = -(-width // group)
    keys = scores.view(torch.int16 if scores.element_size() == 2 else torch.int32)
    if groups < k or k > 128:
        values, indices = kernels.group_topk(scores, k)
        return values.float(), indices
    values = torch.empty(n, k, dtype=torch.float32, device=scores.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=scores.device)
    maxima = torch.empty(n, groups, dtype=keys.dtype, device=scores.device)
    all_groups, all_k = triton.next_power_of_2(groups), triton.next_power_of_2(k)
    block = min(256, all_groups)
    _group_maxima[n, triton.cdiv(groups, block)](
        keys, maxima, width, groups, group=group, block=block, num_warps=4
    )
    _select[n,](
        scores, keys, maxima, values, indices, width, groups, k,
        group=group, all_groups=all_groups, all_k=all_k, bits=_BITS[keys.dtype],
        num_warps=min(8, max(1, max(all_groups, all_k * group) // 1024)),
    )  # fmt: skip
    return values, indices


@triton.jit
def _keep(scores, keys, width, count, block: tl.constexpr, bits: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    key = tl.load(keys + row * width + column, mask=inside, other=-1).to(tl.int32)
    key = tl.where(inside, tl.maximum(key, 0), -1)
    kept = (_chosen(key, count, bits) > 0) & (key > 0)
    tl.store(scores + row * width + column, 0.0, mask=inside & (kept == 0))


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """As `kernels.keep_largest`, in place: all of a row but its `count` largest, and what is
    negative, becomes 0."""
    n, width = scores.shape
    if width > WIDEST:
        return kernels.keep_largest(scores, count)
    keys = scores.view(torch.int16 if scores.element_size() == 2 else torch.int32)
    block = triton.next_power_of_2(width)
    _keep[n,](
        scores, keys, width, count, block=block, bits=_BITS[keys.dtype],
        num_warps=min(32, max(1, block // 1024)),
    )  # fmt: skip
    return scores


# --- the selected pairs -----------------------------------------------------------------------


@triton.jit
def _decode(
    values, indices, table, bias, out, k, d,
    all_d: tl.constexpr, all_k: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ds = tl.arange(0, all_d)
    total = tl.load(bias + ds, mask=ds < d, other=0.0)
    for first in range(0, all_k, step):
        ks = first + tl.arange(0, step)
        value = tl.load(values + row * k + ks, mask=ks < k, other=0.0)
        index = tl.load(indices + row * k + ks, mask=ks < k, other=0).to(tl.int64)
        here = (ks < k)[:, None] & (ds < d)[None, :]
        rows = tl.load(table + index[:, None] * d + ds[None, :], mask=here, other=0.0)
        total += tl.sum(value[:, None] * rows.to(tl.float32), 0)
    tl.store(out + row * d + ds, total, mask=ds < d)


def decode(values: Tensor, indices: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """sum_j value_ij table_j + bias: values and indices (n, k), table (m, d), bias (d,) float32, to
    (n, d) float32."""
    (n, k), d = values.shape, table.shape[1]
    out = torch.empty(n, d, dtype=torch.float32, device=table.device)
    all_d, all_k = triton.next_power_of_2(d), triton.next_power_of_2(k)
    _decode[n,](
        values, indices, table, bias, out, k, d,
        all_d=all_d, all_k=all_k, step=min(all_k, 8),
        num_warps=_warps(all_d * table.element_size(), 16),
    )  # fmt: skip
    return out


@triton.jit
def _by_latent(
    order, latents, begins, values, extra, centred, grad, decoder, k, d,
    grad_encoder, grad_decoder, totals, grad_values,
    has_extra: tl.constexpr, all_d: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """A piece of the pairs (i, j) of a latent j. With g the gradient of y, and the score's gradient
    a_ij = <g_i, decoder_j> where value_ij > 0, else 0, one pass gives sum_i value_ij g_i,
    sum_i a_ij x_i and sum_i a_ij."""
    piece = tl.program_id(0)
    begin = tl.load(begins + piece)
    end = tl.load(begins + piece + 1)
    ds = tl.arange(0, all_d)
    j = tl.load(latents + begin, mask=begin < end, other=0).to(tl.int64)
    row = tl.load(decoder + j * d + ds, mask=(ds < d) & (begin < end), other=0.0).to(tl.float32)
    sum_encoder = tl.zeros((all_d,), tl.float32)
    sum_decoder = tl.zeros((all_d,), tl.float32)
    sum_scores = tl.zeros((step,), tl.float32)
    for first in range(begin, end, step):
        at = first + tl.arange(0, step)
        live = at < end
        pair = tl.load(order + at, mask=live, other=0)
        i = (pair // k).to(tl.int64)
        value = tl.load(values + pair, mask=live, other=0.0)
        here = live[:, None] & (ds < d)[None, :]
        g = tl.load(grad + i[:, None] * d + ds[None, :], mask=here, other=0.0).to(tl.float32)
        x = tl.load(centred + i[:, None] * d + ds[None, :], mask=here, other=0.0).to(tl.float32)
        a = tl.sum(g * row[None, :], 1)
        if has_extra:
            a += tl.load(extra + pair, mask=live, other=0.0)
        a = tl.where(value > 0, a, 0.0)
        tl.store(grad_values + pair, a, mask=live)
        sum_decoder += tl.sum(value[:, None] * g, 0)
        sum_encoder += tl.sum(a[:, None] * x, 0)
        sum_scores += a
    out = piece.to(tl.int64) * d + ds
    tl.store(grad_encoder + out, sum_encoder, mask=ds < d)
    tl.store(grad_decoder + out, sum_decoder, mask=ds < d)
    tl.store(totals + piece, tl.sum(sum_scores))


@triton.jit
def _sum_pieces(
    encoder_sums, decoder_sums, totals, first, m, pieces, d,
    grad_encoder, grad_decoder, grad_scores, all_d: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0)
    begin = tl.load(first + j)
    end = tl.load(first + j + 1, mask=j + 1 < m, other=pieces)
    ds = tl.arange(0, all_d)
    sum_encoder = tl.zeros((all_d,), tl.float32)
    sum_decoder = tl.zeros((all_d,), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    at = begin.to(tl.int64) * d + ds
    for piece in range(begin, end):
        sum_encoder += tl.load(encoder_sums + at, mask=ds < d, other=0.0)
        sum_decoder += tl.load(decoder_sums + at, mask=ds < d, other=0.0)
        total += tl.load(totals + piece)
        at += d
    out = j.to(tl.int64) * d + ds
    tl.store(grad_encoder + out, sum_encoder, mask=ds < d)
    tl.store(grad_decoder + out, sum_decoder, mask=ds < d)
    tl.store(grad_scores + j, total)


def _backward(values, indices, extra, centred, grad, decoder):
    """Gradients of encoder and decoder (m, d), of scores (n, k), and their sums by latent (m,)."""
    (n, k), (m, d), device = values.shape, decoder.shape, decoder.device
    # Sixteen bits sort in half of the passes.
    flat = indices.view(-1).to(torch.int16 if m <= 2**15 else torch.int32)
    latents, order = flat.sort(stable=True)
    every = torch.arange(m, dtype=latents.dtype, device=device)
    offsets = torch.searchsorted(latents, every, out_int32=True)
    # A bag of pairs for each latent, cut at the multiples of RUN: how many pieces there are does
    # not depend on the data, which the host would have to wait for.
    cuts = torch.arange(0, n * k + RUN, RUN, dtype=torch.int32, device=device).clamp_(max=n * k)
    begins = torch.cat([offsets, cuts]).sort().values
    pieces = len(begins) - 1
    new = {"dtype": torch.float32, "device": device}
    encoder_sums, decoder_sums = (torch.empty(pieces, d, **new) for _ in range(2))
    totals, grad_values = torch.empty(pieces, **new), torch.empty(n, k, **new)
    all_d = triton.next_power_of_2(d)
    _by_latent[pieces,](
        order, latents, begins, values, values if extra is None else extra, centred, grad, decoder,
        k, d, encoder_sums, decoder_sums, totals, grad_values,
        has_extra=extra is not None, all_d=all_d, step=4,
        num_warps=_warps(all_d * centred.element_size(), 32),
    )  # fmt: skip
    # Before the first piece of bag j lie those of the bags before it and the cuts before it.
    first = torch.arange(m, dtype=torch.int32, device=device)
    first += offsets.add(RUN - 1).div_(RUN, rounding_mode="floor")
    grad_encoder, grad_decoder = (torch.empty(m, d, **new) for _ in range(2))
    grad_scores = torch.empty(m, **new)
    _sum_pieces[m,](
        encoder_sums, decoder_sums, totals, first, m, pieces, d, grad_encoder, grad_decoder,
        grad_scores, all_d=all_d, num_warps=_warps(all_d * 4, 16),
    )  # fmt: skip
    return grad_encoder, grad_decoder, grad_scores, grad_values


class _Autoencode(torch.autograd.Function):
    """Decode the selected values; the backward pass goes through them to both weights."""

    @staticmethod
    def forward(ctx, x, pre_bias, encoder, decoder, centred, values, indices):
        reduced = centred.element_size() == 2
        table = decoder.to(torch.bfloat16) if reduced else decoder
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(encoder, decoder, centred, values, indices)
        return decode(values, indices, table, pre_bias.float()), values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, extra):
        encoder, decoder, centred, values, indices = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(centred)
        table = grad.to(torch.bfloat16) if centred.element_size() == 2 else grad
        # Gradients may be transposed, or one number in all places.
        table, extra = table.contiguous(), None if extra is None else extra.contiguous()
        grad_encoder, grad_decoder, totals, grad_values = _backward(
            values, indices, extra, centred, table, decoder
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = decode(grad_values, indices, encoder, torch.zeros_like(encoder[0]))
        grad_bias = grad.sum(0) - totals @ encoder
        return grad_x, grad_bias, grad_encoder, grad_decoder, None, None, None


def autoencode(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    pre_bias: Tensor,
    k: int,
    dead: Tensor | None = None,
    aux_k: int = 0,
    keep: kernels.Keep | None = None,
) -> tuple[Tensor, Tensor | None, Code]:
    """As `kernels.autoencode`; the code has no `aux_values` and `aux_indices`."""
    x, encoder, decoder = x.contiguous(), encoder.contiguous(), decoder.contiguous()
    precision = kernels.score_precision(encoder)
    centred = (x.detach() - pre_bias.detach()).to(precision)
    code = kernels.select(centred, encoder, k, kernel="triton")
    if keep is not None:
        code = code._replace(values=keep(code.values))
    y, values = _Autoencode.apply(x, pre_bias, encoder, decoder, centred, code.values, code.indices)
    y_dead = None
    if dead is not None:
        y_dead = kernels.decode_dead(
            x, pre_bias, encoder, decoder, dead, aux_k, keep_largest, centred
        )
    return y, y_dead, Code(values, code.indices)


def _warps(row: int, each: int) -> int:
    """Warps for rows of so many bytes, of which a thread takes `each` (measured on an H200)."""
    return min(8, max(1, row // (32 * each)))
