"""The book's own stages: what its chapters measure of a run, each result computed once.

Every function takes a session, a run and the text to read, and finds or computes an artefact.
Modules that need torch are imported where something is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlsae_book import corpus  # noqa: F401 (so that its text is known)
from mlsae_core import fits, models, pipeline, store
from mlsae_core.keys import keyed, later, run_settings
from mlsae_core.pipeline import Batches, Keyed, Session, Stage
from mlsae_core.spec import EvaluateSpec, SpecError, SubjectSpec, flat, to_dict
from mlsae_core.store import Artefact

if TYPE_CHECKING:
    from mlsae_book.tables.transfer import Target

#: Of single-prompt heatmaps: the MLSAE paper's, and three of the sort of text our models know.
PROMPTS = (
    "When John and Mary went to the store, John gave",
    "Return the number of elements along the given axis.",
    "x : array_like, optional",
    "Raises ValueError if the input is empty.",
)


def drift_key(run: SubjectSpec, settings: EvaluateSpec) -> Keyed:
    """Key, spec and parents of the drift: of the model and the text, whatever was trained."""
    names = ("layers", "source", "alignment", "dtype", "random_weights", "context_length")
    fields, parents = run_settings(run), pipeline.input_parents(run)
    read = {"tokens": settings.tokens, "split": settings.split} | later(settings)
    own = {name: fields[name] for name in names}
    own |= later(run) | later(run.model) | later(run.site) | read
    return store.key("drift", own, parents), {"run": flat(run), "drift": read}, parents


def transfer_key(run: SubjectSpec, settings: EvaluateSpec, target: Target) -> Keyed:
    """Key, spec and parents of a transfer to another model: of its content, and of its text's."""
    fields, parents = pipeline.measured(run)
    parents |= {
        "model": models.key(target.model.path, target.model.revision),
        "data": pipeline.text_key(target.data),
    }
    own = {**fields, **keyed(settings), "target": target.settings()}
    spec = {"run": flat(run), "transfer": to_dict(settings), "target": to_dict(target)}
    return store.key("transfer", own, parents), spec, parents


def prompts_key(run: SubjectSpec) -> Keyed:
    """Key, spec and parents of the single prompts: of the run and of `PROMPTS`."""
    own, parents = pipeline.measured(run)
    return store.key("prompts", own | {"prompts": PROMPTS}, parents), {"run": flat(run)}, parents


def transfer(
    session: Session, run: SubjectSpec, settings: EvaluateSpec, target: Target | None = None
) -> Artefact:
    """The dictionary at every layer of its model, or of another one: `transfer.csv`.

    target: the other model and what it reads; a model of the same width.
    """
    if run.site.stacked:
        raise SpecError("stacked: expected false for transfer between layers, got true")

    def fill(folder: Path, lm, sae, lens, batches) -> int:
        from mlsae_book.tables import transfer

        start = target.start if target else 0
        batches = target.batches(lm, batches) if target else batches
        table = transfer.across_layers(
            lm, sae, lens, run.site, batches, ablations=settings.ablations, start=start
        )
        table.to_csv(folder / "transfer.csv", index=False, float_format="%.8g")
        return int(table.tokens.iloc[0])

    if target is None:
        return session.analysis("transfer", run, settings, fill, any_batch=True)
    return session.analysis(
        "transfer",
        run,
        settings,
        fill,
        key=transfer_key(run, settings, target),
        read=target.read(run),
        any_batch=target.text == "given",
    )


def _transfer_parts() -> dict:
    from mlsae_book.tables.transfer import Target

    return {"target": Target}


def geometry(session: Session, run: SubjectSpec, settings: EvaluateSpec | None = None) -> Artefact:
    """How similar decoder rows are: `mmcs.csv` and `cosines.csv`; reads no text."""
    identity, spec, parents = pipeline.analysis_key("geometry", run)
    if found := session.find("geometry", identity, spec):
        return found
    fits.check(run)
    sae = session.sae(run)

    def fill(folder: Path) -> dict:
        from mlsae_book.tables import geometry

        layers = run.site.indices(fits.model_config(run.model).num_hidden_layers)
        summary, cosines = geometry.geometry(sae.decoder.detach(), len(layers))
        summary.to_csv(folder / "mmcs.csv", index=False, float_format="%.8g")
        cosines.to_csv(folder / "cosines.csv", index=False, float_format="%.8g")
        return {}

    return session.write("geometry", identity, spec, parents, fill)


