"""Name → stage: from specs to trained dictionaries and tables, each computed once.

Every stage is looked up in the shipped results, then in this machine's store, and only then
computed. `Session` keeps the language model and the new results of one process in memory. Modules
that need torch or transformers are imported where something is computed: looking up needs neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlsae_core import store, text
from mlsae_core.keys import keyed, later, run_settings, stored, stored_run
from mlsae_core.spec import EvaluateSpec, ModelSpec, RunSpec, SpecError, canonical, flat, to_dict
from mlsae_core.store import Artefact, Stopped, StoreError

if TYPE_CHECKING:
    import torch

    from mlsae_core.analysis.transfer import Target
    from mlsae_core.kernels import Kernel
    from mlsae_core.lens import Lens
    from mlsae_core.lm import LanguageModel
    from mlsae_core.sae import MLSAE

Mode = Literal["cached", "force", "read-only"]
EVALUATION_BATCH_TOKENS = 2048
#: Analyses whose result is the same to rounding however the text is cut into batches. The others
#: draw random numbers batch by batch, or hold a graph of what they read.
ANY_BATCH = ("evaluate", "transfer", "drift", "examples", "duplicates")
#: Of single-prompt heatmaps: the MLSAE paper's, and three of the sort of text our models know.
PROMPTS = (
    "When John and Mary went to the store, John gave",
    "Return the number of elements along the given axis.",
    "x : array_like, optional",
    "Raises ValueError if the input is empty.",
)


def _hash(value) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def run_key(run: RunSpec) -> tuple[str, dict, dict]:
    """Key, spec and parents of a run's training: content, never paths, so it holds anywhere."""
    parents = input_parents(run)
    return store.key("train", run_settings(run), parents), flat(run), parents


def input_parents(run: RunSpec) -> dict[str, str]:
    """Content of the language model, the text and the lens, which all of a run's results need."""
    basis = run.site.basis
    return {
        "model": store.model_key(run.model.path, run.model.revision),
        "data": _hash(text.data_key(run.data)),
        "lens": "identity" if basis == "identity" else _lens_key(basis),
    }


def drift_key(run: RunSpec, settings: EvaluateSpec) -> tuple[str, dict, dict]:
    """Key, spec and parents of the drift: of the model and the text, whatever was trained."""
    names = ("layers", "source", "alignment", "dtype", "random_weights", "context_length")
    fields, parents = run_settings(run), input_parents(run)
    read = {"tokens": settings.tokens, "split": settings.split} | later(settings)
    own = {name: fields[name] for name in names}
    own |= later(run) | later(run.model) | later(run.site) | read
    identity = store.key("drift", own, parents)
    return identity, {"run": flat(run), "drift": read}, parents


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


def analysis_key(
    stage: str, run: RunSpec, settings: EvaluateSpec | None = None, target: Target | None = None
) -> tuple[str, dict, dict]:
    """Key, spec and parents of an analysis of a trained run; target: of another model than its.

    settings: none for stages that read no text of the run.
    """
    spec, parents = {"run": flat(run)}, {"train": run_key(run)[0]}
    own = {"prompts": PROMPTS} if stage == "prompts" else {}
    if settings is not None:
        own, spec[stage] = keyed(settings), to_dict(settings)
    if target is not None:
        own, spec["target"] = {**own, "target": target.settings()}, to_dict(target)
        parents["model"] = store.model_key(target.model.path, target.model.revision)
        parents["data"] = _hash(text.data_key(target.data))
    return store.key(stage, own, parents), spec, parents


