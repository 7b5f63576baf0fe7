"""The command line: `python -m mlsae_core --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mlsae_core import __version__
from mlsae_core.spec import EvaluateSpec, SpecError, load_experiment, load_run

_EXAMPLE = """\
a minimal SPEC.yml:

  model: neox-6l-128d      # a name under data/models, a Hugging Face folder, or a hub id
  data: docstrings         # or a .jsonl/.jsonl.zst/.json/.txt/.parquet file, or a hub data set
  layers: all              # or a list such as [0, 2, 4]
  expansion_factor: 16     # n_latents / d_model
  k: 16                    # active latents per vector
  tokens: 2_000_000
  seed: 0

All other fields have defaults, documented in mlsae_core/spec.py. An EXPERIMENT.yml has `title`,
`run` (the fields above), `sweep` (field: [values]) and `evaluate` (tokens, split).
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlsae_core",
        description="Train and measure multi-layer sparse autoencoders. Results are kept under a "
        "key of everything they depend on, so no command computes what exists already.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, argument: str, about: str, mode: bool = True, **options):
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument(argument.lower(), metavar=argument, help=about, **options)
        if mode:
            group = sub.add_mutually_exclusive_group()
            group.add_argument("--force", action="store_true", help="compute anew what exists")
            group.add_argument("--read-only", action="store_true", help="compute nothing; fail on "
                               "a missing result and name the nearest one")  # fmt: skip
        return sub

    train = command("train", "train the dictionary of a spec, or find it", "SPEC", "YAML file")
    train.add_argument("--track", action="append", default=[], metavar="TRACKER",
                       help="also log to an accelerate tracker: tensorboard, wandb, …")  # fmt: skip
    evaluate = command(
        "evaluate", "FVU, L1, delta CE and KL per layer; trains first where needed", "SPEC",
        "YAML file",
    )  # fmt: skip
    defaults = EvaluateSpec()
    about_tokens = f"tokens of the split to read (default {defaults.tokens})"
    evaluate.add_argument("--tokens", type=int, default=defaults.tokens, help=about_tokens)
    evaluate.add_argument(
        "--split", default=defaults.split, help="train, validation or test (default)"
    )
    materialise = command(
        "materialise", "everything an experiment declares", "EXPERIMENT", "YAML file"
    )
    materialise.add_argument("--ship", action="store_true", help="copy the results to data/shipped")
    command("status", "what exists and what the rest would cost; without a file, all results",
            "EXPERIMENT", "YAML file of an experiment or a run", mode=False, nargs="?")  # fmt: skip
    command("pretrain", "train a language model of the suite from its recipe", "RECIPE",
            "name under data/models, or a recipe.yml", mode=False)  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when done, 2 for bad input, 1 for anything that stopped the work."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    from mlsae_core.store import StoreError
    from mlsae_core.train import TrainingStopped

    logging.disable_progress_bar()
    try:
        _run(options)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StoreError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace):
    import pandas as pd

    from mlsae_core import pipeline

    mode = "cached"
    if getattr(options, "force", False):
        mode = "force"
    elif getattr(options, "read_only", False):
        mode = "read-only"

    def show(table: pd.DataFrame):
        print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))

    if options.command == "train":
        artefact = pipeline.Session(mode, tuple(options.track)).train(load_run(options.spec))
        last = pd.read_csv(artefact.file("log.csv")).iloc[-1]
        print(f"{artefact.path}\nFVU {last.fvu:.4f}, dead latents {last.dead_fraction:.1%}, "
              f"{int(last.tokens):,} tokens in {artefact.meta['seconds']:.0f} s")  # fmt: skip
    elif options.command == "evaluate":
        if options.split not in ("train", "validation", "test"):
            raise SpecError(f"split: expected train, validation or test, got {options.split}")
        settings = EvaluateSpec(options.tokens, options.split)
        artefact = pipeline.Session(mode).evaluate(load_run(options.spec), settings)
        show(pd.read_csv(artefact.file("evaluation.csv")))
        print(artefact.path)
    elif options.command == "materialise":
        made = pipeline.materialise(load_experiment(options.experiment), mode, options.ship)
        show(made.provenance)
    elif options.command == "status":
        show(_status(options.experiment))
    elif options.command == "pretrain":
        from mlsae_core import pretrain

        print(pretrain.pretrain(options.recipe))


def _status(path: str | None):
    import pandas as pd

    from mlsae_core import pipeline, store

    if path is not None:
        return pipeline.status(load_experiment(path))
    rows = []
    for stage in store.STAGES:
        for artefact in store.artefacts(stage):
            state = "shipped" if Path(artefact.path).is_relative_to(store.SHIPPED) else "stored"
            rows.append({**pipeline.provenance(artefact), "state": state})
    return pd.DataFrame(rows, columns=["stage", "key", "state", "tokens", "seconds", "written"])


if __name__ == "__main__":
    sys.exit(main())
