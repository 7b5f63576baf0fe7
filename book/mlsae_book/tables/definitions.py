"""How far the released code's numbers are from the definitions, on data that need no model.

Activations, codes and logits are drawn with a stated seed: the planted world of `planted`, whose
codes are known, and Gaussian numbers for the rest.
"""

from __future__ import annotations

import itertools

import pandas as pd
import torch

from mlsae_book import as_released
from mlsae_book.planted import PlantedSpec, World, top_codes
from mlsae_core import metrics
from mlsae_core.lens import Lens
from mlsae_core.sae import MLSAE

#: Errors below it are of the arithmetic, in float64.
ROUNDING = 1e-9
WORLD = PlantedSpec(n_features=64, d_model=32, n_layers=4, active=6, context_length=128)


def special_tokens(seed: int = 0) -> pd.DataFrame:
    """MSE with one token in ten special: removed (ours), or zeroed and counted (released)."""
    _, x, clean = _draw(seed)
    keep = torch.rand(x.shape[1], generator=_generator(seed)) >= 0.1
    ours = (x[:, keep] - clean[:, keep]).square().mean()
    theirs = (as_released.masked(x, keep) - as_released.masked(clean, keep)).square().mean()
    return _table(("MSE, one token in ten special", ours, theirs))


def fvu_variants(seed: int = 0, offset: float = 3.0) -> pd.DataFrame:
    """Both FVUs of one tensor with an offset in every dimension, and the mean of batch ratios.

    offset: standard deviation over dimensions of a constant that is added to all tokens.
    """
    _, x, clean = _draw(seed)
    shift = offset * torch.randn(x.shape[-1], generator=_generator(seed))
    variants = [metrics.fvu(x + shift, clean + shift, v) for v in ("per_dimension", "global")]
    batches = list(zip(x.split(16, 1), clean.split(16, 1), strict=True))
    whole, ratios = metrics.fvu(x, clean), as_released.mean_fvu(batches)
    return _table(
        ("FVU, per-dimension (ours beside) and global (released)", *(v.mean() for v in variants)),
        ("FVU, global, over batches of 16 tokens", whole.mean(), ratios.mean()),
    )


def dead_window() -> pd.DataFrame:
    """The counter of a latent that is silent for 3 training and 5 evaluation batches of 1000."""
    sae, steps = MLSAE(4, 8, 2), torch.zeros(8, dtype=torch.int64)
    silent = torch.zeros(8, dtype=torch.bool)
    for batch in range(8):
        if batch < 3:  # the released code has no such condition
            sae.count_tokens(silent, 1000)
        steps = as_released.count_dead_steps(steps, silent)
    return _table(
        ("Dead counter: training tokens (ours), steps (released)",
         sae.tokens_since_active[0], steps[0])
    )  # fmt: skip


def lens_round_trip(seed: int = 0, size: float = 0.1, d: int = 64) -> pd.DataFrame:
    """Largest error of an activation of N(0, 1) numbers after a tuned lens and its inverse.

    In float64; what is below `ROUNDING` counts as none.

    size: standard deviation of the entries of W.
    """
    generator = _generator(seed)
    weight = size * torch.randn(1, d, d, generator=generator).double()
    bias = torch.randn(1, d, generator=generator).double()
    x = torch.randn(1, 512, d, generator=generator).double()
    lens = Lens(weight, bias, "as-released")
    y = lens.apply(x)
    back = lens.invert(y), as_released.invert_lens(y[0], weight[0], bias[0])
    errors = [(z - x).abs().max() for z in back]
    errors = [error.where(error >= ROUNDING, 0) for error in errors]
    return _table(("Tuned lens: error of the round trip", *errors))


def alignment(n_layers: int = 4) -> pd.DataFrame:
    """Which translator each layer's residual stream meets, found out by translators that say so.

    Translator i adds i + 1 to every dimension, so what is added less 1 is its number, and −1 is
    the identity.
    """
    weight = torch.zeros(n_layers, 1, 1)
    bias = torch.arange(1.0, n_layers + 1)[:, None]
    x = torch.zeros(n_layers, 1, 1)
    parts = {name: Lens(weight, bias, name).apply(x) for name in ("aligned", "as-released")}
    columns = {name: (part.flatten() - 1).int().tolist() for name, part in parts.items()}
    return pd.DataFrame({"layer": range(n_layers), **columns})


