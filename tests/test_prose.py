"""The text `wikipedia`: what of an article is prose, and where it comes from without a network."""

import bz2

import pytest

from mlsae_book import prose
from mlsae_core import store, text
from mlsae_core.spec import DataSpec, SpecError

LONG = (
    "This sentence is one of several that stand in a paragraph, which is long enough to be kept. "
)
ARTICLE = f"""{{{{Infobox|name=X|text={LONG * 3}}}}}
'''X''' is [[a thing|the thing]].<ref>{LONG * 3}</ref> {LONG * 2}
== History ==
{{| class="wikitable"
| {LONG * 3}
|}}
It {LONG * 2}
* short
[[File:x.png|thumb|{LONG * 2}]]
=== Early ===
Then {LONG * 2}
== References ==
{LONG * 3}
== Empty ==
None.
"""


@pytest.fixture
def dump(tmp_path):
    def page(title, wikitext):
        escaped = wikitext.replace("&", "&amp;").replace("<", "&lt;")
        revision = f"<revision><text>{escaped}</text></revision>"
        return f"<page><title>{title}</title>{revision}</page>"

    pages = page("X", ARTICLE) + page("Y", "#REDIRECT [[X]] " + LONG * 3) + page("Z", "")
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(bz2.compress(f'<m xmlns="http://x/">{pages}</m>'.encode()))
    return path


def test_prose_is_what_the_sections_of_articles_say(dump):
    pytest.importorskip("mwparserfromhell", reason="the package mwparserfromhell is not installed")
    sentence = LONG.strip()
    assert list(prose.documents(dump)) == [
        f"X is the thing. {sentence} {sentence}",
        f"It {sentence} {sentence}\n\nThen {sentence} {sentence}",
    ]


def test_a_text_is_known_before_it_is_fetched_and_is_what_its_origin_says(data, dump, monkeypatch):
    pytest.importorskip("mwparserfromhell", reason="the package mwparserfromhell is not installed")
    origin = data / "texts/wikipedia/origin.yml"
    origin.parent.mkdir(parents=True)
    origin.write_text("documents_sha256: abc\n")
    spec = DataSpec("wikipedia")
    before = text.data_key(spec)
    with pytest.raises(SpecError, match="fetch wikipedia` gets it"):
        text.documents(spec)
    with pytest.raises(SpecError, match="expected documents with SHA-256 abc, got") as error:
        prose.make(dump)
    assert not (store.STORE / "documents").exists()
    origin.write_text(f"documents_sha256: {str(error.value).split('got ')[1][:64]}\n")
    assert text.data_key(spec) != before
    prose.make(dump)
    assert sorted(text.documents(spec)) == sorted(prose.documents(dump))
