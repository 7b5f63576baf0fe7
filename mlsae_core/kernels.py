"""Top-k encoding and sparse decoding, apart from the mathematics that uses them.

Two implementations of the same functions, chosen by an argument at every call:

- ``"dense"`` is the definition, written out: a matrix of scores with one row per vector and one
  column per latent, `torch.topk`, and two matrix products, differentiated by autograd. It is the
  oracle in the tests.
- ``"sparse"`` computes the same numbers without ever storing the scores. Only the k selected
  (vector, latent) pairs of each vector survive the forward pass, and the backward pass touches
  nothing else.

Nothing here knows about layers, standardisation or losses: vectors are the rows of one matrix.
"""

from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["sparse", "dense"]
KERNELS: tuple[str, ...] = ("sparse", "dense")

CHUNK_ROWS = {"cpu": 256, "cuda": 4096}
"""Rows of the score matrix held at a time, by device type."""


class Code(NamedTuple):
    """What the encoder selects for each of n vectors.

    `values` (n, k), non-negative, and `indices` (n, k), distinct within a row; `aux_values` and
    `aux_indices` (n, aux_k) are the same for the dead latents alone, or None.
    """

    values: Tensor
    indices: Tensor
    aux_values: Tensor | None = None
    aux_indices: Tensor | None = None


def autoencode(
    x: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    pre_bias: Tensor,
    k: int,
    dead: Tensor | None = None,
    aux_k: int = 0,
    kernel: Kernel = "sparse",
) -> tuple[Tensor, Tensor | None, Code]:
    """Encode and decode, and reconstruct with the dead latents from the same scores.

    Parameters
    ----------
    x : (n, d)
    encoder, decoder : (n_latents, d)
    pre_bias : (d,)
    k : latents kept for each vector
    dead : indices (n_dead,) of the latents among which `aux_k` more are selected, or None
    aux_k : at most n_dead

    Returns
    -------
    y : (n, d), W_dec ReLU(TopK_k(W_enc (x - b))) + b
    y_dead : (n, d), W_dec ReLU(TopK_aux_k(W_enc (x - b) on the dead latents)), without a bias,
        or None without dead latents
    code : the selected values and indices
    """
    centred = x - pre_bias
    if kernel == "dense":
        code = _dense_code(centred @ encoder.T, k, dead, aux_k)
        y = _dense_decode(code.values, code.indices, decoder)
        y_dead = None
        if code.aux_values is not None:
            y_dead = _dense_decode(code.aux_values, code.aux_indices, decoder)
        return y + pre_bias, y_dead, code
    code = select(centred, encoder, k, dead, aux_k)
    values, indices = code.values, code.indices
    if code.aux_values is not None:
        values = torch.cat((values, code.aux_values), 1)
        indices = torch.cat((indices, code.aux_indices), 1)
    pairs = Pairs(indices, len(encoder))
    values = _Encode.apply(x, pre_bias, encoder, centred.detach(), values, pairs)
    y, y_dead = _Decode.apply(values, decoder, pairs, k)
    return y + pre_bias, y_dead, code._replace(values=values[:, :k])


def encode(x: Tensor, encoder: Tensor, pre_bias: Tensor, k: int, kernel: Kernel = "sparse") -> Code:
    """The k largest latents of each vector: x (n, d) to values and indices (n, k)."""
    centred = x - pre_bias
    if kernel == "dense":
        return _dense_code(centred @ encoder.T, k)
    code = select(centred, encoder, k)
    pairs = Pairs(code.indices, len(encoder))
    values = _Encode.apply(x, pre_bias, encoder, centred.detach(), code.values, pairs)
    return Code(values, code.indices)


