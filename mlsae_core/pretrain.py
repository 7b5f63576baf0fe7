"""Train one of the book's own language models from its recipe, as a Hugging Face folder.

A recipe is ``data/models/<name>/recipe.yml``; everything else in that folder is written by this
module. Hidden matrices are updated by Muon, embeddings, gains and biases by AdamW, both with a
short warm-up and linear decay to zero: on two cores the number of steps is what is scarce.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from mlsae_core import store, text
from mlsae_core.spec import DataSpec, Spec, SpecError, build, read_yaml

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe(Spec):
    """How a language model of the suite is made.

    architecture: `model_type` and the fields of its Hugging Face config. tokenizer: name of a
    shipped model whose tokenizer is shared, or none to train one of vocab_size byte-level BPE
    tokens. tokens: training tokens. micro_batch: sequences per forward pass
        (small ones stay in a CPU's cache). rate_muon, rate_adam: peak learning rates.
    """

    architecture: dict
    tokens: int
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

    _prefix = "recipe."


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


def _tokenizer(recipe: Recipe, folder: Path):
    from transformers import AutoTokenizer

    if recipe.tokenizer is not None:
        return AutoTokenizer.from_pretrained(store.model_folder(recipe.tokenizer))
    if not (folder / "tokenizer.json").exists():
        documents = [d for d in text.docstrings() if text.split_of(d) == "train"]
        train_tokenizer(documents, recipe.vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iterations (Jordan et al., 2024), in float32.

    The parameters of one group have one shape and are updated as one stack. `torch.optim.Muon`
    orthogonalises one matrix at a time in bfloat16, which CPUs without bfloat16 units emulate:
    1.4 s a step for this model on two cores, more than the rest of the step.
    """

    def __init__(self, groups, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = group["params"]
            gradient = torch.stack([p.grad for p in parameters])
            state = self.state[parameters[0]]
            buffer = state.setdefault("momentum", torch.zeros_like(gradient))
            buffer.lerp_(gradient, 1 - group["momentum"])
            update = orthogonalize(gradient.lerp_(buffer, group["momentum"]))
            rows, columns = update.shape[1:]
            step = group["lr"] * max(1.0, rows / columns) ** 0.5
            for parameter, direction in zip(parameters, update, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(direction, alpha=step)


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
    return [
        Muon(groups, lr=recipe.rate_muon, weight_decay=recipe.weight_decay),
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


def read_recipe(path: str | Path) -> tuple[Recipe, Path]:
    """A recipe and the model folder it belongs to, from a shipped name or a recipe.yml."""
    path = Path(path)
    if not path.suffix:
        path = store.MODELS / path / "recipe.yml"
    if not path.is_file():
        raise SpecError(f"recipe: no file {path}; expected data/models/<name>/recipe.yml")
    return build(Recipe, read_yaml(path, typed=True)), path.parent


def pretrain(path: str | Path, stop_after: float | None = None) -> Path:
    """Train the model of a recipe; resumes from its checkpoint; returns the finished folder.

    stop_after: seconds after which to stop at a checkpoint, for tests.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe, folder = read_recipe(path)
    tokenizer = _tokenizer(recipe, folder)
    train = text.blocks(recipe.data, tokenizer, "train")
    validation = text.blocks(recipe.data, tokenizer, "validation")

    accelerator = Accelerator()
    architecture: dict[str, Any] = dict(recipe.architecture)
    config = AutoConfig.for_model(
        architecture.pop("model_type"),
        vocab_size=len(tokenizer),
        max_position_embeddings=recipe.data.context_length,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **architecture,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(accelerator.device)
    optimizers = _optimizers(model, recipe)
    step_batch = recipe.batch_tokens // recipe.data.context_length
    steps = recipe.tokens // recipe.batch_tokens
    interval = max(steps // 100, 1)
    peaks = [group["lr"] for o in optimizers for group in o.param_groups]

    checkpoint = store.STORE / "pretrain" / f"{folder.name}.safetensors"
    first, log, seconds = 0, [], 0.0
    if checkpoint.exists():
        state = store.load_checkpoint(checkpoint)
        if state["recipe"] == repr(recipe):
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            first, log, seconds = state["step"], state["log"], state["seconds"]

    def save(step: int):
        state = {
            "recipe": repr(recipe),
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "step": step,
            "log": log,
            "seconds": seconds + time.perf_counter() - start,
        }
        store.save_checkpoint(checkpoint, state)

    compiled = torch.compile(model) if accelerator.device.type == "cuda" else model
    start, running = time.perf_counter(), []
    progress = tqdm(total=steps * recipe.batch_tokens, initial=first * recipe.batch_tokens,
                    desc=folder.name, unit=" tokens", unit_scale=True)  # fmt: skip
    batches = train.batches(step_batch, seed=recipe.seed, start=first)
    for step in range(first, steps):
        scale = _rate(step, steps, recipe.warmup)
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * scale
        tokens = next(batches).to(accelerator.device)
        for part in tokens.split(recipe.micro_batch):
            loss = _loss(compiled, part) * (len(part) / len(tokens))
            loss.backward()
            running.append(loss.detach())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress.update(recipe.batch_tokens)
        if (step + 1) % interval == 0 or step + 1 == steps:
            now = float(torch.stack(running).sum()) / ((step % interval) + 1)
            if not math.isfinite(now):
                raise RuntimeError(f"loss is {now} at step {step}; the last checkpoint is kept")
            running = []
            row = {"tokens": (step + 1) * recipe.batch_tokens, "train": round(now, 4)}
            if (step + 1) % (5 * interval) == 0 or step + 1 == steps:
                row["validation"] = round(validation_loss(model, validation, limit=16), 4)
                save(step + 1)
            log.append(row)
            progress.set_postfix(row)
        if stop_after is not None and time.perf_counter() - start > stop_after:
            save(step + 1)
            return folder
    seconds += time.perf_counter() - start
    _write(folder, recipe, model, tokenizer, train, validation, log, seconds)
    return folder


def _write(folder, recipe, model, tokenizer, train, validation, log, seconds):
    final = validation_loss(model, validation)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": recipe.tokens // recipe.batch_tokens * recipe.batch_tokens,
        "distinct_tokens": train.blocks.numel(),
        "validation_tokens": validation.blocks.numel(),
        "validation_loss": round(final, 4),
        "seconds": round(seconds),
        "seed": recipe.seed,
        **store.provenance(),
    }
    with store.atomic_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        pd.DataFrame(log).to_csv(new / "log.csv", index=False)
        (new / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
        (new / "README.md").write_text(_card(folder.name, recipe, facts))
        (new / "recipe.yml").write_bytes((folder / "recipe.yml").read_bytes())


def _card(name: str, recipe: Recipe, facts: dict) -> str:
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    epochs = facts["training_tokens"] / facts["distinct_tokens"]
    return f"""---
license: mit
pipeline_tag: text-generation
---
# {name}

{recipe.description.strip()}

Trained by `python -m mlsae_core pretrain {name}` on the docstrings of the packages pinned in
`data/docstrings.yml` ({epochs:.2f} epochs of the train split; the splits are disjoint by document
hash). The loss is the mean cross-entropy over the whole validation split, in nats per token, with a
context of {recipe.data.context_length} tokens. It is made to be studied, not to be used: it writes
something that looks like documentation.

| | |
| --- | --- |
{rows}
"""
