"""Single-layer dictionaries by name: made here, found, measured at all layers, and for Gemma 2."""

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_given import SETTINGS, given_of, key_of
from test_pipeline import CONTEXT, run_of

from mlsae_book import dictionaries, experiments, stages
from mlsae_book.__main__ import main
from mlsae_book.tables import transfer
from mlsae_core import formats, pipeline, spec, status, store
from mlsae_core.analysis import distributions
from mlsae_core.sae import MLSAE
from mlsae_core.spec import Experiment, SpecError, load_experiment

BOOK = Path(__file__).parents[1] / "book"
NAME = "neox-6l-128d-scope"
X = torch.randn(20, 16, generator=torch.Generator().manual_seed(3)) * 2


def trainings(inputs, layers=(0, 1, 2), **changes):
    changes = {"activation": "batchtopk", "standardize": False} | changes
    runs = [({"layers": [n]}, run_of(inputs, layers=[n], **changes)) for n in layers]
    return Experiment("three", tuple(runs))


@pytest.fixture
def made(inputs, data):
    return dictionaries.make(trainings(inputs), "three")


def dense(sae, x):
    values, indices = sae.encode(x)
    return torch.zeros(len(x), sae.n_latents).scatter(1, indices, values)


# --- made and found -------------------------------------------------------------------------------


