"""The sparse kernels against the dense definition, and the optimiser against its laws."""

import copy
import importlib.util
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsae_core import kernels, optimizer, pairs, products
from mlsae_core.optimizer import ProjectedAdam

D, N, K = 12, 96, 5


def problem(n=7, dead=0, seed=0, dtype=torch.float64):
    """Random vectors, weights with their gradients on, and indices of dead latents."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=dtype)
    weights = [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in ((N, D), (N, D), (D,))
    ]
    which = torch.randperm(N, generator=generator)[:dead].sort().values if dead else None
    return x, *weights, which


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 700),
    share=st.floats(0, 1),
    rows=st.integers(1, 5),
    levels=st.sampled_from([2, 5, 10**6]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_group_topk_selects_the_largest_values_even_with_ties(
    width, share, rows, levels, dtype, seed
):
    k = max(1, min(width, round(share**3 * width)))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels // 3, levels, (rows, width), generator=generator).to(dtype)
    values, indices = kernels.group_topk(scores, k)
    assert torch.equal(values.sort(1).values, scores.relu().sort(1).values[:, -k:])
    assert torch.equal(scores.gather(1, indices).relu(), values)
    assert all(len(set(row.tolist())) == k for row in indices)


@pytest.mark.parametrize(("width", "k"), [(2**13, 1), (2**14, 16), (2**16, 32), (2**17 + 5, 128)])
def test_group_topk_replaces_a_large_problem_by_small_ones(monkeypatch, width, k):
    widths, topk = [], torch.Tensor.topk

    def counted(keys, *rest, **settings):
        widths.append(keys.shape[1])
        return topk(keys, *rest, **settings)

    monkeypatch.setattr(torch.Tensor, "topk", counted)
    scores = torch.rand(2, width, generator=torch.Generator().manual_seed(0))
    values, _ = kernels.group_topk(scores, k)
    assert torch.equal(values.sort(1).values, scores.sort(1).values[:, -k:])
    assert k < sum(widths) < width / 8


#: The path tuned for a processor, and that of other devices, run on a processor.
either_path = pytest.mark.parametrize("tuned", [True, False], ids=["cpu", "other devices"])


@either_path
@pytest.mark.parametrize(
    ("chunk_rows", "piece", "run", "products", "scores"),
    [(1, 1, 1, 1, 1), (3, 7 * D, 3, 12, 256), (64, 2**19, 256, 2**25, 2**28)],
)
@pytest.mark.parametrize(("k", "dead", "aux_k"), [(K, 0, 0), (K, 1, 1), (1, 40, 7), (N, N, N)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_equals_dense(
    monkeypatch, chunk_rows, piece, run, products, scores, k, dead, aux_k, dtype, tuned
):
    """However many blocks, pieces and runs the work is cut into, the last one shorter."""
    monkeypatch.setattr(pairs, "is_cpu", lambda _: tuned)
    monkeypatch.setattr(pairs, "PIECE", piece)
    monkeypatch.setattr(pairs, "RUN", run)
    monkeypatch.setattr(pairs, "PAIRS", products)
    monkeypatch.setattr(kernels, "DEAD_SCORES", scores)
    monkeypatch.setattr(kernels, "DEAD_KEPT", 2 * scores)  # the first two are kept
    monkeypatch.setattr(kernels, "chunk_rows", lambda *_: chunk_rows)
    results = {}
    for kernel in ("sparse", "candidates", "dense"):
        x, encoder, decoder, bias, which = problem(dead=dead, dtype=dtype)
        x.requires_grad_()
        y, y_dead, code = kernels.autoencode(x, encoder, decoder, bias, k, which, aux_k, kernel)
        total = (y * torch.linspace(1, 2, D)).sin().sum() + code.values.square().sum()
        if y_dead is not None:
            total = total + y_dead.square().sum()
        total.backward()
        results[kernel] = [y, total] + [t.grad for t in (x, encoder, decoder, bias)]
    for *others, dense in zip(*results.values(), strict=True):
        tolerance = 2e-5 if dtype == torch.float32 else 1e-13
        atol = tolerance * dense.abs().max().item()
        for other in others:
            torch.testing.assert_close(other, dense, rtol=0, atol=atol)


def test_scores_of_dead_latents_are_held_and_kept_as_far_as_memory_is_given(monkeypatch):
    monkeypatch.setattr(kernels, "DEAD_SCORES", 2 * 64)  # two vectors' scores of 64 latents
    monkeypatch.setattr(kernels, "DEAD_KEPT", 3 * 2 * 64)
    x, encoder, decoder, bias, which = problem(n=9, dead=40)
    asked = []

    def keep(scores, count):
        asked.append(len(scores))
        return kernels.keep_largest(scores, count)

    y = kernels.decode_dead(x, bias, encoder, decoder, which, 4, keep)
    assert asked == [2, 2, 2, 2, 1]
    y.sum().backward()
    assert asked[5:] == [2, 1]  # the first three are kept


def test_scores_of_dead_latents_take_1_gib_at_a_time_and_keep_4_in_single_precision():
    """Of tensors without data, which may be as large as they like."""
    held = []

    def keep(scores, count):
        held.append(4 * scores.numel())
        return scores

    with torch.device("meta"):
        x, bias, dead = torch.empty(2**17, 4), torch.empty(4), torch.arange(2**14)
        weights = [torch.empty(2**15, 4, requires_grad=True) for _ in range(2)]
        kernels.decode_dead(x, bias, *weights, dead, 8, keep, x).sum().backward()
    assert held == [2**30] * (8 + 4)  # of the second half, which is not kept, once more


@pytest.mark.gpu
def test_a_gpu_gives_the_numbers_of_the_definition():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    results = []
    for device, kernel in (("cpu", "dense"), ("cuda", "sparse")):
        x, *weights, which = (t.detach().to(device) for t in problem(n=500, dead=40))
        for weight in weights:
            weight.requires_grad_()
        y, y_dead, _ = kernels.autoencode(x, *weights, K, which, 7, kernel)
        (y.sin().sum() + y_dead.square().sum()).backward()
        results.append([t.detach().cpu() for t in (y, y_dead, *(w.grad for w in weights))])
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense)


def test_sparse_gradients_pass_gradcheck():
    x, encoder, decoder, bias, which = problem(n=3, dead=30)
    x.requires_grad_()

    def both(x, encoder, decoder, bias):
        return kernels.autoencode(x, encoder, decoder, bias, K, which, 4)[:2]

    assert torch.autograd.gradcheck(both, (x, encoder, decoder, bias), fast_mode=True)


def test_a_second_derivative_is_refused():
    """None is written, and PyTorch's would leave out how a gradient depends on the weights."""
    x, encoder, decoder, bias, which = problem(dead=40)
    code = kernels.encode(x, encoder, bias, K)
    found = {
        encoder: code.values,
        decoder: kernels.decode(code.values.detach(), code.indices, decoder),
        bias: kernels.decode_dead(x, bias, encoder, decoder, which, 4, kernels.keep_largest),
    }
    for weight, result in found.items():
        [gradient] = torch.autograd.grad(result.square().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


def test_encode_and_decode_alone_equal_autoencode():
    x, encoder, decoder, bias, _ = problem()
    y, _, code = kernels.autoencode(x, encoder, decoder, bias, K)
    alone = kernels.encode(x, encoder, bias, K)
    assert torch.equal(alone.values, code.values)
    assert torch.equal(alone.indices, code.indices)
    for kernel in kernels.KERNELS:
        again = kernels.decode(alone.values, alone.indices, decoder, kernel) + bias
        torch.testing.assert_close(again, y)


@pytest.mark.parametrize("kernel", ["sparse", "dense", "candidates"])
def test_a_code_has_as_many_columns_as_a_vector_keeps_latents_and_at_least_one(kernel):
    x, encoder, _, bias, _ = problem()
    scores = (x - bias) @ encoder.T
    for least in (0.6 * scores.max(), 0.999 * scores.max(), scores.max() + 1):
        kept = scores * (scores >= least)
        code = kernels.encode(
            x, encoder, bias, K, kernel, lambda values, least=least: values * (values >= least)
        )
        assert code.values.shape == code.indices.shape
        assert code.values.shape[1] == max(1, (kept > 0).sum(1).max())
        torch.testing.assert_close(
            torch.zeros_like(scores).scatter(1, code.indices, code.values), kept
        )


@pytest.mark.parametrize("letters", ["sparse", "dense", "candidates"])
def test_a_kernel_is_the_implementation_of_that_name(monkeypatch, letters):
    """Which the numbers do not tell. Names that were read are equal, not the same."""
    asked, kernel = [], "".join(list(letters))
    for name in ("_dense_code", "_dense_decode", "_select_candidates", "_matmul"):
        real = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, n=name, real=real: asked.append(n) or real(*a)
        )
    monkeypatch.setattr(kernels, "sums_bfloat16_in_float32", lambda: True)
    x, encoder, decoder, bias, _ = problem()
    first = {"dense": "_dense_code", "candidates": "_select_candidates", "sparse": "_matmul"}
    code = kernels.encode(x, encoder, bias, K, kernel)
    assert asked[0] == first[letters]
    asked.clear()
    kernels.decode(*code[:2], decoder, kernel)
    assert asked == ["_dense_decode"] * (letters == "dense")
    kernels.autoencode(x, encoder, decoder, bias, K, kernel=kernel)
    assert first[letters] in asked
    assert ("_dense_decode" in asked) == ("_dense_code" in asked) == (letters == "dense")


