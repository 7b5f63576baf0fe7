"""The book's own stages: what its chapters measure of a run, each result computed once.

What measures a stage takes the folder to fill and a `pipeline.Subject`. Modules that need torch are
imported where something is computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlsae_book import corpus  # noqa: F401 (so that its text is known)
from mlsae_core import architecture, models, pipeline, store
from mlsae_core.keys import keyed, later, run_settings
from mlsae_core.pipeline import Keyed, Session, Stage, Subject
from mlsae_core.spec import EvaluateSpec, RunSpec, SpecError, SubjectSpec, flat, to_dict
from mlsae_core.store import Artefact

if TYPE_CHECKING:
    from mlsae_book.tables.transfer import Target
    from mlsae_core.activations import TextSource

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


def transfer_key(
    run: SubjectSpec, settings: EvaluateSpec, target: Target, stage: str = "transfer"
) -> Keyed:
    """Key, spec and parents of a transfer to another model: of its content, and of its text's."""
    fields, parents = pipeline.measured(run)
    parents |= {
        "model": models.key(target.model.path, target.model.revision),
        "data": pipeline.text_key(target.data),
    }
    own = {**fields, **keyed(settings), "target": target.settings()}
    spec = {"run": flat(run), stage: to_dict(settings), "target": to_dict(target)}
    return store.key(stage, own, parents), spec, parents


def prompts_key(run: SubjectSpec) -> Keyed:
    """Key, spec and parents of the single prompts: of the run and of `PROMPTS`."""
    own, parents = pipeline.measured(run)
    return store.key("prompts", own | {"prompts": PROMPTS}, parents), {"run": flat(run)}, parents


def predictions_key(run: SubjectSpec) -> Keyed:
    """Key, spec and parents of what a model says after each of `PROMPTS`: of the model alone."""
    parents = {"model": models.key(run.model.path, run.model.revision)}
    own = keyed(run.model) | {"prompts": PROMPTS}
    own.pop("path")
    own.pop("revision", None)
    return store.key("predictions", own, parents), {"run": flat(run)}, parents


def transfer(
    session: Session, run: SubjectSpec, settings: EvaluateSpec, target: Target
) -> Artefact:
    """The dictionary at every layer of another model of the same width: `transfer.csv`.

    target: the other model and what it reads.
    """
    return session.make(
        "transfer",
        run,
        settings,
        measure=partial(
            _transfer, target=target, own=partial(_own, session, run, settings, target)
        ),
        key=partial(transfer_key, target=target),
        read=target.read(run),
        any_batch=target.text == "given",
    )


def elsewhere(
    session: Session, stage: str, run: SubjectSpec, settings: EvaluateSpec, target: Target
) -> Artefact:
    """A stage of the run's dictionary on what the target reads, with all that the stage measures.

    Raises:
        SpecError: a target that changes what is read by more than its choice of text and tokens.
    """
    if target.text != "given" or target.rescaled:
        raise SpecError(f"target.text: expected given, not rescaled, for the stage {stage}")
    key = partial(transfer_key, target=target, stage=stage)
    return session.make(stage, run, settings, key=key, read=target.read(run))


def _own(session: Session, run: SubjectSpec, settings: EvaluateSpec, target: Target) -> TextSource:
    """The activations of the run's own model on the target's text."""
    return session.source(replace(run, data=target.data), settings)


def _transfer(
    folder: Path,
    subject: Subject,
    target: Target | None = None,
    own: Callable[[], TextSource] | None = None,
    match: bool = False,
) -> dict:
    """The dictionary at every layer of a model: `transfer.csv`."""
    from mlsae_book.tables import transfer

    source, start, sae = subject.source, 0, subject.sae
    if match:
        sae = transfer.matched(source, sae, subject.size)
    if target and own and target.rescaled:
        norms = [transfer.mean_norms(read, subject.size) for read in (own(), source)]
        sae = transfer.rescaled(sae, norms[0] / norms[1])
    if target:
        source, start = target.source(source), target.start
    table = transfer.across_layers(
        source,
        sae,
        subject.size,
        ablations=subject.settings.ablations,
        start=start,
        checkpoint=subject.checkpoint,
    )
    table.to_csv(folder / "transfer.csv", index=False, float_format="%.8g")
    return {"tokens": int(table.tokens.iloc[0])}


