"""The book's sources and its machinery: pairs, contents, pins, mathematics, pages, imports."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import jupytext
import pytest
import yaml
from docutils import nodes
from docutils.utils import new_document
from sphinx_external_toc.parsing import parse_toc_yaml

from mlsae_book import api, excerpts, fonts, glossary, outputs, sphinx_ext

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
PACKAGE = BOOK / "mlsae_book"
CHAPTERS = sorted(p for p in BOOK.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

every_chapter = pytest.mark.parametrize(
    "chapter", CHAPTERS, ids=lambda p: p.relative_to(BOOK).as_posix()
)


def code_cells(chapter):
    return [cell for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]


# Chapters ---------------------------------------------------------------------------------------


@every_chapter
def test_both_halves_of_a_pair_say_the_same(chapter):
    notebook, script = (
        [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in half.cells]
        for half in (jupytext.read(chapter), jupytext.read(chapter.with_suffix(".py")))
    )
    assert notebook == script, "run `make notebooks`"


def test_every_script_has_its_notebook():
    scripts = {p for p in BOOK.rglob("*.py") if PACKAGE not in p.parents}
    assert {p.with_suffix(".ipynb") for p in scripts} == set(CHAPTERS)


@every_chapter
def test_stored_outputs_come_from_one_run_from_top_to_bottom(chapter):
    cells = code_cells(chapter)
    # `make notebooks` drops the output of widgets, which is another in every run, with its count.
    dropped = ["remove-output" in cell.metadata.get("tags", []) for cell in cells]
    expected = [None if gone else n for n, gone in enumerate(dropped, 1)]
    assert [cell.execution_count for cell in cells] == expected
    errors = [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert not errors


@every_chapter
def test_cells_are_short_and_hold_no_program(chapter):
    """What needs a function or a loop belongs into the package, where it is tested."""
    program = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.comprehension)
    for cell in code_cells(chapter):
        assert len(cell.source.splitlines()) <= 12, cell.source
        found = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, program)]
        assert not found, f"{type(found[0]).__name__} in:\n{cell.source}"


@every_chapter
def test_no_sentence_becomes_a_list(chapter):
    """A line of a paragraph that begins with `1.`, `-` or `+` is one to Markdown."""
    for cell in jupytext.read(chapter).cells:
        if cell.cell_type == "markdown":
            begins = re.findall(r"[\w,]\n((?:\d+[.)]|[-+*]) .*)", cell.source)
            assert not begins


def menus(spec):
    """Of every menu in a chart the words that it shows first, and those of each other choice."""
    if isinstance(spec, list):
        yield from (found for part in spec for found in menus(part))
    if not isinstance(spec, dict):
        return
    for param in spec.get("params", []):
        if options := param.get("bind", {}).get("options"):
            labels = [words(str(label)) for label in param["bind"].get("labels", options)]
            yield labels.pop(options.index(param["value"])) if "value" in param else [], labels
    yield from (found for name, part in spec.items() if name != "datasets" for found in menus(part))


def words(text):
    return [word for word in re.findall(r"\w+", text.lower()) if not word.isdigit()]


def unseen(spec):
    """Words of a chart's title that only a choice other than the first would show; of short names,
    not of prompts."""
    first, others = set(), set()
    for shown, rest in menus(spec):
        first |= {*shown}
        others |= {label[-1] for label in rest if 0 < len(label) < 4}
    return (others - first) & {*words(spec["title"]["text"])}


@every_chapter
def test_the_first_view_of_a_chart_shows_what_its_title_names(chapter):
    for cell in code_cells(chapter):
        for output in cell.get("outputs", []):
            for kind, spec in output.get("data", {}).items():
                if "vegalite" in kind:
                    assert not unseen(spec), spec["title"]["text"]


def test_a_title_that_names_another_choice_is_seen():
    menu = {"bind": {"options": ["k", "R"], "labels": ["Sparsity k", "Factor R"]}, "value": "k"}
    chart = {"title": {"text": "It falls with k, and over R it rises"}, "params": [menu]}
    assert unseen({**chart, "vconcat": []}) == {"r"}
    assert unseen({**chart, "params": [{**menu, "value": "R"}]}) == {"k"}
    assert not unseen({**chart, "params": []})


@every_chapter
def test_widgets_are_left_out_of_the_page_and_of_the_comparison(chapter):
    """A static page shows a dead widget: it has a twin with controls in the chart instead."""
    for cell in code_cells(chapter):
        views = [
            o
            for o in cell.outputs
            if "application/vnd.jupyter.widget-view+json" in o.get("data", {})
        ]
        assert not views, "tag the cell remove-output and nbval-ignore-output, run `make notebooks`"


def test_contents_list_every_chapter_and_no_other():
    listed = {str(BOOK / name) for name in parse_toc_yaml(ROOT / "_toc.yml")}
    pages = {*CHAPTERS, *BOOK.rglob("*.md")}
    assert listed == {str(page.with_suffix("")) for page in pages}


def test_both_tables_of_contents_are_the_same():
    """`book/_toc.yml` is a link; a checkout without links makes a text file of it."""
    top, linked = (ROOT / "_toc.yml").read_text(), (BOOK / "_toc.yml").read_text()
    assert linked == top, "book/_toc.yml is no link here: copy _toc.yml over it"


def test_a_chapter_without_page_is_missed(tmp_path):
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: a\nchapters:\n- file: part/b\n")
    html = tmp_path / "_build" / "html"
    html.mkdir(parents=True)
    (html / "a.html").touch()
    assert sphinx_ext.missing_pages(tmp_path) == ["part/b"]


# Pages ------------------------------------------------------------------------------------------


def test_a_chart_cannot_break_out_of_its_script():
    spec = {"title": {"text": "1 < 2"}, "description": "</script><b>", "mark": "bar"}
    html = sphinx_ext.figure(spec)
    assert html.count("</script>") == 1
    assert '<p class="chart-title">1 &lt; 2</p>' in html
    [stored] = re.findall("<script[^>]*>(.*?)</script>", html)
    assert json.loads(stored) == {"description": "</script><b>", "mark": "bar"}


@pytest.mark.parametrize(
    ("tex", "text"),
    [
        (r"x \in \mathbb{R}", "x∈ℝ"),
        (r"\mathbf{W} \mathcal{L} \mathfrak{C} \boldsymbol{\alpha}", "𝐖ℒℭ𝜶"),
        (r"\mathrm{FVU}_\ell \le \tfrac{1}{2}", "FVUℓ≤12"),
        (r"\operatorname{TopK}_k(x)", "TopK\u2061k(x)"),
    ],
)
def test_letters_of_an_equation(tex, text):
    math = ElementTree.fromstring(sphinx_ext.mathml(tex))
    annotation = math.find(".//{*}annotation")
    assert annotation.text == tex
    assert "".join(math.itertext()).removesuffix(tex) == text
    assert not [e for e in math.iter() if e.get("mathvariant", "normal") != "normal"]


def test_columns_of_an_equation_are_aligned_by_css():
    tex = r"\begin{split}a &= b \\ c &= d\end{split}"
    math = ElementTree.fromstring(sphinx_ext.mathml(tex, True))
    cells = list(math.iter(f"{{{sphinx_ext.MATHML}}}mtd"))
    assert len(cells) == 4
    assert [re.match("text-align:(.*?);", c.get("style"))[1] for c in cells] == [
        "right",
        "left",
    ] * 2
    assert math.get("display") == "block"


@pytest.mark.parametrize(
    ("tex", "spaces"), [(r"\ln 4096", 1), (r"\max_j x_j", 1), (r"\ln(4096) + \max_j\{x_j\}", 0)]
)
def test_a_function_stands_apart_from_an_argument_without_parentheses(tex, spaces):
    assert sphinx_ext.mathml(tex).count("<mspace") == spaces


def test_a_prime_is_no_superscript_and_keeps_its_order():
    math = ElementTree.fromstring(sphinx_ext.mathml(r"x'_t + \ell'"))
    assert not {"msup", "msubsup"} & {e.tag.split("}")[1] for e in math.iter()}
    assert "".join(math[0][0].itertext()) == "x′t+ℓ′"


def test_a_mistake_in_an_equation_is_an_error_that_says_where():
    with pytest.raises(ValueError, match=r"Undefined control sequence: \\relu at position 1"):
        sphinx_ext.mathml(r"\relu(x)")


def test_words_wrap_and_numbers_do_not():
    table = "<th>k</th><td>-0.25</td><td>NaN</td><td>an adjective</td><td>test_x.py::test_long</td>"
    assert outputs.wrapping(table) == (
        '<th class="words">k</th><td>-0.25</td><td>NaN</td><td class="words">an adjective</td>'
        '<td class="words">test_<wbr>x.<wbr>py::<wbr>test_<wbr>long</td>'
    )


def test_letters_of_the_equations_stay_in_their_font_upright_and_italic():
    kept = fonts.mathematics(["x <math><mi>a</mi><annotation>z</annotation></math> y"])
    assert kept == {"a", "𝑎", "−", "ℎ"}


def test_icons_that_no_page_shows_leave_the_style_sheet():
    bars, moon = (
        '.fa-bars:before,.fa-menu:before{content:"\\f0c9"}',
        '.fa-moon:before{content:"\\f186"}',
    )
    font = 'src:url(a.woff2) format("woff2"),url(a.ttf) format("truetype")'
    used = fonts.icons(['<i class="fa-solid fa-bars">'])
    assert fonts.cut_icons(bars + moon + font, used) == bars + 'src:url(a.ttf) format("truetype")'


@pytest.fixture
def document():
    """A page about latents with a heading, code, a link, a formula and a subsection."""
    page = new_document("page")
    section, inner = nodes.section(ids=["top"]), nodes.section(ids=["below"])
    code = nodes.literal("", "FVU")
    link = nodes.reference("", "residual stream", refuri="x")
    text = nodes.paragraph("", "", nodes.Text("Most latents have an "), code, nodes.Text(" and a "))
    text += [link, nodes.Text(". A Latent: "), nodes.math("", "FVU"), nodes.Text("the FVU.")]
    inner += [nodes.title("", "Dead latents"), nodes.paragraph("", "A dead latent, a latent.")]
    section += [nodes.title("", "Latents"), text, nodes.raw("", "<b>", format="html"), inner]
    page += section
    return page


def test_a_term_is_explained_at_its_first_use_in_running_text(document):
    app = SimpleNamespace(builder=SimpleNamespace(format="html"))
    before = document.astext()
    glossary.explain(app, document, "page")
    found = [node.astext() for node in document.findall(glossary.explained)]
    assert found == ["latents", "FVU", "dead latent"]
    assert document.astext() == before


@pytest.mark.parametrize(
    ("text", "found"),
    [("residual-stream", 0), ("MLSAEs", 2), ("SAEs", 3), ("dead latents", 4), ("Latents", 5)],
)
def test_the_longest_term_counts(text, found):
    assert glossary.TERM.fullmatch(text).lastindex == found + 1
    assert not glossary.TERM.search("SAElens relatent anatsy")


def test_excerpts_are_cut_from_a_section_without_its_subsections(document):
    assert excerpts.sections(document) == [
        ("top", "Latents Most latents have an FVU and a residual stream. A Latent: the FVU."),
        ("below", "Dead latents A dead latent, a latent."),
    ]


@pytest.mark.slow
def test_a_failing_cell_fails_the_build(tmp_path):
    """By default Jupyter Book prints the error into the page and exits with 0."""
    (tmp_path / "book").mkdir()
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    del config["bibtex_bibfiles"]
    config["sphinx"]["config"]["html_static_path"] = [str(BOOK / "_theme")]
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "book/_toc.yml").write_text("format: jb-book\nroot: page\n")
    page = jupytext.reads("# %% [markdown]\n# # Page\n\n# %%\n1 / 0\n", "py:percent")
    jupytext.write(page, tmp_path / "book/page.ipynb")
    build = [Path(sys.executable).with_name("jupyter-book"), "build", tmp_path / "book"]
    run = subprocess.run(build, capture_output=True, text=True)
    assert run.returncode != 0
    assert "look at page.ipynb: ZeroDivisionError: division by zero" in run.stdout + run.stderr
    shown = (tmp_path / "_build/html/page.html").read_text()
    assert "could not be executed" in shown


# The house --------------------------------------------------------------------------------------

#: A module imports only what stands above it, and `mlsae_core` nothing of the book.
FOLDERS = {package: folder for package, (folder, _) in api.PACKAGES.items()}
MODULES = {package: (*order, "__main__") for package, (_, order) in api.PACKAGES.items()}
ALONE = {"fields", "metrics", "charts"}
SOURCES = [
    (package, path)
    for package, folder in FOLDERS.items()
    for path in sorted(folder.rglob("*.py"))
    if path != folder / "__init__.py"
]
every_source = pytest.mark.parametrize(
    ("package", "path"), SOURCES, ids=[p.relative_to(ROOT).as_posix() for _, p in SOURCES]
)


def imports(package, path):
    """Names that a source file imports, wherever in it, absolute: "torch.nn", "mlsae_core.sae"."""
    here = [package, *path.relative_to(FOLDERS[package]).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_of(package, path):
    return path.relative_to(FOLDERS[package]).with_suffix("").parts[0]


def test_the_tables_of_modules_are_complete():
    for package, modules in MODULES.items():
        assert {module_of(p, path) for p, path in SOURCES if p == package} == set(modules)


@every_source
def test_a_module_imports_only_what_stands_above_it(package, path):
    module, order = module_of(package, path), MODULES[package]
    found = set(imports(package, path))
    ours = {name.split(".")[1] for name in found if name.startswith(f"{package}.")}
    ours -= {module, "__version__"}
    above = set() if module in ALONE else set(order[: order.index(module)])
    assert ours <= above, f"{module} imports {', '.join(sorted(ours - above))}"


@every_source
def test_the_core_knows_nothing_of_the_book(package, path):
    """Nor do its lazy imports, nor names that are given to importlib."""
    if package == "mlsae_core":
        assert not [name for name in imports(package, path) if name.startswith("mlsae_book")]
        strings = [
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not [text for text in strings if re.fullmatch(r"mlsae_book[\w.:]*", text)]


def test_statistics_know_no_drawing_and_drawing_knows_no_models():
    names = {}
    for package, path in SOURCES:
        found = {name.split(".")[0] for name in imports(package, path)}
        names.setdefault(module_of(package, path), set()).update(found)
    assert not names["metrics"] & {"altair", "pandas"}
    assert not names["charts"] & {"torch", "transformers"}
    assert not (names["spec"] | names["fields"]) & {"torch", "transformers"}