@pytest.mark.parametrize("spread", [0, 1e-6, 1e-3, 0.1, 1])
def test_candidates_are_those_of_the_exact_scores_however_close_they_lie(spread):
    """Scores that bfloat16 cannot tell apart (small spread) are found as well."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((50, D), (N, D))
    )
    encoder = spread * noise + (1 - spread) * torch.ones(D)
    exact, found = (kernels.select(x, encoder, K, kernel=k) for k in ("sparse", "candidates"))
    expected = (x @ encoder.T).topk(K, dim=1).values.relu()
    for code in (exact, found):
        values = code.values.sort(1, descending=True).values
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            (x @ encoder.T).gather(1, code.indices).relu(), code.values, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("off", ["vector", "latent"])
def test_a_latent_that_bfloat16_hides_as_well_as_it_can_is_found(off):
    """Each number of one factor is rounded by nearly half a step, all in the same direction."""
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    hidden = torch.where(signs > 0, 1 + 0.9 * 2.0**-8, 1.0)  # in bfloat16 all are 1
    x, latent = (hidden, signs) if off == "vector" else (torch.ones(64), hidden * signs)
    encoder = torch.zeros(101, 64)
    encoder[:100, 0] = 0.05 * 0.5 ** torch.arange(100)
    encoder[100] = latent
    assert latent @ x > 0.1
    assert latent.bfloat16() @ x.bfloat16() == 0
    found = kernels.select(x[None], encoder, 1, kernel="candidates")
    assert found.indices.tolist() == [[100]]
    exact = float(latent.double() @ x.double())  # 64 terms of about 1, which cancel
    assert found.values.item() == pytest.approx(exact, abs=64 * 2.0**-23)


def latents_near_65(*scores_and_errors):
    """Each number in bfloat16 is near 2.5, so that such scores of 64 ones are sums of 2^-6, and is
    off by less than half of that: in all by `error`."""
    signs = torch.tensor([1.0] * 45 + [-1.0] * 19)
    rows = []
    for score, error in scores_and_errors:
        steps = torch.arange(64).neg().add(round(64 * (score - 65)) + 63) // 64
        rows.append(2.5 * signs + 2.0**-6 * steps + error / 64)
        assert rows[-1].bfloat16().double().sum() == score
    return torch.ones(1, 64), torch.stack(rows)


@pytest.mark.parametrize(
    ("first", "error"), [(65.25 + 2.0**-6, 0.225), (65.25 + 2.0**-6, 0.1), (65.75, 0.3)]
)
@pytest.mark.parametrize("place", [0, 1, 25, 48, 49])
def test_a_latent_that_all_roundings_together_hide_is_found(first, error, place):
    """Scores near 65 are rounded to halves: the hidden one's down by as much as can be, the first
    one's up; and the errors of the weights do the same."""
    rows = [(65, 0)] * 50
    rows[place] = (65.25, error)
    x, encoder = latents_near_65(*rows, (first, -error))
    found = kernels.select(x, encoder, 1, kernel="candidates")
    assert found.indices.item() == place
    assert found.values.item() == pytest.approx(65.25 + error)


