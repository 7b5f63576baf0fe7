"""Single-layer dictionaries that were trained here as a set of others, under `data/dictionaries`."""

from __future__ import annotations

import json
from pathlib import Path

from mlsae_core import pipeline, publish, store
from mlsae_core.architecture import model_config
from mlsae_core.spec import Experiment, RunSpec, SpecError, flat, shown


def make(experiment: Experiment, name: str, force: bool = False) -> Path:
    """Write the dictionaries of an experiment in Gemma Scope's format, trained where they are not.

    Args:
        experiment: of runs at one layer each, that differ in their layer alone.
        name: under ``data/dictionaries``, by which a spec's `dictionary` finds them.
        force: write although it is there; only what was made here is replaced.

    Returns:
        The folder: ``layer_N/params.npz``, and ``training.json``, which says what each is of.

    Raises:
        SpecError: a name that is a path, other runs, a set of that name, or dictionaries that the
            format has no room for.
    """
    if Path(name).name != name or not name.isprintable() or name.strip(" .") != name or not name:
        raise SpecError(
            f"name: expected one without a path, as `neox-6l-128d-scope`, got {shown(name)}"
        )
    folder = store.DATA / "dictionaries" / name
    store.settle(folder)
    store.check_own(folder, store.DICTIONARY_MARK)
    if (folder / store.DICTIONARY_MARK).is_file() and not force:
        raise SpecError(f"name: {folder} is there; replace it with --force, or name another")
    runs = _by_layer(experiment)
    session, saes, trained = pipeline.Session(), {}, {}
    for layer, run in runs.items():
        made = session.with_weights(run, session.train(run))
        names = ("tokens", "seconds", "commit", "written")
        trained[layer] = {"train": made.key} | {name: made.meta[name] for name in names}
        if found := made.meta["parents"].get(store.DIFFERS):
            trained[layer][store.DIFFERS] = found
        saes[layer] = session.sae(run)
    facts = {"spec": flat(next(iter(runs.values()))) | {"layers": list(runs)}, "layers": trained}
    with store.atomic_folder(folder, mark=store.DICTIONARY_MARK) as new:
        publish.write_gemma_scope(saes, new)
        text = json.dumps(facts | store.provenance(), indent=1) + "\n"
        (new / store.DICTIONARY_MARK).write_text(text, encoding="utf-8")
    return folder


def _by_layer(experiment: Experiment) -> dict[int, RunSpec]:
    """The run of each layer."""
    found: dict[int, RunSpec] = {}
    for _, run in experiment.runs:
        layers = run.site.indices(model_config(run.model).num_hidden_layers)
        if not isinstance(run, RunSpec) or len(layers) != 1 or layers[0] in found:
            raise SpecError(
                "experiment: expected trainings at one layer each, and one of each layer, got "
                f"layers {', '.join(map(str, layers))}"
            )
        publish.check_gemma_scope(run.sae.activation, run.sae.standardize)
        found[layers[0]] = run
    others = {json.dumps(flat(run) | {"layers": None}) for run in found.values()}
    if len(others) != 1:
        raise SpecError("experiment: expected trainings that differ in their layer alone")
    return found
