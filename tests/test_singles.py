"""A dictionary for each layer, measured as one: alone, and by every stage."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_given import SETTINGS, given_of, key_of
from test_pipeline import run_of

from mlsae_book import stages
from mlsae_book.tables.transfer import Target
from mlsae_core import pipeline, singles, status
from mlsae_core.sae import MLSAE
from mlsae_core.singles import SingleLayers
from mlsae_core.spec import DataSpec, SpecError

D, LAYERS = 16, (0, 1, 2)


def jumprelu(layer, n_latents=32, d=D):
    """With biases and thresholds, and another L0 than its neighbours."""
    generator = torch.Generator().manual_seed(layer)
    settings = {"activation": "jumprelu", "encoder_bias": True, "generator": generator}
    sae = MLSAE(d, n_latents, 1, 0, False, **settings)
    sae.encoder.data /= 4
    sae.encoder_bias.data.normal_(0, 0.01, generator=generator)
    sae.pre_bias.data.normal_(0, 0.1, generator=generator)
    sae.activation.threshold.data.uniform_(0, 0.02 * (layer + 1), generator=generator)
    return sae


def write(sae, folder):
    """As Gemma Scope has them, whose bias is not subtracted."""
    arrays = {
        "W_enc": sae.encoder.T,
        "W_dec": sae.decoder,
        "b_enc": sae.encoder_bias - sae.encoder @ sae.pre_bias,
        "b_dec": sae.pre_bias,
        "threshold": sae.activation.threshold,
    }
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: t.detach().numpy() for name, t in arrays.items()})


@pytest.fixture
def folder(data):
    for layer in LAYERS:
        write(
            jumprelu(layer), data / "scope" / f"layer_{layer}" / "width_32" / f"average_l0_{layer}"
        )
    return data / "scope"


def alone(folder, layer):
    [path] = folder.glob(f"layer_{layer}/*/*")
    return path


# --- the module -----------------------------------------------------------------------------------


def test_each_layer_has_its_own_latents_in_one_index():
    sizes = {0: 32, 4: 20, 7: 48}
    saes = {layer: jumprelu(layer, n) for layer, n in sizes.items()}
    both = SingleLayers({layer: saes[layer] for layer in (7, 0, 4)})
    assert (both.layers, both.starts, both.n_latents) == ((0, 4, 7), [0, 32, 52], 100)
    x = torch.randn(3, 30, D, generator=torch.Generator().manual_seed(8))
    values, indices = both.encode(x)
    assert all(len(set(row)) == len(row) for row in indices.flatten(0, 1).tolist())
    found = torch.zeros(3, 30, 100).scatter(2, indices, values)
    expected, recon = torch.zeros(3, 30, 100), []
    for row, (layer, start) in enumerate(zip(sizes, both.starts, strict=True)):
        code = saes[layer].encode(x[row])
        mine = torch.zeros(30, sizes[layer]).scatter(1, *code[::-1])
        expected[row, :, start : start + sizes[layer]] = mine
        recon.append(saes[layer](x[row]).recon)
    assert torch.equal(found, expected)
    assert len({int((row > 0).sum()) for row in expected}) == 3
    output = both(x)
    assert torch.equal(output.recon, torch.stack(recon))
    assert torch.equal(output.topk.values, values)
    torch.testing.assert_close(both.decode(output.topk), output.recon)
    torch.testing.assert_close(both.decoder[52:], saes[7].decoder)
    assert torch.equal(both.fired(output.topk), (expected > both.dead_threshold).any(0).any(0))


def test_statistics_of_a_target_are_those_of_its_layer():
    saes = {
        layer: MLSAE(D, 32, 4, generator=torch.Generator().manual_seed(layer)) for layer in (0, 1)
    }
    x, y = torch.randn(2, 2, 9, D, generator=torch.Generator().manual_seed(2))
    recon = SingleLayers(saes)(x, 5 * y).recon
    for row, sae in saes.items():
        assert torch.equal(recon[row], sae(x[row], 5 * y[row]).recon)


def test_vectors_without_their_layers_are_refused():
    both = SingleLayers({0: jumprelu(0), 1: jumprelu(1)})
    for shape in ((9, D), (1, 9, D), (3, 9, D)):
        with pytest.raises(ValueError, match=r"of the 2 layers 0, 1, got shape"):
            both.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="same n_inputs at all layers, got 16 at layer 0 and 8 at"):
        SingleLayers({0: jumprelu(0), 1: jumprelu(1, d=8)})


# --- every stage ----------------------------------------------------------------------------------


def test_a_set_is_evaluated_as_each_alone(inputs, folder):
    session = pipeline.Session()
    both = pd.read_csv(session.evaluate(given_of(inputs, folder), SETTINGS).file("evaluation.csv"))
    for layer in LAYERS:
        run = given_of(inputs, alone(folder, layer), layers=[layer])
        one = pd.read_csv(session.evaluate(run, SETTINGS).file("evaluation.csv"))
        same = one.columns.drop(["dead", "inactive"])  # shares of all latents, or of one layer's
        row = both[both.layer == layer].reset_index(drop=True)
        pd.testing.assert_frame_equal(row[same], one[same], rtol=1e-4, atol=1e-5)
    assert both.l0.nunique() == 3


def test_distributions_and_importance_of_a_set_are_those_of_each_alone(inputs, folder):
    session, run = pipeline.Session(), given_of(inputs, folder)
    arrays = load_file(session.distributions(run, SETTINGS).file("distributions.safetensors"))
    table = pd.read_csv(session.make("importance", run, SETTINGS).file("importance.csv"))
    for layer in LAYERS:
        own = slice(32 * layer, 32 * layer + 32)
        live = arrays["totals"][layer, own] > 0
        assert live.any()
        assert torch.equal(arrays["probs"][layer, own][live], torch.ones(int(live.sum())).half())
        others = [other for other in LAYERS if other != layer]
        assert not arrays["counts"][others, own].any()
        single = given_of(inputs, alone(folder, layer), layers=[layer])
        one = load_file(session.distributions(single, SETTINGS).file("distributions.safetensors"))
        assert torch.equal(one["counts"][0], arrays["counts"][layer, own])
        assert torch.equal(one["totals"][0], arrays["totals"][layer, own])
        alone_ = pd.read_csv(session.make("importance", single, SETTINGS).file("importance.csv"))
        row = table[table.layer == layer].reset_index(drop=True)
        drawn = alone_.gradient != "random"  # for all layers at once
        pd.testing.assert_frame_equal(row[drawn], alone_[drawn], rtol=1e-4)


def test_a_set_is_transferred_to_another_model(inputs, folder, capsys):
    session, run = pipeline.Session(), given_of(inputs, folder)
    data = DataSpec(path=str(inputs / "text.jsonl"), context_length=8)
    target = Target(str(inputs / "gpt_neox"), data, "given", 2)
    table = pd.read_csv(stages.transfer(session, run, SETTINGS, target).file("transfer.csv"))
    assert list(table.layer) == [0, 1, 2]
    assert table.trained_here.all()
    assert "warning" not in capsys.readouterr().err  # it may well fit another model less


def test_only_the_layers_of_a_site_are_loaded(inputs, folder):
    loaded = pipeline.Session().sae(given_of(inputs, folder, layers=[0, 2]))
    assert loaded.layers == (0, 2)
    assert isinstance(singles.load(alone(folder, 1), [1]), MLSAE)
    (alone(folder, 1) / "params.npz").unlink()
    with pytest.raises(SpecError, match=r"dictionary for each layer in .*, found none of 1"):
        pipeline.Session().sae(given_of(inputs, folder))


def test_the_key_of_a_set_is_of_its_layers_and_their_content(inputs, folder, data):
    first = key_of(given_of(inputs, folder))
    folder.rename(data / "moved")
    moved = data / "moved"
    assert key_of(given_of(inputs, moved)) == first
    (moved / "layer_1").rename(moved / "layers.1")
    assert key_of(given_of(inputs, moved)) == first
    chosen = {"path": str(moved), "folders": ["layer*"]}
    assert key_of(given_of(inputs, moved, dictionary=chosen)) == first
    (moved / "layers.1").rename(moved / "layer_x")
    (moved / "layer_0").rename(moved / "layer_1")
    (moved / "layer_x").rename(moved / "layer_0")
    assert key_of(given_of(inputs, moved)) != first


def test_of_a_repository_only_the_folders_named_are_copied(inputs, folder, monkeypatch):
    asked = []

    def snapshot_download(name, revision, **patterns):
        asked.append(patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    chosen = {"path": "google/gemma-scope-2b-pt-res", "folders": ["layer_?/width_32/average_l0_?"]}
    assert key_of(given_of(inputs, folder, dictionary=chosen)) == key_of(given_of(inputs, folder))
    assert "layer_?/width_32/average_l0_?/params.npz" in asked[0]["allow_patterns"]
    assert all(pattern.startswith("layer_?/") for pattern in asked[0]["allow_patterns"])
    chosen["folders"] = ["layer_7/*"]
    with pytest.raises(
        SpecError, match=r"expected params.npz; .* folders for each layer as layer_7"
    ):
        key_of(given_of(inputs, folder, dictionary=chosen))


def test_two_of_one_layer_are_one_line_of_the_field(inputs, folder):
    write(jumprelu(5), folder / "layer_1" / "width_64")
    with pytest.raises(SpecError, match=r"dictionary.path: expected one dictionary of layer 1 "):
        key_of(given_of(inputs, folder))


def test_a_set_costs_what_each_of_its_layers_does(inputs, folder):
    """So it is not estimated as if every layer were encoded by the dictionaries of all."""
    one, both = (
        status._operations("evaluate", given_of(inputs, path, layers=[1]), 100, SETTINGS)
        for path in (alone(folder, 1), folder)
    )
    assert both == one


# --- whether it is read as it was trained ---------------------------------------------------------


def axes(k=6, **parameters):
    """Vectors by their k largest coordinates, which is a fair reconstruction of any."""
    sae = MLSAE(D, 2 * D, k, 0, False, **parameters)
    for rows in (sae.encoder, sae.decoder):
        rows.data.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    return sae


def write_axes(folder, decoder=(1, 1, 1), threshold=None):
    for layer, scale in enumerate(decoder):
        sae = axes(**{} if threshold is None else {"activation": "jumprelu"})
        sae.decoder.data *= scale
        if threshold is not None:
            sae.activation.threshold.data.fill_(threshold)
        sae.save_pretrained(folder / f"layers.{layer}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({}, None),
        ({"decoder": (1, 4, 1)}, r"hardly fits layer 1 \(FVU \d+\.\d\d, L0 6\): expected"),
        (
            {"threshold": 1e9},
            r"layer 0 \(FVU \d\.\d\d, L0 0\), layer 1 \(.*, layer 2 \(.*L0 of 1 to 6;",
        ),
        ({"threshold": 0}, r"layer 0 \(FVU 0\.00, L0 16\), .* how it normalises"),
    ],
)
def test_a_dictionary_that_hardly_fits_gets_a_line(inputs, data, capsys, damage, said):
    write_axes(data / "axes", **damage)
    run = given_of(inputs, data / "axes")
    pipeline.Session().evaluate(run, SETTINGS)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == (said is not None)
    if said:
        assert re.search(said, lines[0]), lines[0]


def test_one_that_was_trained_here_is_not_looked_at(inputs, data, capsys):
    pipeline.Session().evaluate(run_of(inputs), SETTINGS)
    assert "warning" not in capsys.readouterr().err
