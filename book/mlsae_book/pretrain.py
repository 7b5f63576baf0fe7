"""Train one of the book's own language models from its recipe, as a Hugging Face folder.

A recipe is ``data/models/<name>/recipe.yml``, or any other recipe.yml; the model is written beside
it, and whatever else is in that folder stays. Hidden matrices are updated by Muon, embeddings, gains and biases by AdamW, both with a
short warm-up and linear decay to zero: on two cores the number of steps is what is scarce.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from mlsae_book import corpus
from mlsae_core import architecture, models, pipeline, stops, store, text
from mlsae_core import train as sae_training
from mlsae_core.keys import keyed
from mlsae_core.spec import (
    DataSpec,
    ModelSpec,
    Spec,
    SpecError,
    added,
    build,
    canonical,
    read_yaml,
)
from mlsae_core.store import Stopped

END_OF_TEXT = "<|endoftext|>"
CONFIG = "config.json"  # without it a folder is no model
MADE = ".made"  # in a recipe's folder, what is to be moved into it
MARK = "training.json"  # of a model that was trained here, and of what
store.STAGES["tokenizer"] = 1


@dataclass(frozen=True)
class Recipe(Spec):
    """How a language model of the suite is made.

    Args:
        architecture: `model_type` and the fields of its Hugging Face config.
        base: in its place, the name of a shipped model, or a folder, from whose weights and with
            whose tokenizer to start.
        tokenizer: name of a shipped model whose tokenizer is shared, or none to train one of
            vocab_size byte-level BPE tokens.
        tokens: training tokens.
        micro_batch: sequences per forward pass (small ones stay in a CPU's cache).
        rate_muon, rate_adam: peak learning rates.
    """

    architecture: dict = field(default_factory=dict)
    tokens: int = field(kw_only=True)
    description: str = ""
    data: DataSpec = field(default_factory=DataSpec)
    tokenizer: str | None = None
    vocab_size: int = 4096
    batch_tokens: int = 8192
    micro_batch: int = 8
    rate_muon: float = 0.02
    rate_adam: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"
    storage: Literal["float32", "float16"] = "float32"
    base: str | None = added(None)

    _prefix = "recipe."

    def __post_init__(self):
        super().__post_init__()
        self._positive("vocab_size", "micro_batch", "rate_muon", "rate_adam")
        self._seed("seed")
        if self.base is None:
            made = "model_type" in self.architecture
            self._require(made, "architecture", "`model_type` among it, or `base` in its place")
        else:
            self._require(not self.architecture, "architecture", "none beside `base`")
            self._require(self.tokenizer is None, "tokenizer", "none beside `base`, which has one")
        for name, least in (("batch_tokens", self.data.context_length), ("tokens", "batch_tokens")):
            bound = least if isinstance(least, int) else getattr(self, least)
            self._require(getattr(self, name) >= bound, name, f"a number of at least {bound}")


def train_tokenizer(documents: list[str], vocab_size: int):
    """A byte-level BPE tokenizer with one special token, the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _shipped(recipe: Recipe, name: str) -> Path:
    """The folder of the model that a field of the recipe names."""
    folder = models.folder(getattr(recipe, name))
    if folder is None:
        raise SpecError(
            f"recipe.{name}: expected one of {', '.join(models.shipped())} or a folder, got "
            f"{getattr(recipe, name)}"
        )
    return folder


def _tokenizer(recipe: Recipe, folder: Path):
    """The tokenizer of a shipped model; or one that lies beside the recipe; or one trained here."""
    from transformers import AutoTokenizer

    for name in ("tokenizer", "base"):
        if getattr(recipe, name) is not None:
            return AutoTokenizer.from_pretrained(_shipped(recipe, name), trust_remote_code=False)
    given = folder if _is_given_tokenizer(folder) else _trained_tokenizer(recipe)
    return AutoTokenizer.from_pretrained(given, trust_remote_code=False)


def _is_given_tokenizer(folder: Path) -> bool:
    """Whether the folder's tokenizer is the user's."""
    made = _facts(folder)
    return (folder / "tokenizer.json").is_file() and (made is None or made.get("given", False))


def _trained_tokenizer(recipe: Recipe) -> Path:
    """The folder of a tokenizer of the recipe's text and vocabulary, trained once."""
    spec = {"text": pipeline.text_key(recipe.data), "vocab_size": recipe.vocab_size}
    parents = pipeline.differs(recipe.data)
    own, pinned = (store.key("tokenizer", spec, of) for of in (parents, {}))

    def fill(folder: Path) -> dict:
        documents = [d for split, d in text.split_documents(recipe.data) if split == "train"]
        train_tokenizer(documents, recipe.vocab_size).save_pretrained(folder)
        return {}

    made = store.find("tokenizer", pinned) or store.find("tokenizer", own)
    return (made or store.write("tokenizer", own, spec, parents, fill)).path


def _facts(folder: Path) -> dict | None:
    """What is known of the model in a folder, if it was trained here."""
    if not (folder / MARK).is_file():
        return None
    try:
        facts = json.loads((folder / MARK).read_text(encoding="utf-8"))
        facts["training_tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"recipe: {folder / MARK} is not of a model trained here: {error!r}"
        ) from None
    return facts


def _model(recipe: Recipe, tokenizer):
    """The untrained model, its weights those of the base, or drawn from the recipe's seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if recipe.base is not None:
        from mlsae_core.lm import LanguageModel

        model = LanguageModel.load(ModelSpec(recipe.base)).model.requires_grad_(True).train()
        limit, context = model.config.max_position_embeddings, recipe.data.context_length
        if context > limit:
            raise SpecError(
                f"recipe.data.context_length: expected at most the {limit} positions of "
                f"{recipe.base}, got {context}"
            )
        return model
    fields: dict[str, Any] = dict(recipe.architecture)
    with architecture.reading("recipe.architecture"):
        architecture.check_layers(fields)
        config = AutoConfig.for_model(
            fields.pop("model_type"),
            vocab_size=len(tokenizer),
            max_position_embeddings=recipe.data.context_length,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **fields,
        )
        architecture.empty_model(config, "float32")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iterations (Jordan et al., 2024), in float32.

    The parameters of one group have one shape and are updated as one stack. `torch.optim.Muon`
    orthogonalises one matrix at a time in bfloat16, which CPUs without bfloat16 units emulate:
    1.4 s a step for this model on two cores, more than the rest of the step.
    """

    def __init__(self, groups, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = group["params"]
            gradient = torch.stack([p.grad for p in parameters])
            state = self.state[parameters[0]]
            buffer = state.setdefault("momentum", torch.zeros_like(gradient))
            buffer.lerp_(gradient, 1 - group["momentum"])
            update = orthogonalize(gradient.lerp_(buffer, group["momentum"]).to(self.dtype))
            rows, columns = update.shape[1:]
            step = group["lr"] * max(1.0, rows / columns) ** 0.5
            for parameter, direction in zip(parameters, update, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(direction.to(parameter.dtype), alpha=step)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices (n, rows, columns) with singular values moved near 1, singular vectors kept."""
    a, b, c = 3.4445, -4.7750, 2.0315  # the quintic of Jordan et al.
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def _optimizers(model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    embeddings |= {id(p) for p in model.get_output_embeddings().parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in parameters if p.ndim == 2 and id(p) not in embeddings]
    shapes = dict.fromkeys(p.shape for p in hidden)
    groups = [{"params": [p for p in hidden if p.shape == shape]} for shape in shapes]
    other = [p for p in parameters if p.ndim != 2 or id(p) in embeddings]
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return [
        Muon(groups, lr=recipe.rate_muon, weight_decay=recipe.weight_decay, dtype=dtype),
        torch.optim.AdamW(other, lr=recipe.rate_adam, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then linear decay to zero."""
    rising = max(round(steps * warmup), 1)
    return min((step + 1) / rising, (steps - step) / max(steps - rising, 1))


def _loss(model, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), tokens[:, 1:].reshape(-1)
    )


@torch.no_grad()
def validation_loss(model, blocks, batch_size: int = 16, limit: int | None = None) -> float:
    """Mean cross-entropy over predicted tokens, nats per token."""
    total = count = 0
    for number, tokens in enumerate(blocks.batches(batch_size)):
        if limit is not None and number >= limit:
            break
        total += float(_loss(model, tokens.to(model.device))) * len(tokens)
        count += len(tokens)
    return total / count


def ngram_losses(train: np.ndarray, validation: np.ndarray, vocabulary: int) -> dict[str, float]:
    """What a model must beat: cross-entropy of unigram and bigram counts, nats per predicted token.

    Unigrams have add-one smoothing; bigrams are mixed with them by Witten and Bell's weight, the
    number of tokens seen after the previous one over its count plus that number. Both arrays are
    (block, position) token ids.
    """

    def pairs(blocks: np.ndarray) -> np.ndarray:
        return blocks[:, :-1].astype(np.int64) * vocabulary + blocks[:, 1:]

    unigram = np.bincount(train.ravel(), minlength=vocabulary) + 1.0
    unigram /= unigram.sum()
    seen, counts = np.unique(pairs(train), return_counts=True)
    followers = np.bincount(seen // vocabulary, minlength=vocabulary)
    total = np.bincount(seen // vocabulary, weights=counts, minlength=vocabulary)

    wanted = pairs(validation).ravel()
    place = np.searchsorted(seen, wanted).clip(max=len(seen) - 1)
    count = np.where(seen[place] == wanted, counts[place], 0)
    before, after = wanted // vocabulary, wanted % vocabulary
    weight = followers[before] / np.maximum(total[before] + followers[before], 1)
    weight[total[before] == 0] = 1.0
    mixed = (1 - weight) * count / np.maximum(total[before], 1) + weight * unigram[after]
    losses = {"unigram_loss": -np.log(unigram[after]).mean(), "bigram_loss": -np.log(mixed).mean()}
    return {name: round(float(loss), 4) for name, loss in losses.items()}


def read_recipe(path: str | Path) -> tuple[Recipe, Path]:
    """A recipe and the model folder it belongs to, from a shipped name or a recipe.yml."""
    named = store.MODELS / path / "recipe.yml"
    path = named if named.is_file() else Path(path)
    if not path.is_file():
        known = sorted(recipe.parent.name for recipe in store.MODELS.glob("*/recipe.yml"))
        raise SpecError(f"recipe: expected a YAML file or one of {', '.join(known)}, got {path}")
    return build(Recipe, read_yaml(path, typed=True)), path.resolve().parent


def _identity(recipe: Recipe, tokenizer, differs: dict[str, str]) -> str:
    """What the weights are a function of: the recipe, and the content of all that it names.

    differs: what of the text is other here than its key says.
    """
    fields = keyed(recipe)
    for name in ("description", "data", "tokenizer", "base"):
        fields.pop(name, None)
    fields |= {
        "text": pipeline.text_key(recipe.data),
        "context_length": recipe.data.context_length,
        "tokenizer": text.tokenizer_key(tokenizer),
        "base": None if recipe.base is None else models.key(recipe.base, None),
        **differs,
    }
    return hashlib.sha256(canonical(fields).encode()).hexdigest()[:16]


def _check_folder(folder: Path, recipe: Recipe):
    """Refuse a folder in which a file of the user's has the name of one that is to be written."""
    if _facts(folder) is None:
        names = [CONFIG, "generation_config.json", "model.safetensors", "log.csv", "README.md"]
        if recipe.tokenizer or recipe.base:
            names += ["tokenizer.json", "tokenizer_config.json"]
        if theirs := [name for name in names if (folder / name).exists()]:
            raise SpecError(
                f"recipe: {folder} has {', '.join(theirs)}, which this would replace and which was "
                "not written here; move it, or the recipe"
            )


@dataclass
class _State:
    """How far a training is: steps, seconds, log rows, and the losses since the last row."""

    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    running: list[torch.Tensor] = field(default_factory=list)


def pretrain(path: str | Path, stop_after: float | None = None) -> Path:
    """Train the model of a recipe; resumes from its checkpoint; returns the finished folder.

    stop_after: seconds after which to stop at a checkpoint, for tests.

    Raises:
        SpecError: a recipe that cannot be followed.
        Stopped: the loss is not finite; the last checkpoint is kept.
    """
    recipe, folder = read_recipe(path)
    _place(folder)
    _check_folder(folder, recipe)
    if text.is_streamed(recipe.data):
        raise SpecError(
            f"recipe.data.path: expected text in files, got the hub's {recipe.data.path}"
        )
    store.provenance()  # of the code that trains, not of what is there when it ends
    accelerator = Accelerator(mixed_precision=recipe.precision)
    if accelerator.num_processes > 1:
        raise SpecError(f"pretrain: expected one process, got {accelerator.num_processes}")
    tokenizer = _tokenizer(recipe, folder)
    text.check_tokenizer(tokenizer)
    differs = pipeline.differs(recipe.data)
    identity = _identity(recipe, tokenizer, differs)
    checkpoint = store.STORE / "pretrain" / f"{identity}.pt"
    finished = (identity, _identity(recipe, tokenizer, {}))  # one of the pinned text stays
    if (_facts(folder) or {}).get("identity") in finished and (folder / CONFIG).is_file():
        checkpoint.unlink(missing_ok=True)  # of a training that was killed behind its end
        return folder
    model = _model(recipe, tokenizer).to(accelerator.device)
    train = text.blocks(recipe.data, tokenizer, "train")
    validation = text.blocks(recipe.data, tokenizer, "validation")
    training = _Training(
        recipe, accelerator, model, _optimizers(model, recipe), train, validation, checkpoint,
    )  # fmt: skip
    state = training.restore()
    if recipe.base is not None and not state.log:  # what fine-tuning has to improve on
        loss = validation_loss(model, validation, limit=16)
        state.log.append({"tokens": 0, "validation": round(loss, 4)})
    if training.run(state, folder.name, stop_after):
        _write(folder, training, tokenizer, state, identity)
        training.checkpoint.unlink(missing_ok=True)
    return folder


@dataclass(frozen=True)
class _Training:
    """What a training is made of, its steps and its checkpoint."""

    recipe: Recipe
    accelerator: Accelerator
    model: Any
    optimizers: list[torch.optim.Optimizer]
    train: text.TokenBlocks
    validation: text.TokenBlocks
    checkpoint: Path

    def run(self, state: _State, name: str, stop_after: float | None) -> bool:
        """Make the steps that are left; false if time was up before the last."""
        recipe, device = self.recipe, self.model.device
        steps = recipe.tokens // recipe.batch_tokens
        interval = max(steps // 100, 1)
        step_batch = recipe.batch_tokens // recipe.data.context_length
        batches = self.train.batches(step_batch, seed=recipe.seed, start=state.step)
        compiled = torch.compile(self.model) if device.type == "cuda" else self.model
        started = last = saved = time.perf_counter()
        with stops.raised(), self.kept(state, steps), tqdm(
            total=steps * recipe.batch_tokens, initial=state.step * recipe.batch_tokens,
            desc=name, unit=" tokens", unit_scale=True,
        ) as progress:  # fmt: skip
            while state.step < steps:
                losses = self.gradient(compiled, next(batches).to(device))
                with stops.held():  # a checkpoint has all of a step or nothing
                    self.update(_rate(state.step, steps, recipe.warmup))
                    state.running += losses
                    state.step += 1
                    now = time.perf_counter()
                    state.seconds, last = state.seconds + now - last, now
                    progress.update(recipe.batch_tokens)
                    final, since = state.step == steps, (state.step - 1) % interval + 1
                    if since == interval or final:
                        checked = final or state.step % (5 * interval) == 0
                        progress.set_postfix(self.log(state, since, checked))
                stop = stop_after is not None and now - started > stop_after and not final
                if stop or final or now - saved > sae_training.CHECKPOINT_SECONDS:
                    self.save(state)
                    saved = time.perf_counter()
                if stop:
                    return False
        return True

    @contextmanager
    def kept(self, state: _State, steps: int) -> Iterator[None]:
        """A signal writes a checkpoint, and its message says how to go on."""
        try:
            yield
        except stops.Interrupted as error:
            self.save(state)
            raise error.kept(
                f"after step {state.step} of {steps}; the same command continues from "
                f"{self.checkpoint}"
            ) from error

    def gradient(self, model, tokens: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of one step; the parts of its loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses = []
        for part in tokens.split(self.recipe.micro_batch):
            with self.accelerator.autocast():
                loss = _loss(model, part) * (len(part) / len(tokens))
            loss.backward()
            losses.append(loss.detach())
        return losses

    def update(self, scale: float):
        """One step of all optimisers at that share of their peak rates."""
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()

    @property
    def peaks(self) -> tuple[float, float]:
        """Peak learning rates in the order of the optimisers."""
        return self.recipe.rate_muon, self.recipe.rate_adam

    def log(self, state: _State, since: int, checked: bool) -> dict[str, float]:
        """Add the row of the last `since` steps, with a validation loss where it is `checked`."""
        loss = float(torch.stack(state.running).sum()) / since
        if not math.isfinite(loss):
            raise Stopped(f"loss is {loss} at step {state.step}; the last checkpoint is kept")
        row = {"tokens": state.step * self.recipe.batch_tokens, "train": round(loss, 4)}
        if checked:
            row["validation"] = round(validation_loss(self.model, self.validation, limit=16), 4)
        state.log.append(row)
        state.running = []
        return row

    def save(self, state: _State):
        """Write all that the rest of the training depends on."""
        content = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            **vars(state),
        }
        store.save_checkpoint(self.checkpoint, content)

    def restore(self) -> _State:
        """Where the training stands."""
        if not self.checkpoint.exists():
            return _State()
        steps = self.recipe.tokens // self.recipe.batch_tokens
        with store.restoring(self.checkpoint, "a checkpoint of this recipe") as content:
            if content["step"] not in range(steps + 1):
                raise ValueError(f"its step is {content['step']} of {steps}")
            self.model.load_state_dict(content["model"])
            for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            running = [loss.to(self.model.device) for loss in content["running"]]
            return _State(content["step"], content["seconds"], content["log"], running)


def _write(folder: Path, training: _Training, tokenizer, state: _State, identity: str):
    recipe, model = training.recipe, training.model
    stored = getattr(torch, recipe.storage)
    model.to(stored).float()  # what the losses below are measured on
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": recipe.tokens // recipe.batch_tokens * recipe.batch_tokens,
        "distinct_tokens": training.train.blocks.size,
        "validation_tokens": training.validation.blocks.size,
        "validation_loss": round(validation_loss(model, training.validation), 4),
        **ngram_losses(training.train.blocks, training.validation.blocks, len(tokenizer)),
        "seconds": round(state.seconds),
        "seed": recipe.seed,
        **pipeline.differs(recipe.data),
        **store.provenance(),
    }
    card = _card(folder.name, recipe, facts)
    given = _is_given_tokenizer(folder)
    facts |= {"identity": identity, "given": given}
    with store.atomic_folder(folder / MADE) as new:
        model.to(stored).save_pretrained(new)
        if not given:
            tokenizer.save_pretrained(new)
        pd.DataFrame(state.log).to_csv(new / "log.csv", index=False)
        (new / "README.md").write_text(card)
        (new / MARK).write_text(json.dumps(facts, indent=1) + "\n")
    _place(folder)


def _place(folder: Path):
    """Move what was made beside the recipe, and what is left of a move that was stopped.

    The mark goes first, so that what follows is known to be from here. `config.json` goes away
    before all and comes last: the folder is a model as a whole or not at all.
    """
    made = folder / MADE
    if not made.is_dir():
        return
    names = sorted((file.name for file in made.iterdir()), key=lambda n: (n == CONFIG, n != MARK))
    (folder / CONFIG).unlink(missing_ok=True)
    for name in names:
        os.replace(made / name, folder / name)
    made.rmdir()


def _card(name: str, recipe: Recipe, facts: dict) -> str:
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    epochs = facts["training_tokens"] / facts["distinct_tokens"]
    subject = "questions about the" if recipe.data.path == corpus.QUESTIONS else "the"
    return f"""---
license: mit
pipeline_tag: text-generation
---
# {name}

{recipe.description.strip()}

Trained by `python -m mlsae_book pretrain {name}` on {subject} docstrings of the packages pinned in
`data/docstrings.yml` ({epochs:.2f} epochs of the train split; the splits are disjoint by document
hash). The loss is the mean cross-entropy over the whole validation split, in nats per token, with a
context of {recipe.data.context_length} tokens. It is made to be studied, not to be used: it writes
something that looks like documentation.

| | |
| --- | --- |
{rows}
"""
