"""Sphinx extension of the book: charts, mathematics and outputs, all without a network.

- Vega-Lite outputs become figures that `book/_theme/charts.js` draws; Vega itself is taken from
  vl-convert-python when the book is built.
- Equations become MathML when the book is built: KaTeX reads them, browsers draw them natively.
  A mistake in an equation is a warning, so it fails the build.
- Outputs are those stored in the notebooks where these are today's (`execution.py`).

Tables, fonts, search and the glossary have modules of their own: `outputs`, `fonts`, `excerpts`,
`glossary`.

`python -m mlsae_book.sphinx_ext figure` draws the README's figure, and
`python -m mlsae_book.sphinx_ext` fails where a chapter of `_toc.yml` has no page in `_build/html`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from html import escape
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from myst_nb.core.render import MimeRenderPlugin
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx_external_toc.parsing import parse_toc_yaml

from mlsae_book import api, charts, execution
from mlsae_core import __version__

MATHML = "http://www.w3.org/1998/Math/MathML"
VEGA = "vega.js"
logger = logging.getLogger(__name__)
ElementTree.register_namespace("", MATHML)


class VegaLite(MimeRenderPlugin):
    """Writes a Vega-Lite output as a figure: title, reading aid, controls, and the chart as JSON.

    Title and subtitle leave the specification and become text of the page, so that they wrap on a
    narrow screen and follow its theme.
    """

    mime_priority_overrides = [("html", charts.MIME, 5)]  # noqa: RUF012 (the base class's form)

    @staticmethod
    def handle_mime(renderer, data, inline):
        if inline or data.mime_type != charts.MIME:
            return None
        scripts = {
            "vega": (VEGA, {"loading_method": "defer", "priority": 100}),
            "charts": ("charts.js", {"loading_method": "defer", "priority": 101}),
            "dark": (None, {"body": f"const DARK_CHARTS = {_json(charts.theme(dark=True))};"}),
        }
        for key, (uri, options) in scripts.items():
            renderer.add_js_file(f"vega_lite_{key}", uri, options)
        return [nodes.raw("", figure(data.content), format="html")]


def figure(spec: dict[str, Any]) -> str:
    """HTML of one chart; `charts.js` finds it by its class and draws it.

    Room for the chart and its controls is kept, so that nothing moves when it is drawn.
    """
    spec = dict(spec)
    heading = ""
    title = spec.get("title")
    if isinstance(title, dict) and isinstance(title.get("text"), str):
        heading = f'<p class="chart-title">{escape(title["text"])}</p>'
        if "subtitle" in title:
            heading += f'<p class="chart-subtitle">{escape(title["subtitle"])}</p>'
        del spec["title"]
    controls = sum("bind" in parameter for parameter in spec.get("params", []))
    return (
        f'<figure class="vega-lite-chart" style="--controls:{controls};--height:{_height(spec)}px">'
        f'{heading}<div class="chart-controls"></div><div class="chart-view"></div>'
        f'<script type="application/json">{_json(spec)}</script>'
        "<noscript><p>This chart is drawn by JavaScript, which is switched off.</p></noscript>"
        "</figure>"
    )


def _height(spec: dict[str, Any]) -> int:
    """Pixels of a chart in the column of a wide page."""
    single = {} if "width" in spec or "vconcat" in spec else {"width": 768}
    svg = _svg({**spec, **single})
    return round(float(re.search(r'<svg[^>]* height="([\d.]+)"', svg)[1]))


#: Characters that XML has no place for. They would end the process that draws.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _svg(spec: dict[str, Any]) -> str:
    """A chart as it stands still; characters without a place in XML are shown as unknown ones."""
    import vl_convert

    def legible(value: Any) -> Any:
        if isinstance(value, dict):
            return {legible(name): legible(one) for name, one in value.items()}
        if isinstance(value, list):
            return [legible(one) for one in value]
        return _NO_XML.sub("\ufffd", value) if isinstance(value, str) else value

    return vl_convert.vegalite_to_svg(legible(spec), vl_version="5.20")


def _json(value: Any) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).replace("</", "<\\/")


# Mathematics ------------------------------------------------------------------------------------


@cache
def _katex() -> Callable[[str, bool], str]:
    import dukpy

    files = distribution("sphinxcontrib-katex").files or []
    source = next(f for f in files if f.name == "katex.min.js").locate()
    engine = dukpy.JSInterpreter()
    engine.evaljs(f"{Path(str(source)).read_text(encoding='utf-8')}; null")
    call = "katex.renderToString(dukpy.tex, {output: 'mathml', displayMode: dukpy.display})"
    return lambda tex, display: engine.evaljs(call, tex=tex, display=display)


def mathml(tex: str, display: bool = False) -> str:
    r"""MathML of a TeX formula; raises ``ValueError`` with KaTeX's words where it cannot be read.

    >>> mathml(r"x \in \mathbb{R}").count("<mi>")
    2
    """
    try:
        html = _katex()(tex, display)
    except Exception as error:  # the engine has one exception class of its own
        raise ValueError(str(error).split("\n")[0]) from None
    tree = ElementTree.fromstring(html)[0]
    for element in list(tree.iter()):
        tag = element.tag.removeprefix(f"{{{MATHML}}}")
        variant = element.get("mathvariant")
        if variant and variant != "normal":
            del element.attrib["mathvariant"]
            element.text = "".join(_styled(char, variant) for char in element.text or "")
        if tag == "mo" and element.text == "∥":  # a norm, not a relation
            element.attrib.update(lspace="0", rspace="0")
        if tag == "mtable" and "columnalign" in element.attrib:
            _align_columns(element)
        if tag in ("msup", "msubsup") and element[-1].text == "′":
            _lower_prime(element)
        if tag in ("mrow", "mstyle"):
            _set_functions_apart(element)
    return ElementTree.tostring(tree, encoding="unicode")


def _styled(char: str, variant: str) -> str:
    """MathML Core knows no `mathvariant` but "normal": take Unicode's own letters instead."""
    style = variant.replace("-", " ").upper()
    style = style.replace("DOUBLE STRUCK", "DOUBLE-STRUCK").replace("SANS SERIF", "SANS-SERIF")
    name = unicodedata.name(char, "").replace("LATIN ", "").replace("GREEK ", "")
    name = name.replace("LETTER ", "")
    plain = style.replace("FRAKTUR", "BLACK-LETTER")  # ℝ, ℒ and ℭ are older than their alphabets
    for candidate in (f"MATHEMATICAL {style} {name}", f"{plain} {name}"):
        try:
            return unicodedata.lookup(candidate)
        except KeyError:
            pass
    return char


