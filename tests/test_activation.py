"""Activations: each against its definition on all scores, its laws, files, and training."""

import dataclasses
import json
from concurrent.futures import ProcessPoolExecutor
from typing import get_args, get_type_hints

import numpy as np
import pretend_device
import pytest
import test_pretend_device
import test_train
import torch
from safetensors.torch import load_file, save_file
from test_analysis import BATCHES
from tiny_lm import reading, tiny_lm, train_on_text

from mlsae_book.planted import PlantedSpec, World, score
from mlsae_core import analysis, kernels, keys, objective, pairs, store, train
from mlsae_core.activation import ACTIVATIONS
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SaeSpec, SpecError

L, T, D, N, K = 3, 40, 16, 128, 4
OTHERS = ["batchtopk", "jumprelu"]


def make(activation="topk", dead=0, dtype=torch.float64, k=K, **settings):
    """Untied weights, a bias and, where there are some, thresholds of which each is another."""
    generator = torch.Generator().manual_seed(0)
    sae = MLSAE(D, N, k, activation=activation, generator=generator, **settings).to(dtype)
    with torch.no_grad():
        for param in (sae.encoder, sae.decoder, sae.pre_bias):
            param += 0.1 * torch.randn(param.shape, generator=generator, dtype=dtype)
        if activation == "jumprelu":
            sae.activation.threshold.uniform_(1, 4, generator=generator)
        if activation == "batchtopk":
            sae.activation.threshold.fill_(1.5)
    sae.tokens_since_active[torch.randperm(N, generator=generator)[:dead]] = sae.dead_tokens
    return sae


def vectors(*shape, dtype=torch.float64, seed=1):
    return (
        torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3 + 1
    )


def scores_of(sae, x):
    return (sae.standardise(x)[0] - sae.pre_bias) @ sae.encoder.T


def dense(sae, code):
    shape = (*code.indices.shape[:-1], sae.n_latents)
    return code.values.new_zeros(shape).scatter(-1, code.indices, code.values)


@pytest.fixture
def chunks(monkeypatch):
    monkeypatch.setattr(kernels, "chunk_rows", lambda *_: 7)


# --- definitions --------------------------------------------------------------------------------


def batch_topk(scores, k):
    """The k n largest of all scores (n, latent), after a ReLU."""
    flat = scores.flatten()
    kept = flat.topk(k * len(scores)).indices
    return torch.zeros_like(flat).scatter(0, kept, flat.gather(0, kept)).relu().view_as(scores)


class Step(torch.autograd.Function):
    """1[z > θ], with the gradient of a rectangle of the given width in θ alone."""

    @staticmethod
    def forward(ctx, z, threshold, width):
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        rectangle = (((z - threshold) / ctx.width).abs() < 0.5).to(z.dtype)
        return None, -(rectangle / ctx.width * grad).sum(0), None


class Jump(torch.autograd.Function):
    """z 1[z > θ], with its own gradient in z and that of a rectangle in θ."""

    @staticmethod
    def forward(ctx, z, threshold, width):
        ctx.save_for_backward(z, threshold)
        ctx.width = width
        return z * (z > threshold)

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        rectangle = (((z - threshold) / ctx.width).abs() < 0.5).to(z.dtype)
        return grad * (z > threshold), (-threshold * rectangle / ctx.width * grad).sum(0), None


def defined_loss(sae, x, coefficient):
    """The loss written out on all scores; mean over layers of FVU + AuxK / 32 + c · L0."""
    scaled, stats = sae.standardise(x)
    scores = ((scaled - sae.pre_bias) @ sae.encoder.T).flatten(0, 1)
    penalty = 0
    if sae.activation.name == "jumprelu":
        threshold, width = sae.activation.threshold, sae.activation.bandwidth
        latents = Jump.apply(scores, threshold, width)
        penalty = coefficient * Step.apply(scores, threshold, width).sum(1).mean()
    else:
        latents = batch_topk(scores, sae.k)
    y = (latents @ sae.decoder + sae.pre_bias).view_as(x)
    error = stats.restore(y) - x
    fvu = error.square().mean((1, 2)) / (x - x.mean((1, 2), keepdim=True)).square().mean((1, 2))
    total = fvu.mean() + penalty
    dead = sae.dead.nonzero().squeeze(1)
    if len(dead):
        values, at = scores[:, dead].topk(min(sae.aux_k, len(dead)))
        latents_dead = torch.zeros_like(scores).scatter(1, dead[at], values.relu())
        left = (scaled - y).detach()
        error = left - (latents_dead @ sae.decoder).view_as(x)
        variance = (left - left.mean((1, 2), keepdim=True)).square().mean((1, 2))
        total = total + (error.square().mean((1, 2)) / variance).mean() / 32
    return total, latents


