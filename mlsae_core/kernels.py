"""Top-k encoding and sparse decoding, apart from the mathematics that uses them.

Four implementations of the same functions, chosen by an argument at every call:

- ``"dense"`` is the definition, written out: a matrix of scores with one row per vector and one
  column per latent, `torch.topk`, and two matrix products, differentiated by autograd. It is the
  oracle in the tests.
- ``"sparse"`` computes the same numbers without ever storing the scores. Only the k selected
  (vector, latent) pairs of each vector survive the forward pass, and the backward pass touches
  nothing else.
- ``"candidates"`` is the same, except that candidates are found by a product in bfloat16, which
  takes half of the time on processors that have it, and scored again. Which are selected is
  proven by a bound on the rounding; vectors where the bound does not suffice are done over. Faster
  for many latents, slower for few.
- ``"triton"`` is ``"sparse"`` in kernels written for CUDA devices: `mlsae_core.triton_kernels`.

Nothing here knows about layers, standardisation or losses: vectors are the rows of one matrix.
"""

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mlsae_core import pairs
from mlsae_core.fields import SpecError
from mlsae_core.products import fast_products

Kernel = Literal["sparse", "candidates", "dense", "triton"]
KERNELS: tuple[str, ...] = ("sparse", "candidates", "dense", "triton")

ELSEWHERE = {"triton": "mlsae_core.triton_kernels"}
"""Kernels that are built on this module: where their `autoencode` and `topk` are."""

CANDIDATES = 3
"""Candidates for each of the k latents to be selected, in the kernel of that name."""

DEAD_SCORES = 2**28
"""Scores of dead latents held at a time on devices other than a CPU."""

DEAD_KEPT = 2**30
"""Scores of dead latents that are kept for the backward pass there; the rest is computed again."""


class Code(NamedTuple):
    """What the encoder selects for each of n vectors.

    `values` (n, k), non-negative, and `indices` (n, k), distinct within a row; `aux_values` and
    `aux_indices` (n, aux_k) are the same for the dead latents alone, or None (as on a GPU, where
    they are never listed).
    """

    values: Tensor
    indices: Tensor
    aux_values: Tensor | None = None
    aux_indices: Tensor | None = None


Keep = Callable[[Tensor], Tensor]
"""Values (n, k) of the largest latents of n vectors, with 0 for those that are not kept after all.

It is differentiable, and makes nobody wait for a device.
"""


def check(kernel: str, device: torch.device, precision: torch.dtype = torch.float32) -> None:
    """Refuse a kernel that cannot run on that device, or with such parameters."""
    if kernel != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise SpecError("kernel: triton needs the package of that name; `pip install triton`")
    if device.type != "cuda" and "TRITON_INTERPRET" not in os.environ:
        raise SpecError(f"kernel: triton needs a CUDA device, got {device}; take sparse")
    if precision != torch.float32:
        raise SpecError(f"kernel: triton needs parameters in float32, got {precision}; take sparse")


def fused(function: Callable, kernel: str, device: torch.device) -> Callable:
    """A function of elementwise operations and sums: as it is, or compiled into few passes for the
    kernels of a GPU, where each operation for itself reads and writes everything."""
    return _compiled(function) if kernel == "triton" and device.type == "cuda" else function


_compiled = cache(torch.compile)


