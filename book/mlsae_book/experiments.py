"""Name → experiment: every result of a declared experiment, as tables that chapters show.

Also the facts that chapters quote about their inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from mlsae_book import stages
from mlsae_core import models, pipeline, status, store, text
from mlsae_core.pipeline import Mode
from mlsae_core.spec import EvaluateSpec, Experiment, SpecError, SubjectSpec, load_experiment
from mlsae_core.status import provenance
from mlsae_core.store import Artefact

if TYPE_CHECKING:
    import torch

    from mlsae_book.tables.transfer import Target


class Materialised(NamedTuple):
    """The finished tables of an experiment, each with the swept fields as its first columns.

    log: training, one row per interval. evaluation: one row per run and layer. provenance: one row
    per artefact with key, tokens, seconds and commit. runs: (labels, run) as declared. artefacts:
    stage -> (labels, artefact) of every run that has it.
    """

    log: pd.DataFrame
    evaluation: pd.DataFrame
    provenance: pd.DataFrame
    runs: tuple[tuple[dict, SubjectSpec], ...]
    artefacts: dict[str, list[tuple[dict, Artefact]]]


def materialise(experiment: Experiment, mode: Mode = "cached", ship: bool = False) -> Materialised:
    """Find or compute every result of an experiment; `ship` copies them to the tracked ones.

    Weights that are shipped in half precision are those that are measured.

    Raises:
        StoreError: what is to be shipped would read other text than its keys say.
    """
    if ship:  # before hours of computing
        read = (part for _, run in experiment.runs for part in (run.data, run.model))
        store.check_read(experiment.title, pipeline.differs(*read))
    session = pipeline.Session(mode)
    everything = []
    for labels, run in experiment.runs:
        for stage in stages_of(experiment, run):
            artefact = session.make(stage, run, experiment.evaluate)
            everything.append((labels, artefact))
            if ship and pipeline.is_main_process():
                only = slim(experiment, stage)
                if stage == "train" and not only:  # another experiment may have shipped its log
                    artefact = session.with_weights(run, artefact)
                if stage == "train" and experiment.half and not only:
                    if "half" not in artefact.meta:
                        store.ship_half(artefact, rounding_costs(session, run))
                        session.look_again(artefact)
                else:
                    store.ship(artefact, only)
    made: dict[str, list[tuple[dict, Artefact]]] = {}
    for labels, artefact in everything:
        made.setdefault(artefact.meta["stage"], []).append((labels, artefact))
    return Materialised(
        log=tables(made.get("train", []), "log.csv"),
        evaluation=tables(made.get("evaluate", []), "evaluation.csv"),
        provenance=notes(everything),
        runs=experiment.runs,
        artefacts=made,
    )


def slim(experiment: Experiment, stage: str) -> tuple[str, ...] | None:
    """The files of a stage's results that are shipped, where these are not all."""
    if stage == "train" and not experiment.weights:
        return ("log.csv",)
    return ("variances.json",) if stage == "distributions" and not experiment.arrays else None


def rounding_costs(session: pipeline.Session, run: SubjectSpec, tokens: int = 2048) -> dict:
    """What a dictionary loses when its weights are rounded to half precision: means over layers of
    the global FVU and delta CE, as they were and rounded; the latter on one sequence."""
    import copy

    from mlsae_core import analysis

    settings = EvaluateSpec(tokens=tokens)
    source, sae = session.source(run, settings), session.sae(run)
    rounded = copy.deepcopy(sae)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.half().float()
    found: dict = {"tokens": tokens}
    for name, dictionary in (("", sae), ("_half", rounded)):
        table = analysis.evaluate(source, dictionary, ablations=False, replaced=1, progress=False)
        for column in ("fvu_global", "delta_ce"):
            found[column + name] = float(f"{table[column].mean():.8g}")
    return found


def measure(experiment: Experiment, stage: str, **labels) -> list[tuple[dict, Artefact]]:
    """One stage of every run of an experiment, for `tables`; nothing that it does not need.

    labels: further ones, after those of the experiment, such as what sets it apart from others.
    """
    session, made = pipeline.Session(), []
    for swept, run in experiment.runs:
        made.append((swept | labels, session.make(stage, run, experiment.evaluate)))
    return made


#: The book's sweeps: what a reader is to see → path from the book's folder.
SWEEPS = {
    "Sparsity k": "experiments/sparsity.yml",
    "Expansion factor R": "experiments/factors.yml",
    "Model": "experiments/models.yml",
    "Tuned lens": "experiments/lens.yml",
    "Random weights": "experiments/random.yml",
}
#: Two of them again, through the tuned lens.
LENS_SWEEPS = {
    "Sparsity k, tuned lens": "experiments/lens_sparsity.yml",
    "Expansion factor R, tuned lens": "experiments/lens_factors.yml",
}
#: Dictionaries of models that people use, which stand beside those of our own wherever models do:
#: name → path. What they differ in (R, k, text) is said there.
USED = {"SmolLM2-135M": "experiments/fetched/smollm2.yml"}


