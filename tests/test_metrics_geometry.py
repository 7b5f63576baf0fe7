"""Geometric median, drift and cosine similarities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae_core.metrics import geometric_median

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


def random_rows(seed, n, d, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[0, 0], [2, 0], [1, 0], [1, 1], [1, -1]], [1, 0]),  # symmetric, on a data point
        ([[0, 0], [0, 0], [0, 0], [1, 0], [0, 1]], [0, 0]),  # heavy point: pull √2 < 3
        ([[5, 5], [5, 5]], [5, 5]),
        ([[0, 0], [4, 0], [0, 3], [4, 3]], [2, 1.5]),  # crossing of the diagonals
        ([[0, 0], [2, 0], [1, 3**0.5]], [1, 3**-0.5]),  # Fermat point of the equilateral
    ],
)
def test_median_by_hand(points, expected):
    found = geometric_median(torch.tensor(points, dtype=torch.float64))
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_median_leaves_a_data_point_that_is_not_optimal():
    # the iteration starts at the mean, (0, 0), which is a data point; the median is (−1, 0)
    points = torch.tensor([[0, 0], [-1, 0], [-1, 0], [-1, 0], [3, 0]], dtype=torch.float64)
    expected = torch.tensor([-1, 0], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(points), expected, atol=1e-5, rtol=0)


def check_stationary(points, found):
    """No nearby point has a smaller sum of distances."""

    def cost(y):
        return torch.linalg.vector_norm(points - y, dim=1).sum()

    generator = torch.Generator().manual_seed(0)
    for radius in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            step = torch.randn(points.shape[1], generator=generator, dtype=torch.float64)
            assert cost(found) <= cost(found + radius * step / step.norm()) + 1e-9


@quick
@given(seeds, st.integers(1, 30), st.integers(1, 5))
def test_median_is_a_minimum(seed, n, d):
    points = random_rows(seed, n, d).round(decimals=1)  # rounding makes coincident points
    check_stationary(points, geometric_median(points, tolerance=1e-10, chunk=7))


@quick
@given(seeds, st.floats(0.1, 10), st.floats(-10, 10))
def test_median_moves_with_the_points(seed, scale, shift):
    points = random_rows(seed, 20, 3)
    moved = geometric_median(points * scale + shift, tolerance=1e-9)
    expected = geometric_median(points, tolerance=1e-9) * scale + shift
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)


def test_median_resists_outliers_and_keeps_the_dtype():
    points = random_rows(0, 201, 4, torch.float32)
    points[:50] += 1e6
    found = geometric_median(points)
    assert found.dtype == torch.float32
    assert found.abs().max() < 2 < points.mean(0).abs().max()
    with pytest.raises(ValueError, match="n ≥ 1"):
        geometric_median(torch.zeros(0, 3))