def _everywhere(folder: Path, subject: Subject, match: bool = False) -> dict:
    """Distributions over all layers of the model, wherever the dictionary was trained."""
    from mlsae_book.tables import transfer

    source, sae = subject.source, subject.sae
    if match:
        sae = transfer.matched(source, sae, subject.size)
    subject = replace(subject, source=transfer.everywhere(source), sae=sae)
    return pipeline.STAGES["distributions"].measure(folder, subject)


def _transfer_parts() -> dict:
    from mlsae_book.tables.transfer import Target

    return {"target": Target}


def _geometry(folder: Path, subject: Subject) -> dict:
    """How similar decoder rows are: `mmcs.csv` and `cosines.csv`; reads no text."""
    from mlsae_book.tables import geometry

    run = subject.run
    layers = run.site.indices(architecture.model_config(run.model).num_hidden_layers)
    summary, cosines = geometry.geometry(
        subject.sae.decoder.detach(), len(layers), checkpoint=subject.checkpoint
    )
    summary.to_csv(folder / "mmcs.csv", index=False, float_format="%.8g")
    cosines.to_csv(folder / "cosines.csv", index=False, float_format="%.8g")
    return {}


def _drift(folder: Path, subject: Subject) -> dict:
    """Norms and similarities of the layers' vectors: `layers.csv` and `pairs.csv`.

    Needs no trained dictionary: of the run, only the model, the text and the site count.
    """
    from mlsae_book.tables import drift

    layers, pairs = drift.drift(subject.source, subject.size, checkpoint=subject.checkpoint)
    layers.to_csv(folder / "layers.csv", index=False, float_format="%.8g")
    pairs.to_csv(folder / "pairs.csv", index=False, float_format="%.8g")
    return {"tokens": int(layers.tokens.iloc[0])}


def _prompts(folder: Path, subject: Subject) -> dict:
    """Latents over layers for each of `PROMPTS` alone: `prompts.csv` and `spread.csv`."""
    from mlsae_book.tables import layers

    inputs = subject.source, subject.sae, PROMPTS
    table, spread = layers.prompt_distributions(*inputs), layers.prompt_spread(*inputs)
    table.to_csv(folder / "prompts.csv", index=False, float_format="%.4g")
    spread.to_csv(folder / "spread.csv", index=False, float_format="%.6g")
    return {}


def _predictions(folder: Path, subject: Subject) -> dict:
    """The next tokens that the model finds likely after each of `PROMPTS`: `predictions.csv`."""
    from mlsae_book.tables import predictions

    table = predictions.next_tokens(subject.source.lm, PROMPTS)
    table.to_csv(folder / "predictions.csv", index=False, float_format="%.4g")
    return {}


def _examples(folder: Path, subject: Subject) -> dict:
    """Top activating examples of every latent and layer: `examples.safetensors`."""
    from mlsae_book.tables import examples

    arrays = examples.examples(
        subject.source, subject.sae, subject.size, checkpoint=subject.checkpoint
    )
    examples.save(arrays, folder / "examples.safetensors")
    return {"tokens": subject.source.n_sequences * subject.run.data.context_length}


def _cards(folder: Path, subject: Subject) -> dict:
    """What is known of each latent, for the explorer: `cards.safetensors`."""
    from mlsae_book.tables import cards

    arrays = cards.cards(subject.source, subject.sae, subject.size)
    cards.save(arrays, folder / "cards.safetensors")
    return {"tokens": subject.source.n_sequences * subject.run.data.context_length}


