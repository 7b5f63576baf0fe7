"""Finished tables for pages: one row per thing shown, one column per number."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from mlsae_book.tables.order import ascending, evenly
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import SpecError


def between(value: float, low: float, high: float, digits: int = 3) -> str:
    """A number with the ends of what it may be, as tables show it: 0.500 [0.400, 0.600]."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def prompt_ids(lm: LanguageModel, prompt: str) -> list[int]:
    """The tokens of a prompt; one that is empty or longer than the model's context is refused."""
    ids = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    limit = lm.max_positions or len(ids)
    if not 0 < len(ids) <= limit:
        raise SpecError(f"prompt: expected 1 to {limit} tokens, got {len(ids)}: {prompt[:40]!r}")
    return ids


@torch.no_grad()
def prompt_norms(lm: LanguageModel, prompts: Sequence[str]) -> pd.DataFrame:
    """L2 norm of the residual stream after every block at every token of some prompts.

    Returns:
        One row per (prompt, position, layer): ``prompt``, ``position``, ``token`` (its text),
        ``layer``, ``norm`` (activation units).

    Raises:
        SpecError: an empty prompt, or one longer than the model's context.
    """
    frames = []
    for prompt in prompts:
        ids = prompt_ids(lm, prompt)
        residual = lm.capture(torch.tensor([ids]), range(lm.n_layers))["residual"][:, 0]
        norm = torch.linalg.vector_norm(residual.float(), dim=-1).cpu()
        layer, position = torch.meshgrid(
            torch.arange(lm.n_layers), torch.arange(len(ids)), indexing="ij"
        )
        frames.append(
            pd.DataFrame(
                {
                    "prompt": prompt,
                    "position": position.flatten().numpy(),
                    "token": [lm.tokenizer.decode([ids[i]]) for i in position.flatten().tolist()],
                    "layer": layer.flatten().numpy(),
                    "norm": norm.flatten().numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def latent_table(
    arrays: dict[str, Tensor], weighting: str = "probs", most: int = 600
) -> pd.DataFrame:
    """Distributions over layers as a heatmap wants them, at most `most` live latents.

    Live latents are sorted by their mean layer E[L | j] and, where there are more than `most`,
    every n-th of that order is kept, so the sample has the shape of the whole.

    Args:
        arrays: what `layers.derived` returns. weighting: ``probs`` (each active token counts the
            same), ``probs_by_total`` (each by its activation), or a null model's.

    Returns:
        One row per (latent, layer): ``latent``, ``layer``, ``probability``, ``order``.
    """
    live = arrays["active_tokens"].nonzero().squeeze(1)
    chosen = live[ascending(arrays["mean_layer"][live])][evenly(len(live), most)]
    probs = arrays[weighting][:, chosen]
    n_layers, n = probs.shape
    return pd.DataFrame(
        {
            "latent": chosen.repeat(n_layers).numpy(),
            "layer": torch.arange(n_layers).repeat_interleave(n).numpy(),
            "probability": probs.flatten().numpy(),
            "order": torch.arange(n).repeat(n_layers).numpy(),
        }
    )


def variance_table(numbers: dict) -> pd.DataFrame:
    """The variances and ratios of `distributions`: value, 95 % interval, null models."""
    meaning = {
        "var_l": "Var(L)",
        "exp_var_l_given_j": "E[Var(L | J)]",
        "exp_var_l_given_jt": "E[Var(L | J, T)]",
        "ratio_latent": "E[Var(L | J)] / Var(L)",
        "ratio_token": "E[Var(L | J, T)] / E[Var(L | J)]",
    }
    return pd.DataFrame(
        [{"quantity": label, **numbers[name]} for name, label in meaning.items()]
    ).round(4)


def long_log(log: pd.DataFrame) -> pd.DataFrame:
    """A training log with one row per (step, layer): `fvu_<layer>` columns become rows."""
    layers = [c.removeprefix("fvu_") for c in log if c.startswith("fvu_")]
    keep = [c for c in log if not c.startswith("fvu") and c != "layer"]
    parts = [
        log[keep].assign(layer=int(name) if name.isdigit() else 0, fvu=log[f"fvu_{name}"])
        for name in layers
    ]
    return pd.concat(parts, ignore_index=True)
