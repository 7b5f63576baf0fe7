"""What is shipped can be computed again from nothing, and how far the new numbers are from it."""

import json

import numpy as np
import pandas as pd
import pytest
from test_pipeline import CONTEXT, SETTINGS, run_of

from mlsae_book import experiments, reproduce
from mlsae_book.__main__ import main
from mlsae_core import pipeline, store
from mlsae_core.spec import Experiment, load_experiment

LIVE = store.ROOT / "book" / "experiments" / "live.yml"
#: Another processor adds in another order, and Adam carries that on.
TOLERANCE = 0.02


def test_a_shipped_run_is_computed_again_within_the_tolerance(tmp_path, monkeypatch):
    """The smallest of the shipped experiments, whole: text, tokens, training."""
    monkeypatch.setattr(store, "STORE", tmp_path)
    experiment = load_experiment(LIVE)
    table = reproduce.reproduce(experiment)
    assert list(table.file) == ["log.csv"]
    shipped = pd.read_csv(store.SHIPPED / "train" / table.key[0] / "log.csv")
    anew = pd.read_csv(tmp_path / "reproduced" / "train" / table.key[0] / "log.csv")
    assert len(shipped) == len(anew) > 50
    assert abs(anew.fvu.iloc[-10:].mean() / shipped.fvu.iloc[-10:].mean() - 1) < TOLERANCE
    # A second call finds what the first one made.
    monkeypatch.setattr("mlsae_core.train.train", None)
    pd.testing.assert_frame_equal(reproduce.reproduce(experiment), table)
    assert reproduce.estimate([experiment]) == 0


def test_what_is_computed_of_another_release_of_a_text_is_compared_with_what_is_shipped(
    inputs, data, talk
):
    run = run_of(inputs, data={"path": "talk", "context_length": CONTEXT})
    experiment = Experiment("t", (({}, run),), SETTINGS, analyses=("evaluate",))
    experiments.materialise(experiment, ship=True)
    table = reproduce.reproduce(experiment)
    assert table.deviation.tolist() == [0.0] * 3
    talk.append("two 2.10 → 3.0")
    other = reproduce.reproduce(experiment)
    assert other.file.tolist() == table.file.tolist()
    assert (other.deviation[other.file != "config.json"] > 0).all()
    assert not set(other.key) & set(table.key)


def test_where_nothing_is_shipped_nothing_is_computed(tmp_path, monkeypatch, capsys):
    reproduce.check_shipped([load_experiment(LIVE)])
    monkeypatch.setattr(store, "SHIPPED", tmp_path)
    monkeypatch.setattr(reproduce, "reproduce", None)
    assert main(["reproduce", str(LIVE)]) == 2
    assert "expected shipped results, got none to compare" in capsys.readouterr().err


def test_nothing_shipped_or_stored_is_read_while_recomputing():
    before = store.SHIPPED, store.STORE
    identity = pipeline.run_key(load_experiment(LIVE).runs[0][1])[0]
    assert store.find("train", identity) is not None
    with store.recomputing():
        assert store.find("train", identity) is None
    assert before == (store.SHIPPED, store.STORE)


def test_deviations_are_fractions_of_a_columns_largest_value(tmp_path):
    one = pd.DataFrame(
        {"layer": [0, 1], "fvu": [0.5, -2.0], "seconds": [1.0, 2.0], "t": ["a", "b"]}
    )
    other = one.assign(fvu=[0.6, -2.0], seconds=[5.0, 5.0])
    paths = [tmp_path / f"{name}.csv" for name in ("one", "other")]
    for table, path in zip((one, other), paths, strict=True):
        table.to_csv(path, index=False)
    found = reproduce.deviations(*paths)
    assert found.to_dict() == pytest.approx({"layer": 0, "fvu": 0.05, "t": 0})
    other.assign(t="c").to_csv(paths[1], index=False)
    assert reproduce.deviations(*paths)["t"] == np.inf
    other.assign(fvu=[np.nan, 1]).to_csv(paths[1], index=False)
    assert reproduce.deviations(*paths)["fvu"] == np.inf
    other.drop(columns="t").head(1).to_csv(paths[1], index=False)
    assert set(reproduce.deviations(*paths)) == {np.inf}


def test_fractions_of_latents_are_compared_as_they_are(tmp_path):
    paths = [tmp_path / f"{name}.csv" for name in ("one", "other")]
    for path, dead in zip(paths, (0.001, 0.002), strict=True):
        pd.DataFrame({"dead": [dead], "fvu": [dead]}).to_csv(path, index=False)
    assert reproduce.deviations(*paths).to_dict() == pytest.approx({"dead": 0.001, "fvu": 1.0})


def test_the_last_digits_are_no_deviation(tmp_path):
    paths = [tmp_path / f"{name}.csv" for name in ("one", "other")]
    for path, last in zip(paths, (0.123456, 0.123457), strict=True):
        pd.DataFrame({"kl": [last], "fvu": [0.5]}).to_csv(path, index=False)
    assert reproduce.deviations(*paths).to_dict() == {"kl": 0, "fvu": 0}


def test_nested_json_is_compared_leaf_by_leaf(tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text(json.dumps({"a": {"value": 2.0}, "b": [1, 2]}))
    other.write_text(json.dumps({"a": {"value": 1.5}, "b": [1, 2]}))
    assert reproduce.deviations(one, other).to_dict() == {"a.value": 0.25, "b.0": 0, "b.1": 0}
