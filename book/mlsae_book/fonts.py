"""Fonts of the built pages, cut down to the characters and icons that stand in them.

The font of the equations has 1.5 MB, the theme's icons and the script that could replace them by
pictures another 2. Both are cut after every page is written, since only then is known what is used.
What is left of the first stands in a script: browsers know a font that is given as bytes at once,
and one that comes later would move the text.
"""

from __future__ import annotations

import base64
import functools
import io
import re
import unicodedata
from importlib.metadata import distribution
from pathlib import Path

from fontTools import subset

MATHEMATICS = "mathematics.js"
SCRIPT = """\
document.fonts.add(new FontFace("STIX Two Math", Uint8Array.from(atob("{font}"), (character) =>
  character.charCodeAt(0))));
"""
ICONS = "vendor/fontawesome/webfonts/fa-solid-900.ttf"
STYLES = "styles/pydata-sphinx-theme.css"
# Of the icons, one for each name, which the style sheet declares by hundreds.
ICON = re.compile(r'((?:\.fa-[\w-]+:before,?)+)\{content:"\\([0-9a-f]+)"\}')


def cut(app, error: Exception | None):
    """Write the fonts of a finished build anew, each with what is used of it."""
    if error or app.builder.format != "html":
        return
    html, static = Path(app.outdir), Path(app.outdir) / "_static"
    pages = [path.read_text(encoding="utf-8") for path in sorted(html.rglob("*.html"))]
    scripts = [path.read_text(encoding="utf-8") for path in (static / "scripts").glob("*theme.js")]
    font = base64.b64encode(_subset(_mathematical_font(), mathematics(pages))).decode()
    (static / MATHEMATICS).write_text(SCRIPT.format(font=font))
    styles = static / STYLES
    if styles.is_file():
        kept = cut_icons(styles.read_text(encoding="utf-8"), icons([*pages, *scripts]))
        styles.write_text(kept, encoding="utf-8")
        codes = re.findall(r"\\(f[0-9a-f]{3})\b", kept)
        drawn = frozenset(chr(int(code, 16)) for code in codes)
        (static / ICONS).write_bytes(_subset(str(static / ICONS), drawn))
        (static / "scripts/fontawesome.js").write_text("// Icons are drawn by their font alone.\n")


def mathematics(pages: list[str]) -> frozenset[str]:
    """Characters of the equations of some pages, and those that browsers draw in their place."""
    formulas = "".join(
        part for page in pages for part in re.findall(r"<math.*?</math>", page, re.S)
    )
    text = re.sub(r"<annotation.*?</annotation>|<[^>]*>", "", formulas, flags=re.S)
    return frozenset(text) | {_italic(char) for char in text} | {"−", "ℎ"}


def _italic(char: str) -> str:
    """A letter that stands alone in an equation is drawn italic, by a character of its own."""
    name = re.sub("^(LATIN|GREEK) | LETTER", "", unicodedata.name(char, ""))
    try:
        return unicodedata.lookup(f"MATHEMATICAL ITALIC {name}")
    except KeyError:
        return char


def icons(texts: list[str]) -> set[str]:
    """Names of the icons in some pages and scripts."""
    return {name for text in texts for name in re.findall(r"\bfa-[\w-]+", text)}


def cut_icons(styles: str, used: set[str]) -> str:
    """A style sheet without the icons that are not used, and without a second form of the font."""

    def keep(rule: re.Match) -> str:
        return rule[0] if used & set(re.findall(r"fa-[\w-]+", rule[1])) else ""

    return re.sub(r'url\([^)]*\.woff2\) format\("woff2"\),', "", ICON.sub(keep, styles))


def _mathematical_font() -> str:
    files = distribution("ziamath").files or []
    return str(next(file for file in files if file.name == "STIXTwoMath-Regular.ttf").locate())


@functools.cache
def _subset(font: str, characters: frozenset[str]) -> bytes:
    compressed = "woff" if font == _mathematical_font() else None
    options = subset.Options(flavor=compressed, layout_features=["*"], notdef_outline=True)
    loaded = subset.load_font(font, options)
    cutter = subset.Subsetter(options)
    cutter.populate(text="".join(sorted(characters)))
    cutter.subset(loaded)
    written = io.BytesIO()
    subset.save_font(loaded, written, options)
    return written.getvalue()


def setup(app) -> dict:
    """Called by Sphinx, which finds this module in ``sphinx.extra_extensions`` of _config.yml."""
    app.add_js_file(MATHEMATICS)
    app.connect("build-finished", cut)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
