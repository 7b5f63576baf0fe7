"""Geometric median, drift and cosine similarities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae_core.metrics import (
    Drift,
    LayerMoments,
    copied_rows,
    cosine_histogram,
    gaussian_rows,
    geometric_median,
    geometry,
    mmcs,
    mmcs_between,
    most_similar,
)

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


def test_median_at_a_data_point_steps_as_vardi_and_zhang_do():
    # pull 1 < 3 copies: optimal, so it stays to the last bit, however the copies are chunked
    points = torch.tensor([[-1, 0], [0, 0], [-1, 0], [0, 0], [0, 0], [2, 0]], dtype=torch.float64)
    assert geometric_median(points, chunk=1).tolist() == [0, 0]
    # pull 2.02 > 2 copies: a full step of Weiszfeld from there would end 1.3 higher
    points = [[3, -4], [-5, -5], [0, -6], [-3, -1], [5, 16], [0, 0], [0, 0]]
    points = torch.tensor(points, dtype=torch.float64)
    once = geometric_median(points, max_iterations=1)
    cost = [torch.linalg.vector_norm(points - y, dim=1).sum() for y in (points.mean(0), once)]
    assert cost[1] < cost[0]


@pytest.mark.parametrize(("points", "most"), [(torch.ones(5, 3), 1), (random_rows(0, 50, 3), 60)])
def test_median_ends_when_it_is_there(monkeypatch, points, most):
    passes, split = [], torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda *a: passes.append(0) or split(*a))
    geometric_median(points)
    assert 0 < len(passes) <= most


def check_stationary(points, found):
    """No nearby point has a smaller sum of distances."""
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(60, len(found), generator=generator, dtype=torch.float64)
    step = step / step.norm(dim=1, keepdim=True) * torch.tensor([1e-3, 1e-2, 0.1] * 20)[:, None]
    places = torch.cat([found[None], found + step])
    cost = torch.linalg.vector_norm(points[:, None] - places, dim=2).sum(0)
    assert cost[0] <= cost.min() + 1e-9


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


def cosines(a, b):
    """All pairs, one at a time, in plain Python."""

    def one(x, y):
        dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
        return dot / math.hypot(*x) / math.hypot(*y)

    return [[one(x, y) for y in b.tolist()] for x in a.tolist()]


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Everything is to hold with blocks of a few rows, too."""
    if request.param == "many blocks":
        whole = geometry._products
        monkeypatch.setattr(
            geometry, "_products", lambda a, b, normalize=True: whole(a, b, normalize, 3 * len(b))
        )


def test_drift_by_hand():
    x = torch.tensor(
        [[[1.0, 0.0], [0.0, 3.0]], [[2.0, 0.0], [2.0, 0.0]], [[0.0, 5.0], [-1.0, 0.0]]]
    )
    drift = Drift(torch.zeros(3, 2))
    drift.update(x)
    result = drift.compute()
    assert result.tokens == 2
    expected = torch.tensor([[1, 0.5, 0], [0.5, 1, -0.5], [0, -0.5, 1]]).double()
    torch.testing.assert_close(result.centred, expected)
    torch.testing.assert_close(result.raw, expected)
    assert result.norm.tolist() == [2, 2, 3]
    assert result.norm_se.isnan().all()  # of one sequence
    # about their own means: ±(1/2, −3/2) and ±(1/2, 5/2)
    drift = Drift(x[::2].mean(1))
    drift.update(x[::2], torch.tensor([0, 1]))
    result = drift.compute()
    assert result.centred[0, 1].item() == pytest.approx(-3.5 / 16.25**0.5)
    assert result.raw[0, 1].item() == 0
    # Norms are 1 and 3, 5 and 1; two sequences of one token: half the difference over 1.
    assert result.norm_se.tolist() == pytest.approx([1, 2])
    assert result.raw_se[0, 1].item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_drift_in_two_passes_is_the_dense_one(dtype, offset):
    x = random_rows(0, 4 * 31, 5).view(4, 31, 5)
    x[1:] += 0.8 * x[:-1]
    x = (x + offset * random_rows(1, 4, 5)[:, None]).to(dtype)
    first = LayerMoments(4, 5)
    for part in x.split([13, 0, 18], 1):
        first.update(part)
    parts = [Drift(first.mean) for _ in range(2)]
    for drift, part in zip(parts, x.split([20, 11], 1), strict=True):
        drift.update(part)
    result = parts[1].merge(parts[0]).compute()
    exact = x.double() - x.double().mean(1, keepdim=True)
    dense = torch.cosine_similarity(exact[1:], exact[:-1], dim=-1).mean(1)
    torch.testing.assert_close(result.centred.diagonal(1), dense, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(result.norm, x.double().norm(dim=-1).mean(1))


def test_drift_of_a_copy_is_one_and_centring_matters():
    x = random_rows(3, 50, 4).expand(2, 50, 4)
    moved = torch.stack([x[0], -2 * x[1] + 100])
    for vectors, cosine in ((x, 1), (moved, -1)):
        drift = Drift(vectors.mean(1, dtype=torch.float64))
        drift.update(vectors)
        assert drift.compute().centred[0, 1].item() == pytest.approx(cosine)
    with pytest.raises(ValueError, match="same means"):
        Drift(torch.zeros(2, 3)).merge(Drift(torch.ones(2, 3)))
    with pytest.raises(ValueError, match="no tokens"):
        Drift(torch.zeros(2, 3)).compute()
    with pytest.raises(ValueError, match=r"\(2, token, 3\)"):
        Drift(torch.zeros(2, 3)).update(moved)


def test_sequences_may_be_missing_from_a_batch():
    """As where all tokens of one are special."""
    x, rows = random_rows(0, 2 * 9, 4).view(2, 9, 4), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    results = []
    for numbers in ([0, 1, 2], [1, 4, 5]):
        drift = Drift(x.mean(1))
        drift.update(x, torch.tensor(numbers)[rows])
        results.append(drift.compute())
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert (results[0].norm_se > 0).all()


def test_mmcs_by_hand(blocks):
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]])
    found = mmcs(rows)
    half = 0.5**0.5
    torch.testing.assert_close(found.values, torch.tensor([half, half, half, 0.0]))
    assert found.indices.tolist()[:2] == [2, 2]
    assert found.mean == pytest.approx(0.75 * half)
    assert found.std == pytest.approx(half / 2)  # deviations 1/4, 1/4, 1/4, −3/4 of ½√2
    between = mmcs_between(rows[:1], rows[1:])
    assert between.mean == pytest.approx(half)
    assert between.indices.tolist() == [1]


