"""Dictionaries of others: what each format means, what is refused, and their own packages."""

import copy
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlsae_core import formats, kernels, objective, publish
from mlsae_core.activation import ACTIVATIONS
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SpecError

D, N, K = 12, 40, 5


def drawn(seed=0):
    """As trained: biases that are not zero, thresholds and norms of rows that vary."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "W_enc": normal(N, D) / 3,
        "W_dec": normal(N, D) / 3,
        "b_enc": normal(N) / 5,
        "b_dec": normal(D) / 2,
        "threshold": torch.rand(N, generator=generator),
    }


X = torch.randn(50, D, generator=torch.Generator().manual_seed(9)) * 2 + 0.5


def defined(p, x, activation, subtracted, standardize=False, unit=False):
    """Latents (n, N) and reconstruction by what the format's authors define, in float64."""
    p, x = {name: tensor.double() for name, tensor in p.items()}, x.double()
    mean = x.mean(1, keepdim=True) if standardize else 0
    std = x.std(1, keepdim=True) + 1e-5 if standardize else 1
    norms = p["W_dec"].norm(dim=1) if unit else 1
    z = (((x - mean) / std - (p["b_dec"] if subtracted else 0)) @ p["W_enc"].T + p["b_enc"]) * norms
    if activation == "topk":
        kept = torch.zeros_like(z).scatter(1, z.topk(K).indices, 1)
        latents = z.relu() * kept
    else:
        latents = z.relu() * (z > (0 if activation == "relu" else p["threshold"]))
    recon = (latents / norms) @ p["W_dec"] + p["b_dec"]
    return latents, recon * (x.std(1, keepdim=True) if standardize else 1) + mean


def dense(sae, x):
    values, indices = sae.encode(x)
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    return torch.zeros(len(x), sae.n_latents).scatter(1, indices, values)


def assert_same(sae, latents, recon, tolerance=1e-5):
    with torch.no_grad():
        found, output = dense(sae, X), sae(X)
    assert torch.equal(found > 0, latents > 0)
    close = {"rtol": 0, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(found, latents, **close)
    torch.testing.assert_close(output.recon, recon, **close)


# --- how each is written --------------------------------------------------------------------------


def write_gemma_scope(folder, p):
    arrays = {name: tensor.numpy() for name, tensor in p.items()}
    np.savez(folder / "params.npz", **arrays | {"W_enc": arrays["W_enc"].T})


def write_saelens(folder, p, architecture, **changes):
    config = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": N,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"},
    }
    config |= {"k": K} if architecture == "topk" else {}
    names = [name for name in p if name != "threshold" or architecture == "jumprelu"]
    tensors = {name: p[name].contiguous() for name in names}
    tensors["W_enc"] = p["W_enc"].T.contiguous()
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config | changes))


def write_sparsify(folder, p, **changes):
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    save_file({theirs: p[name] for name, theirs in names.items()}, folder / "sae.safetensors")
    config = {"activation": "topk", "k": K, "d_in": D, "num_latents": N, "transcode": False}
    (folder / "cfg.json").write_text(json.dumps(config | changes))


def write_dictionary_learning(folder, p, kind):
    linear = {
        "encoder.weight": p["W_enc"],
        "encoder.bias": p["b_enc"],
        "decoder.weight": p["W_dec"].T,
    }
    rows = p | {"W_enc": p["W_enc"].T}
    k, one = {"k": torch.tensor(K, dtype=torch.int32)}, {"threshold": p["threshold"][0]}
    state = {
        "AutoEncoder": linear | {"bias": p["b_dec"]},
        "AutoEncoderNew": linear | {"decoder.bias": p["b_dec"]},
        "AutoEncoderTopK": linear | {"b_dec": p["b_dec"]} | k | one,
        "BatchTopKSAE": linear | {"b_dec": p["b_dec"]} | k | one,
        "MatryoshkaBatchTopKSAE": rows | k | one | {"group_sizes": torch.tensor([10, N - 10])},
        "JumpReluAutoEncoder": rows,
    }
    torch.save(state.get(kind, linear), folder / "ae.pt")
    config = {"trainer": {"dict_class": kind, "k": K}}
    (folder / "config.json").write_text(json.dumps(config))