def test_what_the_bound_proves_is_not_done_over(monkeypatch):
    """66.5 and 65 with all their roundings are 66.25 - 0.3 and 65.25 + 0.3."""
    monkeypatch.setattr(kernels, "select", None)  # must not be asked
    x, encoder = latents_near_65(*[(65, 0.3)] * 50, (66.5, -0.3))
    assert kernels._select_candidates(x, encoder, 1).indices.item() == 50


def test_the_probe_of_the_processors_products_agrees_with_their_errors():
    """One rounding is off by 2^-8 at most; sums of 512 that are rounded on the way lose more."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(shape, generator=generator).bfloat16() for shape in ((64, 512), (512, 64)))
    error = ((a @ b).double() / (a.double() @ b.double()) - 1).abs().max()
    assert kernels.sums_bfloat16_in_float32() == (error < 1.1 * 2.0**-8)


def test_scores_of_one_chunk_take_at_most_48_mib_on_a_processor():
    assert kernels.chunk_rows(96, "cpu") == kernels.chunk_rows(2**14, "cpu") == 512
    assert kernels.chunk_rows(2**16, "cpu") * 2**16 * 4 == 48 * 2**20
    assert kernels.chunk_rows(2**30, "cpu") == kernels.chunk_rows(2**30, "cuda") == 1
    assert kernels.chunk_rows(2**16, "cuda") * 2**16 * 4 == 2**30


def test_only_vectors_that_the_bound_leaves_open_are_done_over(monkeypatch):
    again = []
    exact = kernels.select
    monkeypatch.setattr(kernels, "select", lambda x, *rest: again.append(len(x)) or exact(x, *rest))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator)
    encoder = torch.randn(4096, 64, generator=generator)
    found = kernels._select_candidates(x, encoder, 8)
    assert sum(again) < 20
    expected = (x @ encoder.T).topk(8, dim=1)
    assert torch.equal(found.indices.sort(1).values, expected.indices.sort(1).values)
    again.clear()
    kernels._select_candidates(x, torch.ones_like(encoder), 8)
    assert again == [200]


def test_the_encoder_is_rounded_in_pieces_of_2_mib(monkeypatch):
    """Of which the difference from what it was is never held whole."""
    sizes, norms = [], kernels._norms
    monkeypatch.setattr(kernels, "_norms", lambda t: sizes.append(t.numel()) or norms(t))
    encoder = torch.randn(2**13 + 1, 128, generator=torch.Generator().manual_seed(0))
    kernels._select_candidates(encoder[:3], encoder, 1)
    assert sizes[:9] == [2**19] * 6 + [128] * 3
    assert max(sizes[9:]) == 3 * 128


def test_malloc_keeps_memory_after_the_largest_block_from_which_it_learns(monkeypatch):
    """At most 32 MiB on 64 bits (mallopt(3)), with what PyTorch and malloc add to a block."""
    sizes = []
    monkeypatch.setattr(torch, "empty", lambda size, dtype: sizes.append(size * dtype.itemsize))
    kernels._let_malloc_keep_memory.__wrapped__()
    [size] = sizes
    assert 31 * 2**20 < size < 2**25 - 2**12


def test_scores_in_bfloat16_alone_would_select_others():
    """Else the tests of the candidates could not fail."""
    generator = torch.Generator().manual_seed(0)
    x, encoder = (torch.randn(n, 64, generator=generator) for n in (200, 4096))
    rounded = (x.bfloat16() @ encoder.bfloat16().T).topk(8, dim=1).indices
    expected = (x @ encoder.T).topk(8, dim=1).indices
    assert not torch.equal(rounded.sort(1).values, expected.sort(1).values)


def test_candidates_need_products_that_are_rounded_once(monkeypatch):
    monkeypatch.setattr(kernels, "sums_bfloat16_in_float32", lambda: False)
    monkeypatch.delattr(kernels, "_select_candidates")  # must not be asked
    x, encoder, *_ = problem()
    found = kernels.select(x, encoder, K, kernel="candidates")
    exact = kernels.select(x, encoder, K)
    assert torch.equal(found.indices, exact.indices)
    assert torch.equal(found.values, exact.values)


def test_dead_latents_are_selected_among_the_dead_only():
    x, encoder, decoder, bias, which = problem(dead=20)
    code = kernels.autoencode(x, encoder, decoder, bias, K, which, 6)[2]
    assert torch.isin(code.aux_indices, which).all()
    scores = ((x - bias) @ encoder.T)[:, which]
    expected = scores.sort(1, descending=True).values[:, :6].relu()
    torch.testing.assert_close(code.aux_values.sort(1, descending=True).values, expected)


def test_selected_but_negative_scores_give_zero_and_no_gradient():
    x, encoder, decoder, bias, _ = problem()
    encoder = (-encoder.abs()).detach().requires_grad_()
    y, _, code = kernels.autoencode(x.abs(), encoder, decoder, bias * 0, K)
    y.sum().backward()
    assert not code.values.any()
    assert not encoder.grad.any()
    assert not decoder.grad.any()


def test_results_repeat_bit_for_bit():
    def once():
        x, encoder, decoder, bias, which = problem(n=200, dead=30, dtype=torch.float32)
        y, y_dead, _ = kernels.autoencode(x, encoder, decoder, bias, K, which, 8)
        (y.square().sum() + y_dead.square().sum()).backward()
        return y, y_dead, encoder.grad, decoder.grad, bias.grad

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def gradient_of(encoder, decoder, bias, x):
    kernels.autoencode(x, encoder, decoder, bias, K)[0].square().sum().backward()
    return encoder.grad, decoder.grad


def test_gradients_reuse_the_memory_of_the_last_ones_that_nobody_holds():
    x, encoder, decoder, bias, _ = problem()
    first = [grad.data_ptr() for grad in gradient_of(encoder, decoder, bias, x)]
    encoder.grad = decoder.grad = None
    second = [grad.data_ptr() for grad in gradient_of(encoder, decoder, bias, x)]
    assert first == second


@pytest.mark.parametrize("hold", [lambda grad: grad, lambda grad: grad.view(-1)[3:]])
def test_gradients_that_somebody_holds_are_not_overwritten(hold):
    x, encoder, decoder, bias, _ = problem()
    held = [hold(grad) for grad in gradient_of(encoder, decoder, bias, x)]
    copies = [grad.clone() for grad in held]
    encoder.grad = decoder.grad = None
    gradient_of(encoder, decoder, bias, 2 * x)
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_gradients_of_two_batches_add_up():
    x, encoder, decoder, bias, _ = problem()
    once = [grad.clone() for grad in gradient_of(encoder, decoder, bias, x)]
    twice = gradient_of(encoder, decoder, bias, x)
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("elements", [1, 5 * D, 10**6])
def test_gradients_do_not_depend_on_the_pieces_they_are_made_in(monkeypatch, elements):
    x, encoder, decoder, bias, _ = problem()
    whole = [grad.clone() for grad in gradient_of(encoder, decoder, bias, x)]
    encoder.grad = decoder.grad = None
    monkeypatch.setattr(pairs, "PIECE", elements)
    pieces = gradient_of(encoder, decoder, bias, x)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize(
    ("package", "device", "interpreter", "precision", "message"),
    [
        (True, "cuda", False, torch.float32, None),
        (True, "cpu", True, torch.float32, None),
        (False, "cuda", False, torch.float32, "needs the package of that name"),
        (True, "cpu", False, torch.float32, "needs a CUDA device, got cpu"),
        (True, "xpu", False, torch.float32, "needs a CUDA device, got xpu"),
        (True, "cuda", False, torch.bfloat16, "in float32, got torch.bfloat16"),
    ],
)
def test_triton_alone_needs_its_package_a_device_and_single_precision(
    monkeypatch, package, device, interpreter, precision, message
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "found" if package else None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpreter:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    for kernel in kernels.KERNELS:
        refused = message is not None and kernel == "triton"
        with pytest.raises(ValueError, match=message) if refused else nullcontext():
            kernels.check(kernel, torch.device(device), precision)


def test_functions_are_compiled_for_triton_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(kernels, "_compiled", lambda function: ("compiled", function))
    for kernel in kernels.KERNELS:
        for device in ("cuda", "cpu", "xpu"):
            found = kernels.fused(abs, kernel, torch.device(device))
            gpu = kernel == "triton" and device == "cuda"
            assert found == (("compiled", abs) if gpu else abs)


def test_a_gradient_is_made_in_pieces_of_2_mib_in_single_precision(monkeypatch):
    sizes, bags = [], torch.nn.functional.embedding_bag

    def counted(*arguments, **settings):
        piece = bags(*arguments, **settings)
        sizes.append(4 * piece.numel())
        return piece

    monkeypatch.setattr(torch.nn.functional, "embedding_bag", counted)
    chosen = pairs.Pairs([torch.tensor([[0], [2**13]])], torch.empty(2**13 + 1, 128))
    out = torch.empty(2**13 + 1, 128)
    assert chosen.sum_by_latent([torch.ones(2, 1)], torch.ones(2, 128), out) is out
    assert sizes == [2**21, 2**21, 4 * 128]
    assert out[[0, -1]].eq(1).all()
    assert not out[1:-1].any()


@pytest.mark.parametrize("run", [1, 2, 7, 1000])
def test_sums_by_latent_do_not_depend_on_the_runs_they_are_made_in(monkeypatch, run):
    """One latent has most pairs, others none; cuts fall on the beginnings of latents and beside."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randint(5, (40, 3), generator=generator).sub(2).clamp(min=0) * 2
    weights, table = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((40, 3), (40, D))
    )
    expected = torch.zeros(N, D, dtype=torch.float64)
    expected.index_add_(0, latents.view(-1), (weights[..., None] * table[:, None]).flatten(0, 1))
    monkeypatch.setattr(pairs, "RUN", run)
    monkeypatch.setattr(pairs, "is_cpu", lambda _: False)
    chosen = pairs.Pairs([latents], expected)
    torch.testing.assert_close(chosen.sum_by_latent([weights], table), expected)