def used(stage: str, label: str = "model") -> list[tuple[dict, Artefact]]:
    """`measure` of every dictionary of `USED`, with its name in the place of its own labels."""
    return [
        ({label: name}, artefact)
        for name, path in USED.items()
        for _, artefact in measure(load_experiment(path), stage)
    ]


def swept(
    stage: str, experiments: dict[str, str] | None = None
) -> dict[str, list[tuple[dict, Artefact]]]:
    """`measure` for several experiments: name of the sweep → path becomes name → results.

    experiments: by default `SWEEPS`, and then `used` models stand among the models.
    """
    paths = SWEEPS if experiments is None else experiments
    made = {name: measure(load_experiment(path), stage) for name, path in paths.items()}
    return made if experiments is not None else made | {"Model": made["Model"] + used(stage)}


def by_case(experiment: Experiment) -> dict[str, SubjectSpec]:
    """The runs of an experiment that declares cases, by their names."""
    return {labels["case"]: run for labels, run in experiment.runs}


def budgets(experiment: Experiment) -> dict[str, list[SubjectSpec]]:
    """The dictionaries of `experiments/equal.yml`: one for all layers, or one for each."""
    runs = by_case(experiment)
    layers = range(sum("a sixth" in case for case in runs))
    return {
        "one for all layers": [runs["shared"]],
        "one for each, as many latents": [runs[f"layer {layer}"] for layer in layers],
        "one for each, a sixth of them": [runs[f"layer {layer}, a sixth"] for layer in layers],
    }


def together(
    sets: dict[str, list[SubjectSpec]], settings: EvaluateSpec, mode: Mode = "cached"
) -> list[tuple[dict, Artefact]]:
    """`stages.together` of several sets of dictionaries: (label, artefact) for :func:`tables`."""
    session = pipeline.Session(mode)
    return [
        ({"dictionary": name}, stages.together(session, runs, settings))
        for name, runs in sets.items()
    ]


def surrogates(
    experiment: Experiment, mode: Mode = "cached", ship: bool = False
) -> list[tuple[dict, Artefact]]:
    """`stages.surrogate` of every run of an experiment under each of `surrogates.CONDITIONS`.

    Returns:
        (labels, artefact) for :func:`tables`, the first label the condition; all of a run before
        the next one's.
    """
    from mlsae_book.surrogates import CONDITIONS

    session, made = pipeline.Session(mode), []
    for labels, run in experiment.runs:
        for condition in CONDITIONS:
            artefact = stages.surrogate(session, run, experiment.evaluate, condition)
            made.append(({"condition": condition, **labels}, artefact))
            if ship and pipeline.is_main_process():
                store.ship(artefact)
    return made


def crossed(
    experiment: Experiment,
    bases: dict[str, Sequence[str]],
    mode: Mode = "cached",
    ship: bool = False,
) -> pd.DataFrame:
    """`stages.crossed` of the runs of an experiment that declares cases.

    Args:
        bases: case → the bases in which its dictionary is read.

    Returns:
        One row per ``case``, ``basis`` (that is read) and ``ratio`` (Eq. 11, Eq. 12): ``value``,
        ``low``, ``high``, and of layers ``permuted``.
    """
    session, rows = pipeline.Session(mode), []
    for case, run in by_case(experiment).items():
        for basis in bases.get(case, ()):
            artefact = stages.crossed(session, run, experiment.evaluate, basis)
            if ship and pipeline.is_main_process():
                store.ship(artefact)
            numbers = json.loads(artefact.file("variances.json").read_text())
            for name, ratio in (("ratio_latent", "Eq. 11"), ("ratio_token", "Eq. 12")):
                found = {key: numbers[name][key] for key in ("value", "low", "high", "permuted")}
                rows.append({"case": case, "basis": basis, "ratio": ratio, **found})
    return pd.DataFrame(rows)


def stages_of(experiment: Experiment, run: SubjectSpec) -> list[str]:
    """The stages of one run of an experiment; an unknown one is refused."""
    found = status.stages(experiment, run)
    for name in found:
        if name not in pipeline.STAGES:
            known = ", ".join(pipeline.STAGES)
            raise SpecError(f"analyses: expected some of {known}, got {name}")
    return found