LAYER_NORM = {"normalize_activations": "layer_norm"}
NOT_SUBTRACTED = {"apply_b_dec_to_input": False}
CASES = {
    "gemma_scope": (write_gemma_scope, (), {}, ("jumprelu", False)),
    "saelens-standard": (write_saelens, ("standard",), {}, ("relu", True)),
    "saelens-topk": (write_saelens, ("topk",), LAYER_NORM, ("topk", True, True)),
    "saelens-rescaled": (
        write_saelens,
        ("topk",),
        NOT_SUBTRACTED | {"rescale_acts_by_decoder_norm": True},
        ("topk", False, False, True),
    ),
    "saelens-jumprelu": (
        write_saelens,
        ("jumprelu",),
        NOT_SUBTRACTED | LAYER_NORM,
        ("jumprelu", False, True),
    ),
    "sparsify": (write_sparsify, (), {}, ("topk", True)),
    "sparsify-transcoder": (write_sparsify, (), {"transcode": True}, ("topk", False)),
    **{
        f"dictionary_learning-{kind}": (write_dictionary_learning, (kind,), {}, meaning)
        for kind, meaning in {
            "AutoEncoder": ("relu", True, False, True),
            "AutoEncoderNew": ("relu", False),
            "AutoEncoderTopK": ("topk", True),
            "BatchTopKSAE": ("jumprelu", True),
            "MatryoshkaBatchTopKSAE": ("jumprelu", True),
            "JumpReluAutoEncoder": ("jumprelu", False),
        }.items()
    },
}
BATCHED = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")


@pytest.mark.parametrize("case", CASES)
def test_each_format_means_what_its_authors_define(tmp_path, case):
    write, arguments, changes, meaning = CASES[case]
    p = drawn()
    write(tmp_path, p, *arguments, **changes)
    if arguments and arguments[0] in BATCHED:
        p["threshold"] = p["threshold"][0].expand(N)
    latents, recon = defined(p, X, *meaning)
    assert 0 < (latents > 0).sum() < latents.numel()
    assert_same(MLSAE.from_pretrained(tmp_path), latents, recon)


def test_every_format_has_a_case():
    assert {case.split("-")[0] for case in CASES} | {"mlsae"} == formats.FORMATS.keys()
    kinds = {case.partition("-")[2] for case in CASES if case.startswith("dictionary_learning")}
    assert kinds == formats.CLASSES.keys()


def test_a_threshold_that_was_never_set_keeps_what_is_positive(tmp_path):
    p = drawn() | {"threshold": torch.full((N,), -1.0)}
    write_dictionary_learning(tmp_path, p, "BatchTopKSAE")
    assert_same(MLSAE.from_pretrained(tmp_path), *defined(p, X, "relu", True))


