"""The book's stages on a tiny model: what they write, and on what their keys depend."""

import json

import pandas as pd
import pytest
from test_lens import random_lens
from test_pipeline import CONTEXT, SETTINGS, run_of

from mlsae_book import experiments, stages, surrogates
from mlsae_book.tables import carried, margins
from mlsae_book.tables.transfer import Target
from mlsae_core import pipeline, store
from mlsae_core.spec import EvaluateSpec, Experiment

pytestmark = pytest.mark.usefixtures("data")


def test_survival_and_ablations_are_stages_of_a_run(inputs):
    run = run_of(inputs)
    session = pipeline.Session()
    found = session.make("persistence", run, SETTINGS)
    pairs = pd.read_csv(found.file("pairs.csv")).set_index("of")
    assert pairs.l0["measured"] <= 4
    assert pairs.single["measured"] == pytest.approx(pairs.single["k"])
    table = pd.read_csv(session.make("effects", run, SETTINGS).file("effects.csv"))
    assert set(table.columns) > {"total", "direct", "blocks_low"}


def test_margins_are_a_stage_whose_measured_share_is_that_of_persistence(inputs):
    run, session = run_of(inputs), pipeline.Session()
    made = session.make("margins", run, SETTINGS)
    table = pd.read_csv(made.file("selections.csv")).set_index(["of", "selection"])
    pairs = pd.read_csv(session.make("persistence", run, SETTINGS).file("pairs.csv"))
    for selection, share in pairs.set_index("of").single.items():
        if selection in carried.MARGINS:
            assert table.single["measured", selection] == pytest.approx(share)
    treated = pd.read_csv(made.file("treated.csv"))
    assert set(treated.of) == {*carried.UPDATES, margins.CHANCE}


def test_several_dictionaries_are_measured_together(inputs):
    session = pipeline.Session()
    shared = run_of(inputs)
    each = [run_of(inputs, layers=[layer]) for layer in range(3)]
    again = run_of(inputs, layers=[1], seed=1)
    one = stages.together(session, [shared], SETTINGS)
    many = stages.together(session, each, SETTINGS)
    tables = [pd.read_csv(a.file("together.csv")) for a in (one, many)]
    assert [set(t.of) for t in tables] == [{"reconstruction", "mean"}, {"reconstruction"}]
    assert tables[0].delta_ce[0] != tables[1].delta_ce[0]
    other = stages.together(session, [*each[:2], run_of(inputs, layers=[2], seed=1)], SETTINGS)
    assert len({one.key, many.key, other.key}) == 3
    lives = stages.lifetimes(session, shared, each, {1: again}, SETTINGS)
    matches = pd.read_csv(lives.file("matches.csv"))
    assert set(matches.of) == {"next layer", "other tokens", "another seed", "MLSAE"}
    chains = pd.read_csv(lives.file("chains.csv"))
    sums = chains.groupby(["of", "least"], dropna=False).share.sum()
    assert sums.tolist() == pytest.approx([1.0] * len(sums))
    read_only = pipeline.Session("read-only")
    assert stages.together(read_only, each, SETTINGS).path == many.path


def test_every_surrogate_is_trained_measured_and_shipped(inputs):
    runs = ({"seed": 0}, run_of(inputs)), ({"seed": 1}, run_of(inputs, seed=1))
    experiment = Experiment("Surrogates", runs, SETTINGS)
    made = experiments.surrogates(experiment, ship=True)
    labels = [(labels["condition"], labels["seed"]) for labels, _ in made]
    assert labels == [(condition, seed) for seed in (0, 1) for condition in surrogates.CONDITIONS]
    assert len({artefact.key for _, artefact in made}) == len(labels)
    for _, artefact in made:
        table = pd.read_csv(artefact.file("surrogate.csv")).set_index("measure").value
        assert 0 < table["single"] <= 1
        assert 0 < table["live"] <= 1
        assert (store.SHIPPED / "surrogate" / artefact.key / "surrogate.csv").is_file()
    assert experiments.surrogates(experiment, "read-only")[0][1].path.is_relative_to(store.SHIPPED)


def test_a_dictionary_is_read_in_a_basis_that_it_has_not_seen(inputs, data):
    random_lens().write(data / "lens")
    runs = {"identity": run_of(inputs), "lens": run_of(inputs, basis=str(data / "lens"))}
    experiment = Experiment("x", tuple(({"case": c}, run) for c, run in runs.items()), SETTINGS)
    bases = {"identity": ["identity", str(data / "lens")], "lens": ["identity", str(data / "lens")]}
    table = experiments.crossed(experiment, bases, ship=True)
    found = table[table.ratio == "Eq. 11"].set_index(["case", "basis"]).value
    session = pipeline.Session()
    for case, run in runs.items():  # in its own basis, what is measured of it anyway
        numbers = session.distributions(run, SETTINGS).file("variances.json").read_text()
        assert found[case, run.site.basis] == json.loads(numbers)["ratio_latent"]["value"]
    assert len(set(found)) == 4
    assert len(list((store.SHIPPED / "crossed").iterdir())) == 4


def test_overlap_is_measured_of_the_runs_own_text(inputs):
    settings = EvaluateSpec(tokens=128)
    artefact = stages.overlap(pipeline.Session(), run_of(inputs), settings)
    shares = pd.read_csv(artefact.file("shares.csv")).share
    assert shares.is_monotonic_decreasing
    apart = pd.read_csv(artefact.file("apart.csv"))
    assert apart.share.sum() == pytest.approx(1)


def test_a_result_in_whose_making_any_run_read_another_release_of_its_text_has_its_own_key(
    inputs, talk, monkeypatch
):
    for name in ("_together", "_lifetimes", "_transfer"):
        monkeypatch.setattr(stages, name, lambda folder, *_, **__: {})
    talked = {"path": "talk", "context_length": CONTEXT}
    plain = [run_of(inputs, layers=[layer]) for layer in range(3)]
    other = run_of(inputs, layers=[1], data=talked)
    shared, target = run_of(inputs), Target(plain[0].model, data=other.data)

    def made():
        session = pipeline.Session()
        several = {
            "together": stages.together(session, [plain[0], other, plain[2]], SETTINGS),
            "lifetimes": stages.lifetimes(session, shared, plain, {1: other}, SETTINGS),
            "read": stages.transfer(session, shared, SETTINGS, target),
            "trained": stages.transfer(session, run_of(inputs, data=talked), SETTINGS,
                                       Target(plain[0].model, data=plain[0].data)),
            "none": stages.together(session, plain, SETTINGS),
        }  # fmt: skip
        return several.items()

    talk.append("two 2.10 → 3.0")
    before = {name: artefact.key for name, artefact in made()}
    for name, artefact in made():
        assert ("differs" in artefact.meta["parents"]) == (name != "none")
    talk.clear()
    for name, artefact in made():
        assert "differs" not in artefact.meta["parents"]
        assert (artefact.key == before[name]) == (name == "none")
