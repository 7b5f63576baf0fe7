"""A report of a run that was just trained, from its file to its pages."""

import contextlib
import json
import shutil

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


def write(made, folder, monkeypatch, fails=None):
    """A report of what the run's has, without its results; `fails`: the function that stops it."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(offline, "read", lambda *_: None)
        patched.setattr(offline, "_assets", lambda _: iter([("index", b"{}")]))
        patched.setattr(report, "page", lambda *_: f"{report.MARK} new")
        if fails is not None:
            patched.setattr(*fails, stop)
        session = type("Session", (), {"make": lambda *_: None})()
        return report.report(session, None, None, folder, "title")


STOPS = {
    "page": (report, "page"),
    "scripts": (shutil, "copyfile"),
    "into place": (report.os, "replace"),
}


@pytest.mark.parametrize("there", [False, True], ids=["new", "again"])
@pytest.mark.parametrize("fails", STOPS.values(), ids=STOPS)
def test_a_report_that_was_stopped_is_whole_or_written_again(
    made, tmp_path, monkeypatch, fails, there
):
    folder = tmp_path / "pages"
    if there:
        shutil.copytree(made / "pages", folder)
        (folder / "notes.md").write_text("mine")
    with contextlib.suppress(KeyboardInterrupt):
        write(made, folder, monkeypatch, fails)
    if there:
        assert report.MARK in (folder / report.PAGE).read_text()
        assert {f"{name}.js" for name in offline.SCRIPTS} <= {
            p.name for p in (folder / report.APP).iterdir()
        }
    write(made, folder, monkeypatch)
    assert (folder / report.PAGE).read_text() == f"{report.MARK} new"
    left = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert left == {report.PAGE, report.APP} | ({"notes.md"} if there else set())


def test_where_no_report_can_be_is_said_before_anything_is_computed(made, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    theirs = tmp_path / "theirs"
    shutil.copytree(made / "pages", theirs)
    shutil.rmtree(theirs / report.APP)
    (theirs / report.APP).mkdir()
    (theirs / report.APP / "mine.txt").write_text("mine")
    run = str(made / "run.yml")
    for folder, message in (
        (tmp_path / "file", "got a file"),
        (tmp_path / "file" / "below", "got a file"),
        (theirs, "expected a folder with report.css"),
    ):
        assert main(["report", run, str(folder), "--read-only", "--tokens", "7"]) == 2
        assert message in capsys.readouterr().err
    assert (theirs / report.APP / "mine.txt").read_text() == "mine"
