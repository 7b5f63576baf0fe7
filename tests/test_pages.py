"""The built pages in a real browser without a network: everything is drawn, and chosen by readers.

`make book` builds the pages, `pip install ".[browser]"` and Debian's chromium open them; without
them these tests are skipped, in CI they fail.  `SCREENSHOTS=folder` keeps what was seen.
"""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from sphinx_external_toc.parsing import parse_toc_yaml

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
HTML = ROOT / "_build" / "html"
PAGES = list(parse_toc_yaml(ROOT / "_toc.yml"))
SIZES = {"wide": (1400, 900), "middle": (1000, 800), "narrow": (390, 844)}
# Notes by how much of what is seen moves while a page is built up, as browsers measure it.
WATCH = """
window.shift = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shift += entry.value;
}).observe({type: "layout-shift", buffered: true});
"""


def missing():
    """What these tests lack, or None."""
    if not (HTML / f"{PAGES[0]}.html").exists():
        return "no built book: run `make book`"
    return missing_browser()


def missing_browser():
    """What is lacking to open a page at all, or None."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return 'no playwright: pip install -c constraints.txt -e ".[browser]"'
    if chromium() is None:
        return "no browser is installed: apt install chromium"
    return None


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def demand(lack):
    if lack and os.environ.get("CI"):
        pytest.fail(lack)
    if lack:
        pytest.skip(lack)


@pytest.fixture(scope="module")
def browser():
    demand(missing_browser())
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        engine = playwright.chromium.launch(executable_path=chromium(), args=flags)
        yield engine
        engine.close()


@pytest.fixture
def open_page(browser):
    """Opens a page of the book; whatever goes wrong in it is collected in ``page.complaints``, and
    the bytes of what it loads in ``page.files``."""
    demand(missing())
    contexts = []

    def open_page(name, size="wide", scheme="light"):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            offline=True,
            has_touch=size == "narrow",
        )
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(WATCH)
        page.complaints, page.files = [], {}
        page.on("pageerror", lambda error: page.complaints.append(f"script error: {error}"))
        page.on(
            "console",
            lambda line: line.type in ("error", "warning") and page.complaints.append(line.text),
        )
        page.on(
            "request",
            lambda request: (
                request.url.startswith(("file:", "data:", "blob:"))
                or page.complaints.append(f"request: {request.url}")
            ),
        )
        page.on("request", lambda request: page.files.update(sizes_of(request.url)))
        path, _, query = name.partition("?")
        page.goto((HTML / f"{path}.html").as_uri() + (query and f"?{query}"))
        settle(page)
        return page

    yield open_page
    for context in contexts:
        context.close()


def sizes_of(url):
    file = Path(urlsplit(url).path)
    return {file.name: file.stat().st_size} if url.startswith("file:") and file.is_file() else {}


def settle(page):
    """Wait until every chart of the page is drawn."""
    page.wait_for_timeout(50)
    page.evaluate("window.chartsDrawn")


def pictures(page):
    """The drawn charts, without the numbers by which Vega counts its gradients and clips."""
    return page.locator(".vega-lite-chart .chart-view").evaluate_all(
        "all => all.map(v => v.innerHTML.replace(/(gradient_|clip)[0-9]+/g, '$1'))"
    )


every_page = pytest.mark.parametrize("name", PAGES)


@every_page
def test_charts_and_equations_are_drawn(open_page, name):
    page = open_page(name)
    assert page.complaints == []
    for math in page.locator("span.math, div.math").all():
        assert math.locator("math").count() == 1, math.inner_text()
        assert math.locator("math").bounding_box()["height"] > 5
    if page.locator("math").count():
        assert page.evaluate("document.fonts.check('16px \"STIX Two Math\"')")
    for figure in page.locator(".vega-lite-chart").all():
        svg = figure.locator(".chart-view svg").first
        assert svg.get_attribute("aria-label") or svg.locator("[aria-label]").count()
        drawn = svg.locator(".role-mark > path").evaluate_all(
            "paths => paths.filter(p => p.getBoundingClientRect().width > 0).length"
        )
        assert drawn > 0, figure.inner_text()


@every_page
def test_every_control_changes_its_chart(open_page, name):
    page = open_page(name)
    for figure in page.locator(".vega-lite-chart").all():
        for control in figure.locator(".chart-controls select, .chart-controls input").all():
            view = figure.locator(".chart-view")
            before = view.inner_html()
            if control.evaluate("c => c.tagName") == "SELECT":
                last = control.locator("option").count() - 1
                chosen = control.evaluate("c => c.selectedIndex")
                control.select_option(index=last if chosen != last else 0)
            elif control.get_attribute("type") == "checkbox":
                control.click()
            else:
                control.focus()
                here = control.evaluate("c => c.value - c.min > c.max - c.value")
                control.press("Home" if here else "End")
            page.wait_for_timeout(100)
            assert view.inner_html() != before, control.evaluate("c => c.name")
    assert page.complaints == []


@every_page
def test_charts_follow_the_page_into_the_dark_and_keep_what_was_chosen(open_page, name):
    page = open_page(name)
    light = pictures(page)
    selects = page.locator(".vega-lite-chart .chart-controls select")
    for select in selects.all():
        select.select_option(index=select.locator("option").count() - 1)
    chosen = [select.input_value() for select in selects.all()]
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    settle(page)
    assert all(a != b for a, b in zip(light, pictures(page), strict=True))
    assert [select.input_value() for select in selects.all()] == chosen
    dark = pictures(page)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    settle(page)
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    settle(page)
    assert pictures(page) == dark
    assert page.complaints == []


@every_page
@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_nothing_is_cut_off(open_page, name, size, tmp_path):
    folder = os.environ.get("SCREENSHOTS")
    for scheme in ("light", "dark") if folder else ("light",):
        page = open_page(name, size, scheme)
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        width, height = SIZES[size][0], page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": width, "height": min(height + 100, 12_000)})
        settle(page)
        page.screenshot(path=Path(folder or tmp_path) / f"{Path(name).name}-{size}-{scheme}.png")
        begins_outside = page.locator("div.math").evaluate_all(
            "all => all.filter(div => div.querySelector('math').getBoundingClientRect().left"
            " < div.getBoundingClientRect().left - 1).map(div => div.textContent)"
        )
        assert begins_outside == []
        overhangs = page.locator(".chart-view svg").evaluate_all(
            "all => all.map(svg => svg.getBoundingClientRect().right"
            " - svg.closest('.chart-view').getBoundingClientRect().right).filter(over => over > 1)"
        )
        assert overhangs == []
        assert page.evaluate("document.scrollingElement.scrollWidth - innerWidth") <= 0
        assert page.complaints == []


# --- the shell: menus, weight, search, tables, terms, print --------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [PAGES[0], "api/specs"])
def test_menu_and_contents_open_and_lead_on(open_page, name, size):
    page = open_page(name, size)

    def press(button):
        button.tap() if size == "narrow" else button.click()
        page.wait_for_timeout(300)

    [menu] = page.locator(".primary-toggle:visible").all()
    links = page.locator("nav.bd-links a:visible")
    before = links.count()
    press(menu)
    assert (links.count() > 3) == (before == 0)
    if size != "wide":
        page.keyboard.press("Escape")
        [contents] = page.locator(".secondary-toggle:visible").all()
        headings = page.locator(".bd-toc .page-toc a:visible, dialog .page-toc a:visible")
        assert headings.count() == 0
        press(contents)
        assert headings.count() > 1
        press(headings.nth(1))
        assert page.evaluate("location.hash") == headings.nth(1).get_attribute("href")
    assert page.complaints == []


MOST_BYTES = 1_500_000
MOST_PIXELS = 40_000
MOST_SHIFT = 0.05


@every_page
@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_a_page_is_light_of_bounded_height_and_does_not_move_while_it_loads(open_page, name, size):
    page = open_page(name, size)
    if size == "wide":
        charts = {"vega.js", f"{Path(name).name}.html"} if "vega.js" in page.files else set()
        assert sum(b for file, b in page.files.items() if file not in charts) < MOST_BYTES
        assert page.evaluate("document.documentElement.scrollHeight") < MOST_PIXELS
    assert "mathematics.js" in page.files
    assert page.evaluate("window.shift") < MOST_SHIFT


def test_a_search_shows_excerpts_from_files(open_page):
    page = open_page("search?q=geometric+median")
    page.wait_for_selector("#search-results .context")
    excerpts = page.locator("#search-results .context").all_inner_texts()
    assert len(excerpts) > 1
    assert any("median" in excerpt.lower() for excerpt in excerpts)
    assert page.complaints == []


def test_words_of_a_table_wrap_and_its_first_column_stays(open_page):
    page = open_page("definitions")
    table = page.locator("table.dataframe").first
    assert table.evaluate("t => t.parentElement.scrollWidth - t.parentElement.clientWidth") <= 1
    page = open_page("definitions", "narrow")
    table = page.locator("table.dataframe").first
    head, cell = table.locator("tbody th").first, table.locator("tbody td").last
    at, before = head.bounding_box()["x"], cell.bounding_box()["x"]
    table.locator("xpath=ancestor::div[contains(@class, 'text_html')]").evaluate(
        "output => { output.scrollLeft = 200; }"
    )
    assert cell.bounding_box()["x"] == pytest.approx(before - 200, abs=1)
    assert head.bounding_box()["x"] == pytest.approx(at, abs=1)
    assert head.bounding_box()["width"] < SIZES["narrow"][0] / 2


@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_a_term_is_explained_where_it_is_first_used(open_page, size):
    page = open_page(PAGES[0], size)
    terms = page.locator(".term")
    said = [term.evaluate("t => t.firstChild.textContent.toLowerCase()") for term in terms.all()]
    assert "residual stream" in said
    assert len(said) == len(set(said))
    for term in terms.all():
        meaning = term.locator("[role=tooltip]")
        assert not meaning.is_visible()
        term.tap() if size == "narrow" else term.hover()
        box = meaning.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= SIZES[size][0]
    assert page.complaints == []


@every_page
def test_how_a_page_was_made_is_folded_away(open_page, name):
    page = open_page(name)
    made = page.locator("section:has(> :is(h1, h2, h3):text('How this page was made'))")
    for table in made.locator("table.dataframe").all():
        assert not table.is_visible()
    for folded in made.locator("details.made > summary").all():
        folded.click()
    for table in made.locator("table.dataframe").all():
        assert table.is_visible()


@every_page
def test_print_keeps_columns_and_colours(open_page, name):
    page = open_page(name)
    page.set_viewport_size({"width": 700, "height": 1000})  # a sheet between its margins
    page.emulate_media(media="print")
    settle(page)
    lost = page.locator("table.dataframe:visible").evaluate_all(
        "all => all.filter(t => t.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert lost == 0
    shades = "article mark, article td[style*=background], article span[style*=background]"
    coloured = page.locator(shades)
    kept = "all => all.map(e => getComputedStyle(e).printColorAdjust)"
    assert set(coloured.evaluate_all(kept)) <= {"exact"}


# --- what strangers wrote ---------------------------------------------------------------------

HOSTILE = [
    "<img src=x onerror=window.harmed=1>",
    "</script><script>window.harmed=1</script>",
    "<svg onload=window.harmed=1>",
    '"><b onmouseover=window.harmed=1>',
    "[a](javascript:window.harmed=1)",
    "{{constructor.constructor('window.harmed=1')()}}",
    "datum.x'+window.alert(1)+'",
    "\u202e\x1b[31m",
]
HARM = "img, svg[onload], b[onmouseover], a[href^=javascript], script:not([src])"


@pytest.fixture
def hostile_page():
    """A built page with a chart and a table of examples whose tokens are hostile."""
    import altair as alt
    import pandas as pd

    from mlsae_book import charts, sphinx_ext
    from mlsae_book.tables import examples

    if lack := missing():
        pytest.skip(lack)
    charts.use_book_theme()
    rows = pd.DataFrame({"token": HOSTILE, "value": range(1, len(HOSTILE) + 1)})
    encoded = {
        "x": alt.X("token:N", title=HOSTILE[2]),
        "y": "value:Q",
        "color": "token:N",
        "tooltip": [alt.Tooltip("token:N", title=HOSTILE[3]), "value:Q"],
    }
    titled = alt.Chart(rows, title=alt.Title(HOSTILE[0], subtitle=HOSTILE[1]))
    chart = sphinx_ext.figure(titled.mark_bar().encode(**encoded).to_dict())
    shown = rows.assign(
        latent=0, rank=1, layer=0, activation=1.0, peak=rows.index == 0,
        token=rows.token.map(examples.shown),
    )  # fmt: skip
    page = (HTML / "intro.html").read_text()
    first = page.index('<figure class="vega-lite-chart"')
    path = HTML / "hostile.html"
    path.write_text(page[:first] + examples.html(shown) + chart + page[first:])
    yield path.stem
    path.unlink()


def test_hostile_tokens_are_text_in_charts_tooltips_and_tables(open_page, hostile_page):
    """They stand in titles, axes, legends, marks, tooltips and examples, and harm nothing."""
    plain = open_page("intro").locator(HARM).count()
    page = open_page(hostile_page)
    assert page.locator(HARM).count() == plain + 1  # the chart's own JSON
    text = page.locator("article").inner_text()
    for token in HOSTILE[:3]:
        assert token in text
    bars = page.locator(".vega-lite-chart").first.locator('path[aria-roledescription="bar"]').all()
    assert len(bars) == len(HOSTILE)
    seen = []
    for bar in bars:
        bar.hover()
        page.wait_for_timeout(50)
        seen.append(page.locator("#vg-tooltip-element").inner_text())
        assert page.locator(HARM).count() == plain + 1
    assert sorted(t for t in HOSTILE[:7] if any(t in tip for tip in seen)) == sorted(HOSTILE[:7])
    assert page.evaluate("window.harmed") is None
    assert page.complaints == []
