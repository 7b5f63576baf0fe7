"""A report of a run that was just trained, from its file to its pages."""

import json

import pytest
import yaml
from test_offline import content

from mlsae_book import offline, report
from mlsae_book.__main__ import main


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    """A folder with a run's file and its report."""
    from workers import use_data

    from mlsae_core import store

    folder = tmp_path_factory.mktemp("report")
    before = {name: getattr(store, name) for name in ("DATA", "MODELS", "SHIPPED", "STORE")}
    use_data(folder)
    fields = {"model": str(inputs / "gpt_neox"), "expansion_factor": 2, "k": 4, "tokens": 256}
    fields["data"] = {"path": str(inputs / "text.jsonl"), "context_length": 16}
    (folder / "run.yml").write_text(yaml.safe_dump(fields | {"batch_tokens": 64}))
    code = main(["report", str(folder / "run.yml"), str(folder / "pages"), "--tokens", "400"])
    for name, value in before.items():
        setattr(store, name, value)
    assert code == 0
    return folder


def test_a_report_has_the_evaluation_and_every_latent(made):
    html = (made / "pages" / report.PAGE).read_text()
    assert report.MARK in html
    assert offline.markup() in html
    for name in offline.SCRIPTS:
        assert (made / f"pages/explorer/{name}.js").is_file()
    index = json.loads(content(made / "pages/explorer/data/index.js"))
    cards = json.loads(content(made / "pages/explorer/data/latents-00.js"))
    assert len(cards) == min(offline.SHARD, len(index["latents"]["token"]))
    assert index["no_model"] is None or "the page runs" in index["no_model"]


def test_a_report_replaces_only_a_report(made, tmp_path, capsys):
    again = ["report", str(made / "run.yml")]
    other = tmp_path / "other"
    other.mkdir()
    (other / report.PAGE).write_text("mine")
    assert main([*again, str(other)]) == 2
    assert "an earlier report" in capsys.readouterr().err
    assert (other / report.PAGE).read_text() == "mine"
