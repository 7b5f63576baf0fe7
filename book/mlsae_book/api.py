"""The reference: the modules of both packages in the order in which to read them.

Their sections are added to the page `api`; what stands there is autodoc's, from the docstrings.
"""

from __future__ import annotations

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
            "models",
            "architecture",
            "metrics",
            "documents",
            "text",
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
            "stages",
            "experiments",
            "dictionaries",
            "charts",
            "widgets",
            "pretrain",
            "reproduce",
            "api",
            "execution",
            "sphinx_ext",
        ),
    ),
}
#: Modules that only build the book.
BUILD = ("mlsae_book.api", "mlsae_book.execution", "mlsae_book.sphinx_ext")


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


def _add_modules(app, page: str, source: list[str]):
    """A section for each module at the end of the page."""
    if page == "api":
        for name in modules():
            if name not in BUILD:
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
