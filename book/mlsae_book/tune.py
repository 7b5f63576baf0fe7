"""Train a tuned lens for a language model (Belrose et al. 2023), as a folder under `data/lenses`.

The objective is that of the tuned-lens package: translator i maps the input of block i to what the
final norm and the unembedding should read, so that the Kullback-Leibler divergence from the model's
own next-token distribution is least. All translators start at zero, where the tuned lens is the
logit lens, and are trained by Adam on the same tokens, each by its own divergence.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mlsae_core import models, store, text
from mlsae_core.keys import stored
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import DataSpec, ModelSpec, Spec, to_dict
from mlsae_core.store import Stopped
from mlsae_core.train import process_state

_AT_ONCE = 512  # positions whose logits are held at a time; they stay in a CPU's cache


@dataclass(frozen=True)
class TuneSpec(Spec):
    """How a tuned lens is trained; the defaults are the recipe of the shipped lenses.

    Args:
        tokens: training tokens, special ones included, rounded down to whole steps of batch_tokens.
        learning_rate: peak of Adam's rate, which rises over the first tenth of the steps and falls
            linearly to zero.
        weight_decay: pulls W and b to zero, so the lens to the logit lens.
        validation_tokens: of the validation split, for the divergences before and after, which are
            measured in float32.
        precision: of the logits' products in training.
    """

    data: DataSpec = field(default_factory=DataSpec)
    tokens: int = 300_000
    batch_tokens: int = 1024
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    validation_tokens: int = 16_384
    seed: int = 0
    precision: Literal["no", "bf16"] = "bf16"

    _prefix = "lens."

    def __post_init__(self):
        super().__post_init__()
        self._positive("learning_rate", "validation_tokens")
        self._require(self.weight_decay >= 0, "weight_decay", "0 or more")
        self._seed("seed")
        for name, least in (("batch_tokens", self.data.context_length), ("tokens", "batch_tokens")):
            bound = least if isinstance(least, int) else getattr(self, least)
            self._require(getattr(self, name) >= bound, name, f"a number of at least {bound}")


class Tuned(NamedTuple):
    """A trained lens.

    Args:
        log: one row per interval, `tokens` and `kl` (mean over translators, on training text).
        before, after: (translator,) mean KL on validation text, nats per token, at zero and
            trained.
    """

    lens: Lens
    log: pd.DataFrame
    before: Tensor
    after: Tensor


def cross_entropy(lm: LanguageModel, states: Tensor, final: Tensor) -> Tensor:
    """Cross-entropy of what the final norm and the unembedding read from `states`.

    Less the entropy of `final`, which no translator changes, it is KL(final ‖ read).

    Args:
        states: (token, d_model). final: (token, vocabulary), the model's own probabilities.

    Returns:
        (token,) nats; differentiable in `states`.
    """
    logits = lm.logits(states[None])[0].float()
    return torch.nn.functional.cross_entropy(logits, final, reduction="none")


def translator_divergences(
    lm: LanguageModel, weight: Tensor, bias: Tensor, batches: Iterable[Tensor]
) -> Tensor:
    """(translator,) mean KL, nats per token: translator i acts on the input of block i.

    Args:
        weight: (translator, d_model, d_model). bias: (translator, d_model).
        batches: (batch, position) int64 tokens; special tokens are left out of the mean.
    """

    def states(original):
        inputs = _block_inputs(original)
        return inputs + torch.einsum("lbpi,loi->lbpo", inputs, weight) + bias[:, None, None]

    return _mean_divergences(lm, states, batches)


def layer_divergences(lm: LanguageModel, lens: Lens, batches: Iterable[Tensor]) -> Tensor:
    """(layer,) mean KL, nats per token, of the residual stream after each block in the lens space.

    Args:
        lens: the identity gives the logit lens (nostalgebraist 2020).
        batches: (batch, position) int64 tokens; special tokens are left out of the mean.
    """

    def states(original):
        return lens.apply(original.residual.flatten(1, 2)).view(original.residual.shape)

    return _mean_divergences(lm, states, batches)


def _block_inputs(original) -> Tensor:
    """(block, batch, position, d_model): the embeddings, then the output of all but the last."""
    return torch.cat([original.embeddings[None], original.residual[:-1]])


@torch.no_grad()
def _mean_divergences(lm: LanguageModel, states: Callable, batches: Iterable[Tensor]) -> Tensor:
    total, count = 0.0, 0
    for tokens in batches:
        original = lm.original(tokens)
        keep = lm.keep_mask(original.tokens)
        final, entropy = _final(lm, original.residual[-1][keep])
        layers = [
            sum(cross_entropy(lm, *parts).double().sum() for parts in _parts(layer[keep], final))
            for layer in states(original)
        ]
        total, count = total + (torch.stack(layers) - entropy).cpu(), count + len(final)
    return total / count


def _final(lm: LanguageModel, states: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own probabilities of the next token, (token, vocabulary), and their entropy.

    The entropy is summed over tokens, in nats.
    """
    logs = lm.logits(states[None])[0].float().log_softmax(-1)
    probabilities = logs.exp()
    return probabilities, -(probabilities * logs).sum(-1).double().sum()


