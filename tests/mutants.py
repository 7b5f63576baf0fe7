"""Break the core on purpose and see whether the tests of what was broken fail.

`make mutants` breaks one operator, comparison, number, loop or decorator at a time and lists what
survives; MUTANTS.md says what did and why. The mutations are Cosmic Ray's, one for each place. Its
own runner starts an interpreter for every mutant, which mostly imports torch, and writes mutants
into the tracked files; here they live in forks of a process that has imported what is large.
A mutant that `_build/mutants.jsonl` calls killed is not run again, one that survived is.
"""

import ast
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

#: What is broken, and the tests that are to notice: no golden numbers among them.
TESTS = {
    "kernels": ("kernels", "objective"),
    "pairs": ("kernels",),
    "optimizer": ("kernels", "sae"),
    "objective": ("objective",),
    "train": ("train",),
    "analysis": ("analysis", "analysis_layers"),
    **{
        f"metrics.{name}": (f"metrics_{name}",)
        for name in ("distribution", "downstream", "examples", "geometry", "reconstruction")
    },
}
PATHS = {name: Path("mlsae_core", f"{name.replace('.', '/')}.py") for name in TESTS}
#: Tests of other interpreters, which import what is in the files.
ELSEWHERE = "not process and not does_not_import and not compiled"
BITS = ("LShift", "RShift", "BitAnd", "BitOr", "BitXor")
LARGE = ("torch", "transformers", "accelerate", "pandas", "hypothesis", "nbval.plugin", "tabulate")
RESULTS = Path("_build/mutants.jsonl")


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where type annotations begin and end, in which nothing is computed."""
    nodes, names = ast.walk(ast.parse(source)), ("annotation", "returns")
    found = (getattr(node, name, None) for node in nodes for name in names)
    ends = ((p.lineno, p.col_offset, p.end_lineno, p.end_col_offset) for p in found if p)
    return [(end[:2], end[2:]) for end in ends]


def places(module: str) -> list[tuple[str, list[tuple[str, int]]]]:
    """Where there is anything to break, and by which operators: their names and occurrences."""
    source = PATHS[module].read_text()
    tree, typed, found = get_ast(source), annotations(source), {}
    for name in plugins.operator_names():
        operator, words = plugins.get_operator(name), name.split("_")
        # A float has no bits: such a mutant fails wherever it is run, and so says nothing.
        if operator.arguments() or (words[-1] in BITS and words[-2] not in BITS):
            continue
        starts = (s for node in ast_nodes(tree) for s, _ in operator().mutation_positions(node))
        for number, start in enumerate(starts):
            if not any(first <= start < last for first, last in typed):
                found.setdefault(start, []).append((name, number))
    return [(module, found[start]) for start in sorted(found)]


def broken(module: str, name: str, number: int) -> dict:
    """A mutant: its module, line, operator, that line before and after, and the whole source."""
    source = PATHS[module].read_text()
    mutated = mutate_code(source, plugins.get_operator(name)(), number)
    lines = enumerate(zip(source.splitlines(), mutated.splitlines(), strict=False), 1)
    line, (before, after) = next((i, pair) for i, pair in lines if pair[0] != pair[1])
    facts = {"module": module, "line": line, "operator": name.removeprefix("core/")}
    return facts | {"before": before.strip(), "after": after.strip(), "source": mutated}


class Import(SourceFileLoader):
    """Import one module from its `source`, which is in no file."""

    def find_spec(self, name: str, *_) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, _):
        return compile(self.source, self.path, "exec")


def run_tests(module: str, source: str):
    """Exit with pytest's code for the tests of a module that has this source."""
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    broken = Import(f"mlsae_core.{module}", str(PATHS[module].resolve()))
    broken.source = source
    sys.meta_path.insert(0, broken)
    files = [f"tests/test_{name}.py" for name in TESTS[module]]
    early = "ignore::pytest.PytestAssertRewriteWarning"  # what LARGE has brought along
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", early, "-k", ELSEWHERE]
    os._exit(pytest.main([*options, *files]))


def outcome(module: str, source: str, limit: float = 600) -> tuple[str, float]:
    """What became of a mutant, "killed", "timeout" or "survived", and after how many seconds."""
    start = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=run_tests, args=(module, source))
    child.start()
    child.join(limit)
    found = "timeout" if child.is_alive() else "killed" if child.exitcode else "survived"
    child.kill()
    return found, round(time.monotonic() - start, 1)


def main(count: int = 300, seed: int = 0):
    """Break `count` places and say what survives."""
    for name in LARGE:
        importlib.import_module(name)
    dealt = random.Random(seed)
    every = [place for module in TESTS for place in places(module)]
    sample = dealt.sample(every, min(count, len(every)))
    chosen = sorted((module, dealt.choice(ways)) for module, ways in sample)
    print(f"{len(every)} places, of which {len(chosen)} are broken", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {row["key"]: row["outcome"] for row in map(json.loads, lines)}
    limits, counts = {}, {module: Counter() for module in TESTS}
    for module, way in chosen:
        mutant = broken(module, *way)
        source = mutant.pop("source")
        key = hashlib.sha256(f"{module}\n{source}".encode()).hexdigest()[:16]
        if (found := known.get(key, "survived")) == "survived":
            if module not in limits:
                whole, seconds = outcome(module, PATHS[module].read_text())
                if whole != "survived":
                    sys.exit(f"{module}: expected its tests to pass, they fail")
                limits[module] = 30 + 5 * seconds
            found, seconds = outcome(module, source, limits[module])
            with RESULTS.open("a") as file:
                row = {"key": key, "outcome": found, "seconds": seconds, **mutant}
                file.write(json.dumps(row) + "\n")
        counts[module][found] += 1
        if found == "survived":
            where = f"{PATHS[module]}:{mutant['line']} {mutant['operator']}"
            print(f"{where}\n  - {mutant['before']}\n  + {mutant['after']}", flush=True)
    counts["together"] = sum(counts.values(), Counter())
    for module, found in counts.items():
        every, killed = found.total(), found.total() - found["survived"]
        print(f"{module:22} {killed:4} of {every:4} killed, {killed / max(every, 1):.0%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
