"""The kernels for CUDA devices: the dense definition is their judge.

On a CPU they run in Triton's interpreter (see conftest.py). `pip install triton` is needed for
that; without it these tests are skipped, in CI they fail.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from mlsae_core import kernels, objective, pairs
from mlsae_core.sae import MLSAE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if importlib.util.find_spec("triton") is None:
    if "CI" in os.environ:
        raise ModuleNotFoundError('triton: pip install -c constraints.txt -e ".[gpu]"')
    pytest.skip("needs triton", allow_module_level=True)
from mlsae_core import triton_kernels  # noqa: E402

#: Larger where that costs nothing: (vectors, d, latents, k, dead, aux_k).
SIZES = [(23, 24, 512, 8, 40, 7), (9, 20, 301, 5, 301, 64), (5, 130, 1100, 33, 1, 1)]
if DEVICE == "cuda":
    SIZES += [(777, 130, 3001, 16, 500, 65), (4000, 512, 32768, 32, 4096, 256)]
    SIZES += [(64, 24, 40000, 8, 100, 10)]  # latents' numbers take more than 16 bits


def problem(n, d, m, n_dead, seed=0):
    """Vectors, unit weights, a bias and dead latents; the first latents are active everywhere but
    for the first vector, whose scores are all 0."""
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(n, d, generator=generator), torch.randn(d, generator=generator) / 10
    encoder, decoder = (F.normalize(torch.randn(m, d, generator=generator)) for _ in range(2))
    encoder[:2] += 2 * F.normalize(x.mean(0, keepdim=True))
    x[0] = bias
    dead = torch.randperm(m, generator=generator)[:n_dead].sort().values
    return x, encoder, decoder, bias, dead


@functools.cache
def results(size, kernel, precision=None):
    """Everything that a pass forward and backward gives, on the CPU, in float64."""
    n, d, m, k, n_dead, aux_k = size
    device = "cpu" if kernel == "dense" else DEVICE
    dtype = torch.float64 if kernel == "dense" else torch.float32
    *tensors, dead = problem(n, d, m, n_dead)
    tensors = [t.to(device, dtype).requires_grad_() for t in tensors]
    with torch.autocast(device, precision or torch.bfloat16, enabled=precision is not None):
        y, y_dead, code = kernels.autoencode(*tensors, k, dead.to(device), aux_k, kernel)
        y, y_dead = y.to(dtype), y_dead.to(dtype)
        total = y.sin().sum() + y_dead.square().sum() + code.values.square().sum()
    total.backward()
    values = code.values.sort(1).values
    found = {"y": y, "y_dead": y_dead, "values": values}
    found |= {
        name: t.grad for name, t in zip(("x", "encoder", "decoder", "bias"), tensors, strict=True)
    }
    return {name: t.detach().cpu().double() for name, t in found.items()}


def largest_error(found, expected):
    return {
        name: float((found[name] - expected[name]).norm() / expected[name].norm())
        for name in expected
    }


def test_what_is_not_kept_counts_for_nothing():
    """As with batchtopk: a choice among the largest, in one result and its gradients."""

    def keep(values):
        return torch.where(values > 2, values, 0)

    results = []
    for kernel in ("dense", "triton"):
        device = "cpu" if kernel == "dense" else DEVICE
        tensors = [t.to(device).requires_grad_() for t in problem(23, 24, 512, 1)[:-1]]
        y, _, code = kernels.autoencode(*tensors, 8, kernel=kernel, keep=keep)
        (y.sin().sum() + code.values.square().sum()).backward()
        active = (code.values > 0).sum(1)
        results.append([t.detach().cpu() for t in (y, active, *(t.grad for t in tensors))])
    assert 0 < results[0][1].sum() < 23 * 8
    for dense, found in zip(*results, strict=True):
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_are_those_of_the_definition(size, monkeypatch):
    monkeypatch.setattr(triton_kernels, "RUN", 4)  # runs of the busy latents are cut
    errors = largest_error(results(size, "triton"), results(size, "dense"))
    assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_they_are_rounded_to_its_precision(precision):
    """Scores that lie too close for it change places, so results are compared given the choice."""
    n, d, m, k, *_ = SIZES[-1] if DEVICE == "cuda" else SIZES[0]
    *tensors, _ = problem(n, d, m, 0)
    x, encoder, decoder, bias = (t.to(DEVICE).requires_grad_() for t in tensors)
    with torch.autocast(DEVICE, precision):
        y, _, code = kernels.autoencode(x, encoder, decoder, bias, k, kernel="triton")
    y.square().sum().backward()
    found = [t.grad for t in (x, encoder, decoder, bias)]
    exact = (x - bias) @ encoder.T
    best = exact.topk(k, 1).values.relu().sort(1).values
    off = code.values.detach().sort(1).values - best.detach()
    assert 1e-5 < float(off.norm() / best.norm().detach()) < 0.005
    for t in (x, encoder, decoder, bias):
        t.grad = None
    values = exact.gather(1, code.indices).relu()
    expected = torch.zeros_like(exact).scatter(1, code.indices, values) @ decoder + bias
    expected.square().sum().backward()
    torch.testing.assert_close(
        y, expected, rtol=0, atol=0.02 * float(expected.detach().abs().max())
    )
    for a, t in zip(found, (x, encoder, decoder, bias), strict=True):
        assert float((a - t.grad).norm() / t.grad.norm()) < 0.01


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_inputs_and_gradients_may_lie_otherwise_in_memory(precision):
    """Transposed ones, and one number that stands for all; in the same precision."""
    found = []
    for transposed in (False, True):
        *tensors, _ = problem(9, 20, 160, 0)
        tensors = [t.to(DEVICE).requires_grad_() for t in tensors]
        *matrices, bias = tensors
        if transposed:
            matrices = [t.T.contiguous().T for t in matrices]
        with torch.autocast(DEVICE, precision or torch.bfloat16, enabled=precision is not None):
            y, _, code = kernels.autoencode(*matrices, bias, 4, kernel="triton")
        weights = torch.arange(y.numel(), device=DEVICE).view_as(y.T) / y.numel()
        if transposed:
            ((y.T * weights).sum() + code.values.sum()).backward()
        else:
            ones = torch.ones_like(code.values)
            torch.autograd.backward([y, code.values], [weights.T.contiguous(), ones])
        found.append([y, *(t.grad for t in tensors)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("levels", [3, 10, 10**6])
@pytest.mark.parametrize(("width", "k"), [(40, 1), (512, 8), (501, 9), (1000, 31), (64, 40)])
def test_the_largest_are_selected_even_with_ties(width, k, levels, precision):
    generator = torch.Generator().manual_seed(width + levels)
    scores = torch.randint(-levels // 3, levels, (4, width), generator=generator).to(precision)
    scores[0] = -scores[0].abs()  # nothing to select
    scores = scores.to(DEVICE)
    expected = scores.relu().float().sort(1, descending=True).values[:, :k]
    values, indices = triton_kernels.topk(scores, k)
    assert torch.equal(values.sort(1, descending=True).values, expected)
    assert torch.equal(scores.relu().float().gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)
    for keep in (triton_kernels.keep_largest, kernels.keep_largest):
        kept = keep(scores.clone(), k)
        assert torch.equal(kept.float().sort(1, descending=True).values[:, :k], expected)
        assert ((kept == 0) | (kept == scores) & (scores > 0)).all()
        assert ((kept > 0).sum(1) <= k).all()


def test_rows_that_are_not_finite_are_not_hidden():
    scores = torch.randn(2, 512, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    scores[0, 7], scores[1, 9] = torch.nan, torch.inf
    values, indices = triton_kernels.topk(scores, 4)
    assert values[0].isnan().any()
    assert values[1].isinf().any()
    assert 7 in indices[0]


def test_dead_latents_by_whole_products_in_parts_that_are_kept_or_computed_again(monkeypatch):
    *tensors, dead = problem(50, 24, 200, 100)
    expected = []
    cases = ((2**28, 2**30, 1), (128 * 7, 2**30, 8), (128 * 7, 128 * 20, 8 + 5), (128, 0, 100))
    for scores, kept, selections in cases:
        monkeypatch.setattr(kernels, "DEAD_SCORES", scores)
        monkeypatch.setattr(kernels, "DEAD_KEPT", kept)
        x, encoder, decoder, bias = (t.double().requires_grad_() for t in tensors)
        if not expected:
            y = kernels.autoencode(x, encoder, decoder, bias, 4, dead, 9, "dense")[1]
            expected = [y, *torch.autograd.grad(y.sin().sum(), (x, encoder, decoder, bias))]
        keep = Mock(side_effect=kernels.keep_largest)
        y = kernels.decode_dead(x, bias, encoder, decoder, dead, 9, keep)
        y.sin().sum().backward()
        assert keep.call_count == selections
        found = [y, *(t.grad for t in (x, encoder, decoder, bias))]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_row_products_in_parts_are_those_of_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    table, a = (torch.randn(shape, generator=generator) for shape in ((30, 6), (11, 6)))
    indices = torch.randint(30, (11, 4), generator=generator)
    whole = pairs.row_products(table, indices, a)
    torch.testing.assert_close(whole, torch.einsum("nkd,nd->nk", table[indices], a))
    monkeypatch.setattr(pairs, "PAIRS", 9)
    part = Mock(wraps=pairs.row_products)
    monkeypatch.setattr(pairs, "row_products", part)
    assert torch.equal(pairs.row_products(table, indices, a), whole)
    assert [call.args[1].numel() for call in part.call_args_list[1:]] == [8, 8, 8, 8, 8, 4]


def test_a_device_that_cannot_run_them_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton needs a CUDA device, got cpu; take sparse"):
        MLSAE(16, 64, 4, kernel="triton").encode(torch.ones(2, 16))
    kernels.check("sparse", torch.device("cpu"), torch.float64)


def test_parameters_that_they_do_not_take_are_named():
    sae = MLSAE(16, 64, 4, kernel="triton").double().to(DEVICE)
    with pytest.raises(ValueError, match=r"parameters in float32, got torch.float64; take sparse"):
        objective.loss(sae, torch.randn(1, 2, 16).to(DEVICE))


def test_they_are_compiled_for_a_card_that_is_not_there_without_spills():
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_compile"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    launched = {n for n, it in vars(triton_kernels).items() if hasattr(it, "arg_names")}
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == launched - {"_chosen"}