@dataclass
class Session:
    """Stages of one process: `mode` says what may be computed.

    mode: ``cached`` computes what is missing, ``force`` everything anew, ``read-only`` nothing.
    trackers: names of accelerate trackers to log training to. kernel: how training computes, see
    `mlsae_core.kernels`. compile: whether training runs the language model compiled. Neither is a
    part of a result's identity, since the numbers are the same up to rounding.

    Under `accelerate launch` all processes train; the main one measures and writes, the others
    wait. Whatever can be refused is refused (SpecError) before text is tokenised or anything is
    computed.
    """

    mode: Mode = "cached"
    trackers: tuple[str, ...] = ()
    kernel: Kernel = "sparse"
    compile: bool = False

    def __post_init__(self):
        store.provenance()  # of the code that computes, not of what is there when it ends
        self._models: dict[ModelSpec, LanguageModel] = {}
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

        if spec not in self._models:
            with _reading(f"model.path: {spec.path} could not be loaded"):
                loaded = LanguageModel.load(spec, self.device)
            self._models = {spec: loaded}  # one at a time: models are large
        return self._models[spec]

    def blocks(self, run: RunSpec, split: str) -> text.TokenBlocks | text.StreamedBlocks:
        """The packed text of a run's split; the main process tokenises for all."""
        from mlsae_core import train

        with train.process_state().main_process_first():
            return text.blocks(run.data, self.lm(run.model).tokenizer, split)

    # --- stages -------------------------------------------------------------------------------

    def train(self, run: RunSpec) -> Artefact:
        """The trained dictionary: `model.safetensors`, `config.json` and `log.csv`."""
        identity, spec, parents = run_key(run)
        if found := self._find("train", identity, spec):
            return found
        from mlsae_core import train

        accelerator = train.make_accelerator(run, self.trackers, project_dir=store.STORE)
        train.check_kernel(self.kernel, accelerator.device)
        lm, lens = self._inputs(run)
        if self.compile:
            lm = _compiled(lm, run)
        blocks = self.blocks(run, "train")
        if self.trackers:
            accelerator.init_trackers("mlsae", config={"spec": canonical(spec)})
        checkpoint = checkpoint_path(identity)
        if self.mode == "force" and is_main_process():
            checkpoint.unlink(missing_ok=True)
        _wait()
        trained = train.train(
            run,
            lm,
            blocks,
            lens,
            accelerator=accelerator,
            checkpoint=checkpoint,
            description=f"training {identity}",
            kernel=self.kernel,
        )
        for tracker in accelerator.trackers:
            tracker.finish()

        def fill(folder: Path) -> dict:
            trained.sae.save_pretrained(folder)
            trained.log.to_csv(folder / "log.csv", index=False, float_format="%.6g")
            last, seconds = trained.log.iloc[-1], round(trained.seconds, 1)
            speed = int(last.tokens_per_second)
            return {"tokens": int(last.tokens), "seconds": seconds, "tokens_per_second": speed}

        made = self._write("train", identity, spec, parents, fill)
        checkpoint.unlink(missing_ok=True)
        return made

    def evaluate(self, run: RunSpec, settings: EvaluateSpec) -> Artefact:
        """Reconstruction and downstream loss per layer: `evaluation.csv`."""

        def fill(folder: Path, lm, sae, lens, batches) -> int:
            from mlsae_core import analysis

            table = analysis.evaluate(
                lm, sae, lens, run.site, batches, ablations=settings.ablations
            )
            table.to_csv(folder / "evaluation.csv", index=False, float_format="%.8g")
            return int(table.tokens.iloc[0])

        return self._analysis("evaluate", run, settings, fill)

    def distributions(self, run: RunSpec, settings: EvaluateSpec) -> Artefact:
        """Distributions over layers: `distributions.safetensors` and `variances.json`."""
        if run.site.stacked:
            raise SpecError("stacked: expected false for distributions over layers, got true")

        def fill(folder: Path, lm, sae, lens, batches) -> int:
            from safetensors.torch import save_file

            from mlsae_core import analysis

            arrays, numbers = analysis.distributions(lm, sae, lens, run.site, batches)
            save_file(arrays, folder / "distributions.safetensors")
            (folder / "variances.json").write_text(json.dumps(numbers, indent=1) + "\n")
            return numbers["tokens"]

        return self._analysis("distributions", run, settings, fill)

    def transfer(
        self, run: RunSpec, settings: EvaluateSpec, target: Target | None = None
    ) -> Artefact:
        """The dictionary at every layer of its model, or of another one: `transfer.csv`.

        target: the other model and what it reads; a model of the same width.
        """
        if run.site.stacked:
            raise SpecError("stacked: expected false for transfer between layers, got true")

        def fill(folder: Path, lm, sae, lens, batches) -> int:
            from mlsae_core.analysis import transfer

            start = target.start if target else 0
            batches = target.batches(lm, batches) if target else batches
            table = transfer.across_layers(
                lm, sae, lens, run.site, batches, ablations=settings.ablations, start=start
            )
            table.to_csv(folder / "transfer.csv", index=False, float_format="%.8g")
            return int(table.tokens.iloc[0])

        return self._analysis("transfer", run, settings, fill, target)

    def geometry(self, run: RunSpec, settings: EvaluateSpec | None = None) -> Artefact:
        """How similar decoder rows are: `mmcs.csv` and `cosines.csv`; reads no text."""
        identity, spec, parents = analysis_key("geometry", run)
        if found := self._find("geometry", identity, spec):
            return found
        check(run)
        sae = self.sae(run)

        def fill(folder: Path) -> dict:
            from mlsae_core.analysis import geometry

            layers = run.site.indices(model_config(run.model).num_hidden_layers)
            summary, cosines = geometry.geometry(sae.decoder.detach(), len(layers))
            summary.to_csv(folder / "mmcs.csv", index=False, float_format="%.8g")
            cosines.to_csv(folder / "cosines.csv", index=False, float_format="%.8g")
            return {}

        return self._write("geometry", identity, spec, parents, fill)

    def drift(self, run: RunSpec, settings: EvaluateSpec) -> Artefact:
        """Norms and similarities of the layers' vectors: `layers.csv` and `pairs.csv`.

        Needs no trained dictionary: of the run, only the model, the text and the site count.
        """
        identity, spec, parents = drift_key(run, settings)
        if found := self._find("drift", identity, spec):
            return found
        lm, lens = self._inputs(run)
        batches = Batches(self.blocks(run, settings.split), run, settings, batch_tokens(lm))

        def fill(folder: Path) -> dict:
            from mlsae_core.analysis import drift

            layers, pairs = drift.drift(lm, lens, run.site, batches)
            layers.to_csv(folder / "layers.csv", index=False, float_format="%.8g")
            pairs.to_csv(folder / "pairs.csv", index=False, float_format="%.8g")
            return {"tokens": int(layers.tokens.iloc[0])}

        return self._write("drift", identity, spec, parents, fill)

    def prompts(self, run: RunSpec, settings: EvaluateSpec | None = None) -> Artefact:
        """Latents over layers for each of `PROMPTS` alone: `prompts.csv` and `spread.csv`."""
        identity, spec, parents = analysis_key("prompts", run)
        if found := self._find("prompts", identity, spec):
            return found
        lm, lens = self._inputs(run)
        inputs = lm, self.sae(run), lens, run.site, PROMPTS

        def fill(folder: Path) -> dict:
            from mlsae_core.analysis import layers

            table, spread = layers.prompt_distributions(*inputs), layers.prompt_spread(*inputs)
            table.to_csv(folder / "prompts.csv", index=False, float_format="%.4g")
            spread.to_csv(folder / "spread.csv", index=False, float_format="%.6g")
            return {}

        return self._write("prompts", identity, spec, parents, fill)

    def examples(self, run: RunSpec, settings: EvaluateSpec) -> Artefact:
        """Top activating examples of every latent and layer: `examples.safetensors`."""
        if run.site.stacked:
            raise SpecError("stacked: expected false for examples per layer, got true")

        def fill(folder: Path, lm, sae, lens, batches) -> int:
            from mlsae_core.analysis import examples

            arrays = examples.examples(lm, sae, lens, run.site, batches)
            examples.save(arrays, folder / "examples.safetensors")
            return batches.sequences * run.data.context_length

        return self._analysis("examples", run, settings, fill)

    def importance(self, run: RunSpec, settings: EvaluateSpec) -> Artefact:
        """Uniformity of active latent importance, of a part of the text: `importance.csv`."""

        def fill(folder: Path, lm, sae, lens, batches) -> int:
            from mlsae_core.analysis import importance

            table = importance.importance(lm, sae, lens, run.site, batches)
            table.to_csv(folder / "importance.csv", index=False, float_format="%.8g")
            return int(table.vectors.iloc[0])

        return self._analysis("importance", run, settings, fill)

    def duplicates(self, run: RunSpec, settings: EvaluateSpec) -> Artefact:
        """Every latent's most similar other latent, and whether it takes over: `duplicates.csv`."""
        if run.site.stacked:
            raise SpecError("stacked: expected false for layers of a latent, got true")

        def fill(folder: Path, lm, sae, lens, batches) -> int:
            from mlsae_core.analysis import latents

            table = latents.duplicates(lm, sae, lens, run.site, batches)
            table.to_csv(folder / "duplicates.csv", index=False, float_format="%.6g")
            return int(table.tokens.iloc[0])

        return self._analysis("duplicates", run, settings, fill)

    def sae(self, run: RunSpec) -> MLSAE:
        """The trained dictionary of a run as a module; `force` does not reach back to it."""
        from mlsae_core.sae import MLSAE

        identity = run_key(run)[0]
        trained = self._made.get(("train", identity))
        if trained is None:
            trained = Session("read-only" if self.mode == "read-only" else "cached").train(run)
        trained = self.with_weights(run, trained)
        return MLSAE.from_pretrained(trained.path).to(self.device).eval()

    def with_weights(self, run: RunSpec, trained: Artefact) -> Artefact:
        """A trained dictionary; one shipped as its log alone: this machine's, or trained anew."""
        if "model.safetensors" in trained.meta["files"]:
            return trained
        if (store.STORE / "train" / trained.key / "meta.json").is_file():
            return store.read(store.STORE / "train" / trained.key)
        if self.mode == "read-only":
            raise StoreError(
                f"train {trained.key}: its weights are not shipped; `python -m mlsae_core train "
                "SPEC.yml --force` trains them again"
            )
        return Session("force").train(run)

    def _analysis(
        self, stage: str, run: RunSpec, settings: EvaluateSpec, measure, target=None
    ) -> Artefact:
        """`measure(folder, lm, sae, lens, batches)` writes its files and returns the tokens."""
        identity, spec, parents = analysis_key(stage, run, settings, target)
        if found := self._find(stage, identity, spec):
            return found
        from mlsae_core.activations import ActivationError

        read = target.read(run) if target else run
        lm, lens = self._inputs(read)
        samples = target is not None and target.text == "rollouts"
        size = batch_tokens(lm) if stage in ANY_BATCH and not samples else EVALUATION_BATCH_TOKENS
        batches = Batches(self.blocks(read, settings.split), read, settings, size)
        sae = self.sae(run)

        def fill(folder: Path) -> dict:
            try:
                return {"tokens": measure(folder, lm, sae, lens, batches)}
            except ActivationError as error:
                raise Stopped(f"{stage}: {error}") from error

        return self._write(stage, identity, spec, parents, fill)

    def _inputs(self, run: RunSpec) -> tuple[LanguageModel, Lens]:
        """Language model and lens of a run, after a look at whether they fit it and each other."""
        from mlsae_core import activations

        check(run)
        lm = self.lm(run.model)
        text.check_tokenizer(lm.tokenizer, lm.vocab_size)
        layers, points = run.site.indices(lm.n_layers), activations.hook_points(run.site)
        lm.capture(lm.special_ids.new_zeros(1, 2), layers, points)
        return lm, _load_lens(run, lm)

    def _find(self, stage: str, identity: str, spec: dict) -> Artefact | None:
        """What exists and may be used; all processes look before any of them computes."""
        _wait()
        found = self._made.get((stage, identity))
        if found is None and self.mode != "force":
            found = store.find(stage, identity)
        _wait()
        if found is None and self.mode == "read-only":
            raise StoreError(_missing(stage, identity, spec))
        return found

    def _write(self, stage, identity, spec, parents, fill: Callable[[Path], dict]) -> Artefact:
        """The main process calls `fill` and writes the artefact; the others wait for it."""
        if is_main_process():
            store.write(stage, identity, spec, parents, fill, replace=self.mode == "force")
        _wait()
        made = self._made[stage, identity] = store.read(store.STORE / stage / identity)
        return made


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
        from mlsae_core import train

        train.process_state().wait_for_everyone()