def _parts(states: Tensor, final: Tensor):
    return zip(states.split(_AT_ONCE), final.split(_AT_ONCE), strict=True)


def tune(lm: LanguageModel, blocks, spec: TuneSpec, validation=()) -> Tuned:
    """Train the translators of a language model on packed text.

    Args:
        blocks: `text.blocks` of the train split, or anything with such `batches`.
        validation: (batch, position) int64 tokens, read twice.

    Raises:
        Stopped: the divergence is not finite.
    """
    shape = lm.n_layers, lm.d_model
    weight = torch.zeros(*shape, lm.d_model, device=lm.device, requires_grad=True)
    bias = torch.zeros(*shape, device=lm.device, requires_grad=True)
    optimizer = torch.optim.Adam(
        [weight, bias], lr=spec.learning_rate, betas=(0.9, 0.999), amsgrad=True,
        weight_decay=spec.weight_decay,
    )  # fmt: skip
    steps = spec.tokens // spec.batch_tokens
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    before = translator_divergences(lm, weight, bias, validation)
    batches = blocks.batches(spec.batch_tokens // spec.data.context_length, seed=spec.seed)
    log, running = [], []
    with tqdm(total=steps * spec.batch_tokens, desc=f"lens of {lm.name}", unit=" tokens",
              unit_scale=True) as progress:  # fmt: skip
        for step, tokens in zip(range(1, steps + 1), batches, strict=False):
            running.append(_gradient(lm, weight, bias, tokens, spec.precision))
            torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(spec.batch_tokens)
            if step % max(steps // 50, 1) == 0 or step == steps:
                kl = sum(running) / len(running)
                if not math.isfinite(kl):
                    raise Stopped(f"the lens's divergence is {kl} at step {step}; nothing is kept")
                log.append({"tokens": step * spec.batch_tokens, "kl": round(kl, 5)})
                progress.set_postfix(kl=f"{kl:.4f}")
                running = []
    weight, bias = weight.detach(), bias.detach()
    after = translator_divergences(lm, weight, bias, validation)
    lens = Lens(weight, bias, model_name=lm.name)
    return Tuned(lens, pd.DataFrame(log), before, after)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth, then linear decay to zero."""
    rising = max(steps // 10, 1)
    return min((step + 1) / rising, (steps - step) / max(steps - rising, 1))


def _gradient(lm, weight: Tensor, bias: Tensor, tokens: Tensor, precision: str) -> float:
    """Add the gradient of every translator's mean divergence; their mean over translators.

    The translators have no parameter in common, so each is trained by its own divergence.
    """
    original = lm.original(tokens)
    keep = lm.keep_mask(original.tokens)
    with torch.no_grad():
        final, entropy = _final(lm, original.residual[-1][keep])
    total = -lm.n_layers * float(entropy)
    for i, inputs in enumerate(_block_inputs(original)):
        for states, targets in _parts(inputs[keep], final):
            translated = states + torch.nn.functional.linear(states, weight[i], bias[i])
            with torch.autocast(lm.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = cross_entropy(lm, translated, targets).sum()
            (loss / len(final)).backward()
            total += float(loss.detach())
    return total / lm.n_layers / len(final)


def make(model: str, spec: TuneSpec | None = None, force: bool = False) -> Path:
    """The folder of a model's tuned lens, trained if it is not there for this model and spec.

    It is trained on accelerate's device.

    Args:
        model: a shipped name, a Hugging Face folder or a hub id.
        force: train although it is there.

    Raises:
        SpecError: a model or text that cannot be read.
        Stopped: the divergence is not finite; nothing is written.
    """
    spec = spec or TuneSpec()
    folder = store.DATA / "lenses" / Path(model).name
    identity = {"model": models.key(model, None), "spec": to_dict(spec)}
    if not force and _made_of(folder) == identity:
        return folder
    lm = LanguageModel.load(ModelSpec(model), process_state().device)
    text.check_tokenizer(lm.tokenizer, lm.vocab_size)
    train, held_out = (text.blocks(spec.data, lm.tokenizer, s) for s in ("train", "validation"))
    sequences = max(spec.validation_tokens // spec.data.context_length, 1)
    validation = [*itertools.islice(held_out.batches(1), sequences)]
    store.provenance()  # of the code that trains, not of what is there when it ends
    start = time.perf_counter()
    tuned = tune(lm, train, spec, validation)
    facts = {
        **identity,
        "validation_tokens": sum(tokens.numel() for tokens in validation),
        "kl_before": [round(float(kl), 5) for kl in tuned.before],
        "kl_after": [round(float(kl), 5) for kl in tuned.after],
        "seconds": round(time.perf_counter() - start),
        **store.provenance(),
    }
    tuned.lens.check()
    with store.atomic_folder(folder) as new:
        tuned.lens.write(new, safetensors=True)
        tuned.log.to_csv(new / "log.csv", index=False)
        (new / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    return folder


def _made_of(folder: Path) -> dict | None:
    """The model and spec of a lens that is there."""
    try:
        facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return {"model": facts["model"], "spec": to_dict(stored(TuneSpec, facts["spec"]))}
    except (OSError, ValueError, KeyError, TypeError):
        return None
