"""The autoencoder: hand-computed encodings, dead latents, and files."""

import json
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from mlsae_core.sae import MLSAE, Stats, TopK

D, N, K = 8, 64, 4


def make(**settings):
    return MLSAE(D, N, K, generator=torch.Generator().manual_seed(0), **settings)


def vectors(*shape, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_standardise_by_hand():
    scaled, stats = MLSAE(4, 4, 1).standardise(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    # mean 3; squares 4 + 1 + 0 + 9 = 14, over d - 1 = 3
    std = (14 / 3) ** 0.5
    torch.testing.assert_close(stats.mean, torch.tensor([3.0]))
    torch.testing.assert_close(stats.std, torch.tensor([std]))
    torch.testing.assert_close(scaled, torch.tensor([-2.0, -1, 0, 3]) / (std + 1e-5))
    torch.testing.assert_close(
        stats.restore(scaled), torch.tensor([1.0, 2, 3, 6]), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_encode_and_decode_by_hand(kernel):
    sae = MLSAE(2, 3, 2, standardize=False, kernel=kernel)
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 1]]))
        sae.decoder.copy_(torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]))
        sae.pre_bias.copy_(torch.tensor([1.0, 1]))
    values, indices = sae.encode(torch.tensor([4.0, 6]))  # x - b = (3, 5): scores 3, 5, 2
    assert dict(zip(indices.tolist(), values.tolist(), strict=True)) == {0: 3.0, 1: 5.0}
    torch.testing.assert_close(sae(torch.tensor([4.0, 6])).recon, torch.tensor([4.0, 6]))
    values, indices = sae.encode(torch.tensor([0.0, -2]))  # x - b = (-1, -3): scores -1, -3, -2
    assert len(set(indices.tolist())) == 2
    assert values.tolist() == [0, 0]  # the largest, but below zero
    torch.testing.assert_close(sae(torch.tensor([0.0, -2])).recon, torch.tensor([1.0, 1]))


def test_the_bias_is_subtracted_before_the_encoder_and_has_no_sibling():
    sae = make()
    assert [name for name, _ in sae.named_parameters()] == ["encoder", "decoder", "pre_bias"]
    with torch.no_grad():
        sae.pre_bias.normal_(generator=torch.Generator().manual_seed(2))
    x = vectors(5)
    scaled, stats = sae.standardise(x)
    scores = (scaled - sae.pre_bias) @ sae.encoder.T
    values, indices = scores.topk(K)
    recon, topk = sae(x)
    torch.testing.assert_close(topk.values.sort().values, values.relu().sort().values)
    y = torch.einsum("nk,nkd->nd", values.relu(), sae.decoder[indices]) + sae.pre_bias
    torch.testing.assert_close(recon, y * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True))
    torch.testing.assert_close(sae.decode(topk), y)
    torch.testing.assert_close(sae.decode(topk, stats), recon)


def test_initial_weights_are_tied_unit_and_reproducible():
    sae = make()
    assert torch.equal(sae.encoder, sae.decoder)
    assert sae.encoder.data_ptr() != sae.decoder.data_ptr()
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(N))
    assert torch.equal(make().encoder, sae.encoder)


@pytest.mark.parametrize(("d", "aux_k"), [(128, 64), (512, 256), (768, 512), (2048, 1024), (2, 1)])
def test_default_aux_k_is_the_power_of_two_nearest_to_half_the_dimension(d, aux_k):
    assert MLSAE(d, 8, 1).aux_k == aux_k


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
def test_shapes(shape):
    recon, topk = make()(vectors(*shape))
    assert recon.shape == (*shape, D)
    assert topk.values.shape == topk.indices.shape == (*shape, K)


def test_k_equal_to_n_latents_and_ties():
    sae = MLSAE(D, N, N)
    with torch.no_grad():
        sae.encoder.copy_(sae.encoder[:1].expand(N, D))  # every latent scores the same
    _, indices = sae.encode(vectors(6))
    assert (indices.sort().values == torch.arange(N)).all()
    sae.k = K
    topk = sae.encode(vectors(6))
    assert topk.values.std(-1).max() < 1e-6
    assert all(len(set(row.tolist())) == K for row in topk.indices)


