"""Tables and charts of tuned lenses, on lenses and results made by hand."""

import json

import pandas as pd
import pytest
import torch
from test_charts import assert_drawn, chosen
from tiny_lm import D_MODEL, N_LAYERS, tiny_lm, tiny_tokens

from mlsae_book import tune
from mlsae_book.charts import lenses as charts
from mlsae_book.tables import lenses
from mlsae_core.lens import Lens


@pytest.fixture
def lens(data):
    """A lens under data/lenses whose translator i stretches one axis by i + 2."""
    weight = torch.zeros(N_LAYERS, D_MODEL, D_MODEL)
    weight[:, 0, 0] = torch.arange(N_LAYERS) + 1.0
    made = Lens(weight, torch.zeros(N_LAYERS, D_MODEL), model_name="tiny")
    folder = data / "lenses" / "tiny"
    made.write(folder, safetensors=True)
    facts = {
        "spec": {"tokens": 512},
        "commit": "abc",
        "kl_before": [3, 2, 1],
        "kl_after": [2, 1, 0],
    }
    (folder / "training.json").write_text(json.dumps(facts))
    return made


def test_conditions_and_training_by_hand(lens):
    table = lenses.conditions()
    values = {name: list(part.condition) for name, part in table.groupby("alignment")}
    assert values["aligned"] == pytest.approx([3, 4, 1])
    assert values["as-released"] == pytest.approx([2, 3, 4])
    assert list(table.layer) == [0, 1, 2] * 2
    rows = lenses.training()
    assert list(rows.logit_lens) == [3, 2, 1]
    assert list(rows.tuned_lens) == [2, 1, 0]
    assert set(rows.model) == {"tiny"}
    chart = charts.conditions(table, "t").to_dict()
    assert chart["params"] == [{"name": "lens_model", "value": "tiny"}]  # nothing to choose


def test_divergences_are_those_of_each_lens(lens):
    lm, batches = tiny_lm(), [tiny_tokens()]
    table = lenses.divergences(lm, "tiny", iter(batches))
    for name, made in {
        "logit lens": Lens.identity(),
        "aligned": lens,
        "as-released": Lens(lens.weight, lens.bias, "as-released"),
    }.items():
        expected = tune.layer_divergences(lm, made, batches).tolist()
        assert list(table[table.lens == name].kl) == pytest.approx(expected)
    chart = charts.divergences(table, "t").to_dict()
    shown = chart["datasets"][chart["data"]["name"]]
    exact = [row for row in shown if row["layer"] == N_LAYERS - 1]
    assert {row["lens"] for row in exact} == {"as-released"}  # no 0 on a log scale


def test_cases_stand_beside_each_other():
    def read(share):
        probs = torch.tensor([[share, 1.0], [1 - share, 0.0]])
        names = ("probs", "probs_by_total", "probs_permuted", "probs_gaussian")
        return dict.fromkeys(names, probs), {}

    made = [({"case": "identity"}, *read(0.5)), ({"case": "as-released"}, *read(0.25))]
    spread = lenses.spread(made)
    assert list(spread.case) == ["identity", "as-released"]
    assert list(spread.largest) == pytest.approx([0.75, 0.875])


def test_prompts_say_how_many_of_their_latents_are_at_one_layer():
    rows = [
        ("a", "p", 7, 0),
        ("a", "p", 7, 1),
        ("a", "p", 8, 2),
        ("a", "q", 7, 0),
        ("b", "p", 9, 0),
    ]
    table = pd.DataFrame(rows, columns=["lens", "prompt", "latent", "layer"])
    found = lenses.in_prompts(table.assign(order=0, probs=0.25, tokens=1), ["p"])
    assert list(found.run) == ["a", "a", "a", "b"]
    assert list(found.note) == ["50% at one layer only"] * 3 + ["100% at one layer only"]
    assert set(found.of) == {"p"}
    assert set(found.probability) == {0.25}


def test_metrics_are_chosen_by_name():
    table = pd.DataFrame(
        {"case": ["a", "b"] * 2, "layer": 0, "metric": ["kl"] * 2 + ["l1"] * 2, "value": range(4)}
    )
    (param,) = charts.metrics(table, "t").to_dict()["params"]
    assert param["bind"]["options"] == ["kl", "l1"]
    assert param["bind"]["labels"][0].startswith("KL")


def test_marks_are_those_of_the_chosen_model_and_metric():
    table = pd.DataFrame(
        {"model": ["m"] * 4 + ["n"] * 4, "alignment": ["aligned", "as-released"] * 4}
    ).assign(layer=[0, 0, 1, 1] * 2, condition=[2.0, 3, 4, 5, 6, 7, 8, 9])
    title = "Condition number of I + W (ratio, log scale)"
    for model, rows in table.groupby("model"):
        spec = chosen(charts.conditions(table, "t").to_dict(), lens_model=model)
        where = {"alignment": rows.alignment, "Residual stream after block": rows.layer}
        assert_drawn(spec, "point", **where, **{title: rows.condition})
    table = pd.DataFrame({"lens": ["a", "b"] * 2, "layer": [0, 0, 1, 1], "kl": [1.0, 2, 3, 0]})
    title, rows = "KL to the model's prediction (nats per token, log scale)", table[:3]
    spec = charts.divergences(table, "t").to_dict()
    where = {"lens": rows.lens, "Residual stream after block": rows.layer}
    assert_drawn(spec, "point", **where, **{title: rows.kl})
    table = pd.DataFrame({"case": ["a", "b"] * 2, "layer": [0, 1, 1, 0], "value": [1.0, 2, 3, 4]})
    table["metric"] = ["kl", "kl", "l1", "l1"]
    for metric, rows in table.groupby("metric"):
        spec = chosen(charts.metrics(table, "t").to_dict(), lens_metric=metric)
        assert_drawn(spec, "point", case=rows.case, Layer=rows.layer, value=rows.value)
