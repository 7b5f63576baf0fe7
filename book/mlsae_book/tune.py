"""Train a tuned lens for a language model (Belrose et al. 2023), as a folder under `data/lenses`.

The objective is that of the tuned-lens package: translator i maps the input of block i to what the
final norm and the unembedding should read, so that the Kullback-Leibler divergence from the model's
own next-token distribution is least. All translators start at zero, where the tuned lens is the
logit lens, and are trained by Adam on the same tokens, each by its own divergence.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mlsae_core import models, pipeline, stops, store, text
from mlsae_core import train as training
from mlsae_core.keys import stored
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import DataSpec, ModelSpec, Spec, SpecError, canonical, to_dict
from mlsae_core.store import Stopped
from mlsae_core.train import process_state

MARK = "training.json"  # of a lens that was made here
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


def tune(
    lm: LanguageModel,
    blocks,
    spec: TuneSpec,
    validation=(),
    checkpoint: Path | None = None,
) -> Tuned:
    """Train the translators of a language model on packed text.

    Args:
        blocks: `text.blocks` of the train split, or anything with such `batches`.
        validation: (batch, position) int64 tokens, read twice.
        checkpoint: file to continue from if it exists, and to write every minute and when a signal
            (`stops`) ends the training.

    Raises:
        Stopped: the divergence is not finite. stops.Interrupted: a signal came.
    """
    shape = lm.n_layers, lm.d_model
    weight = torch.zeros(*shape, lm.d_model, device=lm.device, requires_grad=True)
    bias = torch.zeros(*shape, device=lm.device, requires_grad=True)
    optimizer = torch.optim.Adam(
        [weight, bias], lr=spec.learning_rate, betas=(0.9, 0.999), amsgrad=True,
        weight_decay=spec.weight_decay,
    )  # fmt: skip
    steps, step, log, running = spec.tokens // spec.batch_tokens, 0, [], []
    before = translator_divergences(lm, weight, bias, validation)
    if checkpoint is not None and checkpoint.is_file():
        step, log, running = _restore(checkpoint, weight, bias, optimizer, steps)

    def save():
        if checkpoint is not None:
            content = {
                "weight": weight.detach(),
                "bias": bias.detach(),
                "optimizer": optimizer.state_dict(),
            }
            content |= {"step": step, "log": log, "running": running}
            store.save_checkpoint(checkpoint, content)

    size = spec.batch_tokens // spec.data.context_length
    batches = blocks.batches(size, seed=spec.seed, start=step)
    saved = time.perf_counter()
    try:
        with stops.raised(), tqdm(total=steps * spec.batch_tokens, unit=" tokens", unit_scale=True,
                  initial=step * spec.batch_tokens, desc=f"lens of {lm.name}") as progress:  # fmt: skip
            while step < steps:
                optimizer.zero_grad()
                kl = _gradient(lm, weight, bias, next(batches), spec.precision)
                torch.nn.utils.clip_grad_norm_([weight, bias], 1.0)
                with stops.held():  # a checkpoint has all of a step or nothing
                    for group in optimizer.param_groups:
                        group["lr"] = spec.learning_rate * _rate(step, steps)
                    optimizer.step()
                    running.append(kl)
                    step += 1
                    progress.update(spec.batch_tokens)
                    if step % max(steps // 50, 1) == 0 or step == steps:
                        kl = sum(running) / len(running)
                        if not math.isfinite(kl):
                            raise Stopped(
                                f"the lens's divergence is {kl} at step {step}; nothing is kept"
                            )
                        log.append({"tokens": step * spec.batch_tokens, "kl": round(kl, 5)})
                        progress.set_postfix(kl=f"{kl:.4f}")
                        running = []
                if step == steps or time.perf_counter() - saved > training.CHECKPOINT_SECONDS:
                    save()
                    saved = time.perf_counter()
    except stops.Interrupted as error:
        save()
        kept = f"the same command continues from {checkpoint}" if checkpoint else "nothing is kept"
        raise error.kept(f"after step {step} of {steps}; {kept}") from error
    weight, bias = weight.detach(), bias.detach()
    after = translator_divergences(lm, weight, bias, validation)
    lens = Lens(weight, bias, model_name=lm.name)
    return Tuned(lens, pd.DataFrame(log), before, after)


@torch.no_grad()
def _restore(
    checkpoint: Path, weight: Tensor, bias: Tensor, optimizer, steps: int
) -> tuple[int, list, list]:
    """Step, log and divergences since its last row; translators and optimiser are set to it."""
    with store.restoring(checkpoint, "a checkpoint of this lens") as content:
        if content["step"] not in range(steps + 1):
            raise ValueError(f"its step is {content['step']} of {steps}")
        optimizer.load_state_dict(content["optimizer"])
        weight.copy_(content["weight"])
        bias.copy_(content["bias"])
        return content["step"], content["log"], content["running"]


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

    It is trained on accelerate's device, and named as the model's folder is.

    Args:
        model: a shipped name, a Hugging Face folder or a hub id.
        force: train although it is there; only so is a lens replaced, and only one made here.

    Raises:
        SpecError: a model or text that cannot be read, or another lens of that name.
        Stopped: the divergence is not finite; nothing is written.
    """
    spec = spec or TuneSpec()
    here = models.folder(model) is not None
    name = Path(os.path.abspath(Path(model).expanduser()) if here else model).name
    if not name:
        raise SpecError(f"model.path: expected a folder that has a name, got {model}")
    folder = store.DATA / "lenses" / name
    identity = {
        "model": models.key(model, None),
        "text": pipeline.text_key(spec.data),
        "spec": to_dict(spec),
        **pipeline.differs(spec.data, ModelSpec(model)),
    }
    digest = hashlib.sha256(canonical(identity).encode()).hexdigest()[:16]
    checkpoint = store.STORE / "lens" / f"{digest}.pt"
    store.settle(folder)
    store.check_own(folder, MARK)
    made = _made_of(folder)
    if made is not None and not force:
        made = {"text": identity["text"]} | made  # earlier lenses do not say of which
        other = [name for name in ("model", "text", "spec") if made.get(name) != identity[name]]
        if made.get(store.DIFFERS) not in (None, identity.get(store.DIFFERS)):
            other.append(f"release of its text or model ({made[store.DIFFERS]})")
        if not other:
            store.forget_checkpoint(checkpoint, folder / MARK)
            return folder
        raise SpecError(
            f"lens: {folder} was made of another {other[0]}; rename it to keep it, or replace it "
            "with --force"
        )
    lm = LanguageModel.load(ModelSpec(model), process_state().device)
    text.check_tokenizer(lm.tokenizer, lm.vocab_size)
    train, held_out = (text.blocks(spec.data, lm.tokenizer, s) for s in ("train", "validation"))
    sequences = max(spec.validation_tokens // spec.data.context_length, 1)
    validation = [*itertools.islice(held_out.batches(1), sequences)]
    store.provenance()  # of the code that trains, not of what is there when it ends
    start = time.perf_counter()
    if force:
        checkpoint.unlink(missing_ok=True)
    tuned = tune(lm, train, spec, validation, checkpoint)
    facts = {
        **identity,
        "validation_tokens": sum(tokens.numel() for tokens in validation),
        "kl_before": [round(float(kl), 5) for kl in tuned.before],
        "kl_after": [round(float(kl), 5) for kl in tuned.after],
        "seconds": round(time.perf_counter() - start),
        **store.provenance(),
    }
    tuned.lens.check()
    with store.atomic_folder(folder, mark=MARK) as new:
        tuned.lens.write(new, safetensors=True)
        tuned.log.to_csv(new / "log.csv", index=False)
        (new / MARK).write_text(json.dumps(facts, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)
    return folder


def _made_of(folder: Path) -> dict | None:
    """The model, text and spec of a lens that is there, and what of them was other than pinned."""
    if not (folder / MARK).is_file():
        return None
    try:
        facts = json.loads((folder / MARK).read_text(encoding="utf-8"))
        spec = to_dict(stored(TuneSpec, facts["spec"]))
        said = {name: facts[name] for name in ("model", "text", store.DIFFERS) if name in facts}
        return said | {"spec": spec}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"lens: {folder / MARK} cannot be read: {error!r}") from None