def drift(session: Session, run: SubjectSpec, settings: EvaluateSpec) -> Artefact:
    """Norms and similarities of the layers' vectors: `layers.csv` and `pairs.csv`.

    Needs no trained dictionary: of the run, only the model, the text and the site count.
    """
    identity, spec, parents = drift_key(run, settings)
    if found := session.find("drift", identity, spec):
        return found
    lm, lens = session.inputs(run)
    size = pipeline.batch_tokens(lm)
    batches = Batches(session.blocks(run, settings.split), run, settings, size)

    def fill(folder: Path) -> dict:
        from mlsae_book.tables import drift

        layers, pairs = drift.drift(lm, lens, run.site, batches)
        layers.to_csv(folder / "layers.csv", index=False, float_format="%.8g")
        pairs.to_csv(folder / "pairs.csv", index=False, float_format="%.8g")
        return {"tokens": int(layers.tokens.iloc[0])}

    return session.write("drift", identity, spec, parents, fill)


def prompts(session: Session, run: SubjectSpec, settings: EvaluateSpec | None = None) -> Artefact:
    """Latents over layers for each of `PROMPTS` alone: `prompts.csv` and `spread.csv`."""
    identity, spec, parents = prompts_key(run)
    if found := session.find("prompts", identity, spec):
        return found
    lm, lens = session.inputs(run)
    inputs = lm, session.sae(run), lens, run.site, PROMPTS

    def fill(folder: Path) -> dict:
        from mlsae_book.tables import layers

        table, spread = layers.prompt_distributions(*inputs), layers.prompt_spread(*inputs)
        table.to_csv(folder / "prompts.csv", index=False, float_format="%.4g")
        spread.to_csv(folder / "spread.csv", index=False, float_format="%.6g")
        return {}

    return session.write("prompts", identity, spec, parents, fill)


def examples(session: Session, run: SubjectSpec, settings: EvaluateSpec) -> Artefact:
    """Top activating examples of every latent and layer: `examples.safetensors`."""
    if run.site.stacked:
        raise SpecError("stacked: expected false for examples per layer, got true")

    def fill(folder: Path, lm, sae, lens, batches) -> int:
        from mlsae_book.tables import examples

        arrays = examples.examples(lm, sae, lens, run.site, batches)
        examples.save(arrays, folder / "examples.safetensors")
        return batches.sequences * run.data.context_length

    return session.analysis("examples", run, settings, fill, any_batch=True)


def importance(session: Session, run: SubjectSpec, settings: EvaluateSpec) -> Artefact:
    """Uniformity of active latent importance, of a part of the text: `importance.csv`."""

    def fill(folder: Path, lm, sae, lens, batches) -> int:
        from mlsae_book.tables import importance

        table = importance.importance(lm, sae, lens, run.site, batches)
        table.to_csv(folder / "importance.csv", index=False, float_format="%.8g")
        return int(table.vectors.iloc[0])

    return session.analysis("importance", run, settings, fill)


def duplicates(session: Session, run: SubjectSpec, settings: EvaluateSpec) -> Artefact:
    """Every latent's most similar other latent, and whether it takes over: `duplicates.csv`."""
    if run.site.stacked:
        raise SpecError("stacked: expected false for layers of a latent, got true")

    def fill(folder: Path, lm, sae, lens, batches) -> int:
        from mlsae_book.tables import latents

        table = latents.duplicates(lm, sae, lens, run.site, batches)
        table.to_csv(folder / "duplicates.csv", index=False, float_format="%.6g")
        return int(table.tokens.iloc[0])

    return session.analysis("duplicates", run, settings, fill, any_batch=True)


pipeline.register(
    Stage("drift", 1, drift),
    Stage("geometry", 1, geometry),
    Stage("transfer", 1, transfer, _transfer_parts),
    Stage("examples", 1, examples),
    Stage("importance", 1, importance),
    Stage("duplicates", 1, duplicates),
    Stage("prompts", 1, prompts),
)
