"""What every benchmark shares: taking turns, peak memory, missing packages, tables, the machine.

A suite is a module with `cases(quick)`. A case is one piece of work that several implementations
do; they take turns, round by round, so that what else the machine does meets all of them alike.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], Any]
ROOT = Path(__file__).parents[1]

SUITES = {
    "training step": "benchmarks.bench_train",
    "training loop": "benchmarks.bench_loop",
    "evaluation": "benchmarks.bench_loop",
    "evaluation, 30 layers": "benchmarks.bench_loop",
    "distributions": "benchmarks.bench_loop",
    "memory of distributions": "benchmarks.bench_loop",
    "memory": "benchmarks.bench_train",
}
ASKED_FOR = ("memory", "evaluation, 30 layers")
"""Suites that run only where they are named: they need much memory, or long."""

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "sparsify": "eai-sparsify",
    "sae_lens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
}
"""Import names of what takes part, and the names under which it is installed."""

OURS, LIMIT = "mlsae_core", "limit"
COLUMNS = ("implementation", "per second", "range", "× ours", "of limit", "peak MB", "note")
WIDTHS = (38, 12, 20, 8, 10, 9, 0)


@dataclass(frozen=True)
class Implementation:
    """How one implementation does a case's work.

    make: builds what is needed, outside the time that is taken, and returns the step.
    package: import name of the package that it belongs to, where that is not the project's.
    """

    make: Callable[[], Step]
    package: str | None = None


@dataclass(frozen=True)
class Case:
    """One piece of work, done by several implementations.

    work, unit: how much one step does, such as 3072 activation vectors.
    steps: taken before the clock runs, to warm up, and by the process whose peak memory is
        measured.
    check: given the results of these steps by implementation, raises AssertionError where they
        differ; `agreement` says by how much they may, in words.
    rounds: timed; 0 where memory alone is of interest, which a process of its own measures.
    shares: parts of the time of our rounds, by name, asked for after them.
    settings: what is the same for all implementations, for the table's heading.
    per_token: units of work that a token makes, such as activation vectors of its layers.
    device: whose memory is measured.
    """

    suite: str
    name: str
    work: int
    unit: str
    implementations: dict[str, Implementation]
    steps: int = 2
    check: Callable[[dict[str, list]], None] | None = None
    agreement: str = ""
    rounds: int = 5
    shares: Callable[[], dict[str, float]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    per_token: int = 1
    device: str = "cpu"


def cases(suites: Iterable[str], quick: bool) -> list[Case]:
    """All cases of some suites; the modules of others are not imported."""
    modules = dict.fromkeys(SUITES[suite] for suite in suites)
    found = [case for name in modules for case in importlib.import_module(name).cases(quick)]
    return [case for case in found if case.suite in suites]


def run(case: Case, quick: bool, threads: int) -> list[dict[str, Any]]:
    """One row per implementation; what is not installed or fails is named in `note`."""
    steps, notes = {}, dict.fromkeys(case.implementations, "")
    for name, implementation in case.implementations.items() if case.rounds else ():
        steps[name], notes[name] = _made(implementation)
    results = {name: _first(case, name, step, notes) for name, step in steps.items() if step}
    if case.check:
        case.check(results)
    seconds: dict[str, list[float]] = {name: [] for name in results if not notes[name]}
    for _ in range(min(case.rounds, 3) if quick else case.rounds):
        for name, times in seconds.items():
            start = time.perf_counter()
            steps[name]()
            times.append(time.perf_counter() - start)
    steps.clear()  # the processes below need the memory
    gc.collect()
    torch.cuda.empty_cache()
    rows = []
    for name in case.implementations:
        row = {"suite": case.suite, "case": case.name, "implementation": name, "note": notes[name]}
        row |= {"unit": case.unit, **_rates(seconds.get(name, []), case.work)}
        rate = row["per_second"]
        row["hours_for_1e9_tokens"] = rate and 1e9 * case.per_token / rate / 3600
        peak = {}
        # A quick run starts few processes.
        if not row["note"] and name != LIMIT and (name == OURS or not quick):
            peak = _peak(case, name, quick, threads)
        rows.append(row | {"peak_megabytes": None, "import_megabytes": None} | peak)
    _compare(rows)
    return rows


def _made(implementation: Implementation) -> tuple[Step | None, str]:
    package = implementation.package
    if package is None:
        return implementation.make(), ""
    if find_spec(package) is None:
        return None, f"not installed: pip install {PACKAGES[package]}"
    try:
        return implementation.make(), ""
    except Exception as error:
        return None, _reason(error)


def _first(case: Case, name: str, step: Step, notes: dict[str, str]) -> list:
    """Results of the first steps; what another package fails in is noted."""
    try:
        return [step() for _ in range(case.steps)]
    except Exception as error:
        if case.implementations[name].package is None:
            raise
        notes[name] = _reason(error)
        return []


def _reason(error: Exception) -> str:
    """One line: the error's kind and what it says, without the folders of this machine."""
    words = " ".join(str(error).split()).replace(str(Path.home()), "~")
    return f"failed: {type(error).__name__}: {words[:150]}"


