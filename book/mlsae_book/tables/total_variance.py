"""The law of total variance on real codes: every term by its own definition, none by difference.

`metrics.LayerDistribution` gets these numbers from four sums per latent; here the distributions
themselves are held, one for each (token, latent), which only a small sample allows.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from mlsae_book.tables.order import ascending, evenly
from mlsae_core.activations import ActivationSource
from mlsae_core.metrics import LayerDistribution, layer_moments
from mlsae_core.sae import MLSAE


class Terms(NamedTuple):
    """Terms of Eqs. 14 and 15 of the MLSAE paper, in squared layers, float64."""

    var: float
    """Var(L), from P(L)."""
    exp_var_j: float
    """E[Var(L | J)], from P(L | j)."""
    var_exp_j: float
    """Var(E[L | J]), from the latents' mean layers."""
    exp_var_jt: float
    """E[Var(L | J, T)], from P(L | j, t)."""
    exp_var_exp_jt: float
    """E[Var(E[L | J, T] | J)], from the mean layers of each (token, latent)."""
    latents: pd.DataFrame
    """Eq. 14, one row per live latent: ``latent``, ``tokens`` (at which it is active), ``var`` (of
    P(L | j)), ``within`` (mean over its tokens of the variance at one token), ``between`` (variance
    of the mean layer at one token)."""


def terms(indices: Tensor, values: Tensor, n_latents: int) -> Terms:
    """Every term of the two laws, from the distributions P(L | t, j) themselves.

    Args:
        indices, values: active latents and their activations, (layer, token, k).
        n_latents: size of the dictionary.

    Raises:
        ValueError: no latent is active.
    """
    n_layers, tokens, _ = indices.shape
    token = torch.arange(tokens, device=indices.device)[None, :, None]
    pair, run = (token * n_latents + indices).unique(return_inverse=True)
    layer = torch.arange(n_layers, device=indices.device)[:, None, None].expand_as(run)
    h = torch.zeros(len(pair), n_layers, dtype=torch.float64, device=indices.device)
    h.index_put_((run, layer), values.double(), accumulate=True)
    latent, h = (pair % n_latents)[h.sum(1) > 0], h[h.sum(1) > 0]
    if not len(h):
        raise ValueError("values: expected at least one activation above 0, got none")
    live, j = latent.unique(return_inverse=True)

    def over_tokens(x: Tensor) -> Tensor:
        """Mean over the tokens of each live latent."""
        total = x.new_zeros(len(live), *x.shape[1:]).index_add_(0, j, x)
        return total / j.bincount().view(-1, *[1] * (x.ndim - 1))

    p_jt = h / h.sum(1, keepdim=True)
    p_j = over_tokens(p_jt)
    (mean_jt, var_jt), (mean_j, var_j) = layer_moments(p_jt), layer_moments(p_j)
    within = over_tokens(var_jt)
    between = over_tokens((mean_jt - mean_j[j]).square())
    table = pd.DataFrame(
        {
            "latent": live.cpu().numpy(),
            "tokens": j.bincount().cpu().numpy(),
            "var": var_j.cpu().numpy(),
            "within": within.cpu().numpy(),
            "between": between.cpu().numpy(),
        }
    )
    return Terms(
        var=layer_moments(p_j.mean(0))[1].item(),
        exp_var_j=var_j.mean().item(),
        var_exp_j=mean_j.var(correction=0).item(),
        exp_var_jt=within.mean().item(),
        exp_var_exp_jt=between.mean().item(),
        latents=table,
    )


def both_sides(found: Terms) -> pd.DataFrame:
    """The two laws, and Eq. 14 of one latent: ``left``, its two parts, ``difference`` of the sides.

    The latent is the one with the most tokens; the difference of its row is the largest of all
    latents.
    """
    latents = found.latents
    one = latents.loc[latents["tokens"].idxmax()]
    every = (latents["var"] - latents["within"] - latents["between"]).abs().max()
    rows = [
        ("Var(L) = E[Var(L | J)] + Var(E[L | J])", found.var, found.exp_var_j, found.var_exp_j),
        (
            "E[Var(L | J)] = E[Var(L | J, T)] + E[Var(E[L | J, T] | J)]",
            found.exp_var_j,
            found.exp_var_jt,
            found.exp_var_exp_jt,
        ),
        ("Var(L | j), the most frequent latent", one["var"], one["within"], one["between"]),
    ]
    table = pd.DataFrame(rows, columns=["law", "left", "first part", "second part"])
    difference = (table["left"] - table["first part"] - table["second part"]).abs()
    difference.iloc[-1] = every
    return table.assign(difference=difference)


@torch.no_grad()
def codes(source: ActivationSource, sae: MLSAE, size: int = 8) -> tuple[Tensor, Tensor]:
    """Indices and activations, (layer, token, k), of all that a source gives in one pass."""
    found = [sae.encode(batch.source) for batch in source.batches(size)]
    values, indices = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return indices, values


def beside_the_sums(found: Terms, indices: Tensor, values: Tensor, n_latents: int) -> pd.DataFrame:
    """The same variances from the four sums per latent of `metrics.LayerDistribution`.

    Returns:
        One row per variance: ``quantity``, ``by definition``, ``from sums``, ``difference``.
    """
    sums = LayerDistribution(len(indices), n_latents, device=indices.device)
    sums.update(indices, values)
    variances = sums.compute()
    rows = [
        ("Var(L)", found.var, variances.var_l),
        ("E[Var(L | J)]", found.exp_var_j, variances.exp_var_l_given_j),
        ("E[Var(L | J, T)]", found.exp_var_jt, variances.exp_var_l_given_jt),
    ]
    table = pd.DataFrame(rows, columns=["quantity", "by definition", "from sums"])
    return table.assign(difference=(table["by definition"] - table["from sums"]).abs())


def by_rank(latents: pd.DataFrame, most: int = 400) -> pd.DataFrame:
    """Latents in the order of their variance, at most `most` evenly spaced, for a chart.

    Returns:
        One row per latent and part: ``rank`` (0 the smallest variance), ``latent``, ``part``
        ("at one token", "between tokens"), ``variance`` (squared layers).
    """
    latents = latents.sort_values("latent")
    order = ascending(torch.from_numpy(latents["var"].to_numpy(copy=True)))
    keep = order[evenly(len(order), most)].numpy()
    chosen = latents.iloc[keep].assign(rank=range(len(keep)))
    chosen = chosen.rename(columns={"within": "at one token", "between": "between tokens"})
    return chosen.melt(
        ["rank", "latent"], ["at one token", "between tokens"], "part", "variance"
    ).reset_index(drop=True)
