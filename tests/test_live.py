"""The explorer in JupyterLab: the kernel answers as the module does, and the page asks it."""

import json
import re
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from test_explorer_page import RETURN
from test_lab import serving
from test_pages import browser  # noqa: F401 (a fixture)
from test_pipeline import SETTINGS, run_of

from mlsae_book import live, offline
from mlsae_book.tables import interventions
from mlsae_core import pipeline
from mlsae_core.lens import Lens
from mlsae_core.spec import SpecError
from mlsae_core.text import token_ids

ROOT = Path(__file__).parents[1]
ANSWERED = ("asked", "answered")
PROMPT = "the cat and a dog"


@pytest.fixture
def session(data):
    return pipeline.Session()


def explored(session, run):
    """The panel of a run, and a function that asks as its page does."""
    with torch.enable_grad():
        panel = live.explorer(session, run, SETTINGS, latent=3, prompt='"a&b"')
    frame, asked, answered = panel.children
    count = iter(range(100))

    def ask(method, given=None):
        mark = f"0.5 {next(count)} "
        asked.value = mark + json.dumps([method, given])
        assert answered.value.startswith(mark)
        return json.loads(answered.value.removeprefix(mark))

    return frame.value, ask


def dense(code, tokens, size):
    """(token, latent) activations of one layer's code."""
    indices, values = (torch.tensor(code[name]).view(tokens, -1) for name in ("indices", "values"))
    assert (values.diff(dim=1) <= 0).all()
    return torch.zeros(tokens, size).scatter(1, indices, values)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": [0, 2]},
        {"activation": "batchtopk", "model": "llama"},
        {"standardize": False},
    ],
    ids=str,
)
def test_answers_agree_with_the_module(session, inputs, changes):
    if "model" in changes:
        changes = changes | {"model": str(inputs / changes["model"])}
    run = run_of(inputs, **changes)
    _, ask = explored(session, run)
    lm, sae = session.lm(run.model), session.sae(run)
    layers = run.site.indices(lm.n_layers)
    found = ask("run", PROMPT)["result"]
    ids = token_ids(lm.tokenizer, [PROMPT])[0]
    assert (found["ids"], found["left"]) == (ids, 0)
    tokens = torch.tensor([ids])
    original = lm.original(tokens)

    def same(codes, streams):
        for code, x in zip(codes, streams, strict=True):
            expected = interventions._activations(sae, Lens.identity(), x, 0)
            got = dense(code, len(ids), sae.n_latents)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)

    same(found["codes"], original.residual[layers, 0])
    latent = found["codes"][1]["indices"][0]
    before = lm.logits(original.residual[-1])[0].softmax(-1)
    for kind, by in (("steer", 3.0), ("ablate", "ablate")):
        given = {"kind": kind, "layer": 1, "latent": latent, "amount": 3.0, "token": None}
        codes = ask("change", given)["result"]["codes"]
        effect = interventions.intervene(
            lm, sae, Lens.identity(), run.site, tokens, layers[1], latent, [by]
        )
        assert effect.changed.any()
        after = effect.logits_after[0, 0].softmax(-1)
        kl = (before * (before / after).log()).sum(-1).mean()
        assert ask("divergence")["result"] == pytest.approx(float(kl), rel=1e-3, abs=1e-7)
        same(codes, [effect.residual_after[0, i - layers[1], 0] for i in layers[1:]])
        likeliest = ask("likeliest", {"token": 2, "most": 4})["result"]
        best = {*before[2].topk(4).indices.tolist(), *after[2].topk(4).indices.tolist()}
        assert likeliest["ids"] == sorted(best)
        for name, p in (("before", before), ("after", after)):
            np.testing.assert_allclose(likeliest[name], p[2, likeliest["ids"]], atol=1e-5)
    recon = sae(original.residual[layers[1]]).recon
    for token in (None, 1):
        given = {"kind": "reconstruct", "layer": 1, "latent": 0, "amount": 0, "token": token}
        ask("change", given)
        rows = original.residual[layers[1]].clone()
        rows[:, slice(None) if token is None else token] = recon[
            :, slice(None) if token is None else token
        ]
        after = lm.logits(lm.resume_layers(original, {layers[1]: rows})[0])[0].softmax(-1)
        likeliest = ask("likeliest", {"token": 3, "most": 4})["result"]
        np.testing.assert_allclose(likeliest["after"], after[3, likeliest["ids"]], atol=1e-5)
    ask("run", "a")
    assert ask("likeliest", {"token": 0, "most": 4})["result"]["after"] is None