def _lower_prime(script: ElementTree.Element) -> None:
    """The prime of a mathematical font is raised and small already: set it beside its letter."""
    base, *sub, prime = script
    letter = ElementTree.Element(f"{{{MATHML}}}mrow")
    letter.extend([base, prime])
    script[:] = [letter, *sub]
    script.tag = f"{{{MATHML}}}{'msub' if sub else 'mrow'}"


def _set_functions_apart(row: ElementTree.Element) -> None:
    """A thin space between a function and an argument without parentheses: ln 4096, max_j x_j."""
    for i in range(len(row) - 2, -1, -1):
        name, argument = row[i], next((e for e in row[i + 1].iter() if not len(e)), None)
        if name.tag.endswith(("msub", "msup", "msubsup", "munder", "munderover")):
            name = name[0]
        name = name[-1] if len(name) else name
        if name.text == "\u2061" and argument.text not in ("(", "[", "{"):
            row.insert(i + 1, ElementTree.Element(f"{{{MATHML}}}mspace", width="0.167em"))


def _align_columns(table: ElementTree.Element) -> None:
    """MathML Core leaves the columns of a table to CSS."""
    align = table.attrib.pop("columnalign").split()
    gaps = table.attrib.pop("columnspacing", "0.8em").split()
    for row in table:
        for i, cell in enumerate(row):
            left = "0em" if i == 0 else gaps[min(i, len(gaps)) - 1]
            right = "0em" if i == len(row) - 1 else gaps[min(i + 1, len(gaps)) - 1]
            cell.set(
                "style",
                f"text-align:{align[min(i, len(align) - 1)]};"
                f"padding-left:calc({left}/2);padding-right:calc({right}/2)",
            )