def test_no_call_has_more_pairs_than_a_gpu_can_count(monkeypatch):
    """Of tensors without data; 2^26 is the limit of PyTorch's kernel."""
    calls, name = [], "_embedding_bag_per_sample_weights_backward"
    real = getattr(torch.ops.aten, name)

    def counted(a, table, indices, *rest):
        calls.append(len(indices))
        return real(a, table, indices, *rest)

    monkeypatch.setattr(torch.ops.aten, name, counted)
    with torch.device("meta"):
        indices = torch.empty(2**21 + 3, 2**6, dtype=torch.int64)
        products = pairs.row_products(torch.empty(N, 2), indices, torch.empty(len(indices), 2))
    assert products.shape == indices.shape
    assert 2**20 < max(calls) <= 2**26


def test_the_host_waits_for_no_other_device(monkeypatch):
    """Tensors without data, as on a device that is still at work: to ask for a value would fail."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # refuses the device
    with torch.device("meta"):
        weights = [torch.empty(N, D, requires_grad=True) for _ in range(2)]
        bias, dead = torch.empty(D, requires_grad=True), torch.arange(40)
        y, y_dead, _ = kernels.autoencode(torch.empty(50, D), *weights, bias, K, dead, 8)
        (y.sum() + y_dead.sum()).backward()
        optimiser(*weights).step()
    assert {t.grad.device.type for t in (*weights, bias)} == {"meta"}


def test_reduced_precision_touches_only_the_scores():
    """Under autocast a selected value is off by rounding; the rest stays in single precision."""
    x, encoder, decoder, bias, which = problem(n=50, dead=40, dtype=torch.float32)
    full = kernels.autoencode(x, encoder, decoder, bias, K, which, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, y_dead, code = kernels.autoencode(x, encoder, decoder, bias, K, which, 8)
        again = kernels.decode(code.values, code.indices, decoder) + bias
    assert {t.dtype for t in (y, y_dead, code.values)} == {torch.float32}
    assert torch.equal(again, y)
    torch.testing.assert_close(code.values.sum(1), full[2].values.sum(1), rtol=0.02, atol=0.02)
    (y.sum() + y_dead.sum()).backward()
    assert encoder.grad.dtype == torch.float32


def test_the_faster_product_is_exact_and_restores_the_setting(monkeypatch):
    """As on a processor with AVX-512: elsewhere the permission that is tried has no effect."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    products.onednn_is_exact.cache_clear()
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    a, b = torch.randn(65, 70), torch.randn(70, 30)
    product = kernels._matmul(a, b, torch.empty(65, 30))
    torch.testing.assert_close(product, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)
    assert setting.fp32_precision == before
    products.onednn_is_exact.cache_clear()