def test_what_is_read_by_name_has_the_latents_of_what_was_trained(inputs, data, made):
    assert made == data / "dictionaries" / "three"
    session = pipeline.Session("read-only")
    facts = json.loads((made / "training.json").read_text())
    read = session.sae(given_of(inputs, "three"))
    for number, (labels, run) in enumerate(trainings(inputs).runs):
        trained, layer = session.sae(run), labels["layers"][0]
        assert (made / f"layer_{layer}" / "params.npz").is_file()
        alone = session.sae(given_of(inputs, "three", layers=[layer]))
        expected = dense(trained, X).detach()
        assert 0 < (expected > 0).sum() < expected.numel()
        for sae in (read.saes[number], alone, MLSAE.from_pretrained(made / f"layer_{layer}")):
            torch.testing.assert_close(dense(sae, X).detach(), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(sae(X).recon, trained(X).recon, rtol=0, atol=1e-5)
        assert facts["layers"][str(layer)]["train"] == pipeline.run_key(run)[0]
        assert facts["layers"][str(layer)]["tokens"] == 256
    assert facts["spec"]["layers"] == [0, 1, 2]
    assert facts["commit"] == store.provenance()["commit"]


def test_a_name_stands_for_the_content_of_its_folder(inputs, data, made):
    assert key_of(given_of(inputs, "three")) == key_of(given_of(inputs, made))
    (data.parent / "three").mkdir()  # a folder of the reader's does not stand before it
    assert store.dictionary_folder("three") == made
    made.rename(made.with_name("other"))
    assert key_of(given_of(inputs, "other")) == key_of(
        given_of(inputs, data / "dictionaries/other")
    )
    (data / "dictionaries" / "other" / "training.json").unlink()
    with pytest.raises(SpecError, match=r"name under data/dictionaries \(none yet\), got other; "):
        key_of(given_of(inputs, "other"))


@pytest.mark.parametrize("outside", ["../three", "x/../../three", "..", "."])
def test_a_name_does_not_lead_out_of_the_folder(data, made, outside):
    (data / "dictionaries" / "x").mkdir()
    for place in (data, data / "dictionaries"):
        (place / "training.json").write_text("{}")
    made.rename(data / "three")
    if "three" in outside:
        with pytest.raises(SpecError, match="expected a folder or a hub id"):
            store.dictionary_folder(outside)
    else:  # where the reader is
        assert store.dictionary_folder(outside) == Path(outside)
    with pytest.raises(SpecError, match=r"name: expected one without a path, .* got "):
        dictionaries.make(Experiment("none", ()), outside)


@pytest.mark.parametrize("name", ["", " ", "x ", ".x", "a\nb", "a\x1b[31mb", "~/x", "/x"])
def test_what_is_no_plain_name_is_refused(data, made, name):
    """An empty one would be the folder of all sets, which `--force` then replaces."""
    with pytest.raises(SpecError, match=r"name: expected one without a path, .* got '"):
        dictionaries.make(Experiment("none", ()), name, force=True)
    assert [path.name for path in (data / "dictionaries").iterdir()] == ["three"]


def test_a_set_says_of_what_other_release_its_text_was(inputs, data, talk):
    experiment = trainings(inputs, data={"path": "talk", "context_length": CONTEXT})
    log = dataclasses.replace(experiment, analyses=(), weights=False)
    made = experiments.materialise(log, ship=True).artefacts["train"]
    shutil.rmtree(store.STORE)
    talk.append("two 2.10 → 3.0")  # logs are found, and weights trained again
    facts = json.loads((dictionaries.make(experiment, "three") / "training.json").read_text())
    for (_, shipped), layer in zip(made, facts["layers"].values(), strict=True):
        assert layer["differs"] == "two 2.10 → 3.0"
        assert layer["train"] != shipped.key
    talk.clear()
    folder = dictionaries.make(experiment, "three", force=True)
    facts = json.loads((folder / "training.json").read_text())
    assert [layer["train"] for layer in facts["layers"].values()] == [one.key for _, one in made]
    assert not any("differs" in layer for layer in facts["layers"].values())


def test_where_no_set_can_be_is_said_before_anything_is_trained(data):
    with pytest.raises(SpecError, match="a name of at most 200 bytes"):
        dictionaries.make(Experiment("none", ()), "ä" * 101)
    (data / "dictionaries").write_text("mine")
    with pytest.raises(SpecError, match="dictionaries: expected a folder, got a file; move it"):
        dictionaries.make(Experiment("none", ()), "set")
    assert (data / "dictionaries").read_text() == "mine"


def test_an_unknown_name_is_one_line_that_has_the_known_ones(inputs, made):
    message = r"a folder or a hub id `owner/name`, or a name .* \(three\), got thre; relative"
    with pytest.raises(SpecError, match=message):
        pipeline.Session().evaluate(given_of(inputs, "thre"), SETTINGS)


def test_only_what_was_made_here_is_replaced_and_only_by_force(inputs, data, made, capsys):
    experiment = data.parent / "three.yml"
    fields = {**spec.flat(trainings(inputs).runs[0][1]), "layers": [0]}
    experiment.write_text(yaml.safe_dump({"run": fields, "sweep": {"layers": [[0], [1]]}}))
    command = ["dictionaries", str(experiment), "--name", "three"]
    assert main(command) == 2
    assert "is there; replace it with --force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert sorted(path.name for path in made.glob("layer_*")) == ["layer_0", "layer_1"]
    (data / "dictionaries" / "mine").mkdir()
    (data / "dictionaries" / "mine" / "notes").touch()
    with pytest.raises(store.StoreError, match=r"a folder with training\.json, as written"):
        dictionaries.make(trainings(inputs), "mine", force=True)
    assert (data / "dictionaries" / "mine" / "notes").is_file()


def test_other_experiments_make_no_set(inputs, data):
    one, *_ = trainings(inputs).runs
    several = ({}, run_of(inputs, activation="batchtopk", standardize=False))
    for runs, got in (((several,), "0, 1, 2"), ((one, one), "0")):
        with pytest.raises(SpecError, match=f"one of each layer, got layers {got}$"):
            dictionaries.make(Experiment("no set", runs), "no")
    other = trainings(inputs, [1], k=5).runs
    with pytest.raises(SpecError, match="that differ in their layer alone"):
        dictionaries.make(Experiment("no set", (one, *other)), "no")
    with pytest.raises(SpecError, match=r"batchtopk or jumprelu .* got topk and false"):
        dictionaries.make(trainings(inputs, activation="topk"), "no")
    assert not list(data.iterdir())  # nothing was trained in vain


# --- at all layers --------------------------------------------------------------------------------


def test_latents_of_one_layer_are_distributed_over_all(inputs, made):
    session, run = pipeline.Session(), given_of(inputs, "three", layers=[1])
    found = load_file(session.make("everywhere", run, SETTINGS).file("distributions.safetensors"))
    everywhere = given_of(inputs, made / "layer_1")
    source = session.source(everywhere, SETTINGS)
    size = pipeline.EVALUATION_BATCH_TOKENS // 8
    expected, _ = distributions(source, session.sae(everywhere), size, progress=False)
    assert found["counts"].shape == (3, 32)
    for name, array in expected.items():
        assert torch.equal(found[name].nan_to_num(-1), array.nan_to_num(-1)), name
    own = load_file(session.distributions(run, SETTINGS).file("distributions.safetensors"))
    assert torch.equal(own["counts"][0], found["counts"][1])
    assert (found["counts"].sum(1) > 0).all()


def test_vectors_of_other_layers_are_moved_to_mean_and_spread_of_ones_own(inputs, made):
    session, run = pipeline.Session(), given_of(inputs, "three", layers=[1])
    source, sae = session.source(run, SETTINGS), session.sae(run)
    moved = transfer.matched(source, sae, 8)
    [batch] = transfer.everywhere(source).batches(1000)
    x = batch.source
    means = x.mean(1, keepdim=True)
    spreads = (x - means).square().sum(-1).mean(1).sqrt()
    expected = torch.stack(
        [(x[n] - means[n]) * spreads[1] / spreads[n] + means[1] for n in range(3)]
    )
    for layer in range(3):  # what is encoded is the same; the error grows with the spread
        torch.testing.assert_close(expected[layer].mean(0), means[1, 0], rtol=0, atol=1e-5)
        mine, plain = moved(x), sae(expected[layer])
        values, indices = (part[layer] for part in mine.topk)
        found = torch.zeros(x.shape[1], 32).scatter(1, indices, values)
        torch.testing.assert_close(found, dense(sae, expected[layer]), rtol=0, atol=1e-4)
        error = (mine.recon[layer] - x[layer]).norm(dim=1) / spreads[layer]
        plain_error = (plain.recon - expected[layer]).norm(dim=1) / spreads[1]
        torch.testing.assert_close(error, plain_error, rtol=1e-3, atol=1e-4)
    settings = dataclasses.replace(SETTINGS, ablations=False)
    tables = [
        pd.read_csv(session.make(stage, run, settings).file("transfer.csv"))
        for stage in ("transfer", "transfer_matched")
    ]
    same = [table[table.trained_here].to_numpy(float) for table in tables]
    assert same[0] == pytest.approx(same[1], rel=1e-4)
    assert (tables[0].fvu_global - tables[1].fvu_global).abs()[[0, 2]].min() > 1e-3
    counts = [
        load_file(session.make(stage, run, settings).file("distributions.safetensors"))["counts"]
        for stage in ("everywhere", "everywhere_matched")
    ]
    assert torch.equal(counts[0][1], counts[1][1])
    assert not torch.equal(counts[0], counts[1])


def test_a_tuned_model_is_read_with_the_norms_of_the_base_model(inputs, made, monkeypatch):
    text = {"path": str(inputs / "text.jsonl"), "context_length": 8}
    models = [str(inputs / name) for name in ("gpt_neox", "gpt2")]
    targets = transfer.base_and_tuned(*models, text, prompt_tokens=3, rescaled=True)
    assert list(targets)[-1] == "tuned, rescaled"
    run, session = given_of(inputs, "three"), pipeline.Session()
    own, tuned = (
        transfer.mean_norms(session.source(dataclasses.replace(run, model=t.model), SETTINGS))
        for t in list(targets.values())[:2]
    )
    seen, plain = [], transfer.rescaled

    def spy(sae, factors):
        seen.append(factors)
        return plain(sae, factors)

    monkeypatch.setattr(transfer, "rescaled", spy)
    settings = dataclasses.replace(SETTINGS, ablations=False)
    table = experiments.tables(
        [
            ({"target": name}, stages.transfer(session, run, settings, targets[name]))
            for name in ("base, given text", "tuned, given text", "tuned, rescaled")
        ],
        "transfer.csv",
    )
    torch.testing.assert_close(seen, [own / tuned])
    fvu = table.pivot_table(index="layer", columns="target", values="fvu_global")
    assert (fvu["tuned, given text"] - fvu["tuned, rescaled"]).abs().min() > 1e-3
    x = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(2))
    sae, factors = session.sae(run), torch.tensor([0.5, 1.0, 3.0]).double()
    moved = plain(sae, factors)(x)
    expected = sae(x * factors[:, None, None].float())
    assert torch.equal(moved.topk.values, expected.topk.values)
    torch.testing.assert_close(moved.recon, expected.recon / factors[:, None, None].float())