def test_encoding_changes_no_state():
    sae = make()
    sae.train()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.encode(vectors(9))
    sae(vectors(9))
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())


def test_half_precision_input_is_encoded_in_the_parameters_precision():
    recon, topk = make()(vectors(3).half())
    assert recon.dtype == topk.values.dtype == torch.float32


def test_dead_means_tokens_since_the_last_activation_above_the_threshold():
    sae = MLSAE(D, 4, 2, dead_tokens=10, dead_threshold=0.5)
    topk = TopK(torch.tensor([[[0.6, 0.5], [0.0, 2.0]]]), torch.tensor([[[0, 1], [2, 3]]]))
    sae.count_tokens(sae.fired(topk), 6)
    assert sae.tokens_since_active.tolist() == [0, 6, 6, 0]
    assert not sae.dead.any()
    sae.count_tokens(sae.fired(topk), 4)
    assert sae.tokens_since_active.tolist() == [0, 10, 10, 0]
    assert sae.dead.tolist() == [False, True, True, False]


def test_the_optimiser_holds_the_decoder_alone_at_unit_norm():
    sae = make()
    optimiser = sae.make_optimizer(learning_rate=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        sae(vectors(30)).recon.square().mean().backward()
        optimiser.step()
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(N))
    assert (sae.encoder.norm(dim=1) - 1).abs().max() > 0.01
    assert sae.pre_bias.abs().min() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 65}, "k between 1 and n_latents = 64, got 65"),
        ({"k": 0}, "got 0"),
        ({"n_inputs": 1}, "n_inputs of at least 2"),
        ({"aux_k": -1}, "aux_k of at least 0"),
        ({"kernel": "fastest"}, "'fastest'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MLSAE(**({"n_inputs": D, "n_latents": N, "k": K} | settings))


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(standardize, bad):
    x = vectors(3)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        make(standardize=standardize).encode(x)


def test_wrong_dimension_is_refused():
    with pytest.raises(ValueError, match=r"dimension 8 along the last axis, got shape \(3, 9\)"):
        make().encode(torch.zeros(3, 9))


# --- files ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    sae = make(aux_k=2, standardize=False, dead_tokens=123, dead_threshold=0.25)
    with torch.no_grad():
        for param in sae.parameters():
            param.normal_(generator=torch.Generator().manual_seed(3))
    sae.save_pretrained(tmp_path)
    return sae, tmp_path


def assert_same(a, b):
    for name in ("encoder", "decoder", "pre_bias"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_save_and_load(saved):
    sae, folder = saved
    again = MLSAE.from_pretrained(folder, kernel="dense")
    assert_same(sae, again)
    assert again.kernel == "dense"
    for name in ("n_inputs", "n_latents", "k", "aux_k", "standardize", "dead_tokens"):
        assert getattr(again, name) == getattr(sae, name)
    assert again.dead_threshold == 0.25
    sae.save_pretrained(folder)  # over what is there
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_published_layout(saved):
    sae, folder = saved
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "encoder.weight": (N, D),
        "decoder.weight": (D, N),
        "pre_encoder_bias": (D,),
    }
    config = json.loads((folder / "config.json").read_text())
    names = "n_inputs n_latents k auxk dead_steps_threshold dead_threshold standardize"
    assert set(names.split()) <= set(config)
    # Repositories that hold the transformer and a lens beside it, and a null auxk.
    tensors = {f"autoencoder.{name}": tensor for name, tensor in tensors.items()}
    tensors["transformer.model.embed_in.weight"] = torch.zeros(3, 2)
    tensors["lens.0.bias"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    del config["dead_tokens"]
    (folder / "config.json").write_text(json.dumps(config | {"auxk": None}))
    again = MLSAE.from_pretrained(folder)
    assert_same(sae, again)
    assert again.aux_k == 0
    assert again.dead_tokens == 10_000_000


@pytest.mark.parametrize(
    ("tokens", "steps"), [(10_000_000, 76), (131_072, 1), (262_143, 1), (262_144, 2), (5, 1)]
)
def test_the_dead_window_is_published_in_steps_of_131072_tokens(tmp_path, tokens, steps):
    """Whole steps of the paper's batch, and at least one."""
    make(dead_tokens=tokens).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "n_inputs": D,
        "n_latents": N,
        "k": K,
        "auxk": 4,
        "dead_tokens": tokens,
        "dead_steps_threshold": steps,
        "dead_threshold": 0.001,
        "standardize": True,
    }


def test_weights_may_be_split_over_files(saved):
    sae, folder = saved
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"model-{i}.safetensors")
    assert_same(sae, MLSAE.from_pretrained(folder))


