"""Break the core on purpose and see whether the tests of what was broken fail.

`make mutants` breaks one operator, comparison, number, loop or decorator at a time and lists what
survives; MUTANTS.md says what did and why. Mutations are those of Cosmic Ray, one for each place
in the code. Its own runner would start an interpreter for every mutant, most of whose time goes
into importing torch, and writes mutants into the tracked files. Here they live in memory, in forks
of one process that has imported what is large.

Results are added to `_build/mutants.jsonl`. A mutant that is found killed there is not run again,
one that survived is: tests may have been added.
"""

import ast
import hashlib
import importlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import NamedTuple

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
#: Tests of other interpreters, which import what is in the files.
ELSEWHERE = "not process and not does_not_import and not compiled"
#: What pytest says of its plugins that LARGE has brought along.
EARLY = "ignore::pytest.PytestAssertRewriteWarning"
BITS = ("LShift", "RShift", "BitAnd", "BitOr", "BitXor")
LARGE = ("torch", "transformers", "accelerate", "pandas", "hypothesis", "nbval.plugin", "tabulate")
RESULTS = Path("_build/mutants.jsonl")


class Mutant(NamedTuple):
    module: str
    line: int
    operator: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.module}\n{self.source}".encode()).hexdigest()[:16]


def path_of(module: str) -> Path:
    return Path("mlsae_core", *module.split(".")).with_suffix(".py")


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where type annotations begin and end, in which nothing is computed."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            if (part := getattr(node, name, None)) is not None:
                ends = (part.end_lineno, part.end_col_offset)
                found.append(((part.lineno, part.col_offset), ends))
    return found


def places(module: str) -> list[tuple[str, list[tuple[str, int]]]]:
    """Where there is anything to break, and by which operators: their names and occurrences."""
    source = path_of(module).read_text()
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


def broken(module: str, name: str, number: int) -> Mutant:
    source = path_of(module).read_text()
    mutated = mutate_code(source, plugins.get_operator(name)(), number)
    lines = enumerate(zip(source.splitlines(), mutated.splitlines(), strict=False))
    line, (before, after) = next((i, pair) for i, pair in lines if pair[0] != pair[1])
    operator = name.removeprefix("core/")
    return Mutant(module, line + 1, operator, before.strip(), after.strip(), mutated)


class Import(SourceFileLoader):
    """Import one module from a source that is in no file."""

    def __init__(self, module: str, source: str):
        super().__init__(f"mlsae_core.{module}", str(path_of(module).resolve()))
        self.source = source

    def find_spec(self, name: str, *_) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, _):
        return compile(self.source, self.path, "exec")


def outcome(module: str, source: str, limit: float) -> tuple[str, float]:
    """Run the tests of a module in a fork, until one fails: "killed", "timeout" or "survived"."""
    import pytest

    start = time.monotonic()
    if (child := os.fork()) == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        sys.meta_path.insert(0, Import(module, source))
        files = [f"tests/test_{name}.py" for name in TESTS[module]]
        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", "-W", EARLY, "-k", ELSEWHERE, *files]
        )
        os._exit(code)
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - start > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", limit
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(done[1])
    return "survived" if code == 0 else "killed", time.monotonic() - start


def main(count: int = 300, seed: int = 0):
    sys.path[:0] = ["tests"]
    for name in LARGE:
        importlib.import_module(name)
    dealt = random.Random(seed)
    every = [place for module in TESTS for place in places(module)]
    chosen = dealt.sample(every, min(count, len(every)))
    print(f"{len(every)} places, of which {len(chosen)} are broken", flush=True)
    sample = sorted(broken(module, *dealt.choice(ways)) for module, ways in chosen)
    RESULTS.parent.mkdir(exist_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {row["key"]: row["outcome"] for row in map(json.loads, lines)}
    limits, counts = {}, {module: Counter() for module in TESTS}
    for mutant in sample:
        found, module = known.get(mutant.key, "survived"), mutant.module
        if found == "survived":
            if module not in limits:
                whole, seconds = outcome(module, path_of(module).read_text(), 600)
                if whole != "survived":
                    sys.exit(f"{module}: expected its tests to pass, they fail")
                limits[module] = 30 + 5 * seconds
            found, seconds = outcome(module, mutant.source, limits[module])
            row = {"key": mutant.key, "outcome": found, "seconds": round(seconds, 1)}
            with RESULTS.open("a") as file:
                file.write(json.dumps(row | mutant._asdict() | {"source": None}) + "\n")
        counts[module][found] += 1
        if found == "survived":
            where = f"{path_of(module)}:{mutant.line} {mutant.operator}"
            print(f"{where}\n  - {mutant.before}\n  + {mutant.after}", flush=True)
    for module, found in counts.items():
        print(f"{module:22} {found.total() - found['survived']:4} of {found.total():4} killed")
    total = sum(counts.values(), Counter())
    print(f"{1 - total['survived'] / total.total():.1%} of {total.total()} killed")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