# --- the optimiser ----------------------------------------------------------------------------


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    free = torch.nn.Parameter(torch.randn(40, 8, generator=generator))
    rows = torch.randn(40, 8, generator=generator)
    unit = torch.nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
    return free, unit


def optimiser(free, unit, **settings):
    groups = [{"params": [free], "unit_rows": False}, {"params": [unit], "unit_rows": True}]
    return ProjectedAdam(groups, **settings)


def set_gradients(free, unit, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    for param in (free, unit):
        param.grad = torch.randn(param.shape, generator=generator)


@either_path
@pytest.mark.parametrize("elements", [1, 7 * 8, 2**17])
def test_steps_equal_adam_with_projection_and_rescaling(monkeypatch, tuned, elements):
    """In blocks of one row, of seven, of which the last has five, and in one block."""
    monkeypatch.setattr(optimizer, "is_cpu", lambda _: tuned)
    monkeypatch.setattr(optimizer, "BLOCK_SIZE", elements)
    free, unit = parameters()
    ours = optimiser(free, unit, lr=0.01, eps=1e-9)
    other = [p.detach().clone().requires_grad_() for p in (free, unit)]
    adam = torch.optim.Adam(other, lr=0.01, eps=1e-9, foreach=False)
    for i in range(5):
        set_gradients(free, unit, i)
        set_gradients(*other, i)
        with torch.no_grad():
            grad, row = other[1].grad, other[1]
            grad -= torch.einsum("nd,nd->n", grad, row)[:, None] * row
        ours.step()
        adam.step()
        with torch.no_grad():
            other[1] /= other[1].norm(dim=1, keepdim=True)
    torch.testing.assert_close(free, other[0])
    torch.testing.assert_close(unit, other[1])


def test_step_leaves_unit_rows_and_a_gradient_perpendicular_to_them():
    free, unit = parameters()
    before = unit.detach().clone()
    set_gradients(free, unit, 0)
    optimiser(free, unit, lr=0.1).step()
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(40))
    torch.testing.assert_close((unit.grad * before).sum(1), torch.zeros(40), atol=1e-6, rtol=0)
    assert not torch.equal(unit, before)


