"""JupyterLab: a working copy that reads as the pages do, and nothing tracked is changed by it."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from mlsae_book import lab

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book").glob("*.ipynb"))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_no_role_is_left_and_links_lead_to_chapters(chapter):
    cells = json.loads(lab.readable(ROOT, chapter))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    assert not re.findall(r"\{[\w:]+\}`|```\{|\$\$ \(|^\([\w-]+\)=", text, re.MULTILINE)
    for target in re.findall(r"\]\(([\w/]+)\.ipynb\)", text):
        assert (ROOT / "book" / f"{target}.ipynb").is_file() or target == "api"
    for cell in cells:
        hidden = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
        assert hidden == bool(lab.HIDDEN & set(cell["metadata"].get("tags", ())))


def test_citations_and_equations_are_words_and_numbers():
    text = (
        "As {cite:t}`lawson2025` say ({eq}`eq-loss`):\n\n$$\nx\n$$ (eq-loss)\n\nSee {doc}`drift`."
    )
    assert lab.markdown(ROOT, "training", text).startswith(
        "As Lawson et al. (2025) say ((2)):\n\n$$\nx\n\\tag{2}\n$$\n\nSee ["
    )
    cited = lab.markdown(ROOT, "intro", "```{bibliography}\n:filter: x\n```")
    assert cited.startswith("- ")
    assert "(2025). *Residual Stream Analysis with Multi-Layer SAEs*" in cited


@pytest.fixture
def small(tmp_path):
    """A project of two chapters and an experiment."""
    for name in ("book/intro.ipynb", "book/figures.ipynb", "book/references.bib"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copyfile(ROOT / "book/figures.csv", tmp_path / "book/figures.csv")
    for chapter in CHAPTERS:  # of the others the titles are enough
        if not (tmp_path / "book" / chapter.name).exists():
            cells = json.loads(chapter.read_text())["cells"]
            cells = [cell for cell in cells if cell["cell_type"] == "markdown"]
            content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
            (tmp_path / "book" / chapter.name).write_text(json.dumps(content))
    (tmp_path / "book/experiments").mkdir()
    (tmp_path / "book/experiments/a.yml").write_text("title: a\n")
    return tmp_path


def test_what_a_reader_has_changed_stays_and_the_rest_follows_the_book(small):
    assert lab.copy(small) == []
    mine, other = (small / "lab/book" / name for name in ("experiments/a.yml", "intro.ipynb"))
    mine.write_text("title: mine\n")
    (small / "book/experiments/a.yml").write_text("title: b\n")
    chapter = json.loads((small / "book/intro.ipynb").read_text())
    chapter["cells"] = chapter["cells"][:1]
    (small / "book/intro.ipynb").write_text(json.dumps(chapter))
    assert lab.copy(small) == [mine]
    assert mine.read_text() == "title: mine\n"
    assert len(json.loads(other.read_text())["cells"]) == 1


def request(address, token, data=None):
    sent = urllib.request.Request(address, headers={"Authorization": f"token {token}"})
    if data is not None:
        sent.method, sent.data = "PUT", json.dumps(data).encode()
    with urllib.request.urlopen(sent, timeout=30) as answer:
        return json.loads(answer.read()) if "json" in answer.headers["Content-Type"] else answer.url


@contextlib.contextmanager
def serving(module, folder, *arguments):
    """A JupyterLab that a module starts, with the token a: its address, and its first page's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, options = f"http://127.0.0.1:{port}", ["--allow-root"] if os.geteuid() == 0 else []
    server = subprocess.Popen(
        [sys.executable, "-m", module, *arguments, "--no-browser", f"--port={port}", *options,
         "--IdentityProvider.token=a", "--ServerApp.ip=127.0.0.1"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(240):
            try:
                first = request(f"{address}/?token=a", "a")
                break
            except OSError:
                time.sleep(0.5)
        yield address, first.partition("?")[0]
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


@pytest.mark.slow
def test_executing_and_saving_in_jupyterlab_changes_nothing_that_is_tracked(small):
    """As its autosave does: a chapter is opened, executed, and saved without its outputs."""
    (small / ".gitignore").write_text("/lab/\n")
    git = ["git", "-C", str(small), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "Begin"]):
        subprocess.run([*git, *command], check=True)
    with serving("mlsae_book.lab", small) as (address, first):
        assert first == f"{address}/lab/tree/intro.ipynb"
        opened = request(f"{address}/api/contents/figures.ipynb", "a")
        execute = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--inplace", "--execute"]
        subprocess.run([*execute, small / "lab/book/figures.ipynb"], check=True)
        for cell in opened["content"]["cells"]:
            cell["outputs"] = [] if cell["cell_type"] == "code" else None
            if cell["outputs"] is None:
                del cell["outputs"]
        request(f"{address}/api/contents/figures.ipynb", "a",
                {"type": "notebook", "content": opened["content"]})  # fmt: skip
    saved = json.loads((small / "lab/book/figures.ipynb").read_text())
    assert not [output for cell in saved["cells"] for output in cell.get("outputs", ())]
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    assert changed.stdout == ""