def autoencode(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    pre_bias: Tensor,
    k: int,
    dead: Tensor | None = None,
    aux_k: int = 0,
    kernel: Kernel = "sparse",
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor | None, Code]:
    """Encode and decode, and reconstruct with the dead latents from the same scores.

    Args:
        x: (n, d).
        encoder, decoder: (n_latents, d).
        pre_bias: (d,).
        k: latents kept for each vector.
        dead: indices (n_dead,) of the latents among which `aux_k` more are selected, or None.
        aux_k: at most n_dead.
        keep: which of the k are kept; None keeps all.

    Returns:
        y (n, d), W_dec ReLU(TopK_k(W_enc (x - b))) + b; y_dead (n, d), without a bias,
        W_dec ReLU(TopK_aux_k(W_enc (x - b) on the dead latents)), or None without dead latents;
        and the selected values and indices.
    """
    centred = x - pre_bias
    if kernel == "dense":
        code = _thinned(_dense_code(centred @ encoder.T, k, dead, aux_k), keep)
        y = _dense_decode(code.values, code.indices, decoder)
        y_dead = None
        if code.aux_values is not None:
            y_dead = _dense_decode(code.aux_values, code.aux_indices, decoder)
        return y + pre_bias, y_dead, code
    if kernel in ELSEWHERE:
        theirs = importlib.import_module(ELSEWHERE[kernel])
        return theirs.autoencode(x, encoder, decoder, pre_bias, k, dead, aux_k, keep)
    if dead is not None and not pairs.is_cpu(x.device):
        y, _, code = autoencode(x, encoder, decoder, pre_bias, k, kernel=kernel, keep=keep)
        return y, decode_dead(x, pre_bias, encoder, decoder, dead, aux_k, keep_largest), code
    code = _thinned(select(centred, encoder, k, dead, aux_k, kernel), keep)
    chosen = pairs.Pairs(
        [code.indices] if dead is None else [code.indices, code.aux_indices], encoder
    )
    values = [code.values] if dead is None else [code.values, code.aux_values]
    values = pairs.Encode.apply(x, pre_bias, encoder, centred.detach(), chosen, *values)
    y, *rest = pairs.Decode.apply(decoder, chosen, *values)
    return y.add_(pre_bias), rest[0] if rest else None, code._replace(values=values[0])


def encode(
    x: Tensor,
    encoder: Tensor,
    pre_bias: Tensor,
    k: int,
    kernel: Kernel = "sparse",
    keep: Keep | None = None,
) -> Code:
    """The k largest latents of each vector: x (n, d) to values and indices (n, k); or fewer, as
    `keep` says."""
    centred = x - pre_bias
    if kernel == "dense":
        return _thinned(_dense_code(centred @ encoder.T, k), keep)
    code = _thinned(select(centred, encoder, k, kernel=kernel), keep)
    return differentiable(code, x, encoder, pre_bias, centred)


def differentiable(
    code: Code, x: Tensor, encoder: Tensor, pre_bias: Tensor, centred: Tensor
) -> Code:
    """The selected values, positive or 0, with the gradient of their scores <x - b, encoder>.

    centred: x - pre_bias.
    """
    chosen = pairs.Pairs([code.indices], encoder)
    (values,) = pairs.Encode.apply(x, pre_bias, encoder, centred.detach(), chosen, code.values)
    return Code(values, code.indices)


def decode(values: Tensor, indices: Tensor, decoder: Tensor, kernel: Kernel = "sparse") -> Tensor:
    """The weighted sums of decoder rows: values and indices (n, k) to (n, d)."""
    if kernel == "dense":
        return _dense_decode(values, indices, decoder)
    return pairs.Decode.apply(decoder, pairs.Pairs([indices], decoder), values)[0]


def _thinned(code: Code, keep: Keep | None) -> Code:
    """What is kept of a code; on a CPU without the columns that nobody needs, else there would be a
    device to wait for."""
    if keep is None:
        return code
    values, indices = keep(code.values), code.indices
    if pairs.is_cpu(values.device):
        values, order = values.topk(max(1, int(values.count_nonzero(1).max())), sorted=False)
        indices = indices.gather(1, order)
    return code._replace(values=values, indices=indices)


# --- dense ------------------------------------------------------------------------------------


def _dense_code(scores: Tensor, k: int, dead: Tensor | None = None, aux_k: int = 0) -> Code:
    values, indices = scores.topk(k, dim=1)
    if dead is None:
        return Code(values.relu(), indices)
    aux_values, aux = scores[:, dead].topk(aux_k, dim=1)
    return Code(values.relu(), indices, aux_values.relu(), dead[aux])


def _dense_decode(values: Tensor, indices: Tensor, decoder: Tensor) -> Tensor:
    latents = values.new_zeros(len(values), len(decoder)).scatter(1, indices, values)
    return latents @ decoder


