"""The directive `mlsae-api`: signatures and docstrings of both packages, as a page of the book.

They are read from the source files, so nothing is imported, and set as text, so that no docstring
can break the build.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
#: Heads of a docstring's sections: with a colon, or underlined.
HEAD = re.compile(r"(Args|Returns|Raises):|(\w+)\n-+$", re.MULTILINE)
#: In running text: ``code``, `code`, *stress*.
MARKS = re.compile(r"``(.+?)``|`(.+?)`|(?<![\w*])\*(\w[^*]*)\*(?!\w)")
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
            "store",
            "models",
            "metrics",
            "text",
            "products",
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


def public(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Kind, signature and docstring of what a module defines for others, methods after classes.

    Names with a leading underscore are left out, and so is what has no docstring.
    """
    for node in tree.body:
        yield from _entry(node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                yield from _entry(method, f"{node.name}.")


def _entry(node: ast.stmt, owner: str = "") -> Iterator[tuple[str, str, str]]:
    kinds = {ast.FunctionDef: "function", ast.ClassDef: "class"}
    kind = kinds.get(type(node))
    if kind is None or node.name.startswith("_"):
        return
    if docstring := ast.get_docstring(node):
        yield kind, _signature(node, owner), docstring


def _signature(node: ast.FunctionDef | ast.ClassDef, owner: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    arguments = [ast.unparse(part) for part in _arguments(node.args)]
    flat = f"{owner}{node.name}({', '.join(arguments)})"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if len(flat + result) <= 80:
        return flat + result
    return f"{owner}{node.name}(\n    " + ",\n    ".join(arguments) + f",\n){result}"


def _arguments(arguments: ast.arguments) -> Iterator[ast.arguments]:
    """Each argument as a list of its own, so that it can be written out with its default."""
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = len(positional) - len(arguments.defaults)
    for i, argument in enumerate(positional):
        if argument.arg not in ("self", "cls"):
            yield _one(args=[argument], defaults=arguments.defaults[i - missing :][: i >= missing])
    if arguments.vararg or arguments.kwonlyargs:
        yield _one(vararg=arguments.vararg) if arguments.vararg else ast.Name("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _one(args=[argument], defaults=[default] if default else [])
    if arguments.kwarg:
        yield _one(kwarg=arguments.kwarg)


def _one(**parts) -> ast.arguments:
    empty = {"posonlyargs": [], "args": [], "kwonlyargs": [], "kw_defaults": [], "defaults": []}
    return ast.arguments(**{"vararg": None, "kwarg": None, **empty, **parts})


def described(docstring: str) -> list[nodes.Node]:
    """A docstring as paragraphs; the head of a section stands in bold before its items."""
    found: list[nodes.Node] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if head := HEAD.match(block):
            title = nodes.paragraph()
            title += nodes.strong(text=head[1] or head[2])
            found += [title, _items(block[head.end() :].strip("\n"))]
        elif block.startswith(" "):
            found.append(_items(block))
        else:
            found.append(_paragraph(block))
    return found


def _items(block: str) -> nodes.bullet_list:
    """Lines of a section: what is not indented further than the first begins an item."""
    lines = inspect.cleandoc("\n" + block).splitlines()
    items: list[list[str]] = []
    for line in lines:
        if items and line.startswith(" "):
            items[-1].append(line)
        else:
            items.append([line])
    bullets = nodes.bullet_list()
    for item in items:
        bullets += nodes.list_item("", _paragraph("\n".join(item)))
    return bullets


def _paragraph(text: str) -> nodes.paragraph:
    """Running text with its `MARKS`."""
    paragraph, text, end = nodes.paragraph(), " ".join(text.split()), 0
    for mark in MARKS.finditer(text):
        paragraph += nodes.Text(text[end : mark.start()])
        code = mark[1] or mark[2]
        paragraph += nodes.literal(text=code) if code else nodes.emphasis(text=mark[3])
        end = mark.end()
    paragraph += nodes.Text(text[end:])
    return paragraph


class Api(SphinxDirective):
    """``{mlsae-api}``: of every module, its docstring and all that it defines for others."""

    def run(self) -> list[nodes.Node]:
        return [self._module(name) for name in modules() if name not in BUILD]

    def _module(self, name: str) -> nodes.section:
        path = module_file(name)
        self.env.note_dependency(str(path))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        section = nodes.section(ids=[nodes.make_id(name)])
        section += nodes.title("", "", nodes.literal(text=name))
        section += described(ast.get_docstring(tree) or "")
        for _, signature, docstring in public(tree):
            section += nodes.literal_block(signature, signature, language="python")
            body = nodes.block_quote()
            body += described(docstring)
            section += body
        return section


def module_file(name: str) -> Path:
    """The source of a module, given as ``mlsae_core.metrics.geometry``."""
    package, *parts = name.split(".")
    path = PACKAGES[package][0].joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


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


def setup(app) -> dict:
    """Called by Sphinx, which finds this module in ``sphinx.extra_extensions`` of _config.yml."""
    app.add_directive("mlsae-api", Api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