def test_what_a_page_finds_in_files_the_kernel_gives(session, inputs, tmp_path):
    run = run_of(inputs)
    page, ask = explored(session, run)
    shown = offline.read(session, run, SETTINGS)
    assert shown.model is None  # for whatever reason, the kernel runs it
    for name, content in offline._assets(shown):
        expected = (
            json.loads(content) | {"no_model": None} if name == "index" else json.loads(content)
        )
        assert ask("asset", name)["result"] == expected, name
    assert "data-start=&quot;latent=3&amp;amp;prompt=%22a%26b%22&quot;" in page


def test_a_long_an_empty_and_a_senseless_question_are_answered(session, inputs):
    run = run_of(inputs)
    _, ask = explored(session, run)
    limit = session.lm(run.model).max_positions
    long = ask("run", "cat " * 3 * limit)["result"]
    assert len(long["ids"]) == limit
    assert long["left"] > 0
    assert ask("run", "") == {"result": {"ids": [], "codes": [], "left": 0}}
    assert ask("explode") == {"error": "KeyError: 'explode'"}
    assert ask("run", "cat")["result"]["ids"]


def test_a_run_without_cards_is_refused_as_the_report_does(session, inputs):
    with pytest.raises(SpecError):
        explored(session, run_of(inputs, source="mlp", target="same"))


@pytest.mark.browser
@pytest.mark.parametrize("is_there", [True, False], ids=["silent", "gone"])
def test_a_kernel_that_does_not_answer_gets_a_sentence(browser, tmp_path, is_there):  # noqa: F811
    boxes = "".join(f'<div class="x-{part}"><textarea></textarea></div>' for part in ANSWERED)
    frame = f'<iframe srcdoc="{escape(live.document("x"))}"></iframe>'
    (tmp_path / "page.html").write_text(f"<body>{boxes if is_there else ''}{frame}", "utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.clock.install()
    page.goto((tmp_path / "page.html").as_uri())
    status = page.frame_locator("iframe").locator(".status")
    if is_there:
        assert status.inner_text() == ""
        page.clock.run_for(11_000)
        assert "has not answered for ten seconds" in status.inner_text()
        mark = " ".join(page.input_value(".x-asked textarea").split(" ")[:2])
        page.fill(".x-answered textarea", f'{mark} {{"error": "No such run."}}')
        page.clock.run_for(100)
        assert status.inner_text() == "The explorer cannot start. No such run."
    else:
        page.frame_locator("iframe").locator(".fault").wait_for()
        assert "The kernel cannot be reached. Execute the cell again." in status.inner_text()
    context.close()


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_in_jupyterlab_is_run_by_the_kernel(browser, tmp_path):  # noqa: F811
    source = f"""from pathlib import Path
from mlsae_book import live, offline
from mlsae_core.pipeline import Session
subject = offline.default(Path({str(ROOT / "book")!r}))
live.explorer(Session("read-only"), *subject, prompt={RETURN!r}, latent=1758)"""
    cell = {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "id": "a"}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": [cell | {"execution_count": None}], "metadata": {"kernelspec": kernel}}
    text = json.dumps(notebook | {"nbformat": 4, "nbformat_minor": 5})
    (tmp_path / "a.ipynb").write_text(text)
    with serving("jupyterlab", tmp_path, str(tmp_path)) as (address, _):
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        page = context.new_page()
        complaints = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))
                or complaints.append(request.url)
            ),
        )
        page.goto(f"{address}/lab/tree/a.ipynb?token=a")
        # What is entered before there is a kernel is not run.
        idle = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
        page.locator(idle).wait_for(state="attached", timeout=120_000)
        page.locator(".jp-Notebook .cm-content").click(timeout=60_000)
        page.keyboard.press("Control+Enter")
        frame = page.frame_locator("iframe[title=Explorer]")
        frame.locator("#le-card").wait_for(timeout=120_000)
        frame.locator(".latent-explorer[aria-busy=false]").wait_for()
        assert frame.locator(".strips button").count() == 10
        assert "in the kernel" in frame.locator(".status").inner_text()
        assert frame.locator("#le-card").inner_text() == "Latent 1758"
        assert frame.locator(".latent-card .examples li").count() > 10
        assert frame.locator("html").get_attribute("data-theme") == "light"
        frame.locator("#le-change").select_option("steer")
        frame.locator(".next thead th").nth(3).wait_for()
        assert re.search(r"by [\d.]+ nats", frame.locator(".effect").inner_text())
        frame.locator("#le-find").fill(" return")
        frame.locator(".found:has-text('active at one in an example')").wait_for()
        frame.locator("#le-prompt").fill("def mean(values):")
        frame.locator(".prompt button").click()
        frame.locator(".status:has-text('5 tokens')").wait_for()
        height = page.locator("iframe[title=Explorer]").bounding_box()["height"]
        assert height == pytest.approx(frame.locator("html").evaluate("e => e.offsetHeight"), abs=2)
        page.evaluate("document.body.dataset.jpThemeLight = 'false'")
        frame.locator("html[data-theme=dark]").wait_for()
        assert complaints == []
        context.close()
