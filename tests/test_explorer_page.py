"""The explorer in a real browser without a network: what it computes agrees with the module, and
all that a reader can do is done, by mouse and by keyboard.

Needs no built book but at the end: the page is put together from its parts as the build does it.
"""

import os
import random
import re
import shutil
import statistics
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pages import SIZES, browser, open_page  # noqa: F401 (fixtures)

from mlsae_book import offline
from mlsae_book.tables import interventions
from mlsae_core import pipeline
from mlsae_core.lens import Lens
from mlsae_core.text import token_ids

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
RETURN = "Return the number of elements along the given axis."


@pytest.fixture(scope="module")
def subject():
    """The language model and the dictionary, as the module has them."""
    run, _ = offline.default(ROOT / "book")
    session = pipeline.Session()
    return session.lm(run.model), session.sae(run), run.site


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a page of the explorer and nothing else."""
    folder = tmp_path_factory.mktemp("page")
    shown = offline.read(pipeline.Session("read-only"), *offline.default(ROOT / "book"))
    offline.write(shown, folder / "explorer")
    scripts = "".join(
        f'<script defer src="explorer/{name}.js?v=1"></script>' for name in offline.SCRIPTS
    )
    (folder / "page.html").write_text(
        '<!doctype html><html data-theme="light"><meta charset="utf-8"><title>Explorer</title>'
        f'<link rel="stylesheet" href="explorer/explorer.css">{scripts}'
        f"<body><p>Above.</p>{offline.markup()}<p>Below.</p></body></html>",
        encoding="utf-8",
    )
    return folder


@pytest.fixture
def visit(browser, folder):  # noqa: F811
    """Opens the page at a state, given as in its address; `before` runs before its scripts."""
    contexts = []

    def visit(state="", size="wide", before=None, place=folder):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda m: m.type == "error" and page.complaints.append(m.text))
        page.on(
            "request",
            lambda request: (
                request.url.startswith(("file:", "data:", "blob:"))
                or page.complaints.append(f"request: {request.url}")
            ),
        )
        if before:
            page.add_init_script(before)
        page.goto((place / "page.html").as_uri() + state)
        page.wait_for_selector(".latent-explorer[aria-busy='false'], .fault")
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def engine(browser, folder):  # noqa: F811
    """A page with `ask`, which answers questions to the model."""
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto((folder / "page.html").as_uri())
    page.evaluate(
        "(async () => { window.ask = await startEngine();"
        " window.tokenizer = new Engine(await assets.load('model')).tokenizer; })()"
    )
    yield page
    context.close()


def shown(page):
    """Wait until what was chosen last is shown."""
    page.wait_for_timeout(50)
    page.wait_for_selector(".latent-explorer[aria-busy='false']", timeout=60_000)


def run_prompt(page, text):
    page.fill("#le-prompt", text)
    page.click(".prompt button")
    page.wait_for_selector(".strips button")
    shown(page)


def chosen(page):
    from urllib.parse import parse_qs, urlparse

    found = parse_qs(urlparse(page.url).fragment, keep_blank_values=True)
    return {name: values[0] for name, values in found.items()}


# --- agreement with the module --------------------------------------------------------------------

TEXTS = [
    "", " ", "\n", "\t\t", "   three   spaces   ", "a", "A b", RETURN, "x : array_like, optional",
    "def f(x):\n    return x ** 2\n\n\nclass A(B):\n\tpass\n",
    "don't we'll I'm you've he'd it's 'S",
    "12345 3.14 1e-5 0x1F ½ Ⅷ ٣", "naïve café Ångström", "e\u0301 combining a\u030a", "ﬁ ligature",
    "漢字かな交じり文テスト", "한국어 문장", "русский текст", "العربية", "עברית", "ไทย", "हिन्दी",
    "😀", "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪", "a😀b", "\u00a0no\u2003break\u2028line\u2029par",
    "\u0085nel\x0bvt\x0cff",
    "\ufeffbom\ufeff", "\u200bzero\u200dwidth", "\x00\x01\x1b[31m\x7f", "\r\n\r\n", "  \n  \n  x",
    "<|endoftext|>", "a<|endoftext|>b", "<script>alert(1)</script>", "&amp; &lt;", "\\n\\t\\u00e9",
    "_underscore__dunder__ CamelCase snake_case", "a-b–c—d…", "$%&/()=?`´^°", "∀x∈ℝ: x²≥0 ⇒ ∑ᵢ",
    "https://example.org/a?b=c#d", "{'a': [1, 2, {3: None}]}", "    " * 40, "a" * 500, "ab" * 300,
    "x\u0378y", "\U0001f9ff\U0001fae0", "𝐱𝔸𝒞", "\u202eright to left\u202c", "…" * 20,
    "Parameters\n----------\nx : float\n    The value.\n" * 30,
]  # fmt: skip


def more_texts(number):
    """Random strings of assigned characters, some of them mostly of spaces and letters."""
    draw = random.Random(0)
    limits = [0x80, 0x250, 0x3000, 0x20000]
    texts = []
    while len(texts) < number:
        limit = draw.choice(limits)
        characters = [chr(draw.randrange(limit)) for _ in range(draw.randrange(1, 80))]
        characters = [c for c in characters if unicodedata.category(c) not in ("Cn", "Cs")]
        spaces = [draw.choice(" \n\tab,") for _ in characters]
        texts.append("".join(draw.choice(pair) for pair in zip(characters, spaces, strict=True)))
    return texts


def test_a_hundred_texts_have_the_same_tokens(engine, subject):
    texts = TEXTS + more_texts(100 - len(TEXTS))
    assert len(texts) == 100
    expected = token_ids(subject[0].tokenizer, texts)
    found = engine.evaluate("texts => texts.map(t => tokenizer.encode(t))", texts)
    for text, theirs, ours in zip(texts, found, expected, strict=True):
        assert theirs == ours, repr(text)


SAMPLE = [RETURN, *TEXTS[8:11], "漢字 😀 \x00", TEXTS[-1]]


def dense(indices, values, shape):
    return torch.zeros(shape).scatter(-1, indices, values).numpy()


def codes_of(engine, answer, sae):
    """(layer, token, latent) activations of an answer's codes."""
    k = sae.k
    layers = [
        dense(
            torch.tensor(list(code["indices"])).view(-1, k),
            torch.tensor(list(code["values"])).view(-1, k),
            (len(code["indices"]) // k, sae.n_latents),
        )
        for code in answer
    ]
    return np.stack(layers)


ASK = """async ([method, given]) => {
  const plain = (x) => ArrayBuffer.isView(x) ? [...x] : Array.isArray(x) ? x.map(plain)
    : x && typeof x === 'object'
    ? Object.fromEntries(Object.entries(x).map(([k, v]) => [k, plain(v)])) : x;
  return plain(await ask(method, given));
}"""


def ask(engine, method, given=None):
    return engine.evaluate(ASK, [method, given])


def same_codes(found, expected):
    """Within 1e-3 of each activation; other latents only where they are a tie with the last."""
    last = np.where(expected > 0, expected, np.inf).min(-1, keepdims=True)
    both = (found > 0) & (expected > 0)
    np.testing.assert_allclose(found[both], expected[both], rtol=1e-3)
    alone = (found > 0) != (expected > 0)
    gaps = (np.abs(found + expected - last) / last)[alone]
    assert gaps.max(initial=0) < 1e-3
    assert alone.mean() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("text", SAMPLE, ids=range(len(SAMPLE)))
def test_activations_latents_and_predictions_agree_with_the_module(engine, subject, text):
    lm, sae, _ = subject
    answer = ask(engine, "run", text)
    ids = token_ids(lm.tokenizer, [text])[0]
    assert answer["ids"] == ids[: lm.max_positions]
    assert answer["left"] == max(0, len(ids) - lm.max_positions)
    original = lm.original(torch.tensor([answer["ids"]]))
    code = sae.encode(original.residual[:, 0])
    expected = dense(code.indices, code.values, (*code.indices.shape[:2], sae.n_latents))
    same_codes(codes_of(engine, answer["codes"], sae), expected)
    predicted = lm.logits(original.residual[-1])[0].softmax(-1).numpy()
    for token in {0, len(answer["ids"]) // 2, len(answer["ids"]) - 1}:
        found = ask(engine, "predictions", token)
        assert found["after"] is None
        np.testing.assert_allclose(found["before"], predicted[token], atol=1e-3)
        top = predicted[token] > 1e-3
        np.testing.assert_allclose(np.array(found["before"])[top], predicted[token][top], rtol=1e-2)


CHANGES = [("steer", 1, 962, 8.0), ("steer", 4, 1758, -12.0), ("ablate", 3, 1758, 0.0)]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_steering_and_ablation_agree_with_the_module(engine, subject, change):
    lm, sae, site = subject
    kind, layer, latent, amount = change
    ids = torch.tensor([ask(engine, "run", RETURN)["ids"]])
    given = {"kind": kind, "layer": layer, "latent": latent, "amount": amount, "token": None}
    answer = ask(engine, "change", given)
    wanted = ["ablate"] if kind == "ablate" else [amount]
    effect = interventions.intervene(lm, sae, Lens.identity(), site, ids, layer, latent, wanted)
    assert effect.changed.any()
    code = sae.encode(effect.residual_after[0, :, 0])
    expected = dense(code.indices, code.values, (*code.indices.shape[:2], sae.n_latents))
    same_codes(codes_of(engine, answer["codes"], sae), expected)
    predicted = effect.logits_after[0, 0].softmax(-1).numpy()
    before = effect.logits[0].softmax(-1).numpy()
    found = [ask(engine, "predictions", t) for t in range(ids.shape[1])]
    np.testing.assert_allclose([f["after"] for f in found], predicted, atol=1e-3)
    divergence = (before * np.log(before / predicted)).sum(-1).mean()
    assert divergence > 1e-4
    assert ask(engine, "divergence") == pytest.approx(divergence, rel=0.01)


@torch.no_grad()
def test_a_reconstructed_layer_agrees_with_the_module(engine, subject):
    lm, sae, _ = subject
    layer, token = 2, 4
    ids = torch.tensor([ask(engine, "run", RETURN)["ids"]])
    original = lm.original(ids)
    recon = sae(original.residual[layer]).recon
    one = original.residual[layer].clone()
    one[:, token] = recon[:, token]
    for at, rows in ((None, recon), (token, one)):
        given = {"kind": "reconstruct", "layer": layer, "latent": 0, "amount": 0, "token": at}
        ask(engine, "change", given)
        expected = lm.logits(lm.resume_layers(original, {layer: rows})[0])[0].softmax(-1).numpy()
        found = [ask(engine, "predictions", t)["after"] for t in range(ids.shape[1])]
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_32_tokens_take_less_than_half_a_second(engine):
    text = f"{RETURN} " * 4
    assert 32 <= engine.evaluate("text => tokenizer.encode(text).length", text) <= 48
    times = engine.evaluate(
        """async (text) => {
          const times = [];
          for (let i = 0; i < 7; i++) {
            const start = performance.now();
            await ask("run", text);
            times.push(performance.now() - start);
          }
          return times;
        }""",
        text,
    )
    assert min(times) < 500, times
    assert statistics.median(times) < 1500, times  # where others use the cores as well


# --- what a reader does ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_prompt_is_typed_and_everything_follows(visit, size):
    page = visit(size=size)
    assert page.locator(".run").is_hidden()
    run_prompt(page, RETURN)
    tokens = page.locator(".strips button")
    assert tokens.count() == 10
    assert page.locator(".strips i[data-layer]").count() == 60
    assert "10 tokens" in page.inner_text(".status")
    assert chosen(page)["prompt"] == RETURN
    # the active latents of another token; a click shows the card and colours the layers
    tokens.nth(3).click()
    shown(page)
    assert chosen(page)["token"] == "3"
    assert page.locator(".active tbody tr").count() == 16
    latent = page.locator(".active tbody tr").nth(2).locator("button").nth(4)
    number = latent.inner_text()
    latent.click()
    shown(page)
    assert chosen(page) | {"latent": number, "layer": "4"} == chosen(page)
    page.wait_for_selector(f"#le-card:text-is('Latent {number}')")
    shares = page.locator(".strips i").evaluate_all(
        "all => all.filter(i => i.style.getPropertyValue('--share') > 0).length"
    )
    assert shares > 0
    for heading in ("Where it is active", "What it does to the predictions", "Examples"):
        assert page.locator(f".latent-card :text-is('{heading}')").is_visible()
    assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0
    assert page.complaints == []


def test_no_latent_of_the_first_layer_is_one_of_the_last_as_the_chapter_says(visit):
    page = visit(f"#prompt={RETURN.replace(' ', '+')}")
    shown(page)
    columns = [
        page.locator(f".active button[data-column='{layer}']").all_inner_texts()
        for layer in (0, 5)
    ]  # fmt: skip
    assert [len(c) for c in columns] == [16, 16]
    assert not {*columns[0]} & {*columns[1]}


def test_changes_show_what_follows_before_and_after(visit):
    page = visit(f"#prompt={RETURN.replace(' ', '+')}&latent=1758&layer=3")
    shown(page)
    assert page.locator(".next thead th").all_inner_texts() == ["Token", "Probability"]
    page.select_option("#le-change", "steer")
    shown(page)
    assert page.locator(".next thead th").count() == 4
    assert page.locator(".later tbody tr").count() == 2
    page.focus("#le-amount")
    page.keyboard.press("End")
    shown(page)
    assert chosen(page)["amount"] == "40"
    most = float(re.search(r"by ([\d.]+) nats", page.inner_text(".effect"))[1])
    page.select_option("#le-at", "one")
    shown(page)
    fewer = float(re.search(r"by ([\d.]+) nats", page.inner_text(".effect"))[1])
    assert 0 < fewer < most
    for change in ("ablate", "reconstruct"):
        page.select_option("#le-change", change)
        shown(page)
        assert page.locator("#le-amount").is_hidden()
        assert "nats" in page.inner_text(".effect")
    page.select_option("#le-change", "")
    shown(page)
    assert page.locator(".later").is_hidden()
    assert page.complaints == []


def test_the_address_holds_everything_after_a_reload_and_a_step_back(visit):
    page = visit()
    run_prompt(page, RETURN)
    page.locator(".strips button").nth(2).click()
    shown(page)
    page.select_option("#le-change", "ablate")
    page.select_option("#le-layer", "1")
    shown(page)

    def picture():
        shown(page)
        texts = (".run", ".latent-card", ".next", "#le-find-title")
        return [page.inner_text(t) for t in texts], page.locator(".strips").inner_html()

    state, before = chosen(page), picture()
    page.reload()
    page.wait_for_selector(".strips button")
    assert picture() == before
    assert chosen(page) == state
    page.select_option("#le-layer", "4")
    shown(page)
    assert picture() != before
    page.go_back()
    assert picture() == before
    assert chosen(page) == state
    # typing and moving step by step is one way back
    page.locator(".strips button").nth(2).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
        shown(page)
    page.locator("#le-find").press_sequentially("ret")
    shown(page)
    assert (chosen(page)["token"], chosen(page)["find"]) == ("4", "ret")
    page.click(".legend button")
    assert page.locator("#le-card").evaluate("e => e.getBoundingClientRect().top < innerHeight")
    page.go_back()
    shown(page)
    assert chosen(page)["layer"] != state["layer"] or chosen(page)["change"] != state["change"]
    assert page.complaints == []


def test_everything_can_be_done_by_keyboard(visit):
    page = visit()
    page.focus("#le-prompt")
    page.keyboard.type(RETURN)
    page.keyboard.press("Enter")
    page.wait_for_selector(".strips button")
    shown(page)
    focused = "document.activeElement.getAttribute('aria-label')"
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("!!document.activeElement.closest('.strips')"):
            break
    page.keyboard.press("ArrowLeft")
    shown(page)
    page.keyboard.press("ArrowUp")
    shown(page)
    assert (chosen(page)["token"], chosen(page)["layer"]) == ("8", "4")
    assert "token 9" in page.evaluate(focused)
    page.keyboard.press("Tab")  # the way to the card
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    latent = page.evaluate("document.activeElement.dataset.latent")
    page.keyboard.press("Enter")
    shown(page)
    assert chosen(page)["latent"] == latent
    assert latent in page.evaluate(focused)
    # one stop of the Tab key for each of the two grids
    for grid in (".strips", ".active"):
        assert page.locator(f"{grid} [tabindex='0']").count() == 1
    unnamed = page.locator(".latent-explorer :is(button, select, input, textarea)").evaluate_all(
        "all => all.filter(e => !e.labels?.length && !e.ariaLabel && !e.innerText.trim()).length"
    )
    assert unnamed == 0


def test_latents_are_searched_sorted_listed_and_opened(visit):
    page = visit()
    rows = page.locator(".latents tbody tr")
    page.fill("#le-find", "962")
    shown(page)
    assert rows.count() == 1
    rows.locator("button").click()
    page.wait_for_selector("#le-card:text-is('Latent 962')")
    page.fill("#le-find", " return")
    shown(page)
    assert rows.count() == 25
    for row in rows.all():
        assert any("␣return" in t.lower() for t in row.locator(".token").all_inner_texts())
    said = re.fullmatch(
        r"([\d,]+) latents: (\d+) most often active at such a token,"
        r" (\d+) active at one in an example, (\d+) with one in the text of an example",
        page.inner_text(".found"),
    )
    total, *parts = (int(part.replace(",", "")) for part in said.groups())
    assert total == sum(parts)
    assert min(parts) > 0
    page.fill("#le-find", "")
    shown(page)
    assert page.inner_text(".found") == "2,048 latents"
    page.click(".more")
    assert rows.count() == 50
    page.select_option("#le-sort", "mean")
    shown(page)
    means = [float(t) for t in page.locator(".latents td:nth-child(3)").all_inner_texts()]
    assert means == sorted(means)
    page.select_option("#le-list", label="Pairs most alike")
    shown(page)
    assert rows.count() == 12
    page.fill("#le-find", "no such token <b>")
    shown(page)
    assert "<b>" in page.inner_text(".found")
    assert rows.count() == 0
    assert page.complaints == []


def test_a_latent_that_a_search_finds_has_the_token_in_an_example(visit):
    page = visit()
    page.fill("#le-find", " ndarray")
    shown(page)
    while page.locator(".more").is_visible():
        page.click(".more")
    rows = page.locator(".latents tbody tr")
    active = ".examples .text :is([style*='--share: 0.'], [style*='--share: 1'])"
    for kind, where in (("example at", active), ("example beside", ".examples .text *")):
        row = rows.filter(has_text=kind).last
        token = row.locator(".token").last.inner_text()
        row.locator("button").click()
        shown(page)
        page.wait_for_selector(f"#le-card:text-is('Latent {row.locator('button').inner_text()}')")
        assert token.replace("␣", " ") in page.locator(where).all_text_contents()
    assert page.complaints == []


def test_a_column_of_the_overview_is_a_latent(visit):
    page = visit()
    canvas = page.locator(".overview canvas")
    size = canvas.bounding_box()
    means = []
    for share in (0.05, 0.95):
        canvas.click(position={"x": share * size["width"], "y": size["height"] / 2})
        shown(page)
        means.append(float(re.search(r"mean layer (\d\.\d+)", page.inner_text(".latent-card"))[1]))
        mark = page.locator(".overview i").bounding_box()
        assert mark["x"] - size["x"] == pytest.approx(share * size["width"], abs=3)
    assert means[0] + 2 < means[1]
    assert page.complaints == []


def test_an_example_of_a_card_becomes_a_prompt_and_is_active_there(visit):
    page = visit("#latent=962")
    example = page.locator(".examples .text").first
    example.click()
    page.wait_for_selector(".strips button")
    shown(page)
    assert chosen(page)["latent"] == "962"
    assert "full blue is" in page.inner_text(".legend")
    page.click(".latent-card p button.latent")
    shown(page)
    assert chosen(page)["latent"] != "962"


# --- bad input ------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_cut_and_says_so(visit):
    page = visit()
    run_prompt(page, "word " * 400)
    assert page.locator(".strips button").count() == 256
    assert re.search(r"reads 256 tokens; the last \d+ of the prompt", page.inner_text(".status"))


def test_an_empty_prompt_and_half_a_character_get_a_sentence(visit):
    page = visit()
    page.click(".prompt button")
    shown(page)
    assert "Type a prompt first" in page.inner_text(".status")
    page.evaluate("document.getElementById('le-prompt').value = 'a\\ud83d b'")
    page.click(".prompt button")
    page.wait_for_selector(".strips button")
    shown(page)
    assert "Half a character" in page.inner_text(".status")
    assert page.complaints == []


def test_a_browser_without_workers_computes_in_the_page(visit):
    page = visit(before="delete window.Worker")
    run_prompt(page, RETURN)
    page.select_option("#le-change", "reconstruct")
    shown(page)
    assert "nats" in page.inner_text(".effect")
    assert page.complaints == []


def test_a_browser_that_cannot_unpack_gets_a_sentence(visit):
    page = visit(before="delete window.DecompressionStream")
    assert "cannot unpack" in page.inner_text(".status")
    assert page.complaints == []


def test_a_search_says_when_examples_cannot_be_searched(visit, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for file in (copy / "explorer/data").glob("tokens-*.js"):
        file.unlink()
    page = visit(place=copy)
    page.fill("#le-find", "return")
    shown(page)
    said = page.inner_text(".found")
    assert re.search(r"Examples cannot be searched. The file explorer/data/tokens-\d+.js", said)
    assert page.locator(".latents tbody tr").count() > 0


@pytest.mark.parametrize("file", ["index", "latents-15", "model"])
def test_a_missing_file_gets_a_sentence(visit, folder, tmp_path, file):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / f"explorer/data/{file}.js").unlink()
    page = visit("#latent=962&prompt=a", place=copy)
    fault = page.locator(".fault")
    fault.first.wait_for()
    assert f"{file}.js of this book is missing" in fault.first.inner_text()
    assert all("ERR_FILE_NOT_FOUND" in text for text in page.complaints)


SENSELESS = ["#latent=99999&token=-1&layer=x", "#change=explode&amount=1e9&sort=valueOf", "#top"]


@pytest.mark.parametrize("state", SENSELESS)
def test_an_address_that_makes_no_sense_is_the_beginning(visit, state):
    page = visit(state)
    shown(page)
    assert page.locator(".latents tbody tr").count() == 12
    assert page.complaints == []


def test_hostile_text_is_text(visit):
    hostile = "<img src=x onerror=window.harmed=1></textarea><script>window.harmed=1</script>\u202e"
    page = visit()
    run_prompt(page, hostile)
    page.fill("#le-find", hostile)
    shown(page)
    page.reload()
    page.wait_for_selector(".strips button")
    shown(page)
    assert page.evaluate("window.harmed") is None
    assert page.locator(".latent-explorer :is(img, script)").count() == 0
    assert "⟨202E⟩" in page.inner_text(".strips") or "⟨E2⟩" in page.inner_text(".strips")
    assert page.complaints == []


# --- in the built book ----------------------------------------------------------------------------

#: The smallest ratio of contrast of text on what is shaded behind it (WCAG 2, level AA: 4.5).
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const behind = (element) => {
    const all = [];
    for (let e = element; e; e = e.parentElement) all.unshift(getComputedStyle(e).backgroundColor);
    canvas.fillStyle = "white";
    for (const colour of all) { canvas.fillRect(0, 0, 1, 1); canvas.fillStyle = colour; }
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => rgb.slice(0, 3)
    .map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (element) => {
    const text = getComputedStyle(element).color.match(/[\\d.]+/g).map(Number);
    const [a, b] = [luminance(text), luminance(behind(element))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const shaded = document.querySelectorAll(".latent-explorer :is(.latent, .text *, .token, .hint)");
  return Math.min(...[...shaded].filter((e) => e.offsetParent).map(ratio));
}"""
SHIFTS = """window.shifted = 0; new PerformanceObserver((list) => {
  for (const e of list.getEntries()) if (!e.hadRecentInput) window.shifted += e.value;
}).observe({ type: "layout-shift", buffered: true })"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_built_page_fits_is_legible_and_does_not_move(open_page, size, scheme, tmp_path):  # noqa: F811
    page = open_page("explorer", size, scheme)
    page.evaluate(SHIFTS)
    run_prompt(page, RETURN)
    page.locator(".active .latent").nth(20).click()
    shown(page)
    page.select_option("#le-change", "steer")
    shown(page)
    assert page.locator(".latent-card .examples li").count() > 10
    assert page.evaluate(CONTRAST) >= 4.5
    assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0
    cut = page.locator(".latent-explorer .scroll").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)"
    )
    assert cut == []
    outside = page.locator(".latent-explorer table").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.parentElement.clientWidth).map(e => e.innerText)"
    )
    assert outside == []
    shaded = page.locator(".active .latent").evaluate_all(
        "all => new Set(all.map(e => getComputedStyle(e).backgroundColor)).size"
    )
    assert shaded > 10
    assert page.evaluate("window.shifted") < 0.1
    assert page.complaints == []
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    page.locator(".latent-explorer").screenshot(path=folder / f"prompt-{size}-{scheme}.png")


def test_less_than_3_MB_are_loaded_before_the_reader_asks_for_more(open_page):  # noqa: F811
    page = open_page("explorer")
    page.wait_for_selector(".latent-explorer[aria-busy='false']")
    assert "index.js" in page.files
    assert sum(page.files.values()) < 3_000_000


CLICKED = {
    "a latent of one token": ("intro", 0, "rect mark", 20),
    "a column of the first heatmap": ("intro", 1, "rect mark", 300),
    "the name of a latent": ("total_variance", 0, "text mark", 0),
}


@pytest.mark.parametrize("name", CLICKED)
def test_a_mark_of_a_latent_leads_to_its_card(open_page, name):  # noqa: F811
    chapter, chart, kind, place = CLICKED[name]
    page = open_page(chapter)
    view = page.locator(".chart-view[style*=pointer]").nth(chart)
    view.locator(f'[aria-roledescription="{kind}"]').nth(place).click()
    page.wait_for_url("**/explorer.html#latent=*")
    page.wait_for_selector("#le-card")
    assert page.inner_text("#le-card") == f"Latent {chosen(page)['latent']}"
    assert page.complaints == []
