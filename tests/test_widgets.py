"""Every panel driven as a reader would: each control is changed, and what is shown looked at."""

import dataclasses
import json

import ipywidgets
import pandas as pd
import pytest
import torch
from test_pipeline import SETTINGS, run_of
from tiny_lm import tiny_lm

from mlsae_book import charts, tables, widgets
from mlsae_book.tables import layers
from mlsae_core import pipeline
from mlsae_core.spec import SpecError


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    """The charts that were drawn, as specifications; what was said before is taken away."""
    found = []

    def show(self, chart):
        assert self.outputs == ()
        found.append(chart.to_dict())

    monkeypatch.setattr(ipywidgets.Output, "append_display_data", show)
    return found


def control(panel, description):
    """The control of a panel with this description."""
    parts = list(panel.children)
    parts += [inner for part in parts for inner in getattr(part, "children", ())]
    [found] = [part for part in parts if getattr(part, "description", None) == description]
    return found


def said(panel):
    """What a panel says in words."""
    return "".join(output["text"] for output in panel.children[-1].outputs)


def rows(spec, *columns):
    """The first table of a chart that has these columns."""
    parts = [pd.DataFrame(part) for part in spec["datasets"].values()]
    found, *_ = [part for part in parts if set(columns) <= set(part)]
    return found


def pick(choice, label):
    """Choose an option by what the reader sees of it."""
    choice.label = label


def test_a_prompts_norms_are_those_of_the_typed_prompt(shown):
    panel = widgets.prompt_norms(lm := tiny_lm(), "w5 w6")
    box = control(panel, "Prompt")
    assert not box.continuous_update  # a prompt is run when it is finished
    box.value = "w7 w8 w9"
    for spec, prompt in zip(shown, ("w5 w6", "w7 w8 w9"), strict=True):
        assert spec["title"]["text"] == f"Residual-stream norms of {lm.name}"
        found, expected = rows(spec, "norm"), tables.prompt_norms(lm, [prompt])
        pd.testing.assert_frame_equal(found[list(expected)], expected, rtol=1e-3, check_dtype=False)
    box.value = ""
    assert said(panel).startswith("prompt: expected 1 to 32 tokens, got 0")
    assert len(shown) == 2
    box.value = "w7"
    assert set(rows(shown[2], "norm").prompt) == {"w7"}
    assert said(panel) == ""


def test_the_chosen_metric_is_drawn_alone(shown):
    table = pd.DataFrame({"layer": [0, 1], "fvu_global": [0.1, 0.2], "kl": [3.0, 4.0]})
    panel = widgets.metric_by_layer(table, ["fvu_global", "kl"], "A title")
    choice = control(panel, "Metric")
    assert [label for label, _ in choice.options] == [
        charts.METRICS["fvu_global"],
        charts.METRICS["kl"],
    ]
    pick(choice, charts.METRICS["kl"])
    for spec, metric in zip(shown, ("fvu_global", "kl"), strict=True):
        found = rows(spec, "value")
        assert set(found.metric) == {metric}
        assert found.value.tolist() == table[metric].tolist()
        assert spec["title"]["text"] == "A title"


def test_a_run_of_the_chosen_sparsity_and_size_is_trained(shown, monkeypatch, inputs, data):
    run = run_of(inputs)
    panel = widgets.live_training(run, (2, 4), (2, 3, 8))
    k, factor, button = (control(panel, name) for name in ("k", "R", "Train"))
    assert (k.options, k.value) == ((2, 4), 4)
    assert (factor.options, factor.value) == ((2, 3, 8), 2)
    assert shown == []  # nothing is trained before the button is pressed
    k.value, factor.value = 2, 3
    assert shown == []
    progress, left = panel.children[1].children
    told = []
    left.observe(lambda change: told.append((progress.value, change["new"])), "value")
    button.click()
    assert not button.disabled
    steps = run.train.tokens // run.train.batch_tokens
    assert [step for step, text in told if text] == [*range(1, steps)]
    assert told[0][1].startswith(f"step 1 of {steps}, about ")
    assert told[-1] == (steps, "")
    changed = dataclasses.replace(run.sae, k=2, expansion_factor=3)
    made = pipeline.Session("read-only").train(dataclasses.replace(run, sae=changed))
    assert pipeline.Session("read-only").sae(dataclasses.replace(run, sae=changed)).k == 2
    log = tables.long_log(pd.read_csv(made.file("log.csv")))
    assert shown[0]["title"]["text"] == "k = 2, R = 3"
    assert rows(shown[0], "fvu").fvu.tolist() == pytest.approx(log.fvu.tolist(), rel=1e-3)

    # the run that was trained last, whatever is chosen by now
    explore = control(panel, "Explore it")
    monkeypatch.setattr(widgets, "EXPLORED", 256)
    k.value = 4
    assert not explore.disabled
    explore.click()
    *_, found = panel.children
    frame, asked, answered = found.children
    assert "<iframe" in frame.value
    asked.value = '0 1 ["asset", "index"]'
    index = json.loads(answered.value.split(" ", 2)[2])["result"]
    assert len(index["latents"]["density"]) == 3 * 16
    asked.value = '0 2 ["run", "the cat"]'
    found_in = json.loads(answered.value.split(" ", 2)[2])["result"]
    assert len(found_in["codes"][0]["indices"]) == 2 * len(found_in["ids"])
    assert explore.disabled
    button.click()
    assert found not in panel.children

    def without_cards(*_):
        raise SpecError("cards: expected more")

    monkeypatch.setattr(widgets.live, "explorer", without_cards)
    explore.click()
    assert said(panel) == "cards: expected more\n"

    def refused(*_):
        assert button.disabled
        raise SpecError("k: expected less")

    monkeypatch.setattr(pipeline.Session, "train", refused)
    button.click()
    assert said(panel) == "k: expected less\n"  # and the explorer is gone
    assert not button.disabled
    assert explore.disabled
    assert len(shown) == 2


