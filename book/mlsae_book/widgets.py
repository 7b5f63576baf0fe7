"""Controls for JupyterLab: panels that call analysis and charts when the reader chooses.

Each panel has a static twin beside it in the book, made of parameters bound in the chart itself,
because a page without a kernel cannot run these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import altair as alt
import ipywidgets
import pandas as pd

from mlsae_book import charts, live, tables
from mlsae_core import pipeline
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import EvaluateSpec, RunSpec, SpecError

#: Tokens that are read for the cards of a run that was just trained.
EXPLORED = 65_536


def _panel(draw: Callable[..., alt.TopLevelMixin], **controls: ipywidgets.Widget):
    """Controls above a chart that is drawn again on every change; bad input becomes one line."""
    output = ipywidgets.Output()

    def redraw(_=None):
        # Set, not captured (`with output:`): a captured chart of some size makes nbclient wait for
        # ever for the cell's reply.
        try:
            chart = draw(**{name: control.value for name, control in controls.items()})
        except SpecError as error:
            output.outputs = ()
            output.append_stdout(f"{error}\n")
        else:
            output.outputs = ()
            output.append_display_data(chart)

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*controls.values(), output])


def prompt_norms(lm: LanguageModel, prompt: str) -> ipywidgets.VBox:
    """Type a prompt; see the norm of the residual stream at its tokens and layers."""

    def draw(prompt: str):
        title = f"Residual-stream norms of {lm.name}"
        return charts.prompt_norms(tables.prompt_norms(lm, [prompt]), title)

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

    While it trains, a bar shows how far it is and how many seconds are left. A run that was trained
    before is shown at once: results are kept under their key. Another button opens the explorer of
    the run that was trained last.
    """
    choose_k = ipywidgets.Dropdown(options=k, value=run.sae.k, description="k")
    choose_factor = ipywidgets.Dropdown(
        options=factors, value=run.sae.expansion_factor, description="R"
    )
    button = ipywidgets.Button(description="Train", button_style="primary")
    explore = ipywidgets.Button(description="Explore it", disabled=True)
    output = ipywidgets.Output()
    progress = ipywidgets.IntProgress(max=run.train.tokens // run.train.batch_tokens)
    left = ipywidgets.Label()
    trained = run

    def train(_):
        nonlocal trained
        progress.value, left.value, start = 0, "", time.perf_counter()

        def show(step: int) -> bool:
            progress.value = step
            seconds = (time.perf_counter() - start) / step * (progress.max - step)
            left.value = f"step {step} of {progress.max}, about {seconds:.0f} s left"
            return False

        sae = replace(run.sae, k=choose_k.value, expansion_factor=choose_factor.value)
        wanted = replace(run, sae=sae)
        button.disabled = explore.disabled = True
        panel.children, output.outputs = parts, ()
        try:
            artefact = pipeline.Session(should_stop=show).train(wanted)
        except SpecError as error:
            output.append_stdout(f"{error}\n")
        else:
            log = tables.long_log(pd.read_csv(artefact.file("log.csv")))
            title = f"k = {sae.k}, R = {sae.expansion_factor}"
            output.append_display_data(charts.training_curves(log, title))
            trained, explore.disabled = wanted, False
        finally:
            progress.value, left.value = progress.max, ""
            button.disabled = False

    def look(_):
        explore.disabled = True
        left.value = "the cards of its latents take minutes, once"
        settings = EvaluateSpec(tokens=EXPLORED)
        try:
            panel.children = (*parts, live.explorer(pipeline.Session(), trained, settings))
        except SpecError as error:
            output.append_stdout(f"{error}\n")
        finally:
            left.value = ""

    button.on_click(train)
    explore.on_click(look)
    choices = ipywidgets.HBox([choose_k, choose_factor, button, explore])
    parts = (choices, ipywidgets.HBox([progress, left]), output)
    panel = ipywidgets.VBox(parts)
    return panel


def heatmaps(read: Sequence[tuple[dict, dict, dict]]) -> ipywidgets.VBox:
    """Choose a run, a weighting and how many latents; see its heatmap at that resolution.

    read: what `experiments.all_distributions` returns.
    """
    names = [", ".join(f"{k} = {v}" for k, v in labels.items()) or "run" for labels, _, _ in read]

    def draw(run: int, weighting: str, most: int):
        table = tables.latent_table(read[run][1], weighting, most)
        return charts.heatmap(table, f"Distributions over layers, {names[run]}")

    weightings = [("every token alike", "probs"), ("by activation", "probs_by_total")]
    return _panel(
        draw,
        run=ipywidgets.Dropdown(options=[(n, i) for i, n in enumerate(names)], description="Run"),
        weighting=ipywidgets.Dropdown(options=weightings, description="Tokens"),
        most=ipywidgets.IntSlider(300, 50, 600, 50, description="Latents", continuous_update=False),
    )


def cosines(table: pd.DataFrame) -> ipywidgets.VBox:
    """Choose a run, pairs or maxima, and the width of the bins; see the histogram.

    table: what `tables.sweeps.stack` makes of several `cosines.csv`.
    """
    from mlsae_book.charts import sweeps
    from mlsae_book.tables import geometry

    def draw(run: str, column: str, merge: int):
        found = geometry.densities(table[table["run"] == run], column, merge)
        title = f"Cosine similarities of decoder rows, {run}"
        return sweeps.histogram(found, "Cosine similarity", title, series="rows", logarithmic=True)

    kinds = [("all pairs", "pairs"), ("each row's largest", "maxima")]
    return _panel(
        draw,
        run=ipywidgets.Dropdown(options=list(table["run"].unique()), description="Run"),
        column=ipywidgets.Dropdown(options=kinds, description="Which"),
        merge=ipywidgets.Dropdown(
            options=[(f"{m / 100:.2f}", m) for m in (1, 2, 4)], value=2, description="Bin width"
        ),
    )


def total_variance(
    session: pipeline.Session, run: RunSpec, tokens: Sequence[int]
) -> ipywidgets.VBox:
    """Choose how many test tokens; see every latent's variance and its two parts (Eq. 14)."""
    from mlsae_book.charts import sweeps
    from mlsae_book.tables import total_variance

    sae = session.sae(run)

    def draw(tokens: int):
        codes = total_variance.codes(session.source(run, EvaluateSpec(tokens=tokens)), sae)
        latents = total_variance.terms(*codes, sae.n_latents).latents
        table = total_variance.by_rank(latents)
        return sweeps.variance_by_rank(table, f"Eq. 14 on {tokens:,} tokens")

    return _panel(draw, tokens=ipywidgets.Dropdown(options=list(tokens), description="Tokens"))


def prompt_layers(session: pipeline.Session, run: RunSpec, prompt: str) -> ipywidgets.VBox:
    """Type a prompt; see the distributions over layers of the latents that it makes active."""
    from mlsae_book.charts import layers as layer_charts
    from mlsae_book.tables import layers

    source, sae = session.source(run), session.sae(run)

    def draw(prompt: str):
        table = layers.prompt_distributions(source, sae, [prompt])
        return layer_charts.prompts(table, "Latents of one prompt", "One column a latent.")

    box = ipywidgets.Text(
        prompt, description="Prompt", continuous_update=False, layout={"width": "95%"}
    )
    return _panel(draw, prompt=box)