@pytest.mark.parametrize("dead", [0, 5, 30])
@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize(
    ("activation", "kernel"),
    [
        *(("batchtopk", kernel) for kernel in ("sparse", "dense", "candidates")),
        ("jumprelu", "sparse"),
    ],
)
def test_loss_and_gradients_equal_the_definition(
    activation, kernel, dead, tuned, chunks, monkeypatch
):
    monkeypatch.setattr(pairs, "is_cpu", lambda _: tuned)
    x, results = vectors(L, T), []
    for defined in (True, False):
        sae = make(activation, dead, kernel=kernel)
        if activation == "jumprelu":
            sae.activation.bandwidth = 0.3  # so that many scores are near a threshold
        if defined:
            total, latents = defined_loss(sae, x, 0.02)
            fired = (latents > sae.dead_threshold).any(0)
        else:
            out = objective.loss(sae, x, l0_coefficient=0.02)
            total = out.total
            assert torch.equal(out.fired, fired)
            assert (out.auxk > 0) == (dead > 0)
        total.backward()
        results.append([total, *(parameter.grad for parameter in sae.parameters())])
    assert 0 < fired.sum() < N
    for theirs, mine in zip(*results, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12 * theirs.abs().max().item())


@pytest.mark.parametrize("shape", [(), (3,), (2, 50)])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("activation", OTHERS)
def test_encoding_is_what_exceeds_the_threshold_and_has_its_gradient(
    activation, kernel, shape, chunks
):
    sae, x, grads = make(activation, kernel=kernel), vectors(*shape), []
    z, threshold = scores_of(sae, x), sae.activation.threshold.detach()
    expected = z * (z > threshold)
    topk = sae(x).topk
    torch.testing.assert_close(dense(sae, topk), expected, rtol=0, atol=1e-12)
    assert ((topk.values > 0).sum(-1) == (expected > 0).sum(-1)).all()
    assert topk.values.shape[-1] == (expected > 0).sum(-1).max()
    rows = topk.indices.reshape(-1, topk.indices.shape[-1])
    assert all(len(set(row.tolist())) == len(row) for row in rows)
    torch.testing.assert_close(sae.decode(topk), expected @ sae.decoder + sae.pre_bias)
    for y in (sae.decode(topk), expected @ sae.decoder + sae.pre_bias):
        sae.zero_grad()
        y.sin().sum().backward()
        grads.append([sae.encoder.grad, sae.decoder.grad, sae.pre_bias.grad])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("activation", OTHERS)
