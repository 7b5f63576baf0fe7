"""Name → stage: from specs to trained dictionaries and tables, each computed once.

Every stage is looked up in the shipped results, then in this machine's store, and only then
computed. `Session` keeps the language model and the new results of one process in memory. Modules
that need torch or transformers are imported where something is computed: looking up needs neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlsae_core import models, store, text
from mlsae_core.architecture import memory_of, model_config, reading
from mlsae_core.fits import EVALUATION_VECTORS, check, check_recipe, check_width, load_lens
from mlsae_core.keys import keyed, run_settings, stored, stored_run
from mlsae_core.spec import (
    DataSpec,
    EvaluateSpec,
    GivenSpec,
    ModelSpec,
    RunSpec,
    Spec,
    SpecError,
    SubjectSpec,
    canonical,
    flat,
    to_dict,
)
from mlsae_core.store import Artefact, Stopped, StoreError

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from mlsae_core.activations import TextSource
    from mlsae_core.kernels import Kernel
    from mlsae_core.lm import LanguageModel
    from mlsae_core.processes import Share
    from mlsae_core.sae import MLSAE
    from mlsae_core.singles import SingleLayers

Mode = Literal["cached", "force", "read-only"]
EVALUATION_BATCH_TOKENS = 2048
#: Tokens of which an evaluation takes the mean of a layer.
MEAN_TOKENS = 8192
#: Key, spec and parents of a result.
Keyed = tuple[str, dict, dict]


def _hash(value) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def run_key(run: RunSpec) -> Keyed:
    """Key, spec and parents of a run's training: content, never paths, so it holds anywhere."""
    parents = input_parents(run)
    if text.is_streamed(run.data):  # the order in which training reads it
        parents["lanes"] = str(text.LANES)
    return store.key("train", run_settings(run), parents), flat(run), parents


def input_parents(run: SubjectSpec) -> dict[str, str]:
    """Content of the language model, the text and the lens, which all of a run's results need."""
    basis = run.site.basis
    return {
        "model": models.key(run.model.path, run.model.revision),
        "data": text_key(run.data),
        "lens": "identity" if basis == "identity" else _lens_key(basis),
    }


def text_key(data: DataSpec) -> str:
    """Content of a text."""
    return _hash(text.data_key(data))


def _lens_key(basis: str) -> str:
    folder = store.lens_folder(basis)
    files = [file for name in ("config.json", "params.*") for file in sorted(folder.glob(name))]
    if not files:
        known = ", ".join(sorted(f.parent.name for f in store.DATA.glob("lenses/*/config.json")))
        raise SpecError(
            f"basis: expected `identity` or a tuned-lens folder (from {Path.cwd()}, if relative), "
            f"or the name of one under data/lenses ({known or 'none yet'}), got {basis}"
        )
    return _hash({file.name: store.source_hash(file) for file in files})


def measured(run: SubjectSpec) -> tuple[dict, dict[str, str]]:
    """Fields and parents by which whatever measures a run's dictionary depends on it.

    A training that was keyed stands for all that it depends on; weights that are given depend on
    nothing, so what they are measured on counts beside their content.
    """
    if isinstance(run, RunSpec):
        return {}, {"train": run_key(run)[0]}
    given = run.dictionary
    content = store.dictionary_key(given.path, given.revision, given.folders)
    return {"run": run_settings(run)}, {"dictionary": content} | input_parents(run)


def differs(*read: DataSpec | ModelSpec) -> dict[str, str]:
    """The parent of what reads texts and models of which any is other here than its key says."""
    lines: dict[str, None] = {}
    for one in read:
        found = models.differs(one.path) if isinstance(one, ModelSpec) else text.differs(one)
        lines |= dict.fromkeys(found)
    return {store.DIFFERS: "; ".join(lines)} if lines else {}


