"""The command line: `python -m mlsae_core --help`."""

from __future__ import annotations

import argparse
import os
import sys

from mlsae_core import __version__, store
from mlsae_core.spec import EvaluateSpec, SpecError, build, load_experiment, load_run

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

Relative paths in these files start at the working directory. Results are looked up in data/shipped,
then in data/store, where new ones are written; MLSAE_DATA names another folder in the place of
data. `accelerate launch -m mlsae_core train SPEC.yml` trains on several devices.

Exit codes: 0 done; 2 bad input, which the message names; 1 stopped before the end; 130 interrupted.
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
            group.add_argument("--force", action="store_true", help="compute this stage anew, "
                               "into data/store; the book still reads shipped results")  # fmt: skip
            group.add_argument("--read-only", action="store_true", help="compute nothing; fail on "
                               "a missing result and name the nearest one")  # fmt: skip
        return sub

    train = command("train", "train the dictionary of a spec, or find it", "SPEC", "YAML file")
    train.add_argument("--track", action="append", default=[], metavar="TRACKER",
                       help="also log to an accelerate tracker: tensorboard, wandb, …")  # fmt: skip
    train.add_argument("--kernel", choices=("sparse", "candidates", "dense", "triton"),
                       default="sparse", help="how the same numbers are computed; triton: fastest "
                       "on a GPU; candidates: faster for many latents on processors with bfloat16 "
                       "products")  # fmt: skip
    train.add_argument("--compile", action="store_true", help="compile the language model first; "
                       "faster on a GPU, where it runs as CUDA graphs")  # fmt: skip
    evaluate = command(
        "evaluate", "FVU, L1, delta CE and KL per layer; trains first where needed", "SPEC",
        "YAML file",
    )  # fmt: skip
    defaults = EvaluateSpec()
    about_tokens = f"tokens of the split to read (default {defaults.tokens})"
    evaluate.add_argument("--tokens", default=defaults.tokens, help=about_tokens)
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
    lens = command(
        "lens", "train the tuned lens of a language model, into data/lenses", "MODEL",
        "name under data/models, a Hugging Face folder, or a hub id", mode=False,
    )  # fmt: skip
    lens.add_argument("--tokens", help="training tokens (default: those of the shipped lenses)")
    lens.add_argument("--force", action="store_true", help="train it anew where it is there")
    again = command("reproduce", "recompute shipped results from nothing and compare them",
                    "EXPERIMENT", "YAML files", mode=False, nargs="+")  # fmt: skip
    again.add_argument("--models", action="store_true", help="train the language models again too")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when done, 2 for bad input, 1 for anything that stopped the work."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before transformers is imported
    try:
        _COMMANDS[options.command](options)
    except (SpecError, store.Stopped, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SpecError) else 1
    except KeyboardInterrupt:
        print(
            "interrupted; the same command continues from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        return 130
    return 0


def _mode(options: argparse.Namespace) -> str:
    return "force" if options.force else "read-only" if options.read_only else "cached"


def _show(table):
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


def _train(options: argparse.Namespace):
    run = load_run(options.spec)
    import pandas as pd

    from mlsae_core import pipeline

    chosen = tuple(options.track), options.kernel, options.compile
    artefact = pipeline.Session(_mode(options), *chosen).train(run)
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

    artefact = pipeline.Session(_mode(options)).evaluate(run, settings)
    if pipeline.is_main_process():
        _show(pd.read_csv(artefact.file("evaluation.csv")))
        print(artefact.path)


def _materialise(options: argparse.Namespace):
    experiment = load_experiment(options.experiment)
    from mlsae_core import experiments, pipeline

    made = experiments.materialise(experiment, _mode(options), options.ship)
    if pipeline.is_main_process():
        _show(made.provenance)


def _status(options: argparse.Namespace):
    if options.experiment is not None:
        experiment = load_experiment(options.experiment)
        from mlsae_core import experiments

        return _show(experiments.status(experiment))
    import pandas as pd

    from mlsae_core import experiments

    rows = []
    for stage in store.STAGES:
        for artefact in store.artefacts(stage):
            state = "shipped" if artefact.path.is_relative_to(store.SHIPPED) else "stored"
            row = experiments.provenance(artefact)
            if isinstance(row["tokens"], dict):  # of each split
                row["tokens"] = sum(row["tokens"].values())
            rows.append({**row, "state": state})
    if not rows:
        return print(f"no results yet, neither in {store.SHIPPED} nor in {store.STORE}")
    columns = ["stage", "key", "state", "tokens", "seconds", "written"]
    return _show(pd.DataFrame(rows, columns=columns).astype({"tokens": "Int64"}))


def _pretrain(options: argparse.Namespace):
    from mlsae_core import pretrain

    print(pretrain.pretrain(options.recipe))


def _reproduce(options: argparse.Namespace):
    declared = [load_experiment(path) for path in options.experiment]
    import pandas as pd

    from mlsae_core import reproduce

    hours = reproduce.estimate(declared) / 3600
    print(f"about {hours:.1f} hours left; a killed call continues where it was", flush=True)
    tables = [reproduce.reproduce(e).assign(experiment=e.title) for e in declared]
    _show(pd.concat(tables, ignore_index=True))
    if options.models:
        models = map(reproduce.reproduce_model, store.shipped_models())
        _show(pd.DataFrame(models))
    deviation = max((t.deviation.max() for t in tables if len(t)), default=0.0)
    print(f"largest deviation: {deviation:.2%} of a column's largest value, or of all latents")


def _lens(options: argparse.Namespace):
    from mlsae_core import tune

    chosen = {} if options.tokens is None else {"tokens": options.tokens}
    print(tune.make(options.model, build(tune.TuneSpec, chosen), options.force))


_COMMANDS = {
    "reproduce": _reproduce,
    "train": _train,
    "evaluate": _evaluate,
    "materialise": _materialise,
    "status": _status,
    "pretrain": _pretrain,
    "lens": _lens,
}


if __name__ == "__main__":
    sys.exit(main())