def test_gaussian_mmcs_is_the_brute_force(blocks):
    rows, others = random_rows(0, 30, 4), random_rows(1, 17, 4)
    pairs = cosines(rows, rows)
    best = [max(c for j, c in enumerate(row) if j != i) for i, row in enumerate(pairs)]
    found = mmcs(rows * torch.linspace(0.1, 9, 30)[:, None].double())
    assert found.values.tolist() == pytest.approx(best)
    assert found.mean == pytest.approx(math.fsum(best) / 30)
    squares = math.fsum((b - math.fsum(best) / 30) ** 2 for b in best)
    assert found.std == pytest.approx((squares / 29) ** 0.5)
    assert [row[i] for row, i in zip(pairs, found.indices.tolist(), strict=True)] == pytest.approx(
        best
    )
    # half of the pairs, as the code released with the paper has it, is too small
    lower = [max(row[:i]) for i, row in enumerate(pairs) if i]
    assert math.fsum(lower) / 29 < found.mean - 0.01
    between = [max(row) for row in cosines(rows, others)]
    assert mmcs_between(rows, others).values.tolist() == pytest.approx(between)
    assert mmcs(rows.float()).values.tolist() == pytest.approx(best, abs=1e-5)


@quick
@given(seeds)
def test_laws_of_mmcs(seed):
    a, b = random_rows(seed, 12, 3), random_rows(seed + 1, 20, 3)
    assert mmcs_between(a, torch.cat([b, a])).mean == pytest.approx(1)
    assert mmcs(torch.cat([a, a])).mean == pytest.approx(1)
    assert mmcs_between(a, torch.cat([b, a[:3]])).mean >= mmcs_between(a, b).mean
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert mmcs(a[order]).mean == pytest.approx(mmcs(a).mean)
    with pytest.raises(ValueError, match="n ≥ 2"):
        mmcs(a[:1])


@pytest.mark.parametrize("n_bins", [40, 41])
def test_histogram_counts_every_pair_once(blocks, n_bins):
    rows = random_rows(2, 30, 3)
    found = cosine_histogram(rows, n_bins)
    pairs = cosines(rows, rows)
    expected = [0] * n_bins
    for i in range(30):
        for j in range(i):
            expected[min(n_bins - 1, math.floor((pairs[i][j] + 1) * n_bins / 2))] += 1
    assert found.counts.tolist() == expected
    assert found.counts.sum() == 30 * 29 // 2
    assert found.edges.tolist() == pytest.approx([-1 + 2 * i / n_bins for i in range(n_bins + 1)])


def test_histogram_holds_its_ends():
    rows = torch.tensor([[1.0, 0.1], [1.0, 0.1], [-1.0, -0.1]])
    assert cosine_histogram(rows, 10).counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_histogram_loses_no_pair_to_rounding():
    rows = random_rows(0, 300, 3, torch.float32)
    unit = torch.nn.functional.normalize(rows)
    assert (unit * -unit).sum(1).min() < -1
    counts = cosine_histogram(torch.cat([rows, -rows])).counts
    assert counts.sum() == 600 * 599 // 2
    assert counts[0] >= 300