# --- sparse: selection ------------------------------------------------------------------------


@torch.no_grad()
def select(
    centred: Tensor,
    encoder: Tensor,
    k: int,
    dead: Tensor | None = None,
    aux_k: int = 0,
    kernel: Kernel = "sparse",
) -> Code:
    """Select latents chunk by chunk; the scores of one chunk are all that is ever held.

    Under autocast the scores, and only they, are computed in the reduced precision.
    """
    check(kernel, encoder.device, encoder.dtype)
    device, n = centred.device.type, len(centred)
    precision, top = score_precision(encoder), group_topk
    if kernel in ELSEWHERE:
        top = importlib.import_module(ELSEWHERE[kernel]).topk
    if (
        kernel == "candidates"
        and device == "cpu"
        and precision.itemsize > 2
        and CANDIDATES * k < len(encoder)
        and sums_bfloat16_in_float32()
    ):
        code = _select_candidates(centred, encoder, k)
        if dead is None:
            return code
        # There are few dead latents, and many of them are selected: exact at once.
        aux = select(centred, encoder.index_select(0, dead), aux_k)
        return Code(*code[:2], aux.values, dead[aux.indices])
    columns = encoder.to(precision).T
    values = centred.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int64, device=centred.device)
    aux_values = aux_indices = None
    if dead is not None:
        aux_values = centred.new_empty(n, aux_k)
        aux_indices = torch.empty(n, aux_k, dtype=torch.int64, device=centred.device)
    rows = min(n, chunk_rows(len(encoder), device))
    buffer = _kept_buffer(rows * len(encoder), precision, centred.device).view(rows, -1)
    for start in range(0, n, rows):
        here = slice(start, min(start + rows, n))
        chunk = centred[here].to(precision)
        scores = _matmul(chunk, columns, buffer[: len(chunk)])
        values[here], indices[here] = top(scores, k)
        if dead is not None:
            aux_values[here], aux = group_topk(scores.index_select(1, dead), aux_k)
            aux_indices[here] = dead.index_select(0, aux.view(-1)).view_as(aux)
    return Code(values, indices, aux_values, aux_indices)


def score_precision(encoder: Tensor) -> torch.dtype:
    """Of the scores: that of autocast on the encoder's device, else the encoder's."""
    device = encoder.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else encoder.dtype