def divergence(seed: int = 0, positions: int = 256, spread: float = 1.0) -> pd.DataFrame:
    """KL of logits of N(0, 4) over 512 words, replaced ones being `spread` times noise away."""
    generator = _generator(seed)
    original = 2 * torch.randn(positions, 512, generator=generator).double()
    replaced = original + spread * torch.randn(positions, 512, generator=generator)
    forward = metrics.kl_divergence(original, replaced).mean()
    backward = metrics.kl_divergence(replaced, original).mean()
    return _table(
        ("KL, direction alone", forward, backward),
        (
            f"KL, {positions} positions: mean (ours), sum (released)",
            forward,
            as_released.summed_kl(original, replaced),
        ),
    )


def layer_variances(seed: int = 0) -> pd.DataFrame:
    """Variances of the layer and their ratios, of the true codes of a planted world."""
    codes = _draw(seed)[0]
    found = metrics.LayerDistribution(len(codes), codes.shape[-1])
    found.update(*top_codes(codes))
    result, batches = found.compute(), codes.split(128, 1)
    var, given_j, given_jt = as_released.variances(batches)
    latent, token = as_released.ratios(batches)
    mass = as_released.layer_probs(codes).mean(0).sum(1).mean()
    return _table(
        ("Sum over layers of P(layer | latent)", result.probs.sum(0).mean(), mass),
        ("Var(L)", result.var_l, var),
        ("E[Var(L | J)]", result.exp_var_l_given_j, given_j),
        ("E[Var(L | J, T)]", result.exp_var_l_given_jt, given_jt),
        ("Eq. 11", result.ratio_latent, latent),
        ("Eq. 12", result.ratio_token, token),
    )


def dictionary(seed: int = 0, n: int = 1024, d: int = 64) -> pd.DataFrame:
    """MMCS of n vectors from N(0, I) in d dimensions."""
    rows = metrics.gaussian_rows(n, d, _generator(seed))
    return _table(("MMCS of Gaussian rows", metrics.mmcs(rows).mean, as_released.half_mmcs(rows)))


def differences(seed: int = 0) -> pd.DataFrame:
    """All of the above in one table: ``quantity``, ``ours``, ``released``, ``factor``.

    factor is released over ours, infinite where ours is 0.
    """
    parts = [special_tokens(seed), fvu_variants(seed), dead_window(), lens_round_trip(seed)]
    parts += [divergence(seed), layer_variances(seed), dictionary(seed)]
    return pd.concat(parts, ignore_index=True)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table of these as text, by quantity, with the four digits in which all processors agree."""
    return table.set_index("quantity").map("{:.4g}".format)


def sweeps(seed: int = 0) -> pd.DataFrame:
    """How the differences depend on a setting, for `charts.definitions.differences`.

    Returns:
        One row per value: ``quantity``, ``setting`` (what ``x`` is), ``x``, ``series`` (ours or
        released), ``value``.
    """
    settings = {
        "FVU": ("Offset of the dimensions (activation units)", [0, 1, 2, 3, 4, 6]),
        "KL": ("Positions in the context", [64, 128, 256, 512]),
        "Lens round trip": ("Standard deviation of W's entries", [0, 0.02, 0.04, 0.06, 0.08, 0.1]),
        "MMCS": ("Rows of the dictionary", [128, 256, 512, 1024, 2048]),
    }
    measure = {
        "FVU": lambda x: fvu_variants(seed, x).iloc[0],
        "KL": lambda x: divergence(seed, x).iloc[1],
        "Lens round trip": lambda x: lens_round_trip(seed, x).iloc[0],
        "MMCS": lambda x: dictionary(seed, x).iloc[0],
    }
    rows = []
    for quantity, (setting, values) in settings.items():
        for x, series in itertools.product(values, ("ours", "released")):
            value = measure[quantity](x)[series]
            fields = (quantity, setting, x, series, value)
            names = ("quantity", "setting", "x", "series", "value")
            rows.append(dict(zip(names, fields, strict=True)))
    return pd.DataFrame(rows)


def _draw(seed: int) -> tuple[torch.Tensor, ...]:
    """Codes, stream and clean stream of 2048 tokens, (layer, token, …)."""
    world = World(PlantedSpec(**{**vars(WORLD), "seed": seed}))
    return tuple(part.flatten(1, 2) for part in world.draw(next(world.tokens(16))))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _table(*rows) -> pd.DataFrame:
    table = pd.DataFrame(
        [(name, float(ours), float(theirs)) for name, ours, theirs in rows],
        columns=["quantity", "ours", "released"],
    )
    return table.assign(factor=table.released / table.ours)
