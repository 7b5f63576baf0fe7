"""The command line: `python -m mlsae_core --help`."""

from __future__ import annotations

import argparse
import sys

from mlsae_core import store
from mlsae_core.cli import Commands, mode, show
from mlsae_core.spec import EvaluateSpec, build, coerce, load_experiment, load_run

_EXAMPLE = """\
a minimal SPEC.yml:

  model: neox-6l-128d      # a name under data/models, a Hugging Face folder, or a hub id
  data: docstrings         # or a .jsonl/.jsonl.zst/.json/.txt/.parquet file, or a hub data set
  layers: all              # or a list such as [0, 2, 4]
  expansion_factor: 16     # n_latents / d_model
  k: 16                    # active latents per vector
  tokens: 2_000_000
  seed: 0

All other fields have defaults, documented in mlsae_core/spec.py. In the place of the last four,
`dictionary: PATH` names weights that are there: a name under data/dictionaries, a folder or a hub
id (`{path: owner/name, revision: …}`). They are measured as those of a run are. An EXPERIMENT.yml
has `title`, `run` (the fields above), `sweep` (field: [values]) and `evaluate` (tokens, split).

Relative paths in these files start at the working directory. Results are looked up in data/shipped,
then in data/store, where new ones are written; MLSAE_DATA names another folder in the place of
data. `accelerate launch -m mlsae_core train SPEC.yml` trains on several devices.

"""


def _train(options: argparse.Namespace):
    run = load_run(options.spec)
    import pandas as pd

    from mlsae_core import pipeline

    chosen = tuple(options.track), options.kernel, options.compile, options.checkpoint_every
    artefact = pipeline.Session(mode(options), *chosen).train(run)
    last = pd.read_csv(artefact.file("log.csv")).iloc[-1]
    if pipeline.is_main_process():
        print(
            f"{artefact.path}\nFVU {last.fvu:.4f}, dead latents {last.dead_fraction:.1%}, "
            f"{int(last.tokens):,} tokens in {artefact.meta['seconds']:.0f} s"
        )


def _evaluate(options: argparse.Namespace):
    run = load_run(options.spec)
    settings = build(EvaluateSpec, {"tokens": options.tokens, "split": options.split})
    import pandas as pd

    from mlsae_core import pipeline

    artefact = pipeline.Session(mode(options)).evaluate(run, settings)
    if pipeline.is_main_process():
        show(pd.read_csv(artefact.file("evaluation.csv")))
        print(artefact.path)


def _push(options: argparse.Namespace):
    run = load_run(options.spec)
    from mlsae_core import pipeline, publish

    session = pipeline.Session(mode(options))
    print(publish.push(session, run, options.repo, options.licence, options.private))


def _status(options: argparse.Namespace):
    if options.experiment is not None:
        experiment = load_experiment(options.experiment)
        from mlsae_core import status

        table = status.status(experiment)
        table["seconds"] = table["seconds"].map(_duration)
        show(table.rename(columns={"seconds": "time_here"}).round(3))
        for said in status.remarks(experiment):
            print(f"warning: {said}", file=sys.stderr)
        return None
    import pandas as pd

    from mlsae_core import status

    rows = []
    for stage in store.stages():
        for artefact in store.artefacts(stage):
            state = "shipped" if artefact.path.is_relative_to(store.SHIPPED) else "stored"
            row = status.provenance(artefact)
            if isinstance(row["tokens"], dict):  # of each split
                row["tokens"] = sum(row["tokens"].values())
            rows.append({**row, "state": state})
    if not rows:
        return print(f"no results yet, neither in {store.SHIPPED} nor in {store.STORE}")
    columns = ["stage", "key", "state", "tokens", "seconds", "written"]
    return show(pd.DataFrame(rows, columns=columns).astype({"tokens": "Int64"}))


def _duration(seconds: float) -> str:
    """So long, in a unit in which it is a number that can be read."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def _seconds(text: str) -> float:
    seconds = coerce("--checkpoint-every", text, float)
    if seconds < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return seconds


def _commands() -> Commands:
    commands = Commands(
        "mlsae_core",
        "Train and measure multi-layer sparse autoencoders. Results are kept under a key of "
        "everything they depend on, so no command computes what exists already.",
        _EXAMPLE,
    )
    train = commands.add(
        _train, "train", "train the dictionary of a spec, or find it", "SPEC", "YAML file"
    )
    train.add_argument("--track", action="append", default=[], metavar="TRACKER",
                       help="also log to an accelerate tracker: tensorboard, wandb, …")  # fmt: skip
    train.add_argument("--kernel", choices=("sparse", "candidates", "dense", "triton"),
                       default="sparse", help="how the same numbers are computed; triton: fastest "
                       "on a GPU; candidates: faster for many latents on processors with bfloat16 "
                       "products")  # fmt: skip
    train.add_argument("--compile", action="store_true", help="compile the language model first; "
                       "faster on a GPU, where it runs as CUDA graphs")  # fmt: skip
    train.add_argument("--checkpoint-every", type=_seconds, metavar="SECONDS", help="how often to "
                       "write a checkpoint (default: every minute, at most a twentieth of the "
                       "time); a signal writes one as well")  # fmt: skip
    evaluate = commands.add(
        _evaluate,
        "evaluate",
        "FVU, L1, delta CE and KL per layer; trains first where needed",
        "SPEC",
        "YAML file",
    )
    defaults = EvaluateSpec()
    about_tokens = f"tokens of the split to read (default {defaults.tokens})"
    evaluate.add_argument("--tokens", default=defaults.tokens, help=about_tokens)
    evaluate.add_argument(
        "--split", default=defaults.split, help="train, validation or test (default)"
    )
    push = commands.add(
        _push, "push", "put a trained dictionary on the hub, with its card", "SPEC", "YAML file"
    )
    push.add_argument("repo", metavar="OWNER/NAME", help="repository, made if it is not there")
    push.add_argument("--licence", required=True, help="under which it may be used, such as mit")
    push.add_argument("--private", action="store_true", help="make the repository a private one")
    commands.add(
        _status,
        "status",
        "what exists and what the rest would cost; without a file, all results",
        "EXPERIMENT",
        "YAML file of an experiment or a run",
        mode=False,
        nargs="?",
    )
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run one command; gives its exit code."""
    return _commands().run(arguments)


if __name__ == "__main__":
    sys.exit(main())
