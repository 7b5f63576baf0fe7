"""The reference: every module is listed, and its page says what the docstrings say."""

import io
import re
import shutil
import sys
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
    assert set(api.pages()) == set(api.PAGES)
    assert not [name for name in names if name.endswith("__main__")]


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """The pages with the book's settings, in which any warning is an error."""
    settings = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]
    chosen = ("autodoc", "napoleon", "python", "default_role", "nitpick", "add_module")
    overrides = {
        **{name: value for name, value in settings.items() if name.startswith(chosen)},
        "extensions": ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", api.__name__],
        "root_doc": "api",
        "nitpicky": True,
    }
    folder, warnings = tmp_path_factory.mktemp("pages"), io.StringIO()
    (folder / "api").mkdir()
    for name in ("api", *api.PAGES):
        shutil.copyfile(ROOT / "book" / f"{name}.md", folder / f"{name}.md")
    with open(folder / "api.md", "a", encoding="utf-8") as file:
        file.write("\n```{toctree}\n" + "\n".join(api.PAGES) + "\n```\n")
    mocked = {"mlsae_core.triton_kernels"} - set(sys.modules)
    with patch_docutils(), docutils_namespace():
        places = folder, None, folder / "built", folder / "trees"
        app = Sphinx(*places, "dummy", overrides, None, warnings)
        app.build()
        for name in mocked:  # for others it is as if it had never been imported
            del sys.modules[name]
        assert not warnings.getvalue()
        return {name: app.env.get_doctree(name) for name in ("api", *api.PAGES)}


@pytest.fixture
def page(trees):
    """All pages of the reference as one."""
    whole = nodes.section()
    for name in api.PAGES:
        whole += trees[name].children
    return whole


def signatures(tree):
    return [" ".join(node.astext().split()) for node in tree.findall(addnodes.desc_signature)]


@pytest.mark.slow
def test_every_module_has_a_section_in_the_order_in_which_to_read_them(page):
    titles = [node.astext() for node in page.findall(nodes.title)]
    own = [title for title in titles if title.startswith("mlsae_")]
    assert own == [name for name in api.modules() if name not in api.BUILD]
    assert len(titles) == len(own) + len(api.PAGES)


@pytest.mark.slow
def test_the_first_page_lists_every_module_with_its_first_line(trees):
    listed = [node.astext() for node in trees["api"].findall(nodes.list_item)]
    wanted = [name for names in api.pages().values() for name in names]
    assert [text.partition(":")[0] for text in listed] == wanted
    assert all(len(text.partition(": ")[2]) > 10 for text in listed)


@pytest.mark.slow
def test_signatures_and_shapes_stand_in_the_order_of_the_source(page):
    [section] = (s for s in page.findall(nodes.section) if s[0].astext() == "mlsae_core.kernels")
    found = signatures(section)
    names = ("class Code", "check(", "autoencode(", "decode(", "decode_dead(")
    starts = [next(i for i, text in enumerate(found) if text.startswith(name)) for name in names]
    assert starts == sorted(starts)
    assert not [text for text in found if re.match(r"(class )?_", text)]
    assert "encoder – (n_latents, d)." in section.astext()
    assert "Alias for field" not in page.astext()


@pytest.mark.slow
def test_defaults_that_are_objects_are_shown_as_python(page):
    found = signatures(page)
    [stage] = [text for text in found if text.startswith("class Stage(")]
    [experiment] = [text for text in found if text.startswith("class Experiment(")]
    assert stage.endswith("= dict)")
    assert "EvaluateSpec | None = ..." in experiment
    assert not [text for text in found if "~" in text or "<" in text]
