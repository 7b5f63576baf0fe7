"""Small inputs for whole runs, and functions that tests run in processes of their own."""

import json
import os
import signal
import time
from contextlib import redirect_stdout
from pathlib import Path

from mlsae_core import store

WORDS = [f"{a}{b}" for a in ("la", "re", "mi", "fa", "so") for b in ("tent", "sid", "lens", "ver")]


def sentences(n: int) -> list[str]:
    """n distinct short documents."""
    return [
        " ".join(WORDS[(i * i + 7 * j * (i + 1)) % len(WORDS)] for j in range(6 + i % 9)) + f" {i}."
        for i in range(n)
    ]


def use_data(folder: Path):
    """Let the store of this process lie in `folder`."""
    store.DATA = folder
    store.MODELS, store.SHIPPED, store.STORE = (
        folder / name for name in ("models", "shipped", "store")
    )


def as_rank(rank: int, processes: int, port: int):
    """Make this process one of several that accelerate knows."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def command(arguments: list[str], data: Path, rank: tuple[int, int, int] | None = None):
    """Run the command line in a process of its own, maybe one of several; exits with its code."""
    use_data(data)
    if rank is not None:
        as_rank(*rank)
        write = store.write

        def write_and_mark(stage, *arguments, **options):
            data.mkdir(exist_ok=True)
            (data / f"{stage}-by-{rank[0]}").touch()
            return write(stage, *arguments, **options)

        store.write = write_and_mark
    from mlsae_core.__main__ import main

    # A fork server's own output is wherever that of the test was which happened to start it.
    data.mkdir(parents=True, exist_ok=True)
    with open(data / f"{rank[0] if rank else 0}.out", "w") as out, redirect_stdout(out):
        code = main(arguments)
    os._exit(code)


def slow_command(arguments: list[str], data: Path, checkpoint_steps: int):
    """Run the command line so that it writes a checkpoint at every step and marks when it has."""
    from mlsae_core import train

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell waits for none
    train.CHECKPOINT_EVERY = train.train.__kwdefaults__["checkpoint_seconds"] = 0.0
    save, count = store.save_checkpoint, 0

    def save_and_mark(path, state):
        nonlocal count
        save(path, state)
        count += 1
        if count == checkpoint_steps:
            (data / "ready").touch()

    store.save_checkpoint = save_and_mark
    command(arguments, data)


def told_command(arguments: list[str], data: Path, rank: tuple[int, int, int], step: int):
    """Run the command line as one rank of several; number 1 gets SIGTERM after so many steps."""
    from mlsae_core import train

    steps = train._Loop.steps

    def told(loop, state):
        for row in steps(loop, state):
            if rank[0] == 1 and state.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield row

    train._Loop.steps = told
    command(arguments, data, rank)


def streaming_command(
    arguments: list[str],
    data: Path,
    url: str,
    rank: tuple[int, int, int],
    checkpoint_steps: int | None = None,
):
    """Run the command line on text of the hub at `url`, as one rank of several."""
    import hub

    hub.use(url, data / "cache", f"rank{rank[0]}")
    if rank[1] > 1:
        as_rank(*rank)
    if checkpoint_steps is None:
        command(arguments, data)
    slow_command(arguments, data, checkpoint_steps)


def measure(spec: Path, data: Path, rank: tuple[int, int, int] | None = None):
    """Evaluate a dictionary and find its distributions, maybe as one rank of several."""
    use_data(data)
    if rank is not None:
        as_rank(*rank)
    from mlsae_core import pipeline
    from mlsae_core.spec import EvaluateSpec, load_run

    pipeline.EVALUATION_BATCH_TOKENS = 1024
    session, run, settings = pipeline.Session(), load_run(spec), EvaluateSpec(10_000, "train")
    session.evaluate(run, settings)
    session.distributions(run, settings)
    os._exit(0)


def tokenise_slowly(
    spec: Path, data: Path, rank: tuple[int, int, int], limit: float, seconds: float
):
    """Get a run's text as one rank of several, whose collectives may take `limit` seconds."""
    use_data(data)
    as_rank(*rank)
    from datetime import timedelta

    import torch.distributed.distributed_c10d as distributed

    distributed._get_default_timeout = lambda backend: timedelta(seconds=limit)
    from mlsae_core import pipeline, text
    from mlsae_core.spec import SpecError, load_run

    pack = text._pack_splits

    def slow(*arguments):
        time.sleep(seconds)
        return pack(*arguments)

    text._pack_splits = slow
    try:
        pipeline.Session().blocks(load_run(spec), "train")
    except (SpecError, store.Stopped) as error:
        os._exit(2 if isinstance(error, SpecError) else 1)
    os._exit(0)


def write_twice(folder: Path, text: str, go):
    """Compute one artefact at the same moment as others do."""
    use_data(folder)
    identity = store.key("tokens", {"a": 1}, {})

    def fill(work: Path) -> dict:
        (work / "first.txt").write_text(text)
        go.wait()
        (work / "second.txt").write_text(text)
        return {}

    made = store.write("tokens", identity, {"a": 1}, {}, fill)
    contents = {(made.path / name).read_text() for name in ("first.txt", "second.txt")}
    assert len(contents) == 1
    store.find("tokens", identity)


def write_jsonl(path: Path, rows) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