def decode(values: Tensor, indices: Tensor, decoder: Tensor, kernel: Kernel = "sparse") -> Tensor:
    """The weighted sums of decoder rows: values and indices (n, k) to (n, d)."""
    if kernel == "dense":
        return _dense_decode(values, indices, decoder)
    pairs = Pairs(indices, len(decoder))
    return _Decode.apply(values, decoder, pairs, indices.shape[1])[0]


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
    centred: Tensor, encoder: Tensor, k: int, dead: Tensor | None = None, aux_k: int = 0
) -> Code:
    """Select latents chunk by chunk; the scores of one chunk are all that is ever held.

    Under autocast the scores, and only they, are computed in the reduced precision.
    """
    device, n = centred.device.type, len(centred)
    precision = encoder.dtype
    if torch.is_autocast_enabled(device):
        precision = torch.get_autocast_dtype(device)
    columns = encoder.to(precision).T
    values = centred.new_empty(n, k)
    indices = torch.empty(n, k, dtype=torch.int64, device=centred.device)
    aux_values = aux_indices = None
    if dead is not None:
        aux_values = centred.new_empty(n, aux_k)
        aux_indices = torch.empty(n, aux_k, dtype=torch.int64, device=centred.device)
    rows = min(n, CHUNK_ROWS.get(device, 4096))
    buffer = torch.empty(rows, len(encoder), dtype=precision, device=centred.device)
    for start in range(0, n, rows):
        here = slice(start, min(start + rows, n))
        chunk = centred[here].to(precision)
        scores = _matmul(chunk, columns, buffer[: len(chunk)])
        values[here], indices[here] = group_topk(scores, k)
        if dead is not None:
            aux_values[here], aux = group_topk(scores.index_select(1, dead), aux_k)
            aux_indices[here] = dead[aux]
    if dead is not None:
        aux_values.relu_()
    return Code(values.relu_(), indices, aux_values, aux_indices)


