"""Sources of activations: a model with text, a folder, a planted world; training and measurements
know no other."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import CONTEXT, blocks, digest, lm, run_of  # noqa: F401 (fixtures)
from tiny_lm import EOS, tiny_lm, train_on_text

from mlsae_book.planted import PlantedSpec, World
from mlsae_book.tables import drift, examples, importance, latents, layers, total_variance, transfer
from mlsae_core import activations, analysis, store, train
from mlsae_core.activations import ActivationError, First, SavedSource, TextSource
from mlsae_core.lens import Lens
from mlsae_core.spec import SiteSpec, SpecError
from mlsae_core.text import TokenBlocks

TRANSCODER = {"source": "mlp_input", "target": "mlp_output"}
SMALL = PlantedSpec(n_features=8, d_model=8, active=2, n_layers=3, context_length=4, tokens=256)


def saved(folder, lm, blocks, size=3, **site):  # noqa: F811
    """The activations of a whole text, some sequences a file."""
    return activations.save(TextSource(lm, blocks, SiteSpec(**site)), folder, size)


def same(one, other):
    for name in ("source", "target", "text", "tokens", "sequence", "position"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.target is one.source) == (other.target is other.source)


@pytest.mark.parametrize("site", [{}, TRANSCODER])
@pytest.mark.parametrize("seed", [None, 0])
def test_saved_activations_are_read_as_they_were(lm, blocks, tmp_path, site, seed):  # noqa: F811
    text = TextSource(lm, blocks, SiteSpec(**site))
    folder = SavedSource(saved(tmp_path / "a", lm, blocks, **site))
    for name in ("site", "n_layers", "d_model", "n_sequences"):
        assert getattr(folder, name) == getattr(text, name)
    pairs = zip(folder.batches(7, seed), text.batches(7, seed), strict=seed is None)
    read = [same(*pair) for pair in itertools.islice(pairs, 13)]
    assert len(read) == (6 if seed is None else 13)  # 40 sequences, or more than two passes


def test_a_sequence_of_special_tokens_keeps_its_place(lm, blocks, tmp_path):  # noqa: F811
    tokens = blocks.blocks.copy()
    tokens[[1, 3, 4, 5]] = EOS
    text = TextSource(lm, TokenBlocks(tokens), SiteSpec())
    folder = SavedSource(activations.save(text, tmp_path / "a", 4))
    for seed in (None, 0):
        pairs = zip(folder.batches(2, seed), text.batches(2, seed), strict=False)
        for pair in itertools.islice(pairs, 2):
            same(*pair)
    for source in (text, folder):
        with pytest.raises(ActivationError, match="batch 2: all 16 tokens are special"):
            list(source.batches(2))
        with pytest.raises(ActivationError, match="batch 2: all 16 tokens are special"):
            next(source.batches(2, start=2, every=3))  # of the text, not of this reader


@pytest.fixture(params=["text", "saved", "planted"])
def source(request, lm, blocks, tmp_path):  # noqa: F811
    return {
        "text": lambda: TextSource(lm, blocks, SiteSpec()),
        "saved": lambda: SavedSource(saved(tmp_path / "a", lm, blocks)),
        "planted": lambda: World(SMALL),
    }[request.param]()


def test_every_source_deals_numbered_batches(source):
    whole = list(itertools.islice(source.batches(4, seed=1), 9))
    for number, batch in zip((2, 5, 8), source.batches(4, 1, start=2, every=3), strict=False):
        same(batch, whole[number])
    for batch in whole[:2]:
        assert batch.source.shape == (source.n_layers, len(batch.tokens), source.d_model)
        assert batch.source.device == source.device


def test_one_pass_of_every_source_has_its_sequences_in_order(source):
    size = source.n_sequences // 2 + 1
    first, second = source.batches(size)
    assert [len(first.text), len(second.text)] == [size, source.n_sequences - size]
    (again,) = source.batches(size, start=1)
    same(again, second)
    assert torch.equal(first.text[first.sequence, first.position], first.tokens)
    assert source.key == source.key != World(replace(SMALL, seed=1)).key


# --- training ------------------------------------------------------------------------------------


def test_training_on_saved_activations_is_training_on_the_text(lm, blocks, tmp_path):  # noqa: F811
    expected = digest(train_on_text(run_of(), lm, blocks))
    assert digest(train.train(run_of(), TextSource(lm, blocks, SiteSpec()))) == expected
    source = SavedSource(saved(tmp_path / "a", lm, blocks))
    assert digest(train.train(run_of(), source)) == expected


@pytest.mark.parametrize("site", [{"layers": (0, 2)}, {"stacked": True}])
def test_a_site_chooses_among_saved_layers(lm, blocks, tmp_path, site):  # noqa: F811
    source = SavedSource(saved(tmp_path / "a", lm, blocks), SiteSpec(**site))
    for pair in zip(
        source.batches(8), TextSource(lm, blocks, SiteSpec(**site)).batches(8), strict=True
    ):
        same(*pair)
    assert train.train(run_of(**site), source).log.fvu.iloc[-1] < 1
    with pytest.raises(SpecError, match="layers: expected block indices from 0 to 2"):
        SavedSource(tmp_path / "a", SiteSpec(layers=(3,)))


def test_layers_that_were_saved_keep_their_numbers(lm, blocks, tmp_path):  # noqa: F811
    folder = saved(tmp_path / "a", lm, blocks, layers=(1, 2))
    source = SavedSource(folder)
    assert (source.site.layers, source.n_layers) == ((1, 2), 3)
    log = train.train(run_of(layers=[1, 2]), source).log
    assert [name for name in log if name.startswith("fvu_")] == ["fvu_1", "fvu_2"]
    one = TextSource(lm, blocks, SiteSpec(layers=(2,))).batches(8)
    for pair in zip(SavedSource(folder, SiteSpec(layers=(2,))).batches(8), one, strict=True):
        same(*pair)
    for other in ((0, 1), "all"):
        with pytest.raises(SpecError, match=r"layers: expected some of \[1, 2\], .* got \[0\]"):
            SavedSource(folder, SiteSpec(layers=other))
    for site, message in (
        ({}, r"layers: expected \(1, 2\), as the activations are, got \(0, 1, 2\)"),
        ({"layers": [2]}, r"layers: expected \(1, 2\), as the activations are, got \(2,\)"),
        ({"layers": [1, 2], "stacked": True}, "stacked: expected False, as .* are, got True"),
        (
            {"layers": [1, 2], "source": "mlp_input"},
            "source: expected residual, as .* are, got mlp",
        ),
    ):
        with pytest.raises(SpecError, match=message):
            train.train(run_of(**site), source)


def test_a_checkpoint_knows_its_activations(lm, blocks, tmp_path):  # noqa: F811
    folder, checkpoint = saved(tmp_path / "a", lm, blocks), tmp_path / "c"
    other = TokenBlocks(blocks.blocks[::-1])
    stop = {"checkpoint": checkpoint, "should_stop": {5}.__contains__}
    with pytest.raises(store.Stopped, match="after step 5"):
        train.train(run_of(), SavedSource(folder), **stop)
    for source in (
        SavedSource(saved(tmp_path / "b", lm, other)),
        TextSource(lm, blocks, SiteSpec()),
    ):
        with pytest.raises(store.StoreError, match=r"c: .* it was trained on other activations; d"):
            train.train(run_of(), source, checkpoint=checkpoint)
    done = train.train(run_of(), SavedSource(folder), checkpoint=checkpoint)
    assert digest(done) == digest(train_on_text(run_of(), lm, blocks))


def test_text_is_known_by_its_model_its_tokens_and_its_basis(lm, blocks):  # noqa: F811
    site = SiteSpec()
    tilted = Lens(torch.eye(16).expand(3, 16, 16) / 9, torch.zeros(3, 16))
    sources = [
        TextSource(lm, blocks, site),
        TextSource(lm, TokenBlocks(blocks.blocks[1:]), site),
        TextSource(tiny_lm(seed=1), blocks, site),
        TextSource(lm, blocks, site, tilted),
    ]
    assert len({source.key for source in sources}) == 4
    compiled = TextSource(lm.compiled("aot_eager"), First(blocks, 40), site)
    assert (
        compiled.key == TextSource(tiny_lm(), blocks, SiteSpec(layers=(1,))).key == sources[0].key
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_saved_numbers_that_are_not_finite_stop_in_one_line(lm, blocks, tmp_path, value):  # noqa: F811
    folder = saved(tmp_path / "a", lm, blocks, 40)
    (file,) = folder.iterdir()
    arrays, facts = load_file(file), safe_open(file, "pt").metadata()
    arrays["source"][1, 100, 3] = value
    save_file(arrays, file, facts)
    message = r"batch \d: source has NaN or infinite values at layers \[1\]; save .*a anew"
    with pytest.raises(store.Stopped, match=message + r", after step \d+ of 12; no checkpoint"):
        train.train(run_of(), SavedSource(folder))
    sae = train.build_sae(run_of(), SavedSource(folder))
    for measure in (analysis.evaluate, analysis.distributions):
        with pytest.raises(ActivationError, match=message):
            measure(SavedSource(folder), sae, progress=False)


# --- measurements --------------------------------------------------------------------------------

RECONSTRUCTION = ["layer", "tokens", "fvu_global", "fvu_per_dimension", "mse", "l1", "l0"]
RECONSTRUCTION += ["dead", "inactive"]


def tables(source, sae):
    """What every measurement that takes vectors says of a source, by name."""
    quiet = {"progress": False}
    arrays, numbers = analysis.distributions(source, sae, 7, replicates=9, **quiet)
    found = {"evaluate": analysis.evaluate(source, sae, 7, **quiet)[RECONSTRUCTION]}
    found |= {f"distributions {name}": pd.DataFrame(array) for name, array in arrays.items()}
    found["variances"] = pd.DataFrame([json.dumps(numbers)])
    found["layers"], found["pairs"] = drift.drift(source, 7, **quiet)
    found["duplicates"] = latents.duplicates(source, sae, 7, **quiet)
    for name, array in examples.examples(source, sae, 7, window=3, **quiet).items():
        found[f"examples {name}"] = pd.DataFrame(array.flatten(1))
    for name, array in zip(
        ("indices", "values"), total_variance.codes(source, sae, 7), strict=True
    ):
        found[name] = pd.DataFrame(array.flatten(1).detach())
    return found


def test_every_measurement_says_of_saved_activations_what_it_says_of_their_source(source, tmp_path):
    run = run_of(k=4, expansion_factor=4)
    sae = train.build_sae(run, source)
    expected = tables(source, sae)
    found = tables(SavedSource(activations.save(source, tmp_path / "copy", 5)), sae)
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        pd.testing.assert_frame_equal(found[name], table, check_exact=True, obj=name)
    assert expected["layers"].tokens[0] > 50


@pytest.mark.parametrize("site", [{"stacked": True}, TRANSCODER])
def test_other_sites_are_evaluated_alike(lm, blocks, tmp_path, site):  # noqa: F811
    text = TextSource(lm, blocks, SiteSpec(**site))
    kept = {name: value for name, value in site.items() if name != "stacked"}
    folder = SavedSource(saved(tmp_path / "a", lm, blocks, **kept), SiteSpec(**site))
    sae = train.build_sae(run_of(**site), text)
    tables = [analysis.evaluate(s, sae, progress=False) for s in (text, folder)]
    pd.testing.assert_frame_equal(tables[0][RECONSTRUCTION], tables[1], check_exact=True)
    assert {"delta_ce", "kl", "ce_recovered_mean"} <= set(tables[0])
    drifts = [drift.drift(s, progress=False) for s in (text, folder)]
    for one, two in zip(*drifts, strict=True):
        pd.testing.assert_frame_equal(one, two)


def test_what_needs_a_model_is_refused_without_one():
    world, sae = World(SMALL), train.build_sae(SMALL.run, World(SMALL))
    assert list(analysis.evaluate(world, sae, progress=False)) == RECONSTRUCTION
    for wanted in ({"ablations": True}, {"start": 1}):
        (name,) = wanted
        with pytest.raises(SpecError, match=f"{name}: expected a language model that .*got World"):
            analysis.evaluate(world, sae, progress=False, **wanted)
    measures = importance.importance, transfer.across_layers
    for measure in (*measures, lambda *inputs: layers.prompt_spread(*inputs, ["a"])):
        with pytest.raises(SpecError, match=r"source: expected a language model .* got World"):
            measure(world, sae)


# --- files ---------------------------------------------------------------------------------------


def test_identity_is_the_content_in_its_order(lm, blocks, tmp_path):  # noqa: F811
    first = saved(tmp_path / "a", lm, blocks)
    key = SavedSource(first).key
    moved = first.rename(tmp_path / "b")
    for number, file in enumerate(sorted(moved.iterdir())):
        file.rename(moved / f"part-{number:03}.safetensors")
    assert SavedSource(moved).key == key
    one, two = moved / "part-000.safetensors", moved / "part-001.safetensors"
    one.rename(tmp_path / "kept")
    two.rename(one)
    (tmp_path / "kept").rename(two)
    assert SavedSource(moved).key != key
    arrays, facts = load_file(one), safe_open(one, "pt").metadata()
    arrays["source"][0, 0, 0] += 1
    before = SavedSource(moved).key
    save_file(arrays, one, facts)
    assert SavedSource(moved).key != before


def test_what_cannot_be_read_or_written_is_named(lm, blocks, tmp_path):  # noqa: F811
    folder = saved(tmp_path / "a", lm, blocks)
    with pytest.raises(SpecError, match=r"expected a new one for activations, got .*; remove it"):
        saved(tmp_path / "a", lm, blocks)
    with pytest.raises(SpecError, match="stacked: expected false for activations that are saved"):
        saved(tmp_path / "s", lm, blocks, stacked=True)
    for site, message in (
        (TRANSCODER, r"source: expected residual, as the activations in .*a were saved, got mlp_i"),
        ({"target": "mlp_output"}, "target: expected same, as .* saved, got mlp_output"),
        ({"basis": "lens"}, "basis: expected identity, as .* saved, got lens"),
        ({"alignment": "as-released"}, "alignment: expected aligned, as .* saved, got as-rel"),
        ({"massive": "excluded"}, "massive: expected kept, as .* saved, got excluded"),
    ):
        with pytest.raises(SpecError, match=message):
            SavedSource(folder, SiteSpec(**site))
    with pytest.raises(SpecError, match=r"expected \*.safetensors in .*b, got none"):
        SavedSource(tmp_path / "b")
    file = next(iter(folder.iterdir()))
    arrays, facts = load_file(file), safe_open(file, "pt").metadata()
    for changes, message in (
        ({"sequence": arrays["sequence"] + 1}, "vectors of 3 sequences in order, got others"),
        ({"sequence": arrays["sequence"] - 1}, "vectors of 3 sequences in order, got others"),
        ({"sequence": arrays["sequence"].flip(0)}, "vectors of 3 sequences in order, got others"),
        ({"sequence": arrays["sequence"].float()}, "expected saved activations: "),
        ({"sequence": arrays["sequence"][1:]}, r"expected sequence of shape \[\d+\], got"),
        ({"position": arrays["position"][:-1]}, r"expected position of shape \[\d+\], got"),
        ({"source": arrays["source"][:2].contiguous()}, r"expected source of shape \[3, \d+, 16\]"),
        ({"text": arrays["text"][:, :4].contiguous()}, "files of one site and size, got 2 kinds"),
    ):
        save_file(arrays | changes, file, facts)
        with pytest.raises(SpecError, match=message):
            SavedSource(folder)
    other = json.dumps(json.loads(facts["site"]) | {"source": "mlp_output"})
    save_file(arrays, file, facts | {"site": other})
    with pytest.raises(SpecError, match="expected files of one site and size, got 2 kinds"):
        SavedSource(folder)
    for damaged in (None, {}, facts | {"site": "["}, facts | {"n_layers": "x"}):
        save_file(arrays, file, damaged)
        with pytest.raises(SpecError, match="safetensors: expected saved activations: "):
            SavedSource(folder)
    for name in arrays:
        save_file({n: x for n, x in arrays.items() if n != name}, file, facts)
        with pytest.raises(SpecError, match=rf"safetensors: expected saved activations: .*{name}"):
            SavedSource(folder)
    file.write_bytes(b"damaged")
    with pytest.raises(SpecError, match="safetensors: expected saved activations: "):
        SavedSource(folder)


def test_the_example_of_the_readme_runs(inputs, data):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    fields = data / "my-run.yml"
    text = {"path": str(inputs / "text.jsonl"), "context_length": CONTEXT}
    spec = {"model": str(inputs / "gpt_neox"), "data": text, "layers": [0, 2]}
    spec |= {"expansion_factor": 2, "k": 4, "tokens": 512, "batch_tokens": 64}
    fields.write_text(json.dumps(spec))
    names = {}
    exec(example.replace("my-run.yml", str(fields)), names)
    table = names["table"]
    assert list(table) == RECONSTRUCTION
    assert list(table.layer) == [0, 2]
    assert (table.fvu_global < 1).all()
    assert names["arrays"]["probs"].shape == (2, 32)
