"""Controls for JupyterLab: panels that call analysis and charts when the reader chooses.

Each panel has a static twin beside it in the book, made of parameters bound in the chart itself,
because a page without a kernel cannot run these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import altair as alt
import ipywidgets
import pandas as pd
from IPython.display import display

from mlsae_core import analysis, charts, pipeline
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import RunSpec, SpecError


def _panel(draw: Callable[..., alt.TopLevelMixin], **controls: ipywidgets.Widget):
    """Controls above a chart that is drawn again on every change; bad input becomes one line."""
    output = ipywidgets.Output()

    def redraw(_=None):
        with output:
            output.clear_output(wait=True)
            try:
                display(draw(**{name: control.value for name, control in controls.items()}))
            except SpecError as error:
                print(error)

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*controls.values(), output])


def prompt_norms(lm: LanguageModel, prompt: str) -> ipywidgets.VBox:
    """Type a prompt; see the norm of the residual stream at its tokens and layers."""

    def draw(prompt: str):
        title = f"Residual-stream norms of {lm.name}"
        return charts.prompt_norms(analysis.prompt_norms(lm, [prompt]), title)

    box = ipywidgets.Text(
        prompt, description="Prompt", continuous_update=False, layout={"width": "95%"}
    )
    return _panel(draw, prompt=box)


def metric_by_layer(table: pd.DataFrame, metrics: Sequence[str], title: str) -> ipywidgets.VBox:
    """Choose a metric of an evaluation; see it by layer."""

    def draw(metric: str):
        return charts.metric_by_layer(table[["layer", metric]], title)

    choice = ipywidgets.Dropdown(
        options=[(charts.METRICS[name], name) for name in metrics], description="Metric"
    )
    return _panel(draw, metric=choice)


def live_training(run: RunSpec, k: Sequence[int], factors: Sequence[int]) -> ipywidgets.VBox:
    """Choose k and the expansion factor, press the button, and see the FVU of that run by layer.

    A run that was trained before is shown at once: results are kept under their key.
    """
    choose_k = ipywidgets.Dropdown(options=k, value=run.sae.k, description="k")
    choose_factor = ipywidgets.Dropdown(
        options=factors, value=run.sae.expansion_factor, description="R"
    )
    button = ipywidgets.Button(description="Train", button_style="primary")
    output = ipywidgets.Output()

    def train(_):
        sae = replace(run.sae, k=choose_k.value, expansion_factor=choose_factor.value)
        button.disabled = True
        with output:
            output.clear_output()
            artefact = pipeline.Session().train(replace(run, sae=sae))
            log = analysis.long_log(pd.read_csv(artefact.file("log.csv")))
            display(charts.training_curves(log, f"k = {sae.k}, R = {sae.expansion_factor}"))
        button.disabled = False

    button.on_click(train)
    return ipywidgets.VBox([ipywidgets.HBox([choose_k, choose_factor, button]), output])
