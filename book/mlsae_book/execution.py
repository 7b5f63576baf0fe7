"""Where the outputs of a page come from: its notebook, if they are today's, else an execution.

The notebooks are stored with their outputs, which strict nbval compares. ``book/outputs.json`` says
of each what it was executed with: a hash of its code, of the modules that this imports, of data and
pins. Where that is still so the stored outputs are shown; what has changed is executed, side by
side. Where an execution fails the page says so and shows what is stored.

``EXECUTE=1`` in the environment executes everything. `python -m mlsae_book.execution` writes down
that the stored outputs are today's; `make notebooks` and `make stamp` call it when that is true.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from jupyter_cache import get_cache
from jupyter_cache.cache.main import JupyterCacheBase
from jupyter_cache.executors.basic import ExecutionWorkerLocalMProc, ProcessData
from nbconvert.filters.ansi import strip_ansi
from sphinx.util import logging
from sphinx_external_toc.parsing import parse_toc_yaml
from tqdm.auto import tqdm

OUTPUTS = "book/outputs.json"
#: What the outputs of every notebook may depend on, beside the modules that it imports.
INPUTS = ("book/experiments/**/*", "data/**/*", "benchmarks/*.json", "constraints.txt")
PACKAGES = {"mlsae_core": "mlsae_core", "mlsae_book": "book/mlsae_book"}

logger = logging.getLogger(__name__)


# --- what outputs depend on -----------------------------------------------------------------------


def fingerprint(root: Path, chapter: str, inputs: str) -> str:
    """Hash of what the outputs of a chapter depend on; ``inputs`` as `inputs_hash` gives it."""
    code = _code(root / "book" / f"{chapter}.ipynb")
    digest = hashlib.sha256(f"{inputs}\0{code}\0".encode())
    for name, source in sorted(_imported(root, code).items()):
        digest.update(f"{name}\0{source}\0".encode())
    return digest.hexdigest()[:16]


def inputs_hash(root: Path, patterns: Iterable[str] = INPUTS) -> str:
    """Hash of the files under ``root`` that every chapter may read."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in root.glob(pattern) if p.is_file()}):
        name = path.relative_to(root).as_posix()
        if not name.startswith("data/store/") and path.suffix != ".md":
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_path(build: Path, root: Path) -> Path:
    """Where outputs of executions are kept while nothing that they could depend on has changed."""
    sources = (f"{folder}/**/*.py" for folder in PACKAGES.values())
    return build / ".jupyter_cache" / inputs_hash(root, (*INPUTS, *sources))[:16]


