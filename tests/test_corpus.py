"""The embedded corpus: docstrings of pinned packages, read without running them; declared texts."""

import importlib
import tomllib
from pathlib import Path

import pytest

from mlsae_book import corpus
from mlsae_core import store, text
from mlsae_core.spec import DataSpec, SpecError

ROOT = Path(__file__).parents[1]

SOURCE = '''"""The module says what it is for, at some length."""
class A:
    """A class with a docstring that is long enough."""
    def f(self):
        """Indented,
            as docstrings are: it is cleaned."""
    x = """not a docstring, although it is long enough"""
    async def g(self):
        r"""A raw docstring of a coroutine that is long."""
if True:
    def h():
        """A function in a branch of the module, also read."""
try:
    pass
except ValueError:
    def i():
        """short"""
'''


def test_docstrings_are_read_without_running_the_file(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE + "raise SystemExit\n")
    assert sorted(corpus.file_docstrings(path)) == [
        "A class with a docstring that is long enough.",
        "A function in a branch of the module, also read.",
        "A raw docstring of a coroutine that is long.",
        "Indented,\nas docstrings are: it is cleaned.",
        "The module says what it is for, at some length.",
        "short",
    ]
    path.write_text('"""A template {{ that }} is no Python"""\n{% if %}\n')
    assert corpus.file_docstrings(path) == []


@pytest.fixture
def packages(data, monkeypatch):
    """Two installed packages and one that is not, pinned as the corpus."""
    site = data / "site"
    only = {name: f"Only in {name}, and long enough to be kept." for name in ("one", "two")}
    for name, version in (("one", "1.0"), ("two", "2.10")):
        for file in (f"{name}/a.py", f"{name}/tests/b.py", f"{name}/c.txt"):
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_text(SOURCE)
        (site / name / "only.py").write_text(f'"""{only[name]}"""\n')
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        files = (f"{name}/a.py", f"{name}/only.py", f"{name}/tests/b.py", f"{name}/c.txt")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()

    def pin(**pins):
        lines = "".join(f"  {name}: {version}\n" for name, version in pins.items())
        (data / "docstrings.yml").write_text(f"minimum_characters: 32\npackages:\n{lines}")

    pin(one="1.0", two="'2.10'")
    return pin


def test_the_corpus_is_every_distinct_long_docstring_in_the_order_of_hashes(packages, capsys):
    documents = corpus.docstrings()
    assert len(documents) == 7  # five of the source, one of each package; no test, nothing twice
    assert documents == sorted(documents, key=text.document_hash)
    assert "Only in one, and long enough to be kept." in documents
    assert "differ" not in capsys.readouterr().err
    (made,) = store.artefacts("documents")
    by_package = made.meta["characters_per_package"]
    assert sum(by_package.values()) == sum(map(len, documents))
    assert by_package["two"] == len("Only in two, and long enough to be kept.")


def test_drift_is_said_with_its_share_and_changes_no_key(packages, capsys, monkeypatch):
    key = text.data_key(DataSpec())
    corpus.docstrings()
    capsys.readouterr()
    real = corpus._installed
    monkeypatch.setattr(corpus, "_installed", lambda name: "3.0" if name == "two" else real(name))
    assert corpus.drift() == ["two 2.10 → 3.0"]
    for path in (corpus.DOCSTRINGS, corpus.QUESTIONS):
        assert text.differs(DataSpec(path)) == ["two 2.10 → 3.0"]
    corpus.docstrings()
    message = capsys.readouterr().err
    (made,) = (a for a in store.artefacts("documents") if a.spec["installed"]["two"] == "3.0")
    share = made.meta["characters_per_package"]["two"] / sum(
        made.meta["characters_per_package"].values()
    )
    assert "note: 1 of the 2 packages" in message
    assert f"hold {share:.0%} of its text" in message
    assert "two 2.10 → 3.0" in message
    assert text.data_key(DataSpec()) == key
    packages(one="1.1", two="'2.10'")
    assert text.data_key(DataSpec()) != key


def test_pins_are_text_also_where_yaml_reads_a_number(packages):
    packages(one="1.0", two="'2.10'")
    assert corpus.pins() == {"one": "1.0", "two": "2.10"}
    assert corpus.drift() == []


def test_a_corpus_without_installed_packages_is_refused(packages):
    packages(absent="1.0")
    with pytest.raises(SpecError, match=r"data\.path: expected the packages.*none is installed"):
        corpus.docstrings()
    assert not [file for file in store.STORE.rglob("*") if file.is_file()]


def test_the_shipped_corpus_is_what_is_installed():
    assert len(corpus.pins()) > 30
    assert all(isinstance(pin, str) for pin in corpus.pins().values())


def test_nothing_that_is_tracked_was_made_of_other_releases_than_the_pins():
    made = [*store.DATA.glob("*/*/training.json"), *store.SHIPPED.glob("*/*/meta.json")]
    assert len(made) > 100
    for file in made:
        assert f'"{store.DIFFERS}": ' not in file.read_text(encoding="utf-8"), file


# --- as a text that a package declares ------------------------------------------------------------


@pytest.fixture
def declared(tmp_path, monkeypatch):
    """An installed package whose module knows the text `sagas`."""
    (tmp_path / "sagas.py").write_text(
        "from mlsae_core import text\n"
        "text.SOURCES['sagas'] = text.Source(lambda: {'Once.': 'test'}, lambda: {'sagas': 1})\n"
    )
    info = tmp_path / "sagas-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: sagas\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[mlsae_core.text]\nsagas = sagas\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(text, "SOURCES", dict(text.SOURCES))
    text._declared.cache_clear()
    yield
    text._declared.cache_clear()


def test_a_declared_text_is_known_before_its_module_is_imported(declared):
    assert "sagas" not in text.SOURCES
    data = DataSpec("sagas")
    assert not text.is_streamed(data)
    assert text.data_key(data) == {"sagas": 1}
    assert list(text.split_documents(data)) == [("test", "Once.")]
    assert text.documents(data) == ["Once."]


def test_declared_texts_are_named_where_a_path_is_refused(declared):
    with pytest.raises(SpecError, match=r"expected docstrings, .*sagas, .*a hub id, or a file"):
        text.data_key(DataSpec("./nothing.txt"))


def test_the_texts_of_the_book_are_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    declared = declared["mlsae_core.text"]
    assert {corpus.DOCSTRINGS, corpus.QUESTIONS} <= set(declared)
    for path, module in declared.items():
        importlib.import_module(module)
        assert path in text.SOURCES