def test_controls_have_the_moments_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    centre = torch.linspace(-1, 1, 201, dtype=torch.float64)[:-1] + 0.005
    plain = cosine_histogram(gaussian_rows(600, 64, generator)).counts / (600 * 599 / 2)
    assert (plain * centre).sum().item() == pytest.approx(0, abs=0.003)
    assert (plain * centre**2).sum().item() == pytest.approx(1 / 64, rel=0.02)  # N(0, 1/d)
    rows = copied_rows(602, 64, 6, generator)
    assert rows.shape == (602, 64)
    unit = torch.nn.functional.normalize(rows)
    group = torch.arange(602) // 6
    copies = (group == group[:, None]).triu(1)
    assert (unit @ unit.T)[copies].mean().item() == pytest.approx(0.5, abs=0.01)
    counts = cosine_histogram(rows).counts
    assert counts[150:].sum() > 700 > 20 > (plain * (600 * 599 / 2))[150:].sum()  # the second peak
    assert mmcs(rows).mean == pytest.approx(0.58, abs=0.05)
    assert mmcs(gaussian_rows(602, 64, generator)).mean < 0.45


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("measure", ["cosine", "dot"])
def test_most_similar_is_the_sorted_list(blocks, measure, largest):
    rows, vectors = random_rows(0, 8, 4), random_rows(1, 11, 4)
    pairs = cosines(rows, vectors) if measure == "cosine" else (rows @ vectors.T).tolist()
    found = most_similar(rows, vectors, 3, measure, largest)
    for row, values, indices in zip(pairs, *(t.tolist() for t in found), strict=True):
        expected = sorted(row, reverse=largest)[:3]
        assert values == pytest.approx(expected)
        assert [row[i] for i in indices] == pytest.approx(expected)


def test_of_equally_similar_vectors_the_first_are_taken(blocks):
    vectors = torch.eye(3).repeat(50, 1)
    for largest, first in ((True, [1, 4, 7, 10]), (False, [0, 2, 3, 5])):
        found = most_similar(torch.tensor([[0.0, 2.0, 0.0]] * 5), vectors, 4, "dot", largest)
        assert found.indices.tolist() == [first] * 5
        assert found.values.tolist() == [[2.0 * largest] * 4] * 5
    with pytest.raises(ValueError, match="k: expected 1 to 150, the number of vectors, got 151"):
        most_similar(torch.ones(1, 3), vectors, 151)


def test_results_hold_no_graph_and_mmcs_refuses_what_is_no_dictionary():
    rows = random_rows(0, 6, 3).requires_grad_()
    results = geometric_median(rows), *most_similar(rows, rows), *mmcs(rows)[2:]
    assert not any(t.requires_grad for t in (*results, *cosine_histogram(rows)))
    for wrong in (rows[0], rows[None], rows[:1], rows[:, None]):
        with pytest.raises(ValueError, match=r"rows must be \(n, d\) with n ≥ 2, got"):
            mmcs(wrong)
    for wrong in (rows[0], rows[None], rows[:0]):
        with pytest.raises(ValueError, match=r"points must be \(n, d\) with n ≥ 1, got"):
            geometric_median(wrong)


def test_all_vectors_may_be_asked_for_but_not_none():
    rows = random_rows(0, 4, 3)
    assert most_similar(rows, rows, 4).values.shape == (4, 4)
    assert mmcs(rows[:2]).values.tolist() == pytest.approx([cosines(rows, rows)[0][1]] * 2)
    assert math.isnan(mmcs_between(rows[:1], rows).std)
    with pytest.raises(ValueError, match="k: expected 1 to 4, the number of vectors, got 0"):
        most_similar(rows, rows, 0)


def test_products_of_all_pairs_take_64_mib_at_a_time_in_single_precision():
    """Of tensors without data, which may be as large as they like."""
    a, b = torch.empty(2**14, 2, device="meta"), torch.empty(2**12, 2, device="meta")
    held = [(start, 4 * block.numel()) for start, block in geometry._products(a, b)]
    assert held == [(start, 2**26) for start in range(0, 2**14, 2**12)]


@pytest.mark.parametrize(("elements", "rows"), [(10, [2, 2, 2, 1]), (4, [1] * 7), (35, [7])])
def test_blocks_stay_within_their_size_or_are_a_row(elements, rows):
    products = geometry._products(torch.ones(7, 2), torch.ones(5, 2), elements=elements)
    assert [block.shape for _, block in products] == [(n, 5) for n in rows]
