"""Geometry of activations and dictionaries: geometric median, drift, cosine similarities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from mlsae_core.metrics.reconstruction import _at_least_float32, _check_layers


@torch.no_grad()
def geometric_median(
    points: Tensor, tolerance: float = 1e-6, max_iterations: int = 1000, chunk: int = 65536
) -> Tensor:
    """The vector with the least sum of Euclidean distances to the points, (d,).

    Weiszfeld's iteration from the mean, with the step of Vardi and Zhang (2000) where the iterate
    lies on a data point: it leaves that point if a better one exists and stops there if not.
    Ends when a step is shorter than `tolerance` times the mean distance to the points, or after
    `max_iterations`, when the sum of distances is still no larger than at the mean. In float64,
    `chunk` points at a time.

    Args:
        points: (n, d), n ≥ 1.

    Returns:
        (d,) in the dtype of `points` (the bias's initial value, Lawson et al. 2024, App. A).
    """
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"points must be (n, d) with n ≥ 1, got {tuple(points.shape)}")
    centre = points.mean(0, dtype=torch.float64)
    for _ in range(max_iterations):
        pull = torch.zeros_like(centre)  # Σ (x − y) / ‖x − y‖ over the points away from y
        weight, distance, coincident = (centre.new_zeros(()) for _ in range(3))
        for part in points.split(chunk):
            offset = part.double() - centre
            norm = torch.linalg.vector_norm(offset, dim=1)
            inverse = torch.where(norm > 0, 1 / norm, 0)
            pull += inverse @ offset
            weight += inverse.sum()
            distance += norm.sum()
            coincident += (norm == 0).sum()
        strength = torch.linalg.vector_norm(pull)
        if strength <= coincident:  # the optimality condition at a data point; all points equal
            break
        step = pull / weight * (1 - coincident / strength)
        centre = centre + step
        if torch.linalg.vector_norm(step) <= tolerance * distance / len(points):
            break
    return centre.to(points.dtype)


class DriftResult(NamedTuple):
    """Norms and similarities of the layers' vectors (Lawson et al. 2024, section 4.2); float64.

    Means over tokens, and their standard errors over sequences, whose tokens depend on each other;
    nan for one sequence.
    """

    tokens: int
    """Tokens seen."""
    norm: Tensor
    """L2 norm, not centred, (layer,), in activation units (Fig. 4)."""
    norm_se: Tensor
    centred: Tensor
    """Cosine similarity of a token's vectors at two layers about their means, (layer, other): the
    norm, and with it a common offset, grows over the layers (Fig. 1)."""
    centred_se: Tensor
    raw: Tensor
    """The same without centring."""
    raw_se: Tensor


class Drift:
    """Second pass of the drift: norms, and cosines of every two layers about given means.

    It keeps a row for each sequence, since errors are over sequences.

    Args:
        means: (layer, d_model), from a first pass of `LayerMoments`.
    """

    def __init__(self, means: Tensor) -> None:
        self.means = means.double()
        self.sums: list[Tensor] = []
        self.counts: list[Tensor] = []

    @torch.no_grad()
    def update(self, x: Tensor, sequences: Tensor | None = None) -> None:
        """Add a batch of activations, (layer, token, d_model), of whole sequences.

        sequences: (token,) integers from 0, which are of this batch alone; by default all one.
        """
        _check_layers(x, *self.means.shape)
        x = x.to(self.means)
        norms = torch.linalg.vector_norm(x, dim=-1)[:, None]
        parts = torch.cat([norms, _cosines(x - self.means[:, None]), _cosines(x)], 1)
        rows = x.new_zeros(x.shape[1]).long() if sequences is None else sequences.to(x.device)
        count = rows.bincount()
        total = parts.new_zeros(len(count), *parts.shape[:2])
        total.index_add_(0, rows, parts.permute(2, 0, 1))
        self.sums.append(total[count > 0])
        self.counts.append(count[count > 0])

    def merge(self, other: Drift) -> Self:
        """Add what another accumulator has seen about the same means; returns self."""
        if not torch.equal(self.means, other.means.to(self.means)):
            raise ValueError("only drifts about the same means can be merged")
        self.sums += [part.to(self.means) for part in other.sums]
        self.counts += [part.to(self.means.device) for part in other.counts]
        return self

    def compute(self) -> DriftResult:
        """The means over everything seen so far; errors by the ratio estimator, since sequences
        are of unequal length."""
        if not self.counts:
            raise ValueError("no tokens seen: call update() with at least one token first")
        sums, count = torch.cat(self.sums), torch.cat(self.counts)
        n, tokens, layers = len(count), count.sum(), len(self.means)
        mean = sums.sum(0) / tokens
        rest = (sums - mean * count[:, None, None]).square().sum(0)
        error = (rest * (n / (n - 1) if n > 1 else torch.nan)).sqrt() / tokens
        of_pairs = [part[:, 1:].split(layers, 1) for part in (mean, error)]
        (centred, raw), (centred_se, raw_se) = of_pairs
        norms = mean[:, 0], error[:, 0]
        return DriftResult(int(tokens), *norms, centred, centred_se, raw, raw_se)


def _cosines(x: Tensor) -> Tensor:
    """(layer, other, token): cosine similarities of each token's vectors, (layer, token, d)."""
    unit = functional.normalize(x, dim=-1).transpose(0, 1)
    return (unit @ unit.mT).permute(1, 2, 0)


class Similar(NamedTuple):
    """The most similar vectors of each row, best first."""

    values: Tensor
    """Similarities, (n, k)."""
    indices: Tensor
    """Which vectors, (n, k) int64."""


@torch.no_grad()
def most_similar(
    rows: Tensor,
    vectors: Tensor,
    k: int = 1,
    measure: Literal["cosine", "dot"] = "cosine",
    largest: bool = True,
) -> Similar:
    """The k vectors most similar to each row, in chunks.

    With the unembedding matrix as `vectors` and measure "dot" this is the logit lens of a latent
    (nostalgebraist 2020): the tokens that its decoder row promotes, or suppresses with
    ``largest=False``. With the embedding matrix: the tokens that it resembles.

    Args:
        rows: (n, d_model), decoder rows.
        vectors: (m, d_model).
        k: how many, at most m; of equally similar vectors the first.
        measure: cosine similarity or inner product.
        largest: the largest similarities, or the smallest.

    Raises:
        ValueError: k is not 1 to m.
    """
    if not 1 <= k <= len(vectors):
        raise ValueError(f"k: expected 1 to {len(vectors)}, the number of vectors, got {k}")
    sign, blocks = 1 if largest else -1, []
    for _, block in _products(rows, vectors, measure == "cosine"):
        best = []
        block.mul_(sign)
        for _ in range(k):  # `topk` takes any of equal values, `max` the first
            best.append(block.max(1))
            block.scatter_(1, best[-1].indices[:, None], -torch.inf)
        blocks.append([torch.stack(part, 1) for part in zip(*best, strict=True)])
    values, indices = (torch.cat(part) for part in zip(*blocks, strict=True))
    return Similar(sign * values, indices)


class MaxCosine(NamedTuple):
    """Largest cosine similarity of each row of a dictionary."""

    mean: float
    """Mean over rows, the MMCS."""
    std: float
    """Unbiased standard deviation over rows."""
    values: Tensor
    """Largest cosine similarity of each row, (n,)."""
    indices: Tensor
    """The row it is with, (n,) int64."""


@torch.no_grad()
def mmcs(rows: Tensor) -> MaxCosine:
    """Mean max cosine similarity of each row with any *other* row (Lawson et al. 2024, App. B.5).

    A measure of feature splitting and of duplicates. All ordered pairs count; the code released
    with the paper looks at half of them, so it comes out too small.

    Args:
        rows: (n, d), n ≥ 2, decoder rows; they need not have unit norm.
    """
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"rows must be (n, d) with n ≥ 2, got {tuple(rows.shape)}")
    parts = []
    for start, block in _products(rows, rows):
        block.diagonal(start).fill_(-torch.inf)
        parts.append(block.max(1))
    return _max_cosine(*(torch.cat(part) for part in zip(*parts, strict=True)))


