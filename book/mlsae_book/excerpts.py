"""Search results with excerpts, also where pages are opened as files.

Sphinx's search fetches every page that it found to cut an excerpt from it, which browsers refuse
between files. So the text of all sections is written beside the pages as a script, and
`_theme/excerpts.js` answers the search from it.
"""

from __future__ import annotations

import json
from pathlib import Path

from docutils import nodes

SCRIPT = "excerpts-text.js"
#: Text that nobody reads: code that is folded away, charts, formulas as TeX.
LEFT_OUT = (nodes.raw, nodes.literal_block, nodes.math, nodes.math_block, nodes.comment)


def sections(doctree: nodes.document) -> list[tuple[str, str]]:
    """(anchor, text) of every section of a page, each without its subsections."""
    found = []
    for section in doctree.findall(nodes.section):
        own = (_text(child) for child in section if not isinstance(child, nodes.section))
        found.append((section["ids"][0], " ".join(" ".join(own).split())))
    return found


def _text(node: nodes.Node) -> str:
    if isinstance(node, nodes.Text):
        return node.astext()
    if isinstance(node, LEFT_OUT):
        return ""
    between = "" if isinstance(node, nodes.TextElement) else " "
    return between.join(map(_text, node.children))


def write(app, error: Exception | None):
    """Write the text of all pages as a script that search.html loads."""
    if error or app.builder.format != "html":
        return
    pages = {
        f"{name}{app.builder.out_suffix}": sections(app.env.get_doctree(name))
        for name in sorted(app.env.found_docs)
    }
    text = json.dumps(pages, ensure_ascii=False, separators=(",", ":"))
    (Path(app.outdir) / "_static" / SCRIPT).write_text(f"const TEXT = {text};\n", encoding="utf-8")


def add_scripts(app, page: str, template: str, context: dict, doctree: nodes.document | None):
    """The search page alone loads the text."""
    if page == "search":
        for file in (SCRIPT, "excerpts.js"):
            app.add_js_file(file, priority=100)


def setup(app) -> dict:
    """Called by Sphinx, which finds this module in ``sphinx.extra_extensions`` of _config.yml."""
    app.connect("build-finished", write)
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
