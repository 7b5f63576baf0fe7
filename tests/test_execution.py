"""Where the outputs of pages come from: stored ones, executions, and both where one fails."""

import json
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_cache import get_cache

from mlsae_book import execution

CODE = {
    "same": "from mlsae_book import one\nprint('executed')",
    "changed": "from mlsae_book.parts import two\nprint('executed')",
    "fails": "from mlsae_book.parts import three\nprint(1 / 0)",
    "prose": None,
}
FILES = {
    "mlsae_core/__init__.py": "",
    "mlsae_core/sae.py": "",
    "book/mlsae_book/__init__.py": "",
    "book/mlsae_book/one.py": "def f():\n    from mlsae_core import sae\n",
    "book/mlsae_book/parts/__init__.py": "",
    "book/mlsae_book/parts/two.py": "",
    "book/mlsae_book/parts/three.py": "import mlsae_book.one",
    "book/experiments/one.yml": "",
    "data/models/one/config.json": "",
    "data/store/train/1/meta.json": "",
    "data/README.md": "",
    "benchmarks/results.json": "",
    "constraints.txt": "",
    "README.md": "",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    toc = {"format": "jb-book", "root": "same", "chapters": [{"file": c} for c in CODE][1:]}
    (tmp_path / "_toc.yml").write_text(json.dumps(toc))
    (tmp_path / "book/prose.md").write_text("# Words")
    for name, code in CODE.items():
        if code is not None:
            cell = nbformat.v4.new_code_cell(code, execution_count=1)
            cell.outputs = [nbformat.v4.new_output("stream", text="stored\n")]
            notebook = nbformat.v4.new_notebook(cells=[cell])
            notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
            nbformat.write(notebook, tmp_path / f"book/{name}.ipynb")
    return tmp_path


def prints(root):
    inputs = execution.inputs_hash(root)
    return {c: execution.fingerprint(root, c, inputs) for c in execution.notebooks(root)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("book/mlsae_book/one.py", {"same", "fails"}),
        ("mlsae_core/sae.py", {"same", "fails"}),  # imported in a function
        ("mlsae_core/__init__.py", {"same", "fails"}),
        ("book/mlsae_book/parts/__init__.py", {"changed", "fails"}),
        ("book/mlsae_book/parts/two.py", {"changed"}),
        ("book/experiments/one.yml", {"same", "changed", "fails"}),
        ("data/models/one/config.json", {"same", "changed", "fails"}),
        ("benchmarks/results.json", {"same", "changed", "fails"}),
        ("constraints.txt", {"same", "changed", "fails"}),
        ("data/store/train/1/meta.json", set()),
        ("data/README.md", set()),
        ("README.md", set()),
        ("book/prose.md", set()),
    ],
)
def test_what_is_changed_is_what_may_depend_on_it(root, name, expected):
    before, kept = prints(root), execution.cache_path(root, root)
    (root / name).write_text("import mlsae_core  # another")
    after = prints(root)
    assert {chapter for chapter in before if before[chapter] != after[chapter]} == expected
    assert (execution.cache_path(root, root) != kept) == bool(expected)
    (root / name).write_text(FILES.get(name, "# Words"))
    assert prints(root) == before


def test_code_counts_and_outputs_and_prose_do_not(root):
    before, path = prints(root)["same"], root / "book/same.ipynb"
    for change, same in (
        (lambda n: n.cells.append(nbformat.v4.new_markdown_cell("words")), True),
        (lambda n: n.cells[0].outputs.clear(), True),
        (lambda n: n.cells.append(nbformat.v4.new_code_cell("1")), False),
    ):
        notebook = nbformat.read(path, 4)
        change(notebook)
        nbformat.write(notebook, path)
        assert (prints(root)["same"] == before) == same


def build(root):
    """The output of every notebook that a build would show, and what failed."""
    config = SimpleNamespace(
        nb_execution_mode="cache",
        nb_execution_timeout=60,
        nb_execution_cache_path=str(execution.cache_path(root / "_build", root)),
    )
    app = SimpleNamespace(config=config, srcdir=str(root / "book"))
    suffix = {"prose": ".md"}
    env = SimpleNamespace(doc2path=lambda c: str(root / f"book/{c}{suffix.get(c, '.ipynb')}"))
    execution.provide(app, env, list(CODE))
    cache, shown = get_cache(config.nb_execution_cache_path), {}
    for chapter in execution.notebooks(root):
        _, merged = cache.merge_match_into_file(root / f"book/{chapter}.ipynb")
        shown[chapter] = [output.text for output in merged.cells[0].outputs]
    return shown, env.mlsae_failed


@pytest.mark.slow
def test_stored_outputs_are_shown_while_they_are_todays_and_where_executing_fails(
    root, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", f"{root / 'book'}:{root}")
    execution.stamp(root, ["same", "changed", "fails"])
    (root / "book/mlsae_book/parts/two.py").write_text("x = 1")
    (root / "book/mlsae_book/parts/three.py").write_text("x = 1")
    shown, failed = build(root)
    assert shown == {"same": ["stored\n"], "changed": ["executed\n"], "fails": ["stored\n"]}
    assert failed == {"fails": "ZeroDivisionError: division by zero"}
    monkeypatch.setenv("EXECUTE", "1")
    (root / "constraints.txt").write_text("another")
    assert build(root)[0]["same"] == ["executed\n"]


def test_a_page_with_older_outputs_says_so():
    app = SimpleNamespace(env=SimpleNamespace(mlsae_failed={"a": "NameError: <x>"}))
    for page, marked in (("a", True), ("b", False)):
        context = {"body": "<p>text</p>"}
        execution.say_what_failed(app, page, "", context, None)
        assert ("NameError: &lt;x&gt;" in context["body"]) == marked
        assert context["body"].endswith("<p>text</p>")


def test_a_stamp_forgets_chapters_that_are_gone(root):
    execution.stamp(root, ["same", "fails"])
    (root / "book/fails.ipynb").unlink()
    execution.stamp(root, ["changed"])
    known = json.loads((root / execution.OUTPUTS).read_text())
    assert known == {c: prints(root)[c] for c in ("changed", "same")}