def _visit_math(translator, node: nodes.Element) -> None:
    translator.body.append(translator.starttag(node, "span", "", CLASS="math notranslate"))
    translator.body.append(_math_or_warning(node, display=False) + "</span>")
    raise nodes.SkipNode


def _visit_math_block(translator, node: nodes.Element) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math notranslate"))
    if node["number"]:
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})')
        translator.add_permalink_ref(node, "Link to this equation")
        translator.body.append("</span>")
    translator.body.append(_math_or_warning(node, display=True) + "</div>\n")
    raise nodes.SkipNode


def _math_or_warning(node: nodes.Element, display: bool) -> str:
    tex = node.astext().strip()
    if display and not node.get("nowrap") and "\\\\" in tex:
        tex = rf"\begin{{split}}{tex}\end{{split}}"
    try:
        return mathml(tex, display)
    except ValueError as error:
        logger.warning("%s", error, location=node, type="math")
        return f"<code>{escape(tex)}</code>"


# The build ---------------------------------------------------------------------------------------


def _prepare(app, config) -> None:
    """Point the execution cache at these inputs; lay third-party files beside the static ones."""
    build = Path(app.outdir).parent
    config.nb_execution_cache_path = str(execution.cache_path(build, Path(app.srcdir).parent))
    assets = build / ".assets"
    assets.mkdir(parents=True, exist_ok=True)
    import vl_convert

    bundle = f"// vl-convert-python {vl_convert.__version__}\n"
    vega = assets / VEGA
    if not vega.exists() or not vega.read_text(encoding="utf-8").startswith(bundle):
        bundle += f"(() => {{{vl_convert.javascript_bundle()}}})();\n"
        vega.write_text(bundle, encoding="utf-8")
    config.html_static_path.append(str(assets))


def _drop_thebe(app, pagename, templatename, context, doctree) -> None:
    """Jupyter Book always adds sphinx-thebe, twice and with an outside address; it is not used."""
    for kind in ("script_files", "css_files"):
        context[kind] = [
            file
            for file in context.get(kind, [])
            if "thebe" not in f"{file} {getattr(file, 'attributes', {}).get('body', '')}".lower()
        ]


def missing_pages(root: Path) -> list[str]:
    """Chapters of ``root/_toc.yml`` that have no html page under ``root/_build/html``."""
    chapters = list(parse_toc_yaml(root / "_toc.yml"))
    return [c for c in chapters if not (root / "_build/html" / f"{c}.html").is_file()]


def readme_figure(root: Path) -> Path:
    """Write the README's figure: the landing page's heatmap as it stands in its stored outputs."""
    cells = json.loads((root / "book/intro.ipynb").read_text())["cells"]
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    drawn = [found[charts.MIME] for found in data if charts.MIME in found]
    chart = next(spec for spec in drawn if spec.get("layer", [{}])[0].get("name") == "heatmap")
    chart["title"]["subtitle"] = "A column is a latent; columns are sorted by mean layer."
    chart["config"]["aria"] = False  # a label for every cell would be most of the file
    still = {**chart, "width": 820, "background": "white"}
    path = root / "book/figure.svg"
    path.write_text(_svg(still), encoding="utf-8")
    return path


def setup(app) -> dict[str, Any]:
    """Called by Sphinx, which finds this module in ``sphinx.extra_extensions`` of _config.yml."""
    # Pages written by another version of these modules are written again.
    files = (Path(__file__).with_name(f"{name.split('.')[1]}.py") for name in api.BUILD)
    own = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    app.add_config_value("mlsae_book", own, "env", str)
    app.add_css_file("book.css")
    app.add_js_file("print.js")
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math_block, None))
    app.connect("config-inited", _prepare, priority=10)
    app.connect("env-before-read-docs", execution.provide)
    app.connect("html-page-context", execution.say_what_failed)
    app.connect("html-page-context", _drop_thebe, priority=900)
    app.connect("build-finished", execution.list_what_failed)
    return {"version": __version__, "parallel_read_safe": True, "parallel_write_safe": False}


def main() -> int:
    if sys.argv[1:] == ["figure"]:
        print(readme_figure(Path.cwd()))
        return 0
    missing = missing_pages(Path.cwd())
    for chapter in missing:
        print(f"_build/html/{chapter}.html is missing: the book was not built", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
