"""Break the core on purpose and see whether the tests of what was broken fail.

`make mutants` breaks one operator, comparison, number, loop or decorator at a time and lists what
survives; MUTANTS.md says what did and why. The mutations are Cosmic Ray's, one for each place. Its
own runner starts an interpreter for every mutant, which mostly imports torch, and writes mutants
into the tracked files; here they live in forks of a process that has imported what is large.
A mutant that `_build/mutants.jsonl` calls killed is not run again, one that survived is. What is
broken is drawn module by module, so that a change of one leaves the draws of the others.
"""

import argparse
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
    "activation": ("activation",),
    "train": ("train",),
    "analysis": ("analysis", "analysis_layers", "analysis_drift"),
    **{
        f"metrics.{name}": (f"metrics_{name}",)
        for name in ("distribution", "downstream", "examples", "geometry", "reconstruction")
    },
}
PATHS = {name: Path("mlsae_core", f"{name.replace('.', '/')}.py") for name in TESTS}
#: Tests that look elsewhere: in another interpreter, which imports the file, or at the model alone.
ELSEWHERE = "not does_not_import and not compiled_language_model"
BITS = ("LShift", "RShift", "BitAnd", "BitOr", "BitXor")
LARGE = ("torch", "transformers", "accelerate", "pandas", "hypothesis", "nbval.plugin", "tabulate")
RESULTS = Path("_build/mutants.jsonl")


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where type annotations begin and end, in which nothing is computed."""
    nodes, names = ast.walk(ast.parse(source)), ("annotation", "returns")
    found = (getattr(node, name, None) for node in nodes for name in names)
    ends = ((p.lineno, p.col_offset, p.end_lineno, p.end_col_offset) for p in found if p)
    return [(end[:2], end[2:]) for end in ends]


def places(module: str) -> list[list[tuple[str, int]]]:
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
    return [found[start] for start in sorted(found)]


def broken(module: str, name: str, number: int) -> dict:
    """A mutant: its module, line, operator, that line before and after, and the whole source."""
    source = PATHS[module].read_text()
    mutated = mutate_code(source, plugins.get_operator(name)(), number)
    lines = enumerate(zip(source.splitlines(), mutated.splitlines(), strict=False), 1)
    line, (before, after) = next((i, pair) for i, pair in lines if pair[0] != pair[1])
    facts = {"module": module, "line": line, "operator": name.removeprefix("core/")}
    return facts | {"before": before.strip(), "after": after.strip(), "source": mutated}


def drawn(module: str, every: int, seed: int) -> list[dict]:
    """Mutants of one in `every` places of a module, rounded up, one for each; but those that no
    interpreter reads, as where the star before named parameters became a plus."""
    dealt, found = random.Random(f"{module} {seed}"), places(module)
    sample = sorted(dealt.sample(range(len(found)), -(-len(found) // every)))
    mutants = [broken(module, *dealt.choice(found[place])) for place in sample]
    return [mutant for mutant in mutants if is_read(mutant["source"])]


def is_read(source: str) -> bool:
    try:
        return bool(ast.parse(source))
    except SyntaxError:
        return False


class Import(SourceFileLoader):
    """Import one module from its `source`, which is in no file."""

    def find_spec(self, name: str, *_) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, _):
        return compile(self.source, self.path, "exec")


class Here:
    """A plugin that leaves out tests of other processes, which import the file as well."""

    @staticmethod
    def pytest_collection_modifyitems(items: list):
        items[:] = [item for item in items if "processes" not in item.fixturenames]


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
    os._exit(pytest.main([*options, *files], [Here]))


def outcome(module: str, source: str, limit: float = 600) -> tuple[str, float]:
    """What became of a mutant, "killed", "timeout" or "survived", and after how many seconds."""
    start = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=run_tests, args=(module, source))
    child.start()
    child.join(limit)
    found = "timeout" if child.is_alive() else "killed" if child.exitcode else "survived"
    child.kill()
    return found, round(time.monotonic() - start, 1)


def main(modules: list[str], every: int, seed: int):
    """Break one in `every` places of the modules and say what survives."""
    for name in LARGE:
        importlib.import_module(name)
    RESULTS.parent.mkdir(exist_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = {row["key"]: row["outcome"] for row in map(json.loads, lines)}
    counts = {module: Counter() for module in modules}
    for module, found in counts.items():
        whole, seconds = outcome(module, PATHS[module].read_text())
        if whole != "survived":
            sys.exit(f"{module}: expected its tests to pass, they fail")
        for mutant in drawn(module, every, seed):
            result = judge(mutant.pop("source"), mutant, known, 30 + 5 * seconds)
            found[result] += 1
            if result == "survived":
                where = f"{PATHS[module]}:{mutant['line']} {mutant['operator']}"
                print(f"{where}\n  - {mutant['before']}\n  + {mutant['after']}", flush=True)
    counts["together"] = sum(counts.values(), Counter())
    for module, found in counts.items():
        total, killed = found.total(), found.total() - found["survived"]
        print(f"{module:22} {killed:4} of {total:4} killed, {killed / max(total, 1):.0%}")


def judge(source: str, facts: dict, known: dict[str, str], limit: float) -> str:
    """The outcome of a mutant with this source, noted in `RESULTS` unless it is known as killed."""
    key = hashlib.sha256(f"{facts['module']}\n{source}".encode()).hexdigest()[:16]
    if known.get(key, "survived") != "survived":
        return known[key]
    found, seconds = outcome(facts["module"], source, limit)
    with RESULTS.open("a") as file:
        file.write(json.dumps({"key": key, "outcome": found, "seconds": seconds, **facts}) + "\n")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Which mutants of the core its tests do not kill.")
    parser.add_argument("modules", nargs="*", metavar="module", help="by default all")
    parser.add_argument("--every", type=int, default=4, help="break one in so many places")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.modules or list(TESTS), given.every, given.seed)