def here(stage: str, found: Keyed, *runs: SubjectSpec, anew: bool = False) -> Keyed:
    """Key, spec and parents under which a result is found or written on this machine.

    Its own, where text and model are what the key says. Where they differ, as by other releases of
    the packages whose docstrings are the text, what is shipped is still found; what is computed has
    a key of its own, so that nobody takes it for a result of the text, and none is shipped.

    runs: those whose models and texts are read, or whose dictionaries. anew: whether what is
    shipped does not count.
    """
    identity, spec, parents = found
    other = differs(*(run.data for run in runs), *(run.model for run in runs))
    if not other or (not anew and store.is_shipped(stage, identity)):
        return found
    parents, own = parents | other, {"in place of": identity}
    if stage != "train" and (weights := _shipped_weights(runs)):
        own["weights"] = weights  # and not those that were trained here before they were shipped
    return store.key(stage, own, parents), spec, parents


def _shipped_weights(runs: Sequence[SubjectSpec]) -> list[str]:
    """Keys of the runs' trainings that are shipped with their weights."""
    trained = [run_key(run)[0] for run in runs if isinstance(run, RunSpec)]
    file = "model.safetensors"
    return [key for key in trained if (store.SHIPPED / "train" / key / file).is_file()]


def analysis_key(stage: str, run: SubjectSpec, settings: EvaluateSpec | None = None) -> Keyed:
    """Key, spec and parents of an analysis of a dictionary.

    settings: none for stages that read no text of the run.
    """
    spec, (own, parents) = {"run": flat(run)}, measured(run)
    if settings is not None:
        own, spec[stage] = own | keyed(settings), to_dict(settings)
    return store.key(stage, own, parents), spec, parents