def transfers(
    run: SubjectSpec,
    settings: EvaluateSpec,
    targets: dict[str, Target],
    mode: Mode = "cached",
    ship: bool = False,
    stage: str = "transfer",
) -> list[tuple[dict, Artefact]]:
    """One dictionary measured in several models: (label, artefact) for :func:`tables`.

    stage: or another one, of other text or tokens (`stages.elsewhere`).
    """
    session, made = pipeline.Session(mode), []
    for name, target in targets.items():
        if stage == "transfer":
            artefact = stages.transfer(session, run, settings, target)
        else:
            artefact = stages.elsewhere(session, stage, run, settings, target)
        made.append(({"target": name}, artefact))
        if ship and pipeline.is_main_process():
            store.ship(artefact)
    return made


def transfers_of(
    runs: Sequence[tuple[dict, SubjectSpec]], settings: EvaluateSpec, targets: dict[str, Target]
) -> list[tuple[dict, Artefact]]:
    """`transfers` of several dictionaries, each with the labels of its run before the target's."""
    return [
        (labels | target, artefact)
        for labels, run in runs
        for target, artefact in transfers(run, settings, targets)
    ]


def tables(made: list[tuple[dict, Artefact]], file: str) -> pd.DataFrame:
    """One CSV file of several results as one table, the labels as its first columns."""
    return _stack((labels, pd.read_csv(artefact.file(file))) for labels, artefact in made)


def notes(made: list[tuple[dict, Artefact]]) -> pd.DataFrame:
    """How several results were made, one row each, the labels as its first columns."""
    return _stack((labels, pd.DataFrame([provenance(artefact)])) for labels, artefact in made)


def _stack(parts) -> pd.DataFrame:
    parts = [_labelled(table, labels) for labels, table in parts]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _labelled(table: pd.DataFrame, labels: dict) -> pd.DataFrame:
    fixed = {name: str(v) if isinstance(v, list | dict) else v for name, v in labels.items()}
    return table.assign(**fixed)[[*fixed, *[c for c in table.columns if c not in fixed]]]


def read_distributions(artefact: Artefact) -> tuple[dict[str, torch.Tensor], dict]:
    """Arrays of a `distributions` result, as `layers.derived` lists them, and its numbers."""
    from safetensors.torch import load_file

    from mlsae_book.tables import layers

    arrays = layers.derived(load_file(artefact.file("distributions.safetensors")))
    return arrays, json.loads(artefact.file("variances.json").read_text())


def all_distributions(
    results: Materialised, stage: str = "distributions"
) -> list[tuple[dict, dict, dict]]:
    """Labels, arrays and numbers of every `distributions` result, as `read_distributions` reads.

    stage: or ``everywhere``, whose results are of all layers of the model.
    """
    return read_all(results.artefacts.get(stage, []))


def swept_distributions(
    experiments: dict[str, str] | None = None,
) -> dict[str, list[tuple[dict, dict, dict]]]:
    """`all_distributions` of several experiments: name of the sweep → path, as for `swept`."""
    made = swept("distributions", experiments)
    return {name: read_all(results) for name, results in made.items()}


def read_all(made: list[tuple[dict, Artefact]]) -> list[tuple[dict, dict, dict]]:
    """Labels, arrays and numbers of some `distributions` results."""
    return [(labels, *read_distributions(artefact)) for labels, artefact in made]


# --- facts about the inputs -----------------------------------------------------------------------


def suite() -> pd.DataFrame:
    """The shipped language models, one row each: size, training tokens, loss, seconds, commit."""
    names = ("parameters", "training_tokens", "validation_loss", "bigram_loss", "unigram_loss")
    names += ("seconds", "seed", "commit")
    rows = []
    for model in models.shipped():
        facts = json.loads((store.MODELS / model / "training.json").read_text())
        rows.append({"model": model, **{name: facts[name] for name in names}})
    return pd.DataFrame(rows)


def model_logs() -> pd.DataFrame:
    """How the shipped models' losses fell: ``loss`` (nats per token) by model, tokens, split."""
    logs = []
    for model in models.shipped():
        log = pd.read_csv(store.MODELS / model / "log.csv")
        long = log.melt("tokens", ["train", "validation"], "split", "loss").dropna()
        logs.append(long.assign(model=model))
    return pd.concat(logs, ignore_index=True)


def corpus(session: pipeline.Session, run: SubjectSpec) -> pd.DataFrame:
    """Documents, characters and tokens of each split of a run's text."""
    meta = text.packed(run.data, session.lm(run.model).tokenizer).meta
    columns = ("documents", "characters", "tokens")
    return pd.DataFrame(
        [{"split": split, **{name: meta[name][split] for name in columns}} for split in text.SPLITS]
    )


def published(table: str) -> pd.DataFrame:
    """Numbers printed in a paper, from ``data/published``; `source` says where they stand."""
    return pd.read_csv(store.DATA / "published" / f"{table}.csv")