def test_parallel_gradient_moves_nothing():
    free, unit = parameters()
    before = unit.detach().clone()
    unit.grad = 3 * before
    optimiser(free, unit, lr=0.0).step()
    torch.testing.assert_close(unit, before)
    torch.testing.assert_close(unit.grad, torch.zeros_like(unit), atol=1e-6, rtol=0)


def test_resuming_from_state_dict_is_exact():
    free, unit = parameters()
    first = optimiser(free, unit, lr=0.01)
    for i in range(3):
        set_gradients(free, unit, i)
        first.step()
    copies = [copy.deepcopy(p) for p in (free, unit)]
    second = optimiser(*copies, lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for i in range(3, 6):
        for params, opt in (((free, unit), first), (copies, second)):
            set_gradients(*params, i)
            opt.step()
    assert torch.equal(free, copies[0])
    assert torch.equal(unit, copies[1])


def test_parameters_without_gradient_stay():
    free, unit = parameters()
    before = free.detach().clone()
    unit.grad = torch.randn_like(unit)
    optimiser(free, unit).step()
    assert torch.equal(free, before)


def test_a_step_does_not_import_the_compiler():
    """It would take seconds and 80 MB; other users of PyTorch's optimisers pay them."""
    code = """if True:
        import sys, torch
        from mlsae_core.optimizer import ProjectedAdam
        p = torch.nn.Parameter(torch.ones(2, 2))
        optimiser = ProjectedAdam([p])
        p.square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        assert p.grad is None and p.max() < 1
        print("torch._dynamo" in sys.modules)
        torch.optim.Adam([p])
        print("torch._dynamo" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(("elements", "rows"), [(100, [12, 12, 12, 4]), (1, [1] * 40)])
def test_blocks_of_unit_rows_hold_so_many_elements_or_one_row(monkeypatch, elements, rows):
    free, unit = parameters()
    sizes, adam = [], torch._fused_adam_

    def counted(params, *rest, **settings):
        sizes.append(params[0].numel())
        adam(params, *rest, **settings)

    monkeypatch.setattr(torch, "_fused_adam_", counted)
    monkeypatch.setattr(optimizer, "BLOCK_SIZE", elements)
    set_gradients(free, unit, 0)
    optimiser(free, unit).step()
    assert sizes == [40 * 8, *(8 * n for n in rows)]


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    free, unit = parameters()

    def closure():
        loss = free.square().sum()
        loss.backward()
        return loss

    loss = optimiser(free, unit).step(closure)
    assert loss.requires_grad
    assert optimiser(free, unit).step() is None


@pytest.mark.parametrize("wrong", [{"lr": -1}, {"eps": -1e-9}, {"lr": float("nan")}])
def test_negative_settings_are_refused(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"lr and eps of at least 0, got .*{name}={value}"):
        optimiser(*parameters(), **wrong)
    optimiser(*parameters(), lr=0, eps=0)


def test_without_settings_it_is_adam_as_published_at_a_rate_of_1e_4():
    """Gradients are about as large as eps, so that it counts; and rows have any norm."""
    mine = torch.nn.Parameter(parameters()[0].detach().double())
    other = torch.nn.Parameter(mine.detach().clone())
    ours, adam = ProjectedAdam([mine]), torch.optim.Adam([other], lr=1e-4)
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        mine.grad = 1e-8 * torch.randn(40, 8, generator=generator, dtype=torch.float64)
        other.grad = mine.grad.clone()
        ours.step()
        adam.step()
    assert not torch.equal(mine, parameters()[0])
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-14)


def test_a_single_unit_row_turns_and_stays_one():
    row = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
    row.grad = torch.tensor([[5.0, 2.0]])
    ProjectedAdam([{"params": [row], "unit_rows": True}], lr=0.1).step()
    # What is parallel is removed; Adam's first step is as long as the rate.
    torch.testing.assert_close(row.detach(), torch.tensor([[1.0, -0.1]]) / 1.01**0.5)