def _select_candidates(centred: Tensor, encoder: Tensor, k: int) -> Code:
    """As `select`, from scores in bfloat16, a bound on their error, and some exact scores.

    With x and w rounded to x̂ and ŵ, the rounded score c of the exact score s = <x, w> has

        |s - <x̂, ŵ>| = |<x - x̂, w> + <x̂, w - ŵ>| <= |x - x̂| |w| + |x̂| |w - ŵ|   (Cauchy-Schwarz),

    to which the sum in float32 adds at most 2 d 2^-24 |x̂| |ŵ| and the rounding of the result
    2^-8 |c|. With b, all but the last, for the worst latent: k latents have an exact score of at
    least c_k (1 - 2^-8) - b, where c_k > 0 is the k-th largest rounded one, and a latent whose c
    is so small that c (1 + 2^-8) + b is less than that is not among the k largest. Each term is
    taken a hundredth larger, for the rounding of the bound itself.
    """
    n, d = centred.shape
    rounded = _kept_buffer(encoder.numel(), torch.bfloat16, centred.device, "encoder")
    rounded = rounded.view_as(encoder)
    norms = []
    size = max(1, pairs.PIECE // d)
    for piece, into in zip(encoder.split(size), rounded.split(size), strict=True):
        into.copy_(piece)
        norms.append(torch.stack([_norms(t).amax() for t in (piece, piece - into, into)]))
    norm, off, rounded_norm = torch.stack(norms).amax(0)
    candidates = torch.empty(n, CANDIDATES * k, dtype=torch.int64, device=centred.device)
    proven = torch.empty(n, dtype=torch.bool, device=centred.device)
    rows = min(n, chunk_rows(len(encoder), centred.device.type))
    buffer = _kept_buffer(rows * len(encoder), torch.bfloat16, centred.device).view(rows, -1)
    for start in range(0, n, rows):
        here = slice(start, min(start + rows, n))
        x = centred[here].to(torch.bfloat16)
        scores, candidates[here] = group_topk(
            torch.mm(x, rounded.T, out=buffer[: len(x)]), candidates.shape[1]
        )
        bound = 1.01 * _norms(centred[here] - x) * norm
        bound += 1.01 * _norms(x.to(encoder.dtype)) * (off + d * 2.0**-23 * rounded_norm)
        scores = scores.to(encoder.dtype)
        kth = scores.topk(k, dim=1, sorted=False).values.amin(1)
        # Scores have passed a ReLU: a least one of 0 stands for all that are negative.
        least = scores.amin(1) * (1 + 1.01 * 2.0**-8)
        proven[here] = least < kth * (1 - 1.01 * 2.0**-8) - 2 * bound
    [exact] = pairs.Pairs([candidates], encoder).products(encoder, [centred])
    values, positions = exact.topk(k, dim=1, sorted=False)
    indices = candidates.gather(1, positions)
    if len(again := proven.logical_not_().nonzero().squeeze(1)):
        values[again], indices[again] = select(centred[again], encoder, k)[:2]
    return Code(values.relu_(), indices)


@cache
def sums_bfloat16_in_float32() -> bool:
    """Whether this processor's products of bfloat16 matrices are rounded once, at the end."""
    a = torch.full((64, 512), 2.0**-8)
    a[:, 0] = 1  # to which no single other term adds anything in bfloat16
    product = a.bfloat16() @ torch.ones(512, 64, dtype=torch.bfloat16)
    return bool((product == 3).all())  # 1 + 511 / 256, rounded


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def chunk_rows(n_latents: int, device: str) -> int:
    """Rows of scores held at a time: at most 512, or 48 MiB in float32, on a CPU."""
    rows = min(512, 3 * 2**22 // n_latents) if device == "cpu" else 2**28 // n_latents
    return max(1, rows)


def group_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk(scores, k, dim=1)` followed by ReLU: exact, in no particular order.

    The columns are dealt into groups; each of the k largest scores lies in one of the k groups
    with the largest maxima (were it in another, k maxima would exceed it). So two small top-k
    problems replace one large one. They compare the bits of floats as integers, which is faster
    and the same for all but negative scores, and these become zero anyhow. Among equal scores the
    choice is arbitrary, as it is in `torch.topk`.
    """
    indices = _largest(scores.view(_INTEGERS[scores.element_size()]), k)
    return scores.gather(1, indices).relu_(), indices


def _largest(keys: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the k largest of each row of keys (n, width); the maxima likewise."""
    (n, width), device = keys.shape, keys.device
    if width <= 8 * k:
        return keys.topk(k, dim=1, sorted=False).indices
    size = 8 if k <= 16 else 4  # measured
    while 64 * size * size * k <= width:  # near the square root of width / k, where both are small
        size *= 2
    groups = width // size
    maxima = keys[:, : groups * size].view(n, size, groups).amax(1)
    winners = _largest(maxima, k).unsqueeze(1)
    members = (winners + torch.arange(size, device=device)[:, None] * groups).flatten(1)
    if groups * size < width:
        rest = torch.arange(groups * size, width, device=device).expand(n, -1)
        members = torch.cat((members, rest), 1)
    positions = keys.gather(1, members).topk(k, dim=1, sorted=False).indices
    return members.gather(1, positions)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _kept_buffer(
    size: int, dtype: torch.dtype, device: torch.device, use: str = "scores"
) -> Tensor:
    """Memory for one use, such as a chunk of scores, the same at every call.

    To ask the system for fresh pages costs more than to fill them. A CUDA device needs no such
    help: PyTorch keeps its memory anyway.
    """
    if not pairs.is_cpu(device):
        return torch.empty(size, dtype=dtype, device=device)
    buffers: dict[tuple[str, torch.dtype], Tensor] = _kept.__dict__
    if (use, dtype) not in buffers or buffers[use, dtype].numel() < size:
        _let_malloc_keep_memory()
        buffers[use, dtype] = torch.empty(size, dtype=dtype)
    return buffers[use, dtype][:size]


_kept = threading.local()


@cache
def _let_malloc_keep_memory() -> None:
    """Free a block of nearly 32 MiB, once, after which glibc keeps 64 MiB of what is freed.

    It keeps twice as much as the largest block that was ever freed, up to this size (mallopt(3),
    M_MMAP_THRESHOLD). At first that is too little for one step's temporary tensors, so that every
    step would get fresh pages. Other allocators are not moved by it.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into `out`, on a CPU by the faster of the exact implementations."""
    with fast_products(a.device):
        return torch.mm(a, b, out=out)


# --- dead latents on a GPU --------------------------------------------------------------------


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """All of a row but its `count` largest scores, and what is negative, becomes 0: (n, width)."""
    values, indices = group_topk(scores, count)
    return torch.zeros_like(scores).scatter_(1, indices, values)


def decode_dead(
    x: Tensor,
    pre_bias: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    dead: Tensor,
    aux_k: int,
    keep: Callable[[Tensor, int], Tensor],
    centred: Tensor | None = None,
) -> Tensor:
    """What `autoencode` gives as `y_dead`, by products of whole matrices (n, n_dead).

    A device that is fast at products does them sooner than it gathers the rows of aux_k latents for
    each vector: in Pythia-70m's shape 0.8 TFLOP instead of 1.6 TB. The result, and the gradients
    of the dead rows, are in the scores' precision.

    Args:
        keep: `keep_largest`, or a faster one.
        centred: x - pre_bias in the scores' precision, where that is there already.
    """
    if centred is None:
        centred = (x.detach() - pre_bias.detach()).to(score_precision(encoder))
    return _DecodeDead.apply(x, pre_bias, encoder, decoder, dead, aux_k, keep, centred)


class _DecodeDead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pre_bias, encoder, decoder, dead, aux_k, keep, centred):
        precision = centred.dtype
        # Whole tiles: rows of zeros give scores of 0, and take nothing.
        pad = (0, 0, 0, -len(dead) % 64)
        listens, writes = (
            F.pad(w.index_select(0, dead), pad).to(precision) for w in (encoder, decoder)
        )
        rows = max(1, DEAD_SCORES // len(listens))
        ctx.kept, found = [], []
        for part in centred.split(rows):
            latents = keep(part @ listens.T, aux_k)
            found.append(latents @ writes)
            if len(ctx.kept) * DEAD_SCORES < DEAD_KEPT:
                ctx.kept.append(latents)
        ctx.save_for_backward(centred, listens, writes, dead, encoder)
        ctx.rows, ctx.keep, ctx.aux_k = rows, keep, aux_k
        return torch.cat(found) if len(found) > 1 else found[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        centred, listens, writes, dead, encoder = ctx.saved_tensors
        grad_x, to_listens, to_writes, totals = [], 0, 0, 0
        parts = zip(centred.split(ctx.rows), grad.to(centred.dtype).split(ctx.rows), strict=True)
        for number, (part, grad_part) in enumerate(parts):
            if number < len(ctx.kept):
                latents = ctx.kept[number]
            else:
                latents = ctx.keep(part @ listens.T, ctx.aux_k)
            to_writes = to_writes + (latents.T @ grad_part).to(encoder.dtype)
            scores = torch.ops.aten.threshold_backward(grad_part @ writes.T, latents, 0)
            to_listens = to_listens + (scores.T @ part).to(encoder.dtype)
            totals = totals + scores.sum(0, dtype=encoder.dtype)
            if ctx.needs_input_grad[0]:
                grad_x.append(scores @ listens)
        n_dead = len(dead)
        grads = (
            torch.zeros_like(encoder).index_copy_(0, dead, part[:n_dead])
            for part in (to_listens, to_writes)
        )
        grad_x = torch.cat(grad_x).to(encoder.dtype) if grad_x else None
        grad_bias = -(totals[:n_dead] @ encoder.index_select(0, dead))
        return grad_x, grad_bias, *grads, None, None, None, None
