"""A folder of pages for any run: the explorer of the book, with the evaluation above it.

`python -m mlsae_book report SPEC.yml FOLDER` computes what is missing and writes it; the page opens
from the file, without a server. The language model is in it where a browser can run it.
"""

from __future__ import annotations

import contextlib
import os
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from mlsae_book import charts, offline
from mlsae_core import store
from mlsae_core.pipeline import Session
from mlsae_core.spec import EvaluateSpec, SpecError, SubjectSpec

if TYPE_CHECKING:
    from mlsae_core.store import Artefact

PAGE, MARK = "index.html", '<meta name="generator" content="mlsae_book report">'
#: The folder beside the page, and a file by which it is known.
APP, APP_MARK = "explorer", "report.css"


def report(
    session: Session, run: SubjectSpec, settings: EvaluateSpec, folder: Path, title: str
) -> Path:
    """Write the pages of a run into a folder, in the place of an earlier report; gives the page.

    What else lies beside the page of an earlier one stays.

    Raises:
        SpecError: a run whose latents have no cards, or a folder that holds something else.
    """
    folder = folder.resolve()
    if folder.is_dir() and not _is_ours(folder):
        raise SpecError(f"folder: expected a new one or an earlier report, got {folder}")
    store.check_own(folder / APP, APP_MARK)
    evaluation = session.make("evaluate", run, settings)
    shown = offline.read(session, run, settings)
    with store.atomic_folder(folder / APP, mark=APP_MARK) as made:
        offline.write(shown, made)
        (made / PAGE).write_text(page(title, evaluation), encoding="utf-8")
    with contextlib.suppress(FileNotFoundError):  # another process did, of the same run
        os.replace(folder / APP / PAGE, folder / PAGE)
    return folder / PAGE


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a report, one that was stopped while it was written, or nothing."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(f".{APP}")}
    known = folder / PAGE if PAGE in names else folder / APP / PAGE
    if not names or not known.is_file():
        return not names
    with open(known, encoding="utf-8", errors="replace") as file:
        return MARK in file.read(1000)


def page(title: str, evaluation: Artefact) -> str:
    """HTML of a report, whose explorer lies beside it."""
    table = pd.read_csv(evaluation.file("evaluation.csv"))
    names = {name: text for name, text in charts.METRICS.items() if name in table}
    table = table.set_index("layer")[[*names]].rename(columns=names)
    scripts = "".join(
        f'<script defer src="explorer/{name}.js"></script>\n' for name in offline.SCRIPTS
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="stylesheet" href="explorer/report.css">
<link rel="stylesheet" href="explorer/explorer.css">
{scripts}<main>
<h1>{escape(title)}</h1>
<h2>Evaluation</h2>
<p>{evaluation.meta["tokens"]:,} tokens, by layer.</p>
<div class="scroll">{table.to_html(float_format=lambda x: f"{x:.4g}", border=0)}</div>
<h2>Latents</h2>
{offline.markup()}</main>
</html>
"""