class Batches:
    """The first `settings.tokens` tokens of a split in batches, in order; knows its length."""

    def __init__(
        self,
        blocks,
        run: RunSpec,
        settings: EvaluateSpec,
        batch_tokens: int = EVALUATION_BATCH_TOKENS,
    ):
        context = run.data.context_length
        self.size = max(batch_tokens // context, 1)
        sequences = max(settings.tokens // context, 1)
        if isinstance(blocks, text.TokenBlocks):
            sequences = min(sequences, len(blocks))
        self.blocks, self.sequences = blocks, sequences

    def __len__(self) -> int:
        return math.ceil(self.sequences / self.size)

    def __iter__(self):
        left = self.sequences
        for tokens in self.blocks.batches(self.size):
            yield tokens[:left]
            left -= len(tokens)
            if left <= 0:
                return


def batch_tokens(lm: LanguageModel) -> int:
    """Tokens of a batch of an analysis of `ANY_BATCH`: on a GPU as many as fit a quarter of it.

    The largest thing held is `analysis.evaluate`'s growing batch: three choices for each layer, and
    of each what a block makes of it, about 16 float32 vectors.
    """
    if lm.device.type != "cuda":
        return EVALUATION_BATCH_TOKENS
    each = 3 * lm.n_layers * 16 * 4 * lm.d_model
    fit = max(_memory(lm.device) // 4 // each, EVALUATION_BATCH_TOKENS)
    return min(1 << (fit.bit_length() - 1), 32 * EVALUATION_BATCH_TOKENS)


def _memory(device: torch.device) -> int:
    """Bytes of memory of a device, or of this machine."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def checkpoint_path(identity: str) -> Path:
    return store.STORE / "checkpoints" / f"{identity}.safetensors"


def model_config(model: ModelSpec):
    """The configuration of a language model: its dimensions, without its weights."""
    from transformers import AutoConfig

    folder = store.model_folder(model.path)
    known = ", ".join(store.shipped_models())
    with _reading(
        f"model.path: expected a shipped name ({known}), a Hugging Face folder or a hub id, got "
        f"{model.path}, whose config.json cannot be read"
    ):
        found = AutoConfig.from_pretrained(
            folder or model.path, revision=None if folder else model.revision
        ).get_text_config()
        if min(found.num_hidden_layers, found.hidden_size, found.vocab_size) < 1:
            raise ValueError("a dimension is 0")
    return found


@contextlib.contextmanager
def _reading(failure: str):
    """Errors of other libraries, of many kinds and lengths, become one line."""
    try:
        yield
    except SpecError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(f"{failure}: {reason}") from error


def check(run: RunSpec):
    """Refuse what does not fit the model's configuration; neither weights nor text are read."""
    from mlsae_core import train

    config = model_config(run.model)
    n_latents = run.n_latents(config.num_hidden_layers, config.hidden_size)
    limit, context = getattr(config, "max_position_embeddings", None), run.data.context_length
    if limit is not None and context > limit:
        raise SpecError(
            f"data.context_length: expected at most the {limit} positions of {run.model.path}, "
            f"got {context}"
        )
    # Two matrices; of each the weights, the gradient and Adam's two moments, in float32.
    needed = 2 * 4 * 4 * n_latents * n_latents // run.sae.expansion_factor
    memory = _memory(train.process_state().device)
    if needed > memory:
        raise SpecError(
            f"expansion_factor: expected a dictionary that can be trained in {memory / 1e9:.0f} GB "
            f"of memory, got {n_latents} latents, which need {needed / 1e9:.0f} GB"
        )


def _compiled(lm: LanguageModel, run: RunSpec) -> LanguageModel:
    """The model compiled for the micro-batches of a run."""
    from mlsae_core import activations

    context = run.data.context_length
    tokens = lm.special_ids.new_zeros(run.train.micro_batch_tokens // context, context)
    layers, points = run.site.indices(lm.n_layers), activations.hook_points(run.site)
    with _reading(f"--compile: {run.model.path} could not be compiled"):
        lm = lm.compiled()
        lm.capture(tokens, layers, points)
    return lm


def _load_lens(run: RunSpec, lm: LanguageModel) -> Lens:
    from mlsae_core.lens import Lens

    with _reading(f"basis: {run.site.basis} could not be loaded"):
        lens = Lens.load(run.site, lm.device)
    expected = (lm.n_layers, lm.d_model, lm.d_model)
    if not lens.is_identity and lens.weight.shape != expected:
        raise SpecError(
            f"basis: expected a tuned lens of {lm.n_layers} layers and {lm.d_model} dimensions for "
            f"{lm.name}, got weights of shape {tuple(lens.weight.shape)}"
        )
    return lens


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
    if "target" in parts:
        from mlsae_core.analysis.transfer import Target

        today["target"] = to_dict(stored(Target, parts.pop("target")))
    return today | {stage: to_dict(stored(EvaluateSpec, part)) for stage, part in parts.items()}


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
            "one with the same fields exists, but of other files of the model, the text or the "
            "lens, or of another version of this stage"
        )
    shown = ("train", "evaluate")  # what the command line computes by itself
    command = f"{stage} SPEC.yml" if stage in shown else "materialise EXPERIMENT.yml"
    return (
        f"{stage} {identity} does not exist: {hint}; `python -m mlsae_core {command}` computes it"
    )
