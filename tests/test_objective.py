"""The loss: hand-computed values, its laws, and the sparse kernels against the dense ones."""

import functools

import pytest
import torch

from mlsae_core import kernels, objective
from mlsae_core.sae import MLSAE

L, T, D, N = 3, 40, 16, 128


def make(k=4, dead=0, dtype=torch.float64, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    sae = MLSAE(D, N, k, generator=generator, **settings).to(dtype)
    with torch.no_grad():
        for param in sae.parameters():
            param += 0.1 * torch.randn(param.shape, generator=generator, dtype=dtype)
    sae.tokens_since_active[torch.randperm(N, generator=generator)[:dead]] = sae.dead_tokens
    return sae


def activations(dtype=torch.float64, seed=1, tokens=T):
    """Layers of different scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, tokens, D, generator=generator, dtype=dtype)
    return x * torch.tensor([1, 5, 40])[:, None, None] + torch.arange(D)


def gradients(sae):
    return {name: param.grad.clone() for name, param in sae.named_parameters()}


@pytest.mark.parametrize("dead", [0, 1, 5, 50, N])
@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("k", [1, 4, N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_equals_dense(dead, transcoder, k, dtype):
    source = activations(dtype)
    target = activations(dtype, seed=2).exp().clamp_max(100) if transcoder else None
    results = {}
    for kernel in ("sparse", "dense"):
        sae = make(k, dead, dtype, kernel=kernel)
        for part in (slice(0, 25), slice(25, T)):  # accumulate two micro-batches
            other = None if target is None else target[:, part]
            out = objective.loss(sae, source[:, part], other)
            out.total.backward()
        results[kernel] = {"total": out.total, "fvu": out.fvu, "auxk": out.auxk, **gradients(sae)}
        assert out.n_dead == dead
        assert (out.auxk > 0) == (dead > 0)
    for name, dense in results["dense"].items():
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        scale = dense.abs().max()
        torch.testing.assert_close(
            results["sparse"][name], dense, rtol=0, atol=tolerance * scale.item()
        )


def test_fvu_by_hand():
    """With a latent that is never used, y = b = 0: each vector is predicted by its own mean."""
    sae = MLSAE(2, 1, 1, aux_k=0)
    with torch.no_grad():
        sae.encoder.zero_()
    out = objective.loss(sae, torch.tensor([[[1.0, 3.0], [5.0, 11.0]]]))
    # errors -1, 1, -3, 3: mean square 5; mean of 1, 3, 5, 11 is 5: variance (16 + 4 + 36) / 4 = 14
    torch.testing.assert_close(out.mse, torch.tensor([5.0]))
    torch.testing.assert_close(out.fvu, torch.tensor([5 / 14]))
    torch.testing.assert_close(out.total.detach(), torch.tensor(5 / 14))


def test_total_is_mean_fvu_plus_alpha_auxk():
    sae, x = make(dead=30), activations()
    for alpha in (0.0, 1 / 32, 2.0):
        out = objective.loss(sae, x, alpha=alpha)
        torch.testing.assert_close(out.total.detach(), out.fvu.mean() + alpha * out.auxk)


def test_coefficients_are_the_papers_unless_others_are_given():
    x = activations()
    out = objective.loss(make(dead=30), x)
    torch.testing.assert_close(out.total.detach(), out.fvu.mean() + out.auxk / 32)
    assert out.auxk > 0.01
    sae = make(activation="jumprelu")
    with torch.no_grad():
        sae.activation.threshold.fill_(2.0)
    out = objective.loss(sae, x)
    l0 = (sae.encode(x).values > 0).double().sum() / (L * T)
    torch.testing.assert_close(out.total.detach(), out.fvu.mean() + l0 / 1000)
    assert l0 > 1


def test_fvu_is_that_of_the_reconstruction():
    sae, x = make(), activations()
    out, recon = objective.loss(sae, x), sae(x).recon
    for layer in range(L):
        error = (x[layer] - recon[layer]).square().mean()
        torch.testing.assert_close(out.mse[layer], error)
        torch.testing.assert_close(out.fvu[layer], error / x[layer].var(correction=0))


def test_auxk_by_definition():
    sae, x = make(dead=30), activations()
    out = objective.loss(sae, x)
    scaled, _ = sae.standardise(x)
    error = scaled - sae.decode(out.topk)
    scores = (scaled - sae.pre_bias) @ sae.encoder.T
    scores = scores.masked_fill(~sae.dead, -torch.inf)
    values, indices = scores.topk(sae.aux_k)
    guess = torch.einsum("ltk,ltkd->ltd", values.relu(), sae.decoder[indices])
    expected = (error - guess).square().mean((1, 2)) / error.var((1, 2), correction=0)
    torch.testing.assert_close(out.auxk, expected.mean())


def test_auxk_ignores_the_scale_of_a_layer():
    sae, x = make(dead=30), activations()
    scaled = x * torch.tensor([1.0, 100, 0.1])[:, None, None]
    torch.testing.assert_close(
        objective.loss(sae, scaled).auxk, objective.loss(sae, x).auxk, rtol=1e-3, atol=0
    )


def test_auxk_reaches_only_dead_latents_and_not_the_error():
    """The error is detached, so AuxK alone has no gradient at a latent that is alive."""
    grads = []
    for alpha in (0.0, 1.0):
        sae = make(dead=30, seed=3)
        objective.loss(sae, activations(), alpha=alpha).total.backward()
        grads.append(gradients(sae))
    dead = sae.dead
    for name in ("encoder", "decoder"):
        change = (grads[1][name] - grads[0][name]).norm(dim=1)
        assert (change[~dead] < 1e-14).all()
        assert (change[dead] > 1e-6).sum() > 20


def test_without_aux_k_nothing_counts_as_dead():
    sae = make(dead=30, aux_k=0)
    out = objective.loss(sae, activations())
    assert out.auxk == 0
    assert out.n_dead == 0


def test_dead_latents_come_back_to_life():
    """Latents that point away from all inputs never fire; AuxK turns them around."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, D, generator=generator)
    codes = torch.rand(2000, 64, generator=generator) * (
        torch.rand(2000, 64, generator=generator) < 0.1
    )
    data = codes @ directions + 0.1 * torch.randn(2000, D, generator=generator)
    revived = {}
    for aux_k in (0, 16):
        sae = MLSAE(D, 64, 2, aux_k, dead_tokens=400, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():  # a third of the encoder listens to almost nothing
            sae.encoder[40:] *= 0.01
        sae.tokens_since_active[40:] = sae.dead_tokens
        start = sae.encoder[40:].detach().clone()
        optimiser = sae.make_optimizer(3e-3)
        for step in range(300):
            batch = data[(step * 50) % 2000 :][:50].unsqueeze(0)
            out = objective.loss(sae, batch)
            optimiser.zero_grad()
            out.total.backward()
            optimiser.step()
            sae.count_tokens(sae.fired(out.topk), 50)
        revived[aux_k] = int((~sae.dead[40:]).sum())
        moved = (sae.encoder[40:] - start).norm(dim=1)
        assert (moved > 0.1).any() == (aux_k > 0)
    assert revived[0] == 0
    assert revived[16] >= 12


def test_loss_changes_no_state():
    sae, x = make(dead=10), activations()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    objective.loss(sae, x).total.backward()
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())


def test_target_is_predicted_in_its_own_standardised_space():
    sae, source, target = make(), activations(), activations(seed=5) * 3 - 7
    out = objective.loss(sae, source, target)
    y = sae.decode(sae.encode(source))
    std = target.std(-1, keepdim=True)
    recon = y * std + target.mean(-1, keepdim=True)
    torch.testing.assert_close(out.mse, (target - recon).square().mean((1, 2)))
    torch.testing.assert_close(sae(source, target).recon, recon)


def test_topk_keeps_layers_and_tokens():
    out = objective.loss(make(k=3), activations())
    assert out.topk.values.shape == out.topk.indices.shape == (L, T, 3)


def test_constant_activations_stay_finite():
    out = objective.loss(make(dead=10), torch.ones(1, 4, D, dtype=torch.float64))
    assert out.total.isfinite()


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (torch.zeros(5, D), None, r"\(layer, token, 16\)"),
        (torch.zeros(2, 0, D), None, "at least one token"),
        (torch.zeros(2, 3, D + 1), None, "dimension 16"),
        (torch.zeros(2, 3, D), torch.zeros(2, 4, D), "same layers and tokens"),
        (torch.full((2, 3, D), torch.nan), None, "finite"),
        (torch.ones(2, 3, D), torch.full((2, 3, D), torch.inf), "finite"),
        (torch.zeros(2, 3, D, dtype=torch.int64), None, "floating-point"),
    ],
)
def test_wrong_input_is_refused(source, target, message):
    with pytest.raises(ValueError, match=message):
        objective.loss(make(), source, target)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's compiler looks at it
@pytest.mark.parametrize("n_dead", [0, 9])
def test_what_is_compiled_for_a_gpu_gives_the_same_loss_and_gradients(monkeypatch, n_dead):
    compiled = functools.cache(functools.partial(torch.compile, backend="aot_eager"))
    results = []
    for fuse in (lambda function, *_: function, lambda function, *_: compiled(function)):
        monkeypatch.setattr(kernels, "fused", fuse)
        sae = MLSAE(16, 64, 4, generator=torch.Generator().manual_seed(0))
        sae.tokens_since_active[:n_dead] = sae.dead_tokens
        found = []
        for n in (5, 5, 7):  # another number of tokens compiles anew
            generator = torch.Generator().manual_seed(n)
            x = torch.randn(3, n, 16, generator=generator) * torch.arange(1, n + 1)[:, None]
            loss = objective.loss(sae, x)
            loss.total.backward()
            found += [loss.total.detach(), loss.fvu, loss.mse, loss.auxk]
        results.append([*found, *(p.grad for p in sae.parameters())])
    assert (results[0][3] > 0) == (n_dead > 0)
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)