def group_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk(scores, k, dim=1)` by way of group maxima: exact, in no particular order.

    The columns are dealt into groups; each of the k largest scores lies in one of the k groups
    with the largest maxima (were it in another, k maxima would exceed it). So two small top-k
    problems replace one large one. Among equal scores the choice is arbitrary, as it is in
    `torch.topk`.
    """
    n, width = scores.shape
    size = 1
    while 4 * size * size * k <= width:  # the cost is about width / size + k * size
        size *= 2
    if size < 4:
        return scores.topk(k, dim=1, sorted=False)
    groups = width // size
    body = scores[:, : groups * size].view(n, size, groups)
    winners = body.amax(1).topk(k, dim=1, sorted=False).indices
    members = winners.unsqueeze(1) + torch.arange(size, device=scores.device)[:, None] * groups
    members = members.flatten(1)
    if groups * size < width:
        rest = torch.arange(groups * size, width, device=scores.device).expand(n, -1)
        members = torch.cat((members, rest), 1)
    values, positions = scores.gather(1, members).topk(k, dim=1, sorted=False)
    return values, members.gather(1, positions)


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if a.dtype == torch.float32 and a.device.type == "cpu" and _onednn_is_exact():
        setting = torch.backends.mkldnn.matmul
        before, setting.fp32_precision = setting.fp32_precision, "bf16"
        try:
            return torch.mm(a, b, out=out)
        finally:
            setting.fp32_precision = before
    return torch.mm(a, b, out=out)


@lru_cache(maxsize=1)
def _onednn_is_exact() -> bool:
    return False


# --- sparse: gradients ------------------------------------------------------------------------


class Pairs:
    """The selected (vector, latent) pairs, sorted by latent once, when a gradient first asks.

    indices : (n, k), the latents of each vector.
    """

    def __init__(self, indices: Tensor, n_latents: int):
        self.indices, self.n_latents = indices, n_latents

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """(order, offsets): a permutation of the n*k pairs, and where each latent begins in it."""
        latents, order = self.indices.flatten().sort(stable=True)
        counts = torch.bincount(latents, minlength=self.n_latents)
        return order, counts.cumsum(0) - counts

    def sum_by_latent(self, weights: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        """For each latent, the sum over its pairs of weight times a row of the table.

        weights : (n, k); table : (m, d); rows : (n*k,), the table's row of each pair in `order`.
        """
        order, offsets = self.by_latent
        weights = weights.flatten()[order]
        return F.embedding_bag(rows, table, offsets, mode="sum", per_sample_weights=weights)


class _Encode(torch.autograd.Function):
    """Give the selected values their gradient: that of max(0, <x_i - b, encoder_j>)."""

    @staticmethod
    def forward(ctx, x, pre_bias, encoder, centred, values, pairs):
        ctx.save_for_backward(centred, encoder, values)
        ctx.pairs = pairs
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        centred, encoder, values = ctx.saved_tensors
        pairs = ctx.pairs
        grad = grad.masked_fill(values == 0, 0)
        grad_x = grad_bias = grad_encoder = None
        if ctx.needs_input_grad[0]:
            grad_x = _weighted_sums(grad, pairs.indices, encoder)
        if any(ctx.needs_input_grad[1:3]):
            rows = pairs.by_latent[0] // pairs.indices.shape[1]
        if ctx.needs_input_grad[1]:  # -sum_i sum_j grad_ij encoder_j, summed over i first
            totals = pairs.sum_by_latent(grad, torch.ones_like(centred[:, :1]), rows)
            grad_bias = -(totals.T @ encoder).squeeze(0)
        if ctx.needs_input_grad[2]:
            grad_encoder = pairs.sum_by_latent(grad, centred, rows)
        return grad_x, grad_bias, grad_encoder, None, None, None


class _Decode(torch.autograd.Function):
    """Weighted sums of decoder rows, over the first k pairs of each vector and over the others."""

    @staticmethod
    def forward(ctx, values, decoder, pairs, k):
        ctx.save_for_backward(values, decoder)
        ctx.pairs, ctx.k = pairs, k
        out = [
            _weighted_sums(values[:, part], pairs.indices[:, part], decoder)
            for part in _parts(pairs.indices, k)
        ]
        return out[0], out[1] if len(out) > 1 else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_rest):
        values, decoder = ctx.saved_tensors
        pairs, k = ctx.pairs, ctx.k
        n, width = values.shape
        grads = [g.contiguous() for g in (grad, grad_rest) if g is not None]
        grad_values = grad_decoder = None
        if ctx.needs_input_grad[0]:
            parts = [
                _row_products(g, decoder, pairs.indices[:, part])
                for g, part in zip(grads, _parts(pairs.indices, k), strict=True)
            ]
            grad_values = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        if ctx.needs_input_grad[1]:
            order = pairs.by_latent[0]
            rows = order // width
            if len(grads) > 1:
                rows = rows + n * (order % width >= k)
            table = torch.cat(grads) if len(grads) > 1 else grads[0]
            grad_decoder = pairs.sum_by_latent(values, table, rows)
        return grad_values, grad_decoder, None, None


def _parts(indices: Tensor, k: int) -> list[slice]:
    return [slice(0, k)] + ([slice(k, None)] if indices.shape[1] > k else [])


def _weighted_sums(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """sum_j weight_ij table_j: weights and indices (n, k), table (m, d) to (n, d)."""
    weights, indices = weights.contiguous(), indices.contiguous()
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights)


def _row_products(a: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """<a_i, table_j> for each pair: a (n, d), table (m, d), indices (n, k) to (n, k)."""
    n, k = indices.shape
    indices = indices.contiguous()
    starts = torch.arange(0, n * k, k, device=a.device)
    bags = torch.arange(n, device=a.device).repeat_interleave(k)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a, table, indices.view(-1), starts, bags, 0
    )
    return products.view(n, k)


# --- the optimiser ----------------------------------------------------------------------------


class ProjectedAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2017) that keeps chosen rows at unit norm.

    In parameter groups with `unit_rows`, the part of the gradient parallel to each row is removed
    before the step, so that Adam's moments hold only what turns the row, and rows are rescaled
    to unit norm after it (Bricken et al. 2023; Gao et al. 2024). Everything happens block by
    block of rows, while they are in the processor's cache.
    """

    def __init__(self, params: Iterable, lr: float = 1e-4, betas=(0.9, 0.999), eps: float = 1e-8):
        if not (lr >= 0 and eps >= 0):
            raise ValueError(f"expected lr and eps of at least 0, got lr={lr}, eps={eps}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "unit_rows": False})

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; gradients of unit rows are projected in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: dict) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        tensors = (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
        rows = len(param)
        if param.device.type == "cpu" and param.ndim > 1:
            rows = max(1, 2**15 // param[0].numel())  # four blocks of 128 KiB in float32
        for w, grad, mean, square in zip(*(t.split(rows) for t in tensors), strict=True):
            if group["unit_rows"]:
                grad -= (grad * w).sum(1, keepdim=True) * w
            torch._fused_adam_(
                [w],
                [grad],
                [mean],
                [square],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            if group["unit_rows"]:
                w /= torch.linalg.vector_norm(w, dim=1, keepdim=True)