def test_hub_id_downloads_the_files_of_dictionaries_only(saved, monkeypatch):
    sae, folder = saved
    calls = []

    def snapshot_download(name, **arguments):
        calls.append((name, arguments))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same(sae, MLSAE.from_pretrained("someone/mlsae", revision="v1"))
    [(name, arguments)] = calls
    assert (name, arguments["revision"]) == ("someone/mlsae", "v1")
    files = ["config.json", "cfg.json", "ae.pt", "params.npz", "a.safetensors"]
    others = ["README.md", "tokenizer.json", "pytorch_model.bin", "optimizer.pt", "run.py"]
    everything = [*files, *others, "layer_0/params.npz", "x/config.json"]
    del arguments["revision"]
    assert sorted(filter_repo_objects(everything, **arguments)) == sorted(files)


def test_a_failed_save_leaves_the_previous_files(saved, monkeypatch):
    sae, folder = saved
    with monkeypatch.context() as patch:
        patch.setattr("mlsae_core.sae.save_file", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make().save_pretrained(folder)
    assert_same(sae, MLSAE.from_pretrained(folder))
    assert len(list(folder.iterdir())) == 2


def break_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def break_tensors(**changes):
    def change(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        made = {n.replace("__", "."): make(tensors) for n, make in changes.items()}
        save_file(tensors | made, path)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "does not exist"),
        (lambda folder: (folder / "config.json").write_text("{"), "expected JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "expected a mapping in"),
        (break_config(n_inputs=8.0), "MLSAE's configuration"),
        (break_config(k="4"), "expected integers"),
        (break_config(k=N + 1), "k between 1 and"),
        (break_config(k=True), "expected integers"),
        (break_config(standardize="false"), "standardize: true or false in .*, got 'false'"),
        (break_config(dead_threshold="x"), "dead_threshold of 0 or more in .*, got 'x'"),
        (break_config(dead_threshold=float("nan")), "dead_threshold of 0 or more"),
        (break_config(dead_tokens=None), "dead_tokens of 0 or more in .*, got None"),
        (break_config(auxk=1.5), "auxk of 0 or more in .*, got 1.5"),
        (break_config(standardize=None), "standardize: true or false in .*, got None"),
        (
            lambda folder: shutil.copy(folder / "model.safetensors", folder / "other.safetensors"),
            "once in .*, got another in .*other.safetensors",
        ),
        (
            break_tensors(autoencoder__pre_encoder_bias=lambda t: t["pre_encoder_bias"] + 1),
            "pre_encoder_bias once in",
        ),
        (
            break_tensors(encoder__weight=lambda t: t["encoder.weight"].to(torch.int8)),
            r"floating-point numbers as encoder in .*, got torch.int8",
        ),
        (
            break_tensors(pre_encoder_bias=lambda t: t["pre_encoder_bias"] / 0),
            "finite numbers as pre_bias",
        ),
        (
            break_tensors(activation__threshold=lambda _: torch.zeros(())),
            r"an activation in .*config.json, as there is activation.threshold",
        ),
        (break_config(n_latents=N + 1), r"encoder.weight of shape \(65, 8\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors in .*, found none"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "cannot read"),
        (
            lambda folder: save_file({"W_enc": torch.zeros(2)}, folder / "model.safetensors"),
            "a tensor 'encoder.weight'",
        ),
    ],
)
def test_bad_files_are_refused(saved, damage, message):
    damage(saved[1])
    with pytest.raises(ValueError, match=message):
        MLSAE.from_pretrained(saved[1])


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "a/b/c"])
def test_bad_names_are_refused(name):
    with pytest.raises(ValueError, match="a folder or a hub id"):
        MLSAE.from_pretrained(name)


def test_stats_without_standardisation_restore_the_identity():
    y = vectors(2)
    assert Stats(None, None).restore(y) is y