def _rates(seconds: list[float], work: int) -> dict[str, float | int | None]:
    """Median, slowest and fastest rate of some rounds, in work per second."""
    if not seconds:
        return dict.fromkeys(("per_second", "slowest", "fastest"), None) | {"rounds": 0}
    return {
        "per_second": work / statistics.median(seconds),
        "slowest": work / max(seconds),
        "fastest": work / min(seconds),
        "rounds": len(seconds),
    }


def _compare(rows: list[dict[str, Any]]) -> None:
    """Add how many times longer than ours each one takes, and its share of the limit."""
    rates = {row["implementation"]: row["per_second"] for row in rows}
    for row in rows:
        rate, ours, limit = row["per_second"], rates.get(OURS), rates.get(LIMIT)
        row["times_ours"] = ours / rate if rate and ours else None
        row["share_of_limit"] = rate / limit if rate and limit else None


# --- memory ---------------------------------------------------------------------------------------


def _peak(case: Case, name: str, quick: bool, threads: int) -> dict[str, Any]:
    """Peak memory in MB (10⁶ bytes) of a process of its own, and what its imports take of it."""
    command = [sys.executable, "-m", "benchmarks", "--peak-of", case.suite, case.name, name]
    command += ["--threads", str(threads), *["--quick"] * quick]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"note": f"memory not measured: {lines[-1][:150]}"}
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(suite: str, case_name: str, name: str, quick: bool) -> None:
    """What the process of `_peak` does: a few steps of one implementation."""
    [case] = [case for case in cases([suite], quick) if case.name == case_name]
    if package := case.implementations[name].package:
        importlib.import_module(package)
    before = _memory("VmRSS")
    step = case.implementations[name].make()
    for _ in range(case.steps):
        step()
    found = {"peak_megabytes": _memory("VmHWM"), "import_megabytes": before}
    if case.device == "cuda":
        found["peak_megabytes"] = torch.cuda.max_memory_allocated() / 1e6
    print(json.dumps(found))


def _memory(field: str) -> float:
    """Resident memory of this process; Linux's `getrusage` would include its parent's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines[field].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


# --- what is written ------------------------------------------------------------------------------


def machine(threads: int) -> dict[str, Any]:
    """Processor, versions and date that a result belongs to; nothing that names the computer."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "python": platform.python_version(),
        **{n: metadata.version(n) for n in PACKAGES.values() if n in installed},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed since": bool(_git("status", "--porcelain", "--", "mlsae_core", "benchmarks/*.py")),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def beside_others(content: dict, file: Path) -> dict:
    """The results, and those that the file has of suites that were not measured now.

    A run of some suites, unlike one of all that need not be named, is another run than the one
    that the file is of: its cases say on what machine and at what commit they were measured.
    """
    measured = {case["suite"] for case in content["cases"]}
    whole = measured >= {*SUITES} - {*ASKED_FOR}
    for case in content["cases"]:
        if not whole or case["suite"] in ASKED_FOR:
            case["machine"] = content["machine"]
    if not file.exists():
        return content
    old = json.loads(file.read_text("utf-8"))
    if old["quick"] != content["quick"]:
        return content
    both = {
        name: [*content[name], *(row for row in old[name] if row["suite"] not in measured)]
        for name in ("cases", "results")
    }
    return content | both | {"machine": (content if whole else old)["machine"]}


def head(case: Case) -> str:
    """The heading of a case's table, with what is the same for all implementations."""
    words = ", ".join(f"{name} {value}" for name, value in case.settings.items())
    titles = "".join(
        f"{t:<{w}}" if i == 0 else f"{t:>{w}}"
        for i, (t, w) in enumerate(zip(COLUMNS[:-1], WIDTHS, strict=False))
    )
    return f"\n{case.suite}: {case.name} ({case.unit} per second; {words})\n{titles}"


def line(row: dict[str, Any]) -> str:
    """One row of a case's table."""
    spread = "–"
    if row["rounds"]:
        spread = f"{row['slowest']:,.0f} to {row['fastest']:,.0f}"
    cells = (
        _number(row["per_second"], ",.0f"),
        spread,
        _number(row["times_ours"], ".2f"),
        _number(row["share_of_limit"], ".2f"),
        _number(row["peak_megabytes"], ",.0f"),
    )
    cells = "".join(f"{c:>{w}}" for c, w in zip(cells, WIDTHS[1:-1], strict=True))
    return f"{row['implementation']:<{WIDTHS[0]}}{cells}  {row['note']}".rstrip()


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)