def _importance(folder: Path, subject: Subject) -> dict:
    """Uniformity of active latent importance beside its null models: `importance.csv`."""
    from mlsae_book.tables import importance

    table = importance.importance(
        subject.source, subject.sae, subject.size, checkpoint=subject.checkpoint
    )
    table.to_csv(folder / "importance.csv", index=False, float_format="%.8g")
    return {"tokens": int(table.vectors.iloc[0])}


def _duplicates(folder: Path, subject: Subject) -> dict:
    """Every latent's most similar other latent, and whether it takes over: `duplicates.csv`."""
    from mlsae_book.tables import latents

    table = latents.duplicates(
        subject.source, subject.sae, subject.size, checkpoint=subject.checkpoint
    )
    table.to_csv(folder / "duplicates.csv", index=False, float_format="%.6g")
    return {"tokens": int(table.tokens.iloc[0])}


def _persistence(folder: Path, subject: Subject) -> dict:
    """At how many layers a latent is active at a token, and survives: a table each."""
    from mlsae_book.tables import carried

    tables = carried.persistence(subject.source, subject.sae, subject.size)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    return {"tokens": subject.source.n_sequences * subject.run.data.context_length}


def _margins(folder: Path, subject: Subject) -> dict:
    """Selections beside sums, and latents that blocks treat: a table each."""
    from mlsae_book.tables import margins

    tables = margins.margins(subject.source, subject.sae, subject.size)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    return {"tokens": subject.source.n_sequences * subject.run.data.context_length}


def _effects(folder: Path, subject: Subject) -> dict:
    """What becomes of a latent that is taken out: `effects.csv`."""
    from mlsae_book.tables import carried

    source, sae, size = subject.source, subject.sae, subject.size
    samples = carried.text_samples(source, size)
    table = carried.effects(samples, sae, carried.mean_layers(source, sae, size))
    table.to_csv(folder / "effects.csv", index=False, float_format="%.6g")
    return {"tokens": source.n_sequences * subject.run.data.context_length}


def of_layers_key(stage: str, runs: Sequence[SubjectSpec]) -> Callable[..., Keyed]:
    """Key, spec and parents of what is measured of several runs' dictionaries together."""

    def key(run: SubjectSpec, settings: EvaluateSpec) -> Keyed:
        own, parents = keyed(settings), {}
        for number, one in enumerate(runs):
            fields, needed = pipeline.measured(one)
            own |= {f"{name} {number}": value for name, value in fields.items()}
            parents |= {f"{name} {number}": value for name, value in needed.items()}
        spec = {"run": flat(run), "runs": [flat(one) for one in runs], stage: to_dict(settings)}
        return store.key(stage, own, parents), spec, parents

    return key


def together(session: Session, runs: Sequence[SubjectSpec], settings: EvaluateSpec) -> Artefact:
    """Several layers reconstructed at once: `together.csv`.

    runs: of the MLSAE, or of a dictionary for each layer.
    """
    key = of_layers_key("together", runs)
    measure = partial(_together, session=session, runs=runs)
    changes = {"measure": measure, "key": key, "others": tuple(runs)}
    return session.make("together", runs[0], settings, **changes)


def _together(
    folder: Path, subject: Subject, session: Session, runs: Sequence[SubjectSpec]
) -> dict:
    from mlsae_book.tables.together import together

    source = subject.source
    saes, means = [session.sae(run) for run in runs], None
    if len(saes) == 1:  # of an MLSAE; means are the same beside any dictionary
        saes, means = saes * source.n_layers, 8192
    whole = replace(source, site=replace(source.site, layers="all"))
    table = together(whole, saes, subject.size, mean_tokens=means)
    table.to_csv(folder / "together.csv", index=False, float_format="%.6g")
    return {"tokens": source.n_sequences * subject.run.data.context_length}