def mmcs_between(a: Tensor, b: Tensor) -> MaxCosine:
    """Mean over the rows of `a` of the largest cosine similarity with a row of `b` (Eq. 13).

    The MMCS of Sharkey et al. (2022), with `b` the ground truth or the larger dictionary. Not
    symmetric.

    Args:
        a, b: dictionaries, (n, d) and (m, d).
    """
    similar = most_similar(a, b)
    return _max_cosine(similar.values[:, 0], similar.indices[:, 0])


def _max_cosine(values: Tensor, indices: Tensor) -> MaxCosine:
    wide = values.double()
    std = wide.std().item() if len(wide) > 1 else float("nan")
    return MaxCosine(wide.mean().item(), std, values, indices)


class CosineHistogram(NamedTuple):
    """Histogram of the cosine similarities of the unordered pairs of rows."""

    counts: Tensor
    """Pairs in each bin, (n_bins,) int64."""
    edges: Tensor
    """Edges of the bins from −1 to 1, (n_bins + 1,) float64."""


@torch.no_grad()
def cosine_histogram(rows: Tensor, n_bins: int = 200) -> CosineHistogram:
    """Cosine similarities of all n(n − 1)/2 pairs of rows (Lawson et al. 2024, Fig. 24).

    Compare with `gaussian_rows` (no structure) and `copied_rows` (duplicates) of equal shape.
    Bins are closed below; the last one includes 1.

    Args:
        rows: (n, d).
        n_bins: bins of equal width on [−1, 1].
    """
    counts = torch.zeros(n_bins, dtype=torch.int64, device=rows.device)
    for start, block in _products(rows, rows):
        # right of the diagonal: each unordered pair once
        above = block.triu_(start + 1).add_(1).mul_(n_bins / 2).floor_().clamp_(0, n_bins - 1)
        counts += above.histc(n_bins, 0, n_bins).long()
    # the entries that triu_ set to 0, n(n + 1)/2 of them, all fell into the bin of 0
    counts[n_bins // 2] -= len(rows) * (len(rows) + 1) // 2
    return CosineHistogram(counts, torch.linspace(-1, 1, n_bins + 1, dtype=torch.float64))


def gaussian_rows(n: int, d: int, generator: torch.Generator | None = None) -> Tensor:
    """Negative control: n vectors from N(0, I), (n, d) (Lawson et al. 2024, App. B.6)."""
    return torch.randn(n, d, generator=generator)


def copied_rows(n: int, d: int, n_layers: int, generator: torch.Generator | None = None) -> Tensor:
    """Positive control: n / n_layers vectors from N(0, I), each copied n_layers times, and noise
    from N(0, I) added to every copy, (n, d) (Lawson et al. 2024, App. B.6).

    Copies have a cosine similarity around 0.5. Where n_layers does not divide n, the last vector
    has fewer copies.
    """
    base = torch.randn(-(-n // n_layers), d, generator=generator)
    return base.repeat_interleave(n_layers, 0)[:n] + torch.randn(n, d, generator=generator)


def _products(
    a: Tensor, b: Tensor, normalize: bool = True, elements: int = 2**24
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of a bᵀ with the row they start at; at most `elements` numbers at a time."""
    a, b = _at_least_float32(a), _at_least_float32(b)
    if normalize:
        a, b = functional.normalize(a), functional.normalize(b)
    size = max(1, elements // len(b))
    for start in range(0, len(a), size):
        yield start, a[start : start + size] @ b.T
