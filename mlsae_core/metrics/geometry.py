"""Geometry of activations and dictionaries: geometric median, drift, cosine similarities."""

from __future__ import annotations

import torch
from torch import Tensor


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