def lifetimes(
    session: Session,
    shared: SubjectSpec,
    runs: Sequence[SubjectSpec],
    others: dict[int, SubjectSpec],
    settings: EvaluateSpec,
) -> Artefact:
    """Chains of latents of single layers: `matches.csv` and `chains.csv`.

    shared: of the MLSAE. runs: of a dictionary for each layer. others: of some layers, of another
    seed.
    """
    every = [shared, *runs, *others.values()]
    measure = partial(_lifetimes, session=session, runs=runs, others=others)
    changes = {"measure": measure, "key": of_layers_key("lifetimes", every)}
    return session.make("lifetimes", shared, settings, **changes, others=tuple(every))


def _lifetimes(
    folder: Path,
    subject: Subject,
    session: Session,
    runs: Sequence[SubjectSpec],
    others: dict[int, SubjectSpec],
) -> dict:
    from mlsae_book.tables.lifetimes import lifetimes

    saes = [session.sae(run) for run in runs]
    again = {layer: session.sae(run) for layer, run in others.items()}
    tables = lifetimes(subject.source, saes, again, subject.sae, subject.size)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    return {"tokens": subject.source.n_sequences * subject.run.data.context_length}


def overlap(session: Session, run: SubjectSpec, settings: EvaluateSpec) -> Artefact:
    """Test text that stands in the training text: `shares.csv`, and apart from it `apart.csv`."""
    return session.make("overlap", run, settings, measure=partial(_overlap, session=session))


def _overlap(folder: Path, subject: Subject, session: Session) -> dict:
    from mlsae_book.tables import overlap

    train, test = (session.blocks(subject.run, split).blocks for split in ("train", "test"))
    overlap.shares(train, test).to_csv(folder / "shares.csv", index=False, float_format="%.6g")
    flags = overlap.repeated(train, test[: subject.source.n_sequences], 32)
    table = overlap.apart(subject.source, subject.sae, flags, subject.size)
    table.to_csv(folder / "apart.csv", index=False, float_format="%.6g")
    return {"tokens": subject.source.n_sequences * subject.run.data.context_length}


def surrogate(session: Session, run: RunSpec, settings: EvaluateSpec, condition: str) -> Artefact:
    """A dictionary trained as the run's on something else, and measured: `surrogate.csv`.

    condition: one of `surrogates.CONDITIONS`.
    """

    def key(run: RunSpec, settings: EvaluateSpec) -> Keyed:
        parents = pipeline.input_parents(run)
        own = run_settings(run) | {"condition": condition} | keyed(settings)
        spec = {"run": flat(run), "condition": condition, "surrogate": to_dict(settings)}
        return store.key("surrogate", own, parents), spec, parents

    measure = partial(_surrogate, session=session, condition=condition)
    return session.make("surrogate", run, settings, measure=measure, key=key)


def _surrogate(folder: Path, subject: Subject, session: Session, condition: str) -> dict:
    from mlsae_book import surrogates

    run, source = subject.run, subject.source
    if condition == surrogates.REAL:  # its own dictionary is there, or wanted anyway
        table = surrogates.measured(source, session.sae(run))
    else:
        blocks = session.blocks(run, "train")
        table = surrogates.surrogate(condition, run, source, blocks, source.blocks)
    table.to_csv(folder / "surrogate.csv", index=False, float_format="%.6g")
    return {"tokens": run.train.tokens}


def crossed(session: Session, run: SubjectSpec, settings: EvaluateSpec, basis: str) -> Artefact:
    """Variances of a dictionary on vectors in a basis that it was not trained in, such as without
    the lens, as the code released with the MLSAE paper measures them: `variances.json`.

    basis: as of a site; a lens is aligned.
    """
    other = replace(run, site=replace(run.site, basis=basis, alignment="aligned"))

    def key(run: SubjectSpec, settings: EvaluateSpec) -> Keyed:
        own, parents = pipeline.measured(run)
        parents |= {"lens": pipeline.input_parents(other)["lens"]}
        spec = {"run": flat(run), "basis": basis, "crossed": to_dict(settings)}
        return store.key("crossed", own | keyed(settings), parents), spec, parents

    return session.make("crossed", run, settings, measure=partial(_crossed, other=other), key=key)


