"""The reference: what is public is found in the sources, and docstrings become text."""

import ast
import importlib
import inspect

from mlsae_book import api

SOURCE = '''
"""Module."""
LIMIT = 3

def flat(a, b: int = 2, *rest: str, c, d: float = 1e-3, **more) -> int:
    """One."""

def _hidden():
    """Not shown."""

def bare():
    pass

class Thing(Base):
    """Two."""

    def method(self, x):
        """Three."""

    def _private(self):
        """Not shown."""
'''

DOCSTRING = """First line,
    and its second, with ``code`` and `more`.

    Args:
        a: one thing
            on two lines.
        b: another.

    Returns:
        A table.
    """


def test_public_names_are_found_with_their_signatures():
    found = list(api.public(ast.parse(SOURCE)))
    assert [(kind, text) for kind, _, text in found] == [
        ("function", "One."),
        ("class", "Two."),
        ("function", "Three."),
    ]
    assert found[0][1] == "flat(a, b: int=2, *rest: str, c, d: float=0.001, **more) -> int"
    assert found[1][1] == "class Thing(Base)"
    assert found[2][1] == "Thing.method(x)"


def test_long_signatures_have_a_line_for_each_argument():
    source = f"def f({', '.join(f'argument_{i}: int = {i}' for i in range(9))}):\n    '''D.'''"
    ((_, signature, _),) = api.public(ast.parse(source))
    assert signature.splitlines()[1] == "    argument_0: int=0,"
    assert len(signature.splitlines()) == 11
    ((_, keyword, _),) = api.public(ast.parse("def f(a, *, b=None):\n    'D.'"))
    assert keyword == "f(a, *, b=None)"


def test_signatures_are_those_of_the_running_code():
    """What is read from the sources has the arguments that Python sees."""
    for name in (
        "mlsae_core.metrics.geometry",
        "mlsae_book.tables.spread",
        "mlsae_book.charts.sweeps",
    ):
        module = importlib.import_module(name)
        tree = ast.parse(api.module_file(name).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                parts = [ast.unparse(a) for a in api._arguments(node.args)]
                names = [p.split(":")[0].split("=")[0].lstrip("*") for p in parts if p != "*"]
                assert names == list(inspect.signature(getattr(module, node.name)).parameters)


def test_a_docstring_becomes_paragraphs_and_items():
    first, head, items, _, result = api.described(DOCSTRING)
    assert first.astext() == "First line, and its second, with code and more."
    assert [node.astext() for node in first.findall(api.nodes.literal)] == ["code", "more"]
    assert head.astext() == "Args"
    assert [item.astext() for item in items] == ["a: one thing on two lines.", "b: another."]
    assert result.astext() == "A table."


def test_underlined_heads_and_stress_are_read():
    text = "What it *is*, 2 * 3 * 4.\n\nParameters\n----------\na : one\n    thing\nb : other"
    first, head, items = api.described(text)
    assert first.astext() == "What it is, 2 * 3 * 4."
    assert [node.astext() for node in first.findall(api.nodes.emphasis)] == ["is"]
    assert head.astext() == "Parameters"
    assert [item.astext() for item in items] == ["a : one thing", "b : other"]


def test_every_module_is_listed_and_every_docstring_can_be_set():
    names = api.modules()
    wanted = "mlsae_core.spec mlsae_core.metrics mlsae_core.metrics.geometry mlsae_book.tables"
    assert set(wanted.split()) <= set(names)
    assert not [name for name in names if name.endswith("__main__")]
    for name in names:
        tree = ast.parse(api.module_file(name).read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), name
        for _, signature, docstring in api.public(tree):
            assert api.described(docstring), signature
