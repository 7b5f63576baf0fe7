"""Name → stage: from specs to trained dictionaries and tables, each computed once.

Every stage is looked up in the shipped results, then in this machine's store, and only then
computed. `Session` keeps the language models, text and dictionaries of one process in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from mlsae_core import activations, analysis, store, text, train
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel
from mlsae_core.sae import MLSAE
from mlsae_core.spec import (
    EvaluateSpec,
    Experiment,
    ModelSpec,
    RunSpec,
    SpecError,
    canonical,
    flat,
    to_dict,
)
from mlsae_core.store import Artefact, StoreError

Mode = Literal["cached", "force", "read-only"]
EVALUATION_BATCH_TOKENS = 2048


def _hash(value) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def run_key(run: RunSpec) -> tuple[str, dict, dict]:
    """Key, spec and parents of a run's training: content, never paths, so it holds anywhere."""
    spec = flat(run)
    model, data, basis = spec.pop("model"), spec.pop("data"), spec.pop("basis")
    spec |= {"dtype": model["dtype"], "random_weights": model["random_weights"]}
    spec |= {"context_length": data["context_length"]}
    parents = {
        "model": store.model_key(run.model.path, run.model.revision),
        "data": _hash(text.data_key(run.data)),
        "lens": "identity" if basis == "identity" else _lens_key(basis),
    }
    return store.key("train", spec, parents), flat(run), parents


def _lens_key(folder: str) -> str:
    files = sorted(file for file in Path(folder).glob("*") if file.is_file())
    if not files:
        raise SpecError(f"basis: expected `identity` or a tuned-lens folder, got {folder}")
    return _hash({file.name: store.file_hash(file) for file in files})


def analysis_key(stage: str, run: RunSpec, settings: EvaluateSpec) -> tuple[str, dict, dict]:
    """Key, spec and parents of an analysis of a trained run."""
    parents = {"train": run_key(run)[0]}
    identity = store.key(stage, to_dict(settings), parents)
    return identity, {"run": flat(run), stage: to_dict(settings)}, parents


@dataclass
class Session:
    """Stages of one process: `mode` says what may be computed, `device` where.

    mode: ``cached`` computes what is missing, ``force`` everything anew, ``read-only`` nothing.
    trackers: names of accelerate trackers to log training to.
    """

    mode: Mode = "cached"
    trackers: tuple[str, ...] = ()

    def __post_init__(self):
        self._models: dict[ModelSpec, LanguageModel] = {}
        self._done: set[tuple[str, str]] = set()

    @cached_property
    def device(self) -> torch.device:
        from accelerate import PartialState

        return PartialState().device

    def lm(self, spec: ModelSpec) -> LanguageModel:
        """The language model of a spec, loaded once."""
        if spec not in self._models:
            path = store.model_folder(spec.path) or spec.path
            loaded = LanguageModel.load(replace(spec, path=str(path)), self.device)
            self._models = {spec: loaded}  # one at a time: models are large
        return self._models[spec]

    def blocks(self, run: RunSpec, split: str):
        """The packed text of a run's split."""
        return text.blocks(run.data, self.lm(run.model).tokenizer, split)

    # --- stages -------------------------------------------------------------------------------

    def train(self, run: RunSpec) -> Artefact:
        """The trained dictionary: `model.safetensors`, `config.json` and `log.csv`."""
        identity, spec, parents = run_key(run)

        def fill(folder: Path) -> dict:
            lm = self.lm(run.model)
            check(run, lm)
            accelerator = train.make_accelerator(run, list(self.trackers), project_dir=store.STORE)
            if self.trackers:
                accelerator.init_trackers("mlsae", config={"spec": canonical(spec)})
            checkpoint = store.STORE / "checkpoints" / f"{identity}.safetensors"
            trained = train.train(
                run,
                lm,
                self.blocks(run, "train"),
                accelerator=accelerator,
                checkpoint=checkpoint,
                description=f"training {identity}",
            )
            accelerator.end_training()
            trained.sae.save_pretrained(folder)
            trained.log.to_csv(folder / "log.csv", index=False, float_format="%.6g")
            checkpoint.unlink(missing_ok=True)
            last = trained.log.iloc[-1]
            return {"tokens": int(last.tokens), "tokens_per_second": int(last.tokens_per_second)}

        return self._stage("train", identity, spec, parents, fill)

    def evaluate(self, run: RunSpec, settings: EvaluateSpec) -> Artefact:
        """Reconstruction and downstream loss per layer: `evaluation.csv`."""

        def fill(folder: Path, lm, sae, lens, batches) -> int:
            table = analysis.evaluate(lm, sae, lens, run.site, batches)
            table.to_csv(folder / "evaluation.csv", index=False, float_format="%.8g")
            return int(table.tokens.iloc[0])

        return self._analysis("evaluate", run, settings, fill)

    def distributions(self, run: RunSpec, settings: EvaluateSpec) -> Artefact:
        """Distributions over layers: `distributions.safetensors` and `variances.json`."""

        def fill(folder: Path, lm, sae, lens, batches) -> int:
            arrays, numbers = analysis.distributions(lm, sae, lens, run.site, batches)
            save_file(arrays, folder / "distributions.safetensors")
            (folder / "variances.json").write_text(json.dumps(numbers, indent=1) + "\n")
            return numbers["tokens"]

        return self._analysis("distributions", run, settings, fill)

    def _analysis(self, stage: str, run: RunSpec, settings: EvaluateSpec, fill) -> Artefact:
        identity, spec, parents = analysis_key(stage, run, settings)

        def compute(folder: Path) -> dict:
            sae = self.sae(run)
            lm = self.lm(run.model)
            batches = Batches(self.blocks(run, settings.split), run, settings)
            lens = Lens.load(run.site, self.device)
            return {"tokens": fill(folder, lm, sae, lens, batches)}

        return self._stage(stage, identity, spec, parents, compute)

    def sae(self, run: RunSpec) -> MLSAE:
        """The trained dictionary of a run as a module."""
        return MLSAE.from_pretrained(self.train(run).path).to(self.device).eval()

    def _stage(self, stage, identity, spec, parents, fill: Callable[[Path], dict]) -> Artefact:
        found = store.find(stage, identity)
        if found and (self.mode != "force" or (stage, identity) in self._done):
            return found
        if self.mode == "read-only":
            raise StoreError(_missing(stage, identity, spec))
        made = store.write(stage, identity, spec, parents, fill)
        self._done.add((stage, identity))
        return made