def _code(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\0".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


def _imported(root: Path, code: str) -> dict[str, str]:
    """Name → source of the project's modules that code imports, and those import in turn, whether
    at once or when they are called."""
    found: dict[str, str] = {}
    # What is looked up by a name in a spec may be asked for by any.
    pending = [e.value for e in entry_points(group="mlsae_core.text")]
    pending += _names(code.replace("\0", "\n"))
    while pending:
        name = pending.pop()
        package, *rest = name.split(".")
        if name in found or package not in PACKAGES:
            continue
        path = root.joinpath(PACKAGES[package], *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                found[name] = file.read_text(encoding="utf-8")
                pending += [*_names(found[name]), name.rpartition(".")[0]]
    return found


@functools.cache
def _names(code: str) -> list[str]:
    """All that import statements may mean: modules, and what is imported from them."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def stamp(root: Path, chapters: Iterable[str]):
    """Write down that the stored outputs of these chapters are today's."""
    path = root / OUTPUTS
    known = json.loads(path.read_text()) if path.is_file() else {}
    inputs = inputs_hash(root)
    known |= {chapter: fingerprint(root, chapter, inputs) for chapter in chapters}
    there = set(notebooks(root))
    known = {chapter: known[chapter] for chapter in sorted(known) if chapter in there}
    path.write_text(json.dumps(known, indent=1) + "\n")


def notebooks(root: Path) -> list[str]:
    """Chapters of ``root/_toc.yml`` that are notebooks."""
    return [
        c for c in parse_toc_yaml(root / "_toc.yml") if (root / "book" / f"{c}.ipynb").is_file()
    ]


# --- in a build -----------------------------------------------------------------------------------


def provide(app, env, chapters: list[str]) -> None:
    """Put outputs of the notebooks among these chapters into the cache, where MyST-NB finds them."""
    if app.config.nb_execution_mode != "cache":
        return
    root, cache = Path(app.srcdir).parent, get_cache(app.config.nb_execution_cache_path)
    paths = {str(env.doc2path(chapter)): chapter for chapter in chapters}
    paths = {path: chapter for path, chapter in paths.items() if path.endswith(".ipynb")}
    if not hasattr(env, "mlsae_failed"):
        env.mlsae_failed = {}
    if not os.environ.get("EXECUTE"):
        known, inputs = _read(root), inputs_hash(root)
        for path, chapter in paths.items():
            if known.get(chapter) == fingerprint(root, chapter, inputs):
                cache.cache_notebook_file(path, check_validity=False, overwrite=True)
    for path in paths:
        cache.add_nb_to_project(path)
    failed = _execute(cache, list(paths), app.config.nb_execution_timeout)
    for path, chapter in paths.items():
        env.mlsae_failed.pop(chapter, None)
        if path in failed:
            env.mlsae_failed[chapter] = failed[path]
            cache.cache_notebook_file(path, check_validity=False, overwrite=True)
            logger.warning("shows its stored outputs, since executing it failed: %s",
                           failed[path], location=chapter, type="execution")  # fmt: skip


def _read(root: Path) -> dict[str, str]:
    try:
        return json.loads((root / OUTPUTS).read_text())
    except (OSError, ValueError):
        return {}


def _execute(cache: JupyterCacheBase, paths: list[str], limit: int) -> dict[str, str]:
    """Execute what is not in the cache, as many at a time as there are cores; what failed, and why.

    Each kernel gets its share of the cores, and its threads sleep where they wait: on busy cores
    threads that spin take many times as long.
    """
    records = cache.list_unexecuted(paths)
    if not records:
        return {}
    workers = min(len(records), os.cpu_count() or 1)
    os.environ |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)),
                   "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
    logger.info("executing %s notebooks whose stored outputs are not of today's code", len(records))
    jobs = [ProcessData(record.pk, record.uri, cache, limit, False) for record in records]
    multiprocessing.get_logger().setLevel("CRITICAL")  # what failed is said below
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        done = pool.imap_unordered(ExecutionWorkerLocalMProc(), jobs)
        outcomes = {uri: code for code, uri in tqdm(done, "executing", len(jobs))}
    failed = {}
    for record in cache.list_project_records(list(outcomes)):
        if outcomes[record.uri]:
            said = (record.traceback or "it could not be started").strip().splitlines()
            failed[record.uri] = strip_ansi(said[-1])
    return failed


def say_what_failed(app, pagename, templatename, context, doctree) -> None:
    """A page that shows older outputs says so at its top."""
    reason = getattr(app.env, "mlsae_failed", {}).get(pagename)
    if reason and "body" in context:
        from html import escape

        context["body"] = (
            '<div class="admonition warning"><p class="admonition-title">Stored outputs</p><p>'
            "This page could not be executed with today's code. What it shows was computed before. "
            f"<code>{escape(reason)}</code></p></div>{context['body']}"
        )


def list_what_failed(app, error) -> None:
    """The last lines of a build, which has failed: what to look at."""
    for chapter, reason in sorted(getattr(app.env, "mlsae_failed", {}).items()):
        logger.info("look at %s.ipynb: %s", chapter, reason, color="red")
        app.statuscode = 1


def main(chapters: list[str]) -> int:
    """Stamp chapters, given as paths of either half, or all."""
    start, root = time.perf_counter(), Path.cwd()
    chosen = [Path(c).stem for c in chapters] or notebooks(root)
    stamp(root, chosen)
    print(f"{OUTPUTS}: {len(chosen)} chapters, {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