# --- an encoder bias ------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("d", [7, 12])
def test_an_encoder_bias_is_added_to_the_scores_in_every_kernel(kernel, activation, d):
    generator = torch.Generator().manual_seed(3)
    settings = {"encoder_bias": True, "activation": activation, "kernel": kernel}
    sae = MLSAE(d, 64, 3, generator=generator, **settings)
    for parameter in (sae.encoder_bias, sae.pre_bias):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    if activation != "topk":
        sae.activation.threshold.data.fill_(0.9)
    x = torch.randn(2, 30, d, generator=generator)

    leaf = x.clone().requires_grad_()
    z = (sae.standardise(leaf)[0] - sae.pre_bias) @ sae.encoder.T + sae.encoder_bias
    if activation == "topk":
        expected = z.relu() * torch.zeros_like(z).scatter(2, z.topk(3).indices, 1)
    else:
        expected = z * (z > 0.9)
    other = x.clone().requires_grad_()
    values, indices = sae.encode(other)
    found = torch.zeros_like(z).scatter(2, indices, values)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = torch.randn(z.shape, generator=generator)
    bias = sae.encoder_bias
    for mine, theirs in zip(
        torch.autograd.grad((found * weights).sum(), (other, bias)),
        torch.autograd.grad((expected * weights).sum(), (leaf, bias)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_has_an_encoder_bias_is_saved_and_not_trained(tmp_path):
    write_gemma_scope(tmp_path, drawn())
    sae = MLSAE.from_pretrained(tmp_path)
    sae.save_pretrained(tmp_path / "ours")
    again = MLSAE.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(t, sae.state_dict()[n]) for n, t in again.state_dict().items())
    with pytest.raises(ValueError, match="without an encoder bias"):
        objective.loss(sae, X[None])


# --- published MLSAEs -----------------------------------------------------------------------------


def test_a_repository_with_the_transformer_has_no_sizes_in_its_configuration(tmp_path):
    """That of its Lightning module: the model's name and an expansion factor."""
    sae = MLSAE(D, N, K, generator=torch.Generator().manual_seed(0))
    sae.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefixed = {f"autoencoder.{name}": tensor for name, tensor in tensors.items()}
    beside = {"transformer.model.embed_out.weight": torch.zeros(3, 4), "lens.0.bias": torch.ones(2)}
    save_file(prefixed | beside, tmp_path / "model.safetensors")
    config = {"model_name": "EleutherAI/pythia-70m-deduped", "layers": None, "k": K, "auxk": 256}
    config |= {"expansion_factor": 4, "dead_tokens_threshold": 5_000_000, "tuned_lens": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = MLSAE.from_pretrained(tmp_path)
    assert torch.equal(loaded.decoder, sae.decoder)
    assert (loaded.n_inputs, loaded.n_latents, loaded.k) == (D, N, K)
    assert (loaded.aux_k, loaded.dead_tokens, loaded.standardize) == (256, 5_000_000, True)


def test_a_learnt_lens_is_not_left_out_in_silence(tmp_path):
    MLSAE(D, N, K).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder_lens.0.weight"] = torch.eye(D)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"without a learnt lens in .*, got encoder_lens.0"):
        MLSAE.from_pretrained(tmp_path)


# --- what is refused ------------------------------------------------------------------------------


def edit(name, **changes):
    def change(folder):
        path = folder / name
        config = json.loads(path.read_text())
        for key, value in changes.items():
            if isinstance(value, dict) and key in config:
                config[key] |= value
            else:
                config[key] = value
        path.write_text(json.dumps(config))

    return change


def tensors(name, **changes):
    def change(folder):
        found = load_file(folder / name)
        for key, value in changes.items():
            key = key.replace("__", ".")
            found[key] = value(found[key]) if callable(value) else value
        save_file(
            {key: tensor for key, tensor in found.items() if tensor is not None}, folder / name
        )

    return change


def arrays(**changes):
    def change(folder):
        with np.load(folder / "params.npz") as read:
            found = dict(read)
        for key, value in changes.items():
            found[key] = value(found[key]) if callable(value) else value
        np.savez(folder / "params.npz", **found)

    return change


def state(**changes):
    def change(folder):
        found = torch.load(folder / "ae.pt", weights_only=True)
        for key, value in changes.items():
            key = key.replace("__", ".")
            found[key] = value(found[key]) if callable(value) else value
        torch.save({k: v for k, v in found.items() if v is not None}, folder / "ae.pt")

    return change


def truncated(name, share=0.5):
    def change(folder):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return change


def flipped(name):
    """One byte of a tensor is another."""

    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (folder / name).write_bytes(content)

    return change


def compressed(folder):
    with np.load(folder / "params.npz") as read:
        np.savez_compressed(folder / "params.npz", **dict(read))


def entry(name, content):
    """A file of an archive becomes what `content` makes of it."""

    def change(folder):
        [path] = [*folder.glob("params.npz"), *folder.glob("ae.pt")]
        with zipfile.ZipFile(path) as archive:
            members = [(i, archive.read(i)) for i in archive.infolist()]
        with zipfile.ZipFile(path, "w") as archive:
            for info, old in members:
                new = content(old) if info.filename.endswith(name) else old
                archive.writestr(zipfile.ZipInfo(info.filename), new)

    return change


def twice(folder):
    with (
        zipfile.ZipFile(folder / "params.npz", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        archive.writestr("b_enc.npy", archive.read("b_enc.npy"))


def overlapping(folder):
    """One array under many names, which together are more than the file."""
    path = folder / "params.npz"
    with zipfile.ZipFile(path, "a") as archive:
        [whole] = [entry for entry in archive.infolist() if entry.filename == "W_dec.npy"]
        for number in range(10):
            archive.filelist.append(other := copy.copy(whole))
            other.filename = f"{number}.npy"
            other.orig_filename = other.filename
        archive._didModify = True


def header_of(shape):
    def content(old):
        out = io.BytesIO()
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        return out.getvalue() + old[-400:]

    return content


class Command:
    def __reduce__(self):
        return (print, ("this was run",))


def code(folder):
    torch.save({"encoder.weight": Command()}, folder / "ae.pt")


def more_rows(old):
    """The pickle says of a storage, and of the matrix in it, that there are more rows."""
    rows = b"J" + (N * 10**5).to_bytes(4, "little")
    numbers = pickle.dumps(N * D, 2)[2:-1]
    assert b"K(K\x0c\x86" in old
    assert numbers in old
    many = pickle.dumps(N * D * 10**5, 2)[2:-1]
    return old.replace(b"K(K\x0c\x86", rows + b"K\x0c\x86").replace(numbers, many)


def expanded(tensor):
    return tensor[:1, :1].expand(10**6, 10**6)


def long(tensor):
    return tensor[:1].expand(10**6)


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


OF = {
    "gemma_scope": (write_gemma_scope, ()),
    "saelens": (write_saelens, ("jumprelu",)),
    "topk": (write_saelens, ("topk",)),
    "sparsify": (write_sparsify, ()),
    "dictionary_learning": (write_dictionary_learning, ("AutoEncoderTopK",)),
}
NPZ, SAELENS, SPARSIFY, PT = "params.npz", "sae_weights.safetensors", "sae.safetensors", "ae.pt"
NONE = torch.zeros(0)
BAD = {
    "gemma_scope": [
        (truncated(NPZ), "cannot read"),
        (truncated(NPZ, 0), "cannot read"),
        (flipped(NPZ), "cannot read the array"),
        (compressed, "not compressed"),
        (twice, "every array once"),
        (overlapping, "not compressed"),
        (arrays(b_dec=lambda a: a.astype(np.longdouble)), "cannot read the array b_dec"),
        (entry("b_enc.npy", header_of((10**9, 10**6))), "cannot read the array b_enc"),
        (entry("b_enc.npy", header_of((-1,))), "b_enc of shape"),
        (entry("b_enc.npy", lambda _: b"no"), "cannot read the array b_enc"),
        (arrays(b_dec=lambda a: a.astype(object)), "not object"),
        (arrays(b_dec=lambda a: a.astype(np.int8)), "not int8"),
        (arrays(b_dec=lambda a: a * np.nan), "finite numbers as pre_bias"),
        (arrays(threshold=lambda a: a * np.nan), "finite numbers as activation.threshold"),
        (arrays(W_enc=lambda a: a.T), "W_enc of shape"),
        (arrays(W_enc=lambda a: a[0]), "W_enc of shape"),
        (arrays(w_dec=np.zeros((N, D), "f4")), "of one jumprelu SAE in .*, got w_dec"),
        (arrays(scaling_factor=np.ones(N, "f4")), "got scaling_factor"),
    ],
    "saelens": [
        (truncated(SAELENS), "cannot read"),
        (truncated("cfg.json", 0), "expected JSON"),
        (edit("cfg.json", architecture="gated"), "standard or topk or jumprelu .* got 'gated'"),
        (edit("cfg.json", architecture=["topk"]), "architecture standard"),
        (edit("cfg.json", normalize_activations="constant_norm_rescale"), "none or layer_norm"),
        (edit("cfg.json", normalize_activations="expected_average_only_in"), "none or layer_norm"),
        (edit("cfg.json", reshape_activations="hook_z"), "reshape_activations none"),
        (edit("cfg.json", apply_b_dec_to_input="yes"), "apply_b_dec_to_input True or False"),
        (edit("cfg.json", metadata={"sae_lens_version": "5.11.0"}), "6 or more .* '5.11.0'"),
        (edit("cfg.json", metadata=None), "of 6 or more"),
        (tensors(SAELENS, W_dec=lambda t: t.to(torch.int8)), "quantised"),
        (tensors(SAELENS, W_dec=lambda t: t.to(torch.float8_e4m3fn)), "quantised"),
        (tensors(SAELENS, W_enc=None), "found no W_enc"),
        (tensors(SAELENS, b_enc=lambda t: t[:-1].clone()), "b_enc of shape"),
        (tensors(SAELENS, threshold=None), "found no threshold"),
        (tensors(SAELENS, r_mag=torch.ones(N)), "got r_mag"),
    ],
    "topk": [
        (edit("cfg.json", k="5"), "an integer k"),
        (edit("cfg.json", k=0), "k between 1 and"),
        (edit("cfg.json", k=10**9), "k between 1 and"),
        (tensors(SAELENS, threshold=torch.ones(N)), "of one topk SAE .* got threshold"),
        (tensors(SAELENS, W_dec=torch.zeros(0, D), b_enc=NONE, W_enc=torch.zeros(D, 0)), "k betw"),
    ],
    "sparsify": [
        (truncated(SPARSIFY), "cannot read"),
        (truncated(SPARSIFY, 0), "cannot read"),
        (edit("cfg.json", activation="groupmax"), "activation topk .* got 'groupmax'"),
        (edit("cfg.json", signed=True), "signed False"),
        (edit("cfg.json", skip_connection=True), "skip_connection False"),
        (tensors(SPARSIFY, W_skip=torch.eye(D)), "got W_skip"),
        (tensors(SPARSIFY, W_dec=None), "found no W_dec"),
        (tensors(SPARSIFY, W_dec=lambda t: t[:, :-1].clone()), "one encoder and one decoder"),
        (tensors(SPARSIFY, b_dec=lambda t: t / 0), "finite numbers as pre_bias"),
    ],
    "dictionary_learning": [
        (truncated(PT), "cannot read"),
        (truncated(PT, 0), "cannot read"),
        (code, "tensors alone"),
        (lambda folder: (folder / PT).write_bytes(pickle.dumps(Command())), "zip archive"),
        (edit("config.json", trainer={"dict_class": "GatedAutoEncoder"}), "dict_class AutoEncoder"),
        (edit("config.json", trainer={"k": True}), "an integer k"),
        (text("config.json", '{"trainer": 3}'), "mapping `trainer`"),
        (text("config.json", "[" * 10**5), "expected JSON"),
        (text("config.json", " " * 2**25), "at most 16777216"),
        (entry("data.pkl", more_rows), "cannot read"),
        (state(encoder__weight=expanded), "got fewer"),
        (state(encoder__weight=expanded, decoder__weight=expanded, encoder__bias=long,
               b_dec=long), "got fewer"),
        (state(decoder__weight=lambda t: t.to_sparse()), "plain numbers"),
        (state(decoder__weight=lambda t: t.to("meta")), "plain numbers"),
        (state(b_dec=3), "tensors by name"),
        (lambda folder: torch.save([1], folder / PT), "tensors by name"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "damage", "message"), [(kind, *case) for kind in BAD for case in BAD[kind]]
)
def test_what_is_damaged_ends_in_one_line(tmp_path, kind, damage, message, capsys):
    write, arguments = OF[kind]
    write(tmp_path, drawn(), *arguments)
    MLSAE.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        MLSAE.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert "run" not in capsys.readouterr().out


# --- folders for each layer -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layer_12/width_16k/average_l0_82", 12),
        ("layers.3", 3),
        ("layers.3.mlp", 3),
        ("gpt_neox.layers.0", 0),
        ("blocks.7.hook_resid_post", 7),
        ("blocks.7.hook_resid_pre", 6),
        ("h.11", 11),
        ("resid_post_layer_8/trainer_0", 8),
        ("layer12", 12),
    ],
)
def test_a_folder_is_of_the_layer_in_its_name(tmp_path, name, layer):
    (tmp_path / name).mkdir(parents=True)
    write_gemma_scope(tmp_path / name, drawn())
    assert formats.layers(tmp_path) == {layer: tmp_path / name}


def test_which_folder_is_of_a_layer_is_not_guessed(tmp_path):
    for name in ("layer_0/width_16k/average_l0_82", "layer_0/width_16k/average_l0_20", "embedding"):
        (tmp_path / name).mkdir(parents=True)
        write_gemma_scope(tmp_path / name, drawn())
    (tmp_path / "layer_1").mkdir()
    with pytest.raises(ValueError, match=r"that name a layer.*got embedding"):
        formats.layers(tmp_path)
    with pytest.raises(ValueError, match=r"one dictionary of layer 0 .*_20 and .*_82"):
        formats.layers(tmp_path, ["layer_*"])
    assert formats.layers(tmp_path, ["*/average_l0_20"]).keys() == {0}
    assert formats.layers(tmp_path, ["layer_1"]) == {}
    assert formats.layers(tmp_path / "embedding") == {}


# --- what SAELens, sparsify and dictionary_learning say -------------------------------------------


def package(name):
    return pytest.importorskip(name, reason=f"{name} is not installed, so it is not asked")


def trained_like(module):
    p = drawn()
    for name, parameter in module.named_parameters():
        ours = p[formats.NAMES[name]]
        parameter.data.copy_(ours.T if name in formats.TRANSPOSED else ours)
    return module


THEIRS = pytest.mark.filterwarnings("ignore")  # of what they import


@THEIRS
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("subtracted", [False, True])
@pytest.mark.parametrize("kind", ["Standard", "TopK", "rescaled", "JumpReLU"])
def test_what_saelens_saves_is_read_as_it_computes(tmp_path, kind, subtracted, standardize):
    sae_lens = package("sae_lens")
    settings = {"k": K, "rescale_acts_by_decoder_norm": kind == "rescaled"}
    name = "TopK" if kind == "rescaled" else kind
    config = getattr(sae_lens, f"{name}SAEConfig")(
        d_in=D,
        d_sae=N,
        apply_b_dec_to_input=subtracted,
        normalize_activations="layer_norm" if standardize else "none",
        **settings if name == "TopK" else {},
    )
    theirs = trained_like(getattr(sae_lens, f"{name}SAE")(config))
    theirs.save_model(tmp_path)
    with torch.no_grad():
        assert_same(MLSAE.from_pretrained(tmp_path), theirs.encode(X), theirs(X))


@THEIRS
def test_a_batchtopk_of_saelens_is_read_as_it_is_used(tmp_path):
    sae_lens = package("sae_lens")
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=N, k=K)
    training = trained_like(sae_lens.BatchTopKTrainingSAE(config))
    training.topk_threshold = torch.tensor(0.7, dtype=torch.double)
    training.save_inference_model(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        assert_same(MLSAE.from_pretrained(tmp_path), theirs.encode(X), theirs(X))


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("reader", ["ours", "SAELens"])
@THEIRS
def test_saelens_loads_what_is_written_for_it(tmp_path, activation, standardize, reader):
    generator = torch.Generator().manual_seed(4)
    sae = MLSAE(D, N, K, 0, standardize, activation=activation, generator=generator)
    sae.pre_bias.data.normal_(generator=generator)
    if activation != "topk":
        sae.activation.threshold.data += torch.rand(sae.activation.threshold.shape)
    written = publish.write_saelens({0: sae, 2: sae}, tmp_path, "pythia-70m")
    names = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    assert [path.name for path in written] == names
    assert formats.layers(tmp_path) == dict(zip((0, 2), written, strict=True))
    hooks = [json.loads((p / "cfg.json").read_text())["metadata"]["hook_name"] for p in written]
    assert hooks == names
    with torch.no_grad():
        latents, recon = dense(sae, X), sae(X).recon
        for path in written:
            if reader == "ours":
                assert_same(MLSAE.from_pretrained(path), latents, recon)
            else:
                theirs = package("sae_lens").SAE.load_from_disk(path)
                torch.testing.assert_close(theirs.encode(X), latents, rtol=0, atol=1e-5)
                torch.testing.assert_close(theirs(X), recon, rtol=0, atol=1e-5)


def test_what_saelens_has_no_name_for_is_not_written(tmp_path):
    with pytest.raises(SpecError, match="residual or mlp_output for SAELens, got mlp_input"):
        publish.write_saelens({0: MLSAE(D, N, K)}, tmp_path, "pythia-70m", "mlp_input")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk"])
@pytest.mark.parametrize("biased", [False, True])
def test_what_is_written_for_gemma_scope_has_the_same_latents(tmp_path, activation, biased):
    generator = torch.Generator().manual_seed(4)
    settings = {"activation": activation, "encoder_bias": biased, "generator": generator}
    sae = MLSAE(D, N, K, 0, False, **settings)
    for parameter in (sae.pre_bias, *([sae.encoder_bias] if biased else [])):
        parameter.data.normal_(generator=generator)
    threshold = sae.activation.threshold.data
    threshold += torch.rand(threshold.shape, generator=generator)
    [folder] = publish.write_gemma_scope({5: sae}, tmp_path)
    assert formats.layers(tmp_path) == {5: folder}
    latents, recon = dense(sae, X), sae(X).recon
    assert 0 < (latents > 0).sum() < latents.numel() / 2
    assert_same(MLSAE.from_pretrained(folder), latents.detach(), recon.detach())


@pytest.mark.parametrize(
    ("settings", "got"),
    [({"standardize": False}, "topk and false"), ({"activation": "jumprelu"}, "jumprelu and true")],
)
def test_what_gemma_scope_has_no_room_for_is_not_written(tmp_path, settings, got):
    with pytest.raises(SpecError, match=rf"for Gemma Scope's format, got {got}"):
        publish.write_gemma_scope({0: MLSAE(D, N, K, **settings)}, tmp_path)


@THEIRS
@pytest.mark.parametrize("transcode", [False, True])
def test_what_sparsify_saves_is_read_as_it_computes(tmp_path, transcode, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    sparsify = package("sparsify")
    config = sparsify.SparseCoderConfig(num_latents=N, k=K, transcode=transcode)
    theirs = trained_like(sparsify.SparseCoder(D, config))
    theirs.save_to_disk(tmp_path)
    with torch.no_grad():
        code = theirs.encode(X)
        latents = torch.zeros(len(X), N).scatter(1, code.top_indices, code.top_acts)
        recon = theirs.decode(code.top_acts, code.top_indices)
        assert_same(MLSAE.from_pretrained(tmp_path), latents, recon)


@THEIRS
@pytest.mark.parametrize("kind", formats.CLASSES)
def test_what_dictionary_learning_saves_is_read_as_it_computes(tmp_path, kind):
    package("dictionary_learning")
    from dictionary_learning import utils

    sizes = {"MatryoshkaBatchTopKSAE": (K, [10, N - 10])}
    of_k = kind in (*BATCHED, "AutoEncoderTopK")
    made = getattr(utils, kind)(D, N, *sizes.get(kind, (K,) if of_k else ()))
    trained_like(made)
    if of_k:
        made.threshold.fill_(0.5)
    torch.save(made.state_dict(), tmp_path / "ae.pt")  # as its training does
    config = {"trainer": {"dict_class": kind, "k": K}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, _ = utils.load_dictionary(str(tmp_path), "cpu")
    with torch.no_grad():
        assert_same(MLSAE.from_pretrained(tmp_path), theirs.encode(X), theirs(X))
