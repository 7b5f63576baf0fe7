"""What a language model says comes next after a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from mlsae_book.tables import prompt_ids
from mlsae_core.lm import LanguageModel


@torch.no_grad()
def next_tokens(lm: LanguageModel, prompts: Sequence[str], most: int = 5) -> pd.DataFrame:
    """The most probable next tokens of some prompts.

    Returns:
        One row per prompt and rank: ``prompt``, ``rank`` (from 1), ``token`` (its text),
        ``probability``.

    Raises:
        SpecError: an empty prompt, or one longer than the model's context.
    """
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(lm, prompt)], device=lm.device)
        last = lm.original(ids).residual[-1][:, -1:]
        probabilities, tokens = lm.logits(last)[0, 0].float().softmax(-1).topk(most)
        pairs = zip(probabilities.tolist(), tokens.tolist(), strict=True)
        for rank, (value, token) in enumerate(pairs, 1):
            text = lm.tokenizer.decode([token])
            rows.append({"prompt": prompt, "rank": rank, "token": text, "probability": value})
    return pd.DataFrame(rows)