def test_shares_at_the_own_layer_by_hand():
    def read(layer, probs):
        probs = torch.tensor(probs, dtype=torch.float64)
        names = ("probs", "probs_permuted", "probs_gaussian", "probs_by_total")
        live = probs.isfinite().all(0)
        arrays = dict.fromkeys(names, probs) | {"active_tokens": live.long()}
        arrays["mean_layer"] = torch.arange(2.0).double() @ probs
        return {"layers": [layer]}, arrays, {}

    nan = float("nan")
    as_they_are = [read(0, [[0.5, 1.0, nan], [0.5, 0.0, nan]]), read(1, [[0.5], [0.5]])]
    moved = [read(0, [[1.0, 1.0], [0.0, 0.0]]), read(1, [[0.25], [0.75]])]
    table = transfer.own_shares(as_they_are, moved).set_index("trained")
    assert table.loc["0"].tolist() == pytest.approx([0.75, 1.0, 0.75, 0.25])
    assert table.loc["1"].tolist() == pytest.approx([0.5, 0.75, 0.5, 0.5])
    assert list(table) == ["own", "own_moved", "own_gaussian", "last"]
    cells = transfer.heatmaps(as_they_are, moved, most=2)
    assert list(cells["run"].unique()) == ["SAE of layer 0", "SAE of layer 1"]
    one = cells[(cells.run == "SAE of layer 1") & (cells.of == "vectors moved")]
    assert one.sort_values("layer").probability.tolist() == [0.25, 0.75]
    assert len(cells) == 3 * 2 * 3
    assert cells.probability.notna().all()