def test_a_score_equal_to_its_threshold_is_not_active(activation):
    sae = MLSAE(2, 2, 1, standardize=False, activation=activation)
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(2))
        sae.activation.threshold.fill_(0.5)
    for second, count in ((0.5, 1), (0.500001, 2), (-3.0, 1)):
        values = sae.encode(torch.tensor([[0.75, second]])).values
        assert (values > 0).sum() == count
    assert sae.encode(torch.tensor([[0.1, -0.2]])).values.tolist() == [[0.0]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_vector_is_encoded_the_same_in_any_company_and_nothing_is_changed(activation):
    sae, x = make(activation).train(), vectors(30)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    together = dense(sae, sae.encode(x))
    alone = torch.stack([dense(sae, sae.encode(row)) for row in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    objective.loss(sae, x[None])
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())


# --- batchtopk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_batchtopk_of_one_vector_is_topk(kernel):
    found = []
    for activation in ("topk", "batchtopk"):
        sae = make(activation, dead=20, kernel=kernel)
        out = objective.loss(sae, vectors(1, 1))
        out.total.backward()
        found.append([dense(sae, out.topk), out.total, *(p.grad for p in sae.parameters())])
    for batched, single in zip(*found, strict=True):
        torch.testing.assert_close(batched, single, rtol=1e-12, atol=1e-12)


def test_batchtopk_keeps_k_on_average_and_more_where_scores_are_larger():
    counts = (objective.loss(make("batchtopk"), vectors(L, T)).topk.values > 0).sum(-1)
    assert counts.sum() == K * L * T
    assert counts.min() < K < counts.max() < 8 * K


def test_batchtopk_is_bounded_for_one_vector_and_others_take_what_it_leaves():
    sae, x = make("batchtopk", standardize=False, k=2), vectors(1, T)
    x[0, 3] *= 1000
    topk = objective.loss(sae, x).topk
    counts = (topk.values[0] > 0).sum(-1)
    assert (scores_of(sae, x)[0, 3] > 0).sum() > counts[3] == 8 * 2
    assert counts.sum() == 2 * T


def test_batchtopk_without_enough_positive_scores_keeps_those_there_are():
    sae, x = make("batchtopk", standardize=False), vectors(1, 5)
    with torch.no_grad():
        sae.pre_bias.zero_()
        sae.encoder.copy_(-x.mean((0, 1)).expand(N, D))
        sae.encoder[:2] *= -1
    out = objective.loss(sae, x)
    positive = scores_of(sae, x).clamp_min(0)
    assert 0 < (positive > 0).sum() < 5 * K
    torch.testing.assert_close(dense(sae, out.topk), positive)
    torch.testing.assert_close(out.seen, positive[positive > 0].min()[None])
    with torch.no_grad():
        sae.encoder[:] = 0
    assert objective.loss(sae, x).seen.tolist() == [0]


def test_the_threshold_is_the_mean_over_steps_of_the_smallest_kept_activation():
    sae = MLSAE(D, N, K, activation="batchtopk")
    smallest = []
    for step in range(5):
        x = vectors(1, 20, dtype=torch.float32, seed=step)
        out = objective.loss(sae, x)
        smallest.append(scores_of(sae, x).flatten().topk(20 * K).values.min())
        torch.testing.assert_close(out.seen, smallest[-1][None])
        sae.activation.update(out.seen)
        torch.testing.assert_close(sae.activation.threshold, torch.stack(smallest).mean())
    for steps, weight in ((98, 1 / 99), (99, 1 / 100), (1000, 1 / 100)):
        sae.activation.steps.fill_(steps)
        sae.activation.threshold.fill_(2.0)
        sae.activation.update(torch.tensor([3.0]))
        assert sae.activation.threshold.item() == pytest.approx(2 + weight, rel=1e-6)


# --- jumprelu -----------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [True, False])
def test_jumprelu_starts_where_k_are_active(standardize):
    sae, x = make("jumprelu", standardize=standardize), vectors(50)
    scaled = sae.standardise(x)[0]
    assert sae.activation.bandwidth == pytest.approx(1e-3 * (D**0.5 if standardize else 1))
    fresh = MLSAE(D, N, K, standardize=standardize, activation="jumprelu").activation
    torch.testing.assert_close(fresh.threshold.detach(), torch.full((N,), fresh.bandwidth))
    sae.activation.start(sae, scaled)
    active = (sae.encode(x).values > 0).sum()
    assert active == 50 * K - 1  # the smallest of them is the threshold
    assert sae.activation.threshold.unique().numel() == 1


def test_thresholds_stay_above_zero():
    sae = make("jumprelu")
    with torch.no_grad():
        sae.activation.threshold[:3] = torch.tensor([-1.0, 0.0, 0.25])
    sae.activation.update(torch.empty(0))
    assert (sae.activation.threshold > 0).all()
    assert sae.activation.threshold[2] == 0.25


def test_a_second_derivative_is_refused():
    sae, x = make("jumprelu"), vectors(L, T)
    total = objective.loss(sae, x).total
    [gradient] = torch.autograd.grad(total, sae.decoder, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_the_penalty_alone_raises_thresholds():
    sae, x = make("jumprelu"), vectors(L, T)
    sae.activation.bandwidth = 0.3
    grads = []
    for coefficient in (0.0, 5.0):
        sae.zero_grad()
        objective.loss(sae, x, l0_coefficient=coefficient).total.backward()
        grads.append(sae.activation.threshold.grad)
    z = scores_of(sae, x).flatten(0, 1)
    near = (z - sae.activation.threshold).abs() < 0.15
    expected = -5 / 0.3 * near.double().mean(0)
    torch.testing.assert_close(grads[1] - grads[0], expected, rtol=1e-9, atol=1e-12)


def test_jumprelu_in_reduced_precision_is_near_the_definition():
    results = []
    for enabled in (False, True):
        sae = make("jumprelu", dead=20, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = objective.loss(sae, vectors(L, T, dtype=torch.float32))
        out.total.backward()
        results.append((out.total, sae.encoder.grad, sae.decoder.grad))
        assert all(p.grad.dtype == torch.float32 for p in sae.parameters())
    for exact, rounded in zip(*results, strict=True):
        assert not torch.equal(exact, rounded)
        assert (exact - rounded).norm() < 0.05 * exact.norm()


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_files_carry_the_activation(activation, tmp_path):
    sae, x = make(activation, dtype=torch.float32), vectors(20, dtype=torch.float32)
    if activation == "batchtopk":
        sae.activation.steps.fill_(3)
    sae.save_pretrained(tmp_path)
    again = MLSAE.from_pretrained(tmp_path)
    assert again.activation.name == activation
    for name, tensor in sae.activation.state_dict().items():
        assert torch.equal(again.activation.state_dict()[name], tensor)
    for mine, theirs in zip(again.encode(x), sae.encode(x), strict=True):
        assert torch.equal(mine, theirs)
    config = json.loads((tmp_path / "config.json").read_text())
    assert ("activation" in config) == (activation != "topk")


def test_a_file_without_the_key_is_topk_and_one_that_does_not_fit_is_refused(tmp_path):
    make("jumprelu").save_pretrained(tmp_path)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config = json.loads(path.read_text())
    for wrong in ("relu", ["topk"], None):
        path.write_text(json.dumps(config | {"activation": wrong}))
        with pytest.raises(ValueError, match="an activation of topk, batchtopk, jumprelu, got"):
            MLSAE.from_pretrained(tmp_path)
    path.write_text(json.dumps(config))
    tensors = load_file(weights)
    tensors["activation.threshold"] = torch.ones(N + 1)
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"activation.threshold of shape \(128,\)"):
        MLSAE.from_pretrained(tmp_path)
    tensors["activation.threshold"] = torch.full((N,), -1.0)
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="thresholds of at least 0"):
        MLSAE.from_pretrained(tmp_path)
    del tensors["activation.threshold"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"a tensor for activation\.threshold"):
        MLSAE.from_pretrained(tmp_path)
    del config["activation"]
    path.write_text(json.dumps(config))
    assert MLSAE.from_pretrained(tmp_path).activation.name == "topk"


# --- specs and keys -----------------------------------------------------------------------------


def test_the_spec_knows_the_activations_and_keys_name_all_but_topk():
    assert get_args(get_type_hints(SaeSpec)["activation"]) == tuple(ACTIVATIONS)
    default = keys.keyed(SaeSpec(8, 4))
    assert not {"activation", "l0_coefficient"} & default.keys()
    assert keys.keyed(SaeSpec(8, 4, activation="topk")) == default
    batched = keys.keyed(SaeSpec(8, 4, activation="batchtopk"))
    assert batched == default | {"activation": "batchtopk"}
    jump = keys.keyed(SaeSpec(8, 4, activation="jumprelu"))
    assert jump == default | {"activation": "jumprelu", "l0_coefficient": objective.L0_COEFFICIENT}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "relu"}, "activation: expected .*'relu'"),
        ({"l0_coefficient": 1.0}, "l0_coefficient: expected none with activation: topk, got 1.0"),
        ({"l0_coefficient": 0, "activation": "batchtopk"}, "none with activation: batchtopk"),
        ({"l0_coefficient": -1, "activation": "jumprelu"}, "l0_coefficient: expected 0 or more"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(SpecError, match=message):
        SaeSpec(8, 4, **fields)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", OTHERS)
def test_a_run_trains_continues_and_is_evaluated(activation, tmp_path):
    (run, _, blocks), lm = test_pretend_device.inputs_on("cpu", activation=activation), tiny_lm()
    whole = train_on_text(run, lm, blocks)
    with pytest.raises(store.Stopped, match="after step 5 of 12"):
        train_on_text(run, lm, blocks, checkpoint=tmp_path / "c", should_stop={5}.__contains__)
    continued = train_on_text(run, lm, blocks, checkpoint=tmp_path / "c")
    assert test_train.digest(continued) == test_train.digest(whole)
    other = train_on_text(test_train.run_of(), lm, blocks)
    assert test_train.digest(other) != test_train.digest(whole)
    assert whole.log.fvu.iloc[-1] < 0.9 * whole.log.fvu.iloc[0]
    assert (whole.log.auxk > 0).any()
    sae = whole.sae.eval()
    assert sae.activation.threshold.min() > 0.1
    source = reading(lm, BATCHES)
    table = analysis.evaluate(source, sae, progress=False)
    found = [scores_of(sae, batch.source) for batch in source.batches(1)]
    active = torch.cat(found, 1) > sae.activation.threshold
    expected = active.sum(-1).double().mean(1)
    torch.testing.assert_close(torch.tensor(table.l0), expected, rtol=1e-6, atol=0)
    assert expected.std() > 0


def test_training_penalises_as_the_spec_says():
    (run, lm, blocks), found = test_pretend_device.inputs_on("cpu", activation="jumprelu"), []
    for coefficient in (0.0, 0.5, 1.0):
        sae = dataclasses.replace(run.sae, l0_coefficient=coefficient)
        log = train_on_text(dataclasses.replace(run, sae=sae), lm, blocks).log
        found.append(log.loss - log.fvu - run.sae.aux_alpha * log.auxk)
    none, half, one = (penalty.to_numpy() for penalty in found)
    assert abs(none).max() < 1e-5
    assert one[0] == pytest.approx(2 * half[0])  # before the first update
    assert one[0] > run.sae.k / 2


@pytest.fixture(scope="module")
def there(processes):
    with ProcessPoolExecutor(1, processes, pretend_device.install) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(300)


def train_on(device, activation):
    trained = train_on_text(*test_pretend_device.inputs_on(device, activation=activation))
    weights = {name: x.cpu().numpy() for name, x in trained.sae.state_dict().items()}
    return trained.log.drop(columns="tokens_per_second"), weights


def waits_of_steps(activation):
    inputs = test_pretend_device.inputs_on

    def with_activation(device, **changes):
        return inputs(device, activation=activation, **changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_pretend_device, "inputs_on", with_activation)
        return test_pretend_device.waits_of_steps(4)


@pytest.mark.parametrize("activation", OTHERS)
def test_an_accelerator_gives_the_cpus_numbers_and_is_waited_for_once_a_step(there, activation):
    log, weights = there(train_on, "pretend", activation)
    expected, others = train_on("cpu", activation)
    rounding = test_pretend_device.ROUNDING
    assert list(log) == list(expected)
    np.testing.assert_allclose(log, expected, **rounding)
    for name, other in others.items():  # Adam makes steps of gradients that are rounding alone
        difference = np.linalg.norm(weights[name] - other)
        assert difference <= 1e-4 * np.linalg.norm(other), name
    assert there(waits_of_steps, activation) == [test_pretend_device.ONE] * 10


PLANTED = PlantedSpec(
    n_features=64,
    d_model=32,
    n_layers=3,
    active=6,
    expansion_factor=4,
    k=4,
    training_tokens=100_000,
    tokens=4096,
)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_planted_features_are_recovered(activation):
    """At most 3.1 of 64 features are active in a vector; chance finds similarities of 0.5."""
    world = World(PLANTED)
    sae = dataclasses.replace(world.spec.run.sae, activation=activation, l0_coefficient=None)
    run = dataclasses.replace(world.spec.run, sae=sae)
    table, features = score(world, train.train(run, world).sae)
    estimate = table.set_index("estimator").estimate
    assert features.cosine.mean() > 0.9
    assert features.recovered.mean() > 0.75
    assert estimate.l0 == pytest.approx(PLANTED.k, rel=0.3)
    assert estimate.fvu < 0.25