def distributions(seed):
    """Three layers, 120 latents, of which every tenth is dead."""
    generator = torch.Generator().manual_seed(seed)
    totals = torch.rand(3, 120, generator=generator)
    totals[:, ::10] = 0
    counts, active = (totals > 0).int(), 3 * (totals[0] > 0).int()
    probs = (totals.square() / totals.square().sum(0)).half()
    nulls = {f"probs_{null}": probs for null in ("permuted", "gaussian")}
    stored = {"probs": probs, "totals": totals, "counts": counts, "active_tokens": active}
    return layers.derived(stored | nulls)


def test_a_heatmap_is_of_the_chosen_run_weighting_and_number(shown):
    read = [({"k": 4, "R": 1}, distributions(0), {}), ({"k": 8, "R": 1}, distributions(1), {})]
    panel = widgets.heatmaps(read)
    run, weighting, most = (control(panel, name) for name in ("Run", "Tokens", "Latents"))
    assert [label for label, _ in run.options] == ["k = 4, R = 1", "k = 8, R = 1"]
    assert (most.value, most.min, most.max, most.step) == (300, 50, 600, 50)
    pick(weighting, "by activation")
    pick(run, "k = 8, R = 1")
    most.value = 50
    pick(weighting, "every token alike")
    for spec, (name, column, number) in zip(
        shown,
        [
            (0, "probs", 300),
            (0, "probs_by_total", 300),
            (1, "probs_by_total", 300),
            (1, "probs_by_total", 50),
            (1, "probs", 50),
        ],
        strict=True,
    ):
        label = ("k = 4, R = 1", "k = 8, R = 1")[name]
        assert spec["title"]["text"] == f"Distributions over layers, {label}"
        found, arrays = rows(spec, "probability"), read[name][1]
        assert found.latent.nunique() == min(number, 108)
        expected = [float(arrays[column][row.layer, row.latent]) for row in found.itertuples()]
        assert found.probability.tolist() == pytest.approx(expected, rel=1e-3)
    widgets.heatmaps([({}, distributions(0), {})])
    assert shown[-1]["title"]["text"] == "Distributions over layers, run"


def test_a_histogram_is_of_the_chosen_run_pairs_and_width(shown):
    low = [-1 + 0.25 * i for i in range(8)]
    frames = [
        {"run": run, "rows": "dictionary", "low": low, "high": [x + 0.25 for x in low]}
        | {"pairs": [first, 1, 1, 1, 1, 1, 1, 3], "maxima": [3, 1, 1, 1, 1, 1, 1, first]}
        for run, first in (("a", 1), ("b", 11))
    ]
    panel = widgets.cosines(pd.concat(map(pd.DataFrame, frames), ignore_index=True))
    run, which, width = (control(panel, name) for name in ("Run", "Which", "Bin width"))
    assert [label for label, _ in width.options] == ["0.01", "0.02", "0.04"]
    pick(run, "b")
    pick(which, "each row's largest")
    pick(width, "0.04")
    pick(width, "0.01")
    for spec, (name, shares) in zip(
        shown,
        [
            ("a", [2 / 10, 2 / 10, 2 / 10, 4 / 10]),
            ("b", [12 / 20, 2 / 20, 2 / 20, 4 / 20]),
            ("b", [4 / 20, 2 / 20, 2 / 20, 12 / 20]),
            ("b", [6 / 20, 14 / 20]),
            ("b", [3 / 20, *[1 / 20] * 6, 11 / 20]),
        ],
        strict=True,
    ):
        assert rows(spec, "share").share.tolist() == pytest.approx(shares, rel=1e-3)
        assert spec["title"]["text"] == f"Cosine similarities of decoder rows, {name}"


def test_variances_are_those_of_so_many_tokens(shown, inputs, data):
    from mlsae_book.tables import total_variance

    run, session = run_of(inputs), pipeline.Session()
    session.train(run)
    panel = widgets.total_variance(session, run, (64, 256))
    control(panel, "Tokens").value = 256
    sae = session.sae(run)
    for spec, tokens in zip(shown, (64, 256), strict=True):
        source = session.source(run, dataclasses.replace(SETTINGS, tokens=tokens))
        assert sum(batch.text.numel() for batch in source.batches(8)) == tokens
        codes = total_variance.codes(source, sae)
        expected = total_variance.by_rank(total_variance.terms(*codes, 32).latents)
        found = rows(spec, "variance")[list(expected)]
        assert len(found) == len(expected)
        assert found.variance.tolist() == pytest.approx(expected.variance.tolist(), abs=1e-3)
        assert spec["title"]["text"] == f"Eq. 14 on {tokens} tokens"
    assert len(rows(shown[0], "variance")) <= len(rows(shown[1], "variance"))


def test_the_latents_are_those_of_the_typed_prompt(shown, inputs, data):
    run, session = run_of(inputs), pipeline.Session()
    session.train(run)
    first, second = "the cat", "a dog and a cat"
    panel = widgets.prompt_layers(session, run, first)
    control(panel, "Prompt").value = second
    source, sae = session.source(run), session.sae(run)
    for spec, prompt in zip(shown, (first, second), strict=True):
        expected = layers.prompt_distributions(source, sae, [prompt])
        found = rows(spec, "activation")
        assert found.latent.tolist() == expected.latent.tolist()
        assert found.activation.tolist() == pytest.approx(expected.activation.tolist(), rel=1e-3)
        assert set(found.prompt) == {prompt}
    control(panel, "Prompt").value = ""
    assert said(panel).startswith("prompt: expected 1 to")
