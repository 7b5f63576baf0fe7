"""The reference: every module is listed, and its page says what the docstrings say."""

import io
import re
import shutil
from pathlib import Path

import pytest
import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

from mlsae_book import api

ROOT = Path(__file__).parents[1]


def test_every_module_is_listed_once_and_has_a_file():
    names = api.modules()
    wanted = "mlsae_core.spec mlsae_core.metrics mlsae_core.metrics.geometry mlsae_book.tables"
    assert set(wanted.split()) <= set(names)
    assert len(names) == len(set(names))
    assert set(api.BUILD) < set(names)
    assert not [name for name in names if name.endswith("__main__")]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The built page of some modules, with the book's settings; any warning is an error."""

    def build(*names):
        monkeypatch.setattr(api, "modules", lambda: list(names))
        settings = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]
        chosen = ("autodoc", "napoleon", "python", "default_role", "nitpick", "add_module")
        overrides = {
            **{name: value for name, value in settings.items() if name.startswith(chosen)},
            "extensions": [
                "sphinx.ext.autodoc",
                "sphinx.ext.napoleon",
                "myst_parser",
                api.__name__,
            ],
            "root_doc": "api",
            "nitpicky": True,
        }
        shutil.copyfile(ROOT / "book" / "api.md", tmp_path / "api.md")
        folders = tmp_path, None, tmp_path / "built", tmp_path / "trees"
        with patch_docutils(), docutils_namespace():
            warnings = io.StringIO()
            app = Sphinx(*folders, "dummy", overrides, None, warnings)
            app.build()
            assert not warnings.getvalue()
            return app.env.get_doctree("api")

    return build


def signatures(tree):
    return [" ".join(node.astext().split()) for node in tree.findall(addnodes.desc_signature)]


def test_a_page_has_the_signatures_and_shapes_in_the_order_of_the_source(page):
    tree = page("mlsae_core.objective", "mlsae_core.kernels")
    titles = [node.astext() for node in tree.findall(nodes.title)]
    assert titles[-2:] == ["mlsae_core.objective", "mlsae_core.kernels"]
    found = signatures(tree)
    names = ("class Loss", "loss(", "class Code", "autoencode(", "decode_dead(")
    starts = [next(i for i, text in enumerate(found) if name in text) for name in names]
    assert starts == sorted(starts)
    assert not [text for text in found if re.match(r"(class )?_", text)]
    shown = tree.astext()
    assert "encoder – (n_latents, d)." in shown
    assert "Alias for field" not in shown
    assert "Raises" in shown


def test_defaults_that_are_objects_are_shown_as_python(page):
    found = signatures(page("mlsae_core.pipeline", "mlsae_book.declared"))
    [stage] = [text for text in found if text.startswith("class Stage(")]
    [experiment] = [text for text in found if text.startswith("class Experiment(")]
    assert stage.endswith("= dict)")
    assert "EvaluateSpec | None = ..." in experiment
    assert not [text for text in found if "~" in text or "<" in text]
