"""The reference: the modules of both packages in the order in which to read them.

The page `api` lists them; their sections are added to the pages of `PAGES`. What stands there is
autodoc's, from the docstrings.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Packages, each with where it lies and its modules in the order in which to read them: one imports
#: only what stands before it.
PACKAGES = {
    "mlsae_core": (
        ROOT / "mlsae_core",
        (
            "fields",
            "spec",
            "keys",
            "files",
            "formats",
            "stops",
            "store",
            "processes",
            "resume",
            "metrics",
            "documents",
            "text",
            "models",
            "architecture",
            "products",
            "modules",
            "lm",
            "lens",
            "activations",
            "pairs",
            "kernels",
            "triton_kernels",
            "activation",
            "optimizer",
            "sae",
            "singles",
            "objective",
            "train",
            "analysis",
            "fits",
            "pipeline",
            "publish",
            "status",
            "cli",
        ),
    ),
    "mlsae_book": (
        ROOT / "book/mlsae_book",
        (
            "questions",
            "corpus",
            "prose",
            "fetch",
            "as_released",
            "planted",
            "tune",
            "tables",
            "toys",
            "surrogates",
            "controls",
            "stages",
            "offline",
            "experiments",
            "dictionaries",
            "charts",
            "live",
            "widgets",
            "report",
            "pretrain",
            "reproduce",
            "lab",
            "api",
            "outputs",
            "glossary",
            "excerpts",
            "fonts",
            "execution",
            "sphinx_ext",
        ),
    ),
}
#: Pages of the reference, each with its first module; a page ends where the next one begins.
PAGES = {
    "api/specs": "mlsae_core.fields",
    "api/metrics": "mlsae_core.metrics",
    "api/text": "mlsae_core.documents",
    "api/training": "mlsae_core.pairs",
    "api/measuring": "mlsae_core.analysis",
    "api/worlds": "mlsae_book.questions",
    "api/tables": "mlsae_book.tables",
    "api/tables_of_layers": "mlsae_book.tables.layers",
    "api/experiments": "mlsae_book.stages",
    "api/charts": "mlsae_book.charts",
}
_BOOK = PACKAGES["mlsae_book"][1]
#: Modules that only build the book.
BUILD = tuple(f"mlsae_book.{name}" for name in ("offline", *_BOOK[_BOOK.index("api") :]))


def modules() -> list[str]:
    """Names of the modules of both packages, in the order in which to read them."""
    return [name for package in PACKAGES for name in _modules(package)]


def _modules(package: str) -> list[str]:
    folder, order = PACKAGES[package]
    found = {p.relative_to(folder).with_suffix("") for p in folder.rglob("*.py")}
    names = {".".join(p.parts).removesuffix(".__init__") for p in found}
    names = (name for name in names if not name.startswith("__"))
    ordered = sorted(names, key=lambda name: (order.index(name.split(".")[0]), name))
    return [f"{package}.{name}" for name in ordered]


def pages() -> dict[str, list[str]]:
    """Modules by the page of the reference on which they stand; not those that build the book."""
    firsts = {module: page for page, module in PAGES.items()}
    found: dict[str, list[str]] = {}
    page = ""
    for name in modules():
        page = firsts.get(name, page)
        if name not in BUILD:
            found.setdefault(page, []).append(name)
    return found


def _first_line(name: str) -> str:
    """What the docstring of a module begins with."""
    package, *rest = name.split(".")
    path = PACKAGES[package][0].joinpath(*rest)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    return docstring.partition("\n\n")[0].replace("\n", " ")


def _add_modules(app, page: str, source: list[str]):
    """A list of all modules at the end of the page `api`, a section for each on its own page."""
    if page == "api":
        for other, names in pages().items():
            title = Path(app.srcdir, f"{other}.md").read_text(encoding="utf-8").splitlines()[0]
            source[0] += f"\n## [{title.removeprefix('# ')}]({other}.md)\n\n"
            for name in names:
                source[0] += f"- {{py:mod}}`{name}`: {_first_line(name)}\n"
    for name in pages().get(page, ()):
        source[0] += f"\n## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"


def _is_left_out(app, kind: str, name: str, member, skip: bool, options) -> bool | None:
    """Whether a member is a tuple's field, of which Python says nothing but its number."""
    return True if (member.__doc__ or "").startswith("Alias for field number") else None


def _readable(app, kind: str, name: str, member, options, signature: str | None, returns):
    """Python for defaults that are objects, `<class 'dict'>` and such: else no type is read."""
    if signature is not None:
        signature = re.sub(r"<(?:class '(\w+)')?[^>]*>", lambda found: found[1] or "...", signature)
    return signature, returns


def setup(app) -> dict:
    """Called by Sphinx, which finds this module in ``sphinx.extra_extensions`` of _config.yml."""
    app.connect("source-read", _add_modules)
    app.connect("autodoc-skip-member", _is_left_out)
    app.connect("autodoc-process-signature", _readable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