def test_a_matrix_may_lack_dictionaries_of_some_layers():
    def row_of(trained, values):
        here = [layer == trained for layer in range(len(values))]
        return pd.DataFrame({"layer": range(len(values)), "kl": values, "trained_here": here})

    rows = [row_of(2, [5.0, 4.0, 2.0, 9.0]), row_of(1, [3.0, 1.0, 6.0, 9.0])]
    cells = transfer.matrix(pd.concat(rows))
    assert set(cells.trained) == {"1", "2"}
    row = transfer.summary(cells).loc["kl"]
    assert (row.own, row.other, row.spread_own) == (1.5, 4.5, 1.0)
    assert (row.best_at_own, row.layers) == (2, 2)
    assert pd.isna(row.mlsae)


# --- those that are shipped, and Gemma 2 ----------------------------------------------------------


def test_the_shipped_set_is_of_the_trainings_that_are_declared():
    facts = json.loads((store.DATA / "dictionaries" / NAME / "training.json").read_text())
    declared = load_experiment(BOOK / "experiments/scope_training.yml").runs
    keys = [pipeline.run_key(run)[0] for _, run in declared]
    assert [of["train"] for of in facts["layers"].values()] == keys
    assert facts["spec"] == spec.flat(declared[0][1]) | {"layers": list(range(6))}
    commits = {facts["commit"]} | {of["commit"] for of in facts["layers"].values()}
    assert not any(commit.endswith("-dirty") for commit in commits)


def test_shipped_results_are_of_the_shipped_set_and_agree(monkeypatch):
    monkeypatch.chdir(BOOK)
    together, alone = (
        experiments.materialise(load_experiment(f"experiments/{name}.yml"), "read-only")
        for name in ("scope", "scope_alone")
    )
    content = store.dictionary_key(NAME)
    for made in (together, alone):
        for _, artefact in itertools.chain(*made.artefacts.values()):
            assert artefact.meta["parents"]["dictionary"] == content
    matrix = experiments.tables(alone.artefacts["transfer"], "transfer.csv")
    own = matrix[matrix.trained_here].reset_index(drop=True)
    names = ["layer", "fvu_global", "delta_ce", "kl", "l0"]
    pd.testing.assert_frame_equal(own[names], together.evaluation[names], rtol=1e-4, atol=1e-5)
    [(_, arrays, _)] = experiments.all_distributions(together)
    for layer, (_, found, _) in enumerate(experiments.all_distributions(alone, "everywhere")):
        n = found["counts"].shape[1]
        mine = arrays["counts"][layer, layer * n : layer * n + n]
        assert (found["counts"][layer] - mine).abs().sum() <= 1e-4 * mine.sum()


def test_two_lines_make_the_experiments_those_of_gemma_2(monkeypatch, tmp_path):
    chapter = (BOOK / "gemma_scope.py").read_text(encoding="utf-8")
    [block] = re.findall(r"# ```yaml\n(.*?)# ```", chapter, re.DOTALL)
    lines = [line.removeprefix("# ") for line in block.splitlines()]
    assert len(lines) == 2

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    for name in ("scope", "scope_alone"):
        written = (BOOK / f"experiments/{name}.yml").read_text(encoding="utf-8").splitlines()
        for line in lines:
            field = line.partition(":")[0]
            [place] = [n for n, old in enumerate(written) if old.startswith(f"{field}:")]
            written[place] = line
        (tmp_path / "gemma.yml").write_text("\n".join(written))
        declared = load_experiment(tmp_path / "gemma.yml")
        for _, run in declared.runs:
            assert run.model.path == "google/gemma-2-2b"
            named = [int(formats.LAYER.search(folder)[1]) for folder in run.dictionary.folders]
            assert set(run.site.indices(26)) <= set(named) == set(range(6))
        with pytest.raises(SpecError, match=r"gemma-scope-2b-pt-res .* cannot be had: no net"):
            status.status(dataclasses.replace(declared, analyses=("evaluate",)))