@dataclass
class Session:
    """Stages of one process: `mode` says what may be computed.

    mode: ``cached`` computes what is missing, ``force`` everything anew, ``read-only`` nothing.
    trackers: names of accelerate trackers to log training to. kernel: how training computes, see
    `mlsae_core.kernels`. compile: whether training runs the language model compiled. Neither is a
    part of a result's identity, since the numbers are the same up to rounding. checkpoint_seconds:
    how often training writes a checkpoint, where not as `train.train` has it. should_stop: as
    `train.train` has it, asked after every step.

    Under `accelerate launch` all processes train, and measure what is `Stage.shared`; the rest the
    main one measures, and it writes, while the others wait. Whatever can be refused is refused
    (SpecError) before text is tokenised or anything is computed.
    """

    mode: Mode = "cached"
    trackers: tuple[str, ...] = ()
    kernel: Kernel = "sparse"
    compile: bool = False
    checkpoint_seconds: float | None = None
    should_stop: Callable[[int], bool] = lambda step: False

    def __post_init__(self):
        store.provenance()  # of the code that computes, not of what is there when it ends
        self._models: dict[tuple[ModelSpec, str], LanguageModel] = {}  # with their content
        self._given: dict[tuple, MLSAE | SingleLayers] = {}  # by content and layers
        self._made: dict[tuple[str, str], Artefact] = {}
        if self.trackers:
            from mlsae_core import train

            train.check_trackers(self.trackers)

    @cached_property
    def device(self) -> torch.device:
        """Where language models and dictionaries live: accelerate's device."""
        from mlsae_core import train

        return train.process_state().device

    def lm(self, spec: ModelSpec) -> LanguageModel:
        """The language model of a spec, loaded once."""
        from mlsae_core.lm import LanguageModel

        wanted = spec, models.key(spec.path, spec.revision)
        if wanted not in self._models:
            self._models = {wanted: LanguageModel.load(spec, self.device)}  # one: they are large
        return self._models[wanted]

    def blocks(self, run: SubjectSpec, split: str) -> text.TokenBlocks | text.StreamedBlocks:
        """The packed text of a run's split; the main process tokenises for all."""
        tokenizer = self.lm(run.model).tokenizer
        if not is_main_process():
            _wait()
        found = text.blocks(run.data, tokenizer, split)
        if is_main_process():
            _wait()
        return found

    # --- stages -------------------------------------------------------------------------------

    def make(
        self, stage: str, run: SubjectSpec, settings: EvaluateSpec | None = None, **changes
    ) -> Artefact:
        """The result of a run at the stage of that name, found or computed.

        changes: fields of `Stage` that are others for this result.
        """
        if stage == "train":
            return self.train(run)
        this = replace(STAGES[stage], **changes)
        settings = settings if "text" in this.needs else None
        if this.by_layer:
            run.site.refuse_stacked(f"the stage {stage}")
        source, size, read = None, 1, this.read or run
        runs = run, read, *this.others
        identity, spec, parents = self._here(stage, this.key(run, settings), *runs)
        if found := self.find(stage, identity, spec):
            return found
        if not {"text", "model"} & set(this.needs):
            check(run)
        else:
            source = self.source(read, settings)
            tokens = batch_tokens(source.lm) if this.any_batch else EVALUATION_BATCH_TOKENS
            size = max(tokens // read.data.context_length, 1)
        sae = self.sae(run) if "dictionary" in this.needs else None
        foreign = isinstance(run, GivenSpec) and read is run and is_main_process()
        foreign = foreign and {"dictionary", "text"} <= set(this.needs)
        share = _share(this.shared)
        checkpoint = checkpoint_path(identity, share)
        if self.mode == "force":
            for left in checkpoint.parent.glob(f"{checkpoint.stem}*.pt"):
                left.unlink(missing_ok=True)

        def fill(folder: Path) -> dict:
            from mlsae_core.activations import ActivationError

            try:
                if foreign:
                    check_recipe(sae, run, source.layers, next(iter(source.batches(size))))
                subject = Subject(run, settings, source, size, sae, share, checkpoint)
                return this.measure(folder, subject)
            except ActivationError as error:
                raise Stopped(f"{stage}: {error}") from error

        made = self.write(stage, identity, spec, parents, fill, this.shared)
        for left in checkpoints(identity):  # of other numbers of processes among them
            left.unlink(missing_ok=True)
        return made

    def train(self, run: RunSpec) -> Artefact:
        """The trained dictionary: `model.safetensors`, `config.json` and `log.csv`."""
        if not isinstance(run, RunSpec):
            raise SpecError(
                "dictionary: expected `expansion_factor`, `k` and `tokens` to train one, got the "
                f"weights of {run.dictionary.path}; they can be measured: `evaluate`"
            )
        identity, spec, parents = self._here("train", run_key(run), run)
        if found := self.find("train", identity, spec):
            return found
        from safetensors import SafetensorError

        from mlsae_core import kernels, train

        accelerator = train.make_accelerator(run, self.trackers, project_dir=store.STORE)
        kernels.check(self.kernel, accelerator.device)
        source = self.source(run)
        if self.compile:
            source = _compiled(source, run)
        source = replace(source, blocks=self.blocks(run, "train"))
        if is_main_process():
            counted = text.counted(run.data, source.lm.tokenizer)
            for said in text.remarks(run.data, counted, run.train.tokens) if counted else ():
                print(f"warning: {said}", file=sys.stderr)
        if self.trackers:
            accelerator.init_trackers("mlsae", config={"spec": canonical(spec)})
        checkpoint = checkpoint_path(identity)
        if self.mode == "force" and is_main_process():
            checkpoint.unlink(missing_ok=True)
        _wait()
        every = self.checkpoint_seconds
        often = {} if every is None else {"checkpoint_seconds": every}
        trained = train.train(
            run,
            source,
            accelerator=accelerator,
            checkpoint=checkpoint,
            should_stop=self.should_stop,
            description=f"training {identity}",
            kernel=self.kernel,
            **often,
        )
        for tracker in accelerator.trackers:
            tracker.finish()

        def fill(folder: Path) -> dict:
            trained.sae.save_pretrained(folder)
            trained.log.to_csv(folder / "log.csv", index=False, float_format="%.6g")
            last, seconds = trained.log.iloc[-1], round(trained.seconds, 1)
            speed = int(last.tokens_per_second)
            return {"tokens": int(last.tokens), "seconds": seconds, "tokens_per_second": speed}

        try:
            made = self.write("train", identity, spec, parents, fill)
        except (OSError, SafetensorError) as error:  # as of a full disk
            left = train.kept(checkpoint)
            raise Stopped(f"train {identity} cannot be written: {error}; {left}") from error
        checkpoint.unlink(missing_ok=True)
        return made

    def evaluate(self, run: SubjectSpec, settings: EvaluateSpec) -> Artefact:
        """Reconstruction and downstream loss per layer: `evaluation.csv`."""
        return self.make("evaluate", run, settings)

    def distributions(self, run: SubjectSpec, settings: EvaluateSpec) -> Artefact:
        """Distributions over layers: `distributions.safetensors` and `variances.json`."""
        return self.make("distributions", run, settings)

    def sae(self, run: SubjectSpec) -> MLSAE | SingleLayers:
        """The dictionary of a run as a module; `force` does not reach back to its training."""
        from mlsae_core import singles
        from mlsae_core.sae import MLSAE

        if isinstance(run, GivenSpec):
            given = run.dictionary.path, run.dictionary.revision, run.dictionary.folders
            layers = run.site.indices(model_config(run.model).num_hidden_layers)
            wanted = store.dictionary_key(*given), tuple(layers)
            if wanted not in self._given:
                with reading(f"dictionary.path: {run.dictionary.path} could not be loaded"):
                    folder = store.dictionary_folder(*given)
                    loaded = singles.load(folder, layers, run.dictionary.folders)
                    loaded = loaded.to(self.device).eval()
                self._given = {wanted: loaded}  # one at a time, as of models
            return self._given[wanted]
        identity = self._here("train", run_key(run), run)[0]
        trained = self._made.get(("train", identity))
        if trained is None:
            trained = Session("read-only" if self.mode == "read-only" else "cached").train(run)
        trained = self.with_weights(run, trained)
        return MLSAE.from_pretrained(trained.path).to(self.device).eval()

    def with_weights(self, run: RunSpec, trained: Artefact) -> Artefact:
        """A trained dictionary; one shipped as its log alone: this machine's, or trained anew."""
        if "model.safetensors" in trained.meta["files"]:
            return trained
        own = store.STORE / "train" / here("train", run_key(run), run, anew=True)[0]
        if (own / "meta.json").is_file():
            return store.read(own)
        if self.mode == "read-only":
            raise StoreError(
                f"train {trained.key}: its weights are not shipped; `python -m mlsae_core train "
                "SPEC.yml --force` trains them again"
            )
        return Session("force").train(run)

    # --- what stages are made of --------------------------------------------------------------

    def source(self, run: SubjectSpec, settings: EvaluateSpec | None = None) -> TextSource:
        """The activations of a run, after a look at whether model, lens and text fit each other.

        settings: which text is read; without them there is none yet.
        """
        from mlsae_core.activations import First, TextSource

        check(run)
        if isinstance(run, GivenSpec):
            check_width(self.sae(run), run)
        lm = self.lm(run.model)
        text.check_tokenizer(lm.tokenizer, lm.vocab_size)
        source = TextSource(lm, None, run.site, load_lens(run, lm))
        lm.capture(lm.special_ids.new_zeros(1, 2), source.layers, source.points)
        if settings is None:
            return source
        sequences = max(settings.tokens // run.data.context_length, 1)
        return replace(source, blocks=First(self.blocks(run, settings.split), sequences))

    def _here(self, stage: str, found: Keyed, *runs: SubjectSpec) -> Keyed:
        return here(stage, found, *runs, anew=self.mode == "force")

    def find(self, stage: str, identity: str, spec: dict) -> Artefact | None:
        """What exists and may be used; all processes look before any of them computes."""
        _wait()
        found = self._made.get((stage, identity))
        if found is None and self.mode != "force":
            found = store.find(stage, identity)
            if found is not None and is_main_process():
                for left in {checkpoint_path(identity), *checkpoints(identity)}:
                    store.forget_checkpoint(left, found.path / "meta.json")
        _wait()
        if found is None and self.mode == "read-only":
            raise StoreError(_missing(stage, identity, spec))
        if found is None:
            store.check_own(store.STORE / stage / identity)
        return found

    def look_again(self, artefact: Artefact):
        """Look a result up when it is next asked for, since it now lies elsewhere."""
        self._made.pop((artefact.meta["stage"], artefact.key), None)

    def write(
        self, stage, identity, spec, parents, fill: Callable[[Path], dict], shared: bool = False
    ) -> Artefact:
        """The main process calls `fill` and writes the artefact; the others wait for it.

        shared: or call `fill` as well, for their part; what they write is thrown away.
        """
        if is_main_process():
            store.write(stage, identity, spec, parents, fill, replace=self.mode == "force")
        elif shared:
            with tempfile.TemporaryDirectory() as folder:
                fill(Path(folder))
        _wait()
        made = self._made[stage, identity] = store.read(store.STORE / stage / identity)
        return made


@dataclass(frozen=True)
class Subject:
    """What a stage measures.

    run, settings: what is asked for. source: the activations, read `size` sequences at a time.
    sae: the dictionary. None where the stage does not need it. share: this process' part of what
    is read, all of it where the stage is not shared. checkpoint: file for a measurement to continue
    from; it goes when the result is written.
    """

    run: SubjectSpec
    settings: EvaluateSpec | None
    source: TextSource | None
    size: int
    sae: MLSAE | None
    share: Share
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Stage:
    """A kind of result of a run.

    Args:
        name, version: as keys and folders have them; the version is raised when its numbers change.
        measure: called with (folder, subject), writes the files of the result and returns what is
            noted beside them, such as its tokens; nothing for ``train``.
        needs: of ``dictionary``, ``text`` (with its model; settings say how much) and ``model``.
        by_layer: whether it needs a vector of every layer, so that stacked sites are refused.
        any_batch: whether the result is the same to rounding however the text is cut into batches;
            others draw random numbers batch by batch, or hold a graph of what they read.
        shared: whether all processes of a launch measure, each its `Subject.share`; else the main
            one.
        key: of (run, settings).
        read: the run whose model and text are read, where it is not the one whose dictionary is
            measured.
        others: further runs whose dictionaries are measured.
        parts: gives the specs that stand in that of the artefact beside the run and the settings.
    """

    name: str
    version: int
    measure: Callable[[Path, Subject], dict] | None
    needs: tuple[str, ...] = ("dictionary", "text")
    by_layer: bool = False
    any_batch: bool = False
    shared: bool = False
    key: Callable[[SubjectSpec, EvaluateSpec | None], Keyed] | None = None
    read: SubjectSpec | None = None
    others: tuple[SubjectSpec, ...] = ()
    parts: Callable[[], dict[str, type[Spec]]] = dict

    def __post_init__(self):
        if self.key is None:
            object.__setattr__(self, "key", partial(analysis_key, self.name))


def evaluation(subject: Subject) -> pd.DataFrame:
    """`analysis.evaluate` as the settings of a subject ask for it."""
    from mlsae_core import analysis

    settings, context = subject.settings, subject.run.data.context_length
    return analysis.evaluate(
        subject.source,
        subject.sae,
        subject.size,
        ablations=settings.ablations,
        mean_tokens=MEAN_TOKENS,
        replaced=settings.replaced and max(settings.replaced // context, 1),
        checkpoint=subject.checkpoint,
        share=subject.share,
    )


def _evaluate(folder: Path, subject: Subject) -> dict:
    table = evaluation(subject)
    table.to_csv(folder / "evaluation.csv", index=False, float_format="%.8g")
    return {"tokens": int(table.tokens.iloc[0])}


def _distributions(folder: Path, subject: Subject) -> dict:
    from safetensors.torch import save_file

    from mlsae_core import analysis

    arrays, numbers = analysis.distributions(
        subject.source,
        subject.sae,
        subject.size,
        checkpoint=subject.checkpoint,
        share=subject.share,
    )
    save_file(arrays, folder / "distributions.safetensors")
    (folder / "variances.json").write_text(json.dumps(numbers, indent=1) + "\n")
    return {"tokens": numbers["tokens"]}


#: The stages by name, of this package and of others that build on it.
STAGES: dict[str, Stage] = {}


def register(*stages: Stage):
    """Make stages known to `Session.make` and to the store."""
    for stage in stages:
        STAGES[stage.name] = stage
        store.STAGES[stage.name] = stage.version


register(
    Stage("train", 1, None, key=lambda run, _: run_key(run)),
    Stage("evaluate", 1, _evaluate, any_batch=True, shared=True),
    Stage("distributions", 2, _distributions, by_layer=True, shared=True),
)


def _processes() -> int:
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return max(int(os.environ.get(name, 1)) for name in names)


def is_main_process() -> bool:
    """Whether this is the only process or the main one of an accelerate launch."""
    if _processes() == 1:
        return True
    from mlsae_core import train

    return train.process_state().is_main_process


def _wait():
    """Meet the other processes of an accelerate launch, if there are any."""
    if _processes() > 1:
        from mlsae_core import processes

        processes.meet()


def _share(shared: bool) -> Share:
    """The part of this process in what all of a launch measure, or the main one does alone."""
    from mlsae_core import processes

    if not shared or _processes() == 1:
        return processes.ALONE
    state = processes.process_state()
    return processes.Share(state.process_index, state.num_processes)


def batch_tokens(lm: LanguageModel) -> int:
    """Tokens of a batch where any will do: on a GPU as many as fit a quarter of it.

    The largest thing held is `analysis.evaluate`'s growing batch.
    """
    if lm.device.type != "cuda":
        return EVALUATION_BATCH_TOKENS
    each = 4 * EVALUATION_VECTORS * lm.n_layers * lm.d_model
    fit = max(memory_of(lm.device) // 4 // each, EVALUATION_BATCH_TOKENS)
    return min(1 << (fit.bit_length() - 1), 32 * EVALUATION_BATCH_TOKENS)


def checkpoint_path(identity: str, share: Share | None = None) -> Path:
    """Where a stage is kept before it is done; of each process that has a share, by itself."""
    part = f"-{share.index}-of-{share.count}" if share and share.count > 1 else ""
    return store.STORE / "checkpoints" / f"{identity}{part}.pt"


def checkpoints(identity: str) -> list[Path]:
    """Files from which a stage that was begun continues, with as many processes as then."""
    return sorted((store.STORE / "checkpoints").glob(f"{identity}*.pt"))


def _compiled(source: TextSource, run: RunSpec) -> TextSource:
    """The source with its model compiled for the micro-batches of a run."""
    context = run.data.context_length
    tokens = source.lm.special_ids.new_zeros(run.train.micro_batch_tokens // context, context)
    with reading(f"--compile: {run.model.path} could not be compiled"):
        lm = source.lm.compiled()
        lm.capture(tokens, source.layers, source.points)
    return replace(source, lm=lm)


def _leaves(spec: dict, prefix: str = "") -> dict:
    """Dotted names and values of a nested spec; the fields of its run without `run.`."""
    found = {}
    for name, value in spec.items():
        if isinstance(value, dict):
            found |= _leaves(value, "" if name == "run" else f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _as_today(spec: dict) -> dict:
    """The spec of an artefact of a run with the fields that specs have today."""
    if "run" not in spec:
        return flat(stored_run(spec))
    parts = dict(spec)
    today = {"run": flat(stored_run(parts.pop("run")))}
    return today | {name: to_dict(stored(_spec_of(name), part)) for name, part in parts.items()}


def _spec_of(part: str) -> type[Spec]:
    """What a part of an artefact's spec is: settings of a stage, or a part of its own."""
    if part in STAGES:
        return EvaluateSpec
    return next(own[part] for stage in STAGES.values() if part in (own := stage.parts()))


def _missing(stage: str, identity: str, spec: dict) -> str:
    """Which field differs from the nearest existing result, and what would compute this one."""
    wanted, hints = _leaves(spec), []
    for artefact in store.artefacts(stage):
        try:
            other = _leaves(_as_today(artefact.spec))
        except SpecError:
            continue  # of a kind that can no longer be made
        fields = [name for name in wanted if wanted[name] != other.get(name)]
        hints.append([f"{name} ({wanted[name]}, there {other.get(name)})" for name in fields])
    if not hints:
        hint = "nothing of this stage exists"
    elif nearest := min(hints, key=len):
        hint = f"the nearest existing one differs in {', '.join(nearest)}"
    else:
        hint = (
            "one with the same fields exists, but of other files of the model, the text, the "
            "lens or the dictionary, or of another version of this stage"
        )
    shown = ("train", "evaluate")  # what the command line computes by itself
    command = (
        f"mlsae_core {stage} SPEC.yml"
        if stage in shown
        else "mlsae_book materialise EXPERIMENT.yml"
    )
    return f"{stage} {identity} does not exist: {hint}; `python -m {command}` computes it"