class Batches:
    """The first `settings.tokens` tokens of a split in batches, in order; knows its length."""

    def __init__(self, blocks, run: RunSpec, settings: EvaluateSpec):
        context = run.data.context_length
        self.size = max(EVALUATION_BATCH_TOKENS // context, 1)
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


def check(run: RunSpec, lm: LanguageModel):
    """Refuse what does not fit the model before anything is computed."""
    layers = activations.site_layers(run.site, lm.n_layers)
    if max(layers) >= lm.n_layers:
        raise SpecError(
            f"layers: {max(layers)} does not exist; {run.model.path} has {lm.n_layers} layers, "
            f"expected 0 to {lm.n_layers - 1}"
        )
    limit = lm.max_positions
    if limit is not None and run.data.context_length > limit:
        raise SpecError(
            f"data.context_length: expected at most the {limit} positions of {run.model.path}, "
            f"got {run.data.context_length}"
        )
    train.build_sae(run, lm)


def _missing(stage: str, identity: str, spec: dict) -> str:
    """Which field differs from the nearest existing result, and what would compute this one."""
    run = spec.get("run", spec)
    nearest: tuple[int, list[str]] | None = None
    for artefact in store.artefacts(stage):
        other = artefact.spec.get("run", artefact.spec)
        fields = [name for name in run if run[name] != other.get(name)]
        if nearest is None or len(fields) < nearest[0]:
            nearest = (len(fields), fields)
    if nearest is None:
        hint = "nothing of this stage exists"
    elif not nearest[1]:
        hint = "one with the same fields exists, but its model, text or settings differ"
    else:
        hint = f"the nearest existing one differs in {', '.join(nearest[1])}"
    command = "materialise" if stage == "distributions" else stage
    return (
        f"{stage} {identity} does not exist: {hint}; `python -m mlsae_core {command}` computes it"
    )


# --- experiments --------------------------------------------------------------------------------


class Materialised(NamedTuple):
    """The finished tables of an experiment, each with the swept fields as its first columns.

    log: training, one row per interval. evaluation: one row per run and layer. provenance: one row
    per artefact with key, tokens, seconds and commit. runs: (labels, run) as declared.
    """

    log: pd.DataFrame
    evaluation: pd.DataFrame
    provenance: pd.DataFrame
    runs: tuple[tuple[dict, RunSpec], ...]


def materialise(experiment: Experiment, mode: Mode = "cached", ship: bool = False) -> Materialised:
    """Find or compute every result of an experiment; `ship` copies them to the tracked ones."""
    session = Session(mode)
    logs, tables, notes = [], [], []
    for labels, run in experiment.runs:
        made = [session.train(run)]
        logs.append(_labelled(pd.read_csv(made[0].file("log.csv")), labels))
        if experiment.evaluate is not None:
            made.append(session.evaluate(run, experiment.evaluate))
            tables.append(_labelled(pd.read_csv(made[1].file("evaluation.csv")), labels))
            made.append(session.distributions(run, experiment.evaluate))
        for artefact in made:
            notes.append(_labelled(pd.DataFrame([provenance(artefact)]), labels))
            if ship:
                store.ship(artefact)
    evaluation = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return Materialised(
        pd.concat(logs, ignore_index=True),
        evaluation,
        pd.concat(notes, ignore_index=True),
        experiment.runs,
    )


def _labelled(table: pd.DataFrame, labels: dict) -> pd.DataFrame:
    fixed = {name: str(v) if isinstance(v, list | dict) else v for name, v in labels.items()}
    return table.assign(**fixed)[[*fixed, *[c for c in table.columns if c not in fixed]]]


def provenance(artefact: Artefact) -> dict:
    """How a result was made, in one row: stage, key, tokens, seconds, commit, date."""
    names = ("stage", "tokens", "seconds", "commit", "written")
    row = {name: artefact.meta.get(name) for name in names}
    return {"stage": row.pop("stage"), "key": artefact.key, **row}


def read_distributions(artefact: Artefact) -> tuple[dict[str, torch.Tensor], dict]:
    """Arrays (layer, latent) and the variance decomposition of a `distributions` result."""
    arrays = load_file(artefact.file("distributions.safetensors"))
    return arrays, json.loads(artefact.file("variances.json").read_text())


# --- facts about the inputs -----------------------------------------------------------------------


def suite() -> pd.DataFrame:
    """The shipped language models, one row each: size, training tokens, loss, seconds, commit."""
    names = ("parameters", "training_tokens", "validation_loss", "seconds", "seed", "commit")
    rows = []
    for model in store.shipped_models():
        facts = json.loads((store.MODELS / model / "training.json").read_text())
        rows.append({"model": model, **{name: facts[name] for name in names}})
    return pd.DataFrame(rows)


def model_log(model: str) -> pd.DataFrame:
    """How a shipped model's loss fell: one row per (tokens, split) with `loss`, nats per token."""
    log = pd.read_csv(store.MODELS / model / "log.csv")
    return log.melt("tokens", ["train", "validation"], "split", "loss").dropna()


def corpus(session: Session, run: RunSpec) -> pd.DataFrame:
    """Documents, characters and tokens of each split of a run's text."""
    meta = text.packed(run.data, session.lm(run.model).tokenizer).meta
    columns = ("documents", "characters", "tokens")
    return pd.DataFrame(
        [{"split": split, **{name: meta[name][split] for name in columns}} for split in text.SPLITS]
    )


def published(table: str) -> pd.DataFrame:
    """Numbers printed in a paper, from ``data/published``; `source` says where they stand."""
    return pd.read_csv(store.DATA / "published" / f"{table}.csv")


# --- what exists, and what it would cost ----------------------------------------------------------


def status(experiment: Experiment) -> pd.DataFrame:
    """One row per result: whether it is shipped, stored or missing, and the seconds it would take.

    The estimate counts floating-point operations and divides by the measured speed of a matrix
    product on this machine; expect it to be right within a factor of two.
    """
    rows, speed = [], None
    for labels, run in experiment.runs:
        keys = {"train": run_key(run)[0]}
        if experiment.evaluate is not None:
            for stage in ("evaluate", "distributions"):
                keys[stage] = analysis_key(stage, run, experiment.evaluate)[0]
        for stage, identity in keys.items():
            where = _where(stage, identity)
            seconds = 0.0
            if where == "missing":
                speed = speed or _speed()
                seconds = _operations(stage, run, experiment.evaluate) / speed
            rows.append({**labels, "stage": stage, "key": identity, "state": where,
                         "seconds": round(seconds)})  # fmt: skip
    return pd.DataFrame(rows)


def _where(stage: str, identity: str) -> str:
    for name, root in (("shipped", store.SHIPPED), ("stored", store.STORE)):
        if (root / stage / identity / "meta.json").is_file():
            return name
    checkpoint = store.STORE / "checkpoints" / f"{identity}.safetensors"
    return "begun" if checkpoint.exists() else "missing"


def _operations(stage: str, run: RunSpec, settings: EvaluateSpec | None) -> float:
    """Floating-point operations of a stage, at the share of peak speed that was measured."""
    from transformers import AutoConfig

    path = store.model_folder(run.model.path) or run.model.path
    config = AutoConfig.from_pretrained(path).get_text_config()
    width, depth, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    model = 24 * depth * width**2 + 4 * depth * width * run.data.context_length
    layers = len(activations.site_layers(run.site, depth))
    encode = 2 * layers * width * width * run.sae.expansion_factor
    if stage == "train":
        return run.train.tokens * (model + 2.5 * encode) * 2
    replaced = layers * (model / 2 + 8 * vocabulary * width) if stage == "evaluate" else 0
    return settings.tokens * (model + encode + replaced) * 2


def _speed() -> float:
    a = torch.randn(768, 768)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    return 5 * 2 * 768**3 / (time.perf_counter() - start)


def say(message: str):
    """A line for people, on stderr so that tables on stdout stay clean."""
    print(message, file=sys.stderr)