def _crossed(folder: Path, subject: Subject, other: SubjectSpec) -> dict:
    from mlsae_core.fits import load_lens

    source = subject.source
    source = replace(source, site=other.site, lens=load_lens(other, source.lm))
    measure = pipeline.STAGES["distributions"].measure
    found = measure(folder, replace(subject, source=source))
    (folder / "distributions.safetensors").unlink()  # the variances are all that is asked for
    return found


def _massive(folder: Path, subject: Subject) -> dict:
    """What massive activations do to the metrics, with and without them: `evaluation.csv`, measured
    at all tokens whatever the site excludes, `positions.csv` and `massive.csv`."""
    from mlsae_book.tables import positions

    kept = replace(subject.source, site=replace(subject.source.site, massive="kept"))
    table = pipeline.evaluation(replace(subject, source=kept))
    table.to_csv(folder / "evaluation.csv", index=False, float_format="%.8g")
    groups, massive = positions.by_position(subject.source, subject.sae, subject.size)
    groups.to_csv(folder / "positions.csv", index=False, float_format="%.4g")
    massive.to_csv(folder / "massive.csv", index=False, float_format="%.6g")
    return {"tokens": int(table.tokens.iloc[0])}


def _chosen(folder: Path, subject: Subject) -> dict:
    """Twenty latents from early to late layers, with their texts: `latents.json`."""
    from mlsae_book.tables import chosen

    found = chosen.chosen(subject.source, subject.sae, subject.size)
    found = json.loads(json.dumps(found), parse_float=lambda x: float(f"{float(x):.4g}"))
    content = json.dumps(found, indent=1, ensure_ascii=False)
    (folder / "latents.json").write_text(content + "\n", "utf-8")
    return {"tokens": found[0]["of"] if found else 0}


#: Stages that take more than one run and its settings: functions of this module, no `analyses`.
CALLED = ("together", "lifetimes", "surrogate", "overlap", "crossed")


def _called(stage: str) -> Callable[[Path, Subject], dict]:
    """What such a stage measures of a single run: nothing, in one line."""

    def measure(folder: Path, subject: Subject) -> dict:
        raise SpecError(
            f"{stage}: expected more than one run to measure; call mlsae_book.stages.{stage}"
        )

    return measure


_BY_LAYER = {"by_layer": True, "any_batch": True}
pipeline.register(
    Stage("drift", 1, _drift, ("text",), any_batch=True, key=drift_key),
    Stage("geometry", 1, _geometry, ("dictionary",)),
    Stage("transfer", 1, _transfer, parts=_transfer_parts, **_BY_LAYER),
    Stage("transfer_matched", 1, partial(_transfer, match=True), **_BY_LAYER),
    Stage("everywhere", 1, _everywhere, by_layer=True, shared=True),
    Stage("everywhere_matched", 1, partial(_everywhere, match=True), by_layer=True, shared=True),
    Stage("examples", 1, _examples, **_BY_LAYER),
    Stage("cards", 1, _cards, by_layer=True),
    Stage("persistence", 1, _persistence, by_layer=True),
    Stage("margins", 1, _margins, by_layer=True),
    Stage("effects", 1, _effects, by_layer=True),
    Stage("together", 1, _called("together")),
    Stage("lifetimes", 1, _called("lifetimes")),
    Stage("surrogate", 1, _called("surrogate"), ("text",)),
    Stage("overlap", 1, _called("overlap"), by_layer=True),
    Stage("crossed", 1, _called("crossed"), by_layer=True),
    Stage("importance", 2, _importance),
    Stage("duplicates", 1, _duplicates, **_BY_LAYER),
    Stage("massive", 1, _massive, **_BY_LAYER),
    Stage("predictions", 1, _predictions, ("model",), key=lambda run, _: predictions_key(run)),
    Stage("chosen", 1, _chosen, **_BY_LAYER),
    Stage(
        "prompts",
        1,
        _prompts,
        ("dictionary", "model"),
        by_layer=True,
        key=lambda run, _: prompts_key(run),
    ),
)
