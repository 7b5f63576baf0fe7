"""Text of one split that stands word for word in another, and what is measured apart from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlsae_core.activations import TextSource, one_pass
from mlsae_core.metrics import Reconstruction, cross_entropy
from mlsae_core.sae import MLSAE

LENGTHS = (16, 32, 64)
_BASE = np.array([0x9E3779B97F4A7C15], np.uint64)  # odd, so that no token is lost


def repeated(there: np.ndarray, here: np.ndarray, length: int) -> np.ndarray:
    """Which tokens lie in a span of so many that stands somewhere in another text.

    Spans are compared by hashes of 64 bits.

    Args:
        there, here: tokens, (sequence, position); the sequences of a text follow each other.
        length: tokens of a span, a power of two.

    Returns:
        bool, of the shape of `here`.
    """
    if length & (length - 1):
        raise ValueError(f"length: expected a power of two, got {length}")
    known, own = (_hashes(text.reshape(-1), length) for text in (there, here))
    found = np.isin(own, known)
    ends = np.zeros(here.size + 1, np.int64)  # +1 where a span begins, −1 behind its end
    np.add.at(ends, np.flatnonzero(found), 1)
    np.add.at(ends, np.flatnonzero(found) + length, -1)
    return (ends.cumsum()[:-1] > 0).reshape(here.shape)


def _hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """Of every span, (tokens − length + 1,); one of twice the length is made of two."""
    found, base = (tokens.astype(np.uint64) + np.uint64(1)) * _BASE, _BASE
    found ^= found >> np.uint64(29)
    for step in (1 << i for i in range(length.bit_length() - 1)):
        found = found[:-step] * base + found[step:]
        base = base * base
    return found


def shares(there: np.ndarray, here: np.ndarray, lengths: Sequence[int] = LENGTHS) -> pd.DataFrame:
    """One row per ``span`` (tokens): the ``share`` of the tokens of `here` in spans of `there`."""
    found = [float(repeated(there, here, length).mean()) for length in lengths]
    return pd.DataFrame({"span": lengths, "share": found})


@torch.no_grad()
def apart(source: TextSource, sae: MLSAE, flags: np.ndarray, size: int = 8) -> pd.DataFrame:
    """The model's loss and the dictionary's error on repeated tokens and on the others.

    Args:
        flags: (sequence, position) bool of the sequences of the source, from `repeated`.

    Returns:
        One row per ``text`` (``repeated``, ``new``): ``share`` of the vectors, ``loss`` (nats per
        predicted token, which is one of this kind), ``fvu`` (per dimension, mean over layers); nan
        where there is no such text.
    """
    n, d, lm = source.n_layers, source.d_model, source.lm
    flags, first = torch.as_tensor(flags), 0
    errors = [Reconstruction(n, d) for _ in range(2)]
    losses, counts = torch.zeros(2, 2, dtype=torch.float64)
    for batch in one_pass(source.batches(size), source, size, "apart", progress=False):
        kind = flags[first : first + len(batch.text)]
        first += len(batch.text)
        recon = sae(batch.source).recon
        of_vector = kind[batch.sequence, batch.position]
        last = lm.capture(batch.text, [lm.n_layers - 1])["residual"][0][:, :-1]
        ce = cross_entropy(lm.logits(last), batch.text[:, 1:]).double()
        for row, wanted in enumerate((True, False)):
            rows = of_vector == wanted
            if rows.any():
                errors[row].update(batch.source[:, rows], recon[:, rows])
            predicted = kind[:, 1:] == wanted
            losses[row] += ce[predicted].sum()
            counts[row] += predicted.sum()
    tokens = Tensor([e.moments.tokens for e in errors])
    known = [e.compute().fvu_per_dimension.mean() if e.moments.tokens else math.nan for e in errors]
    return pd.DataFrame(
        {
            "text": ("repeated", "new"),
            "share": (tokens / tokens.sum()).tolist(),
            "loss": (losses / counts).tolist(),
            "fvu": [float(fvu) for fvu in known],
        }
    )
