"""At how many layers a latent is active at one token, and whether it is still at the next.

`Persistence` counts (token, latent) pairs by the layers at which they are active; `Survival` asks
how many of the latents that are active before a step are active after it, where the step is a block
of the language model or a null model of one. Both are exact, one pass, mergeable, and resample
blocks of sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mlsae_core.metrics.distribution import _check_codes
from mlsae_core.metrics.reconstruction import _check_same
from mlsae_core.metrics.resampling import _blocks, _drawn_on, _resampled


class PersistenceResult(NamedTuple):
    """Of the pairs (token, latent) that are active at some layer. float64."""

    pairs: int
    """How many there are."""
    layers: Tensor
    """Share of the pairs that are active at exactly 1, 2, … n_layers layers, (n_layers,)."""
    mean_layers: float
    """Layers at which a pair is active, on average."""
    contiguous: float
    """Share of the pairs of several layers whose layers follow each other; nan if there are none.
    """
    together: Tensor
    """P(active at layer m | active at layer l), (n_layers, n_layers); nan if never active at l."""


class Persistence:
    """Counts of the layers at which a latent is active at one token.

    Args:
        n_layers, n_latents: sizes as in `LayerDistribution`.
        n_blocks: blocks of sequences to resample; 1 if no interval is wanted.
        device: where codes are sorted; the counts are small.
    """

    def __init__(
        self,
        n_layers: int,
        n_latents: int,
        n_blocks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.device = (n_layers, n_latents, n_blocks), torch.device(device)
        zeros = torch.zeros(n_blocks, n_layers, dtype=torch.float64)
        self.layers, self.runs = zeros, zeros.clone()  # pairs by layers; those without a gap
        self.together = zeros.new_zeros(n_blocks, n_layers, n_layers)

    @torch.no_grad()
    def update(self, indices: Tensor, values: Tensor, sequences: Tensor | None = None) -> None:
        """Add a batch: the arguments of `LayerDistribution.update`."""
        n_layers, n_latents, n_blocks = self.shape
        _check_codes(indices, values, n_layers, n_latents)
        tokens = indices.shape[1]
        blocks = _blocks(sequences, tokens, n_blocks).cpu()
        for block in blocks.unique().tolist():
            rows = (blocks == block).to(indices.device)
            active, _ = layers_of_pairs(indices[:, rows], values[:, rows] > 0, self.device)
            active = active.double()
            count = active.sum(1).long()
            # As many beginnings as there are runs of layers without a gap.
            begins = active[:, 0] + (active[:, 1:] > active[:, :-1]).sum(1)
            for kept, chosen in ((self.layers, count), (self.runs, count[begins == 1])):
                kept[block] += torch.bincount(chosen - 1, minlength=n_layers).cpu()
            self.together[block] += (active.T @ active).cpu()

    def merge(self, other: Persistence) -> Self:
        """Add what another accumulator has seen (disjoint tokens); returns self."""
        _check_same(self.shape, other.shape)
        for name in ("layers", "runs", "together"):
            getattr(self, name).add_(getattr(other, name))
        return self

    def compute(self) -> PersistenceResult:
        """The shares of everything seen so far."""
        layers = self.layers.sum(0)
        if not layers.any():
            raise ValueError("no latent has been active yet: call update() with activations first")
        together = self.together.sum(0)
        shares, mean, contiguous = _shares(layers, self.runs.sum(0))
        return PersistenceResult(
            int(layers.sum()),
            shares,
            mean.item(),
            contiguous.item(),
            together / together.diagonal()[:, None],
        )

    def bootstrap(
        self, n_replicates: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`layers` (n_replicates, n_layers), `mean_layers` and `contiguous` (n_replicates,) of
        resampled data, for `basic_interval`."""
        weights = _resampled(self.shape[2], n_replicates, generator).cpu()
        return _shares(weights @ self.layers, weights @ self.runs)


class SurvivalResult(NamedTuple):
    """What of the active latents stays active over each step. float64."""

    rate: Tensor
    """P(active after | active before), (step,); nan where nothing was active before."""
    rate_by_latent: Tensor
    """The same for each latent, (step, n_latents)."""
    active: Tensor
    """Tokens at which the latent is active before the step, (step, n_latents) int64."""


class Survival:
    """How many latents that are active before a step are active after it.

    Args:
        n_steps: steps, such as n_layers − 1 blocks; n_latents, n_blocks: as in `Persistence`.
        device: where the counts are kept.
    """

    def __init__(
        self,
        n_steps: int,
        n_latents: int,
        n_blocks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = (n_steps, n_latents, n_blocks)
        zeros = torch.zeros(n_steps, n_latents, dtype=torch.float64, device=device)
        self.before, self.kept = zeros, zeros.clone()
        self.sums = zeros.new_zeros(n_blocks, 2, n_steps)  # active before, and kept, by block

    @torch.no_grad()
    def update(
        self,
        before: tuple[Tensor, Tensor],
        after: tuple[Tensor, Tensor],
        sequences: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            before, after: indices and values of the codes on both sides of each step, each
                (step, token, k); k may differ between them.
            sequences: as in `LayerDistribution.update`.
        """
        n_steps, n_latents, n_blocks = self.shape
        device = self.before.device
        left, stays = _kept(before, after, n_steps, n_latents, device)
        blocks = _blocks(sequences, left.shape[1], n_blocks).to(device)
        step = torch.arange(n_steps, device=device)[:, None, None].expand_as(left)
        cells = (step * n_latents + left.clamp(min=0)).flatten()
        for row, found in enumerate((left >= 0, stays)):
            kept = (self.before, self.kept)[row]
            kept.view(-1).index_add_(0, cells, found.double().flatten())
            self.sums[:, row].index_add_(0, blocks, found.double().sum(-1).T)

    def merge(self, other: Survival) -> Self:
        """Add what another accumulator has seen (disjoint tokens); returns self."""
        _check_same(self.shape, other.shape)
        for name in ("before", "kept", "sums"):
            mine = getattr(self, name)
            mine += getattr(other, name).to(mine.device)
        return self

    def compute(self) -> SurvivalResult:
        """The rates of everything seen so far."""
        before, kept = self.sums.sum(0)
        return SurvivalResult(kept / before, self.kept / self.before, self.before.long())

    def bootstrap(self, n_replicates: int, generator: torch.Generator | None = None) -> Tensor:
        """`rate` of resampled data, (n_replicates, step), for `basic_interval`."""
        weights = _resampled(self.shape[2], n_replicates, generator).to(self.sums.device)
        before, kept = torch.einsum("rb,bis->irs", weights, self.sums)
        return kept / before


class ExcessResult(NamedTuple):
    """How much more often than in a null model each latent survives a step. float64."""

    difference: Tensor
    """Of both shares that survive, (step, n_latents); nan for a latent never active before."""
    error: Tensor
    """Its standard error over sequences, (step, n_latents)."""
    active: Tensor
    """Tokens at which the latent is active before the step, (step, n_latents) int64."""
    sequences: Tensor
    """Sequences in which it is, (step, n_latents) int64: with few the error says little."""


class Excess:
    """Survival beside that of a null model of the same step, latent by latent.

    Tokens of one sequence depend on each other, so the error is that of a ratio of sums over
    sequences (Cochran 1977, Section 6.3), with d = stays − stays in the null model and b = active
    before, of each sequence: se² = n / (n − 1) · Σ (d − D b)² / (Σ b)², D = Σ d / Σ b.

    Args:
        n_steps, n_latents, device: as in `Survival`.
    """

    def __init__(self, n_steps: int, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.shape, self.seen = (n_steps, n_latents), 0
        # rows: Σ b, Σ d, Σ b², Σ b d, Σ d², Σ [b > 0]
        self.sums = torch.zeros(6, n_steps, n_latents, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(
        self,
        before: tuple[Tensor, Tensor],
        after: tuple[Tensor, Tensor],
        null: tuple[Tensor, Tensor],
        sequences: Tensor,
    ) -> None:
        """Add a batch of whole sequences.

        Args:
            before, after: as in `Survival.update`. null: as after, of the null model.
            sequences: of each token, (token,); no batch may have one that another had.
        """
        n_steps, n_latents = self.shape
        device = self.sums.device
        left, stays = _kept(before, after, n_steps, n_latents, device)
        _, by_chance = _kept(before, null, n_steps, n_latents, device)
        if sequences.shape != (tokens := left.shape[1],):
            raise ValueError(f"sequences must be ({tokens},), got {tuple(sequences.shape)}")
        numbers, sequence = sequences.to(device).unique(return_inverse=True)
        step = torch.arange(n_steps, device=device)[:, None, None]
        cells = (step * n_latents + left.clamp(min=0)) * len(numbers) + sequence[:, None]
        b, d = self.sums.new_zeros(2, n_steps * n_latents * len(numbers))
        for total, found in ((b, left >= 0), (d, stays.double() - by_chance.double())):
            total.index_add_(0, cells.flatten(), found.double().flatten())
        b, d = (total.view(n_steps, n_latents, -1) for total in (b, d))
        self.sums += torch.stack([b, d, b * b, b * d, d * d, (b > 0).double()]).sum(-1)
        self.seen += len(numbers)

    def merge(self, other: Excess) -> Self:
        """Add what another accumulator has seen (disjoint sequences); returns self."""
        _check_same(self.shape, other.shape)
        self.sums += other.sums.to(self.sums.device)
        self.seen += other.seen
        return self

    def compute(self) -> ExcessResult:
        """The differences of everything seen so far, and their errors."""
        before, more, square, product, difference, sequences = self.sums
        ratio = more / before
        squares = (difference - 2 * ratio * product + ratio**2 * square).clamp(min=0)
        error = (self.seen / (self.seen - 1) * squares).sqrt() / before
        return ExcessResult(ratio, error, before.long(), sequences.long())


def _kept(
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    n_steps: int,
    n_latents: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """What is active before each step, (step, token, k), −1 where a latent is not; and whether it
    is still active after it."""
    for indices, values in (before, after):
        _check_codes(indices, values, n_steps, n_latents)
    (indices, values), (later, later_values) = before, after
    if later.shape[1] != (tokens := indices.shape[1]):
        raise ValueError(f"after must have the {tokens} tokens of before, got {later.shape[1]}")
    # What is not active is a latent that does not exist, and another one on each side.
    left = indices.masked_fill(values <= 0, -1).to(device)
    right = later.masked_fill(later_values <= 0, -2).to(device)
    stays = torch.cat([
        (a[..., None] == b[..., None, :]).any(-1)
        for a, b in zip(left.split(256, 1), right.split(256, 1), strict=True)
    ], 1)  # fmt: skip
    return left, stays


# --- null models of a block, and activity without sharp edges -----------------------------------


def shuffled_updates(x: Tensor, generator: torch.Generator | None = None, gap: int = 1) -> Tensor:
    """Null model: each token's stream plus the update that the blocks make at another token.

    What an update does on average stays, and so does its size; that it answers this token goes.

    Args:
        x: the residual stream, (layer, token, d_model).
        generator: on any device, where the numbers are drawn; by default the CPU's.
        gap: blocks whose updates are taken together.

    Returns:
        (layer − gap, token, d_model), in the place of x[gap:].
    """
    order = torch.rand(x.shape[1], generator=generator, device=_drawn_on(generator)).argsort()
    return x[:-gap] + (x[gap:] - x[:-gap])[:, order.to(x.device)]


def random_updates(x: Tensor, generator: torch.Generator | None = None, gap: int = 1) -> Tensor:
    """Null model: each token's stream plus an update in a random direction, whose part along the
    stream and whose norm are those of the blocks'. Arguments and result as of `shuffled_updates`.
    """
    first = x[:-gap]
    update = x[gap:] - first
    along = first / torch.linalg.vector_norm(first, dim=-1, keepdim=True)
    radial = (update * along).sum(-1, keepdim=True)
    across = torch.linalg.vector_norm(update - radial * along, dim=-1, keepdim=True)
    noise = torch.randn(update.shape, generator=generator, device=_drawn_on(generator)).to(x)
    noise -= (noise * along).sum(-1, keepdim=True) * along
    noise /= torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
    return first + radial * along + across * noise


def drifted(x: Tensor, update: Callable[[Tensor], Tensor]) -> Tensor:
    """Null model of the whole stream: from the first layer on, nothing but such updates.

    Args:
        x: the residual stream, (layer, token, d_model).
        update: `shuffled_updates` or `random_updates`; it is asked once for each block.

    Returns:
        (layer, token, d_model): x[0], and each layer the one before it plus the update that the
        null model makes of the block's own.
    """
    stream = [x[0]]
    for before, after in itertools.pairwise(x):
        pair = torch.stack([stream[-1], stream[-1] + after - before])
        stream.append(update(pair)[0])
    return torch.stack(stream)


def of_batch(indices: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Codes by a threshold in the place of TopK: of all vectors together, as many latents as TopK
    would keep, the largest (BatchTopK, Bussmann et al. 2024).

    Args:
        indices, values: (layer, token, more than k).

    Returns:
        The same indices, and values that are 0 where a latent is below the threshold.
    """
    most = k * values.shape[0] * values.shape[1]
    least = values.flatten().topk(most).values[-1]
    return indices, torch.where(values >= least, values, 0)


def hysteresis(indices: Tensor, values: Tensor, k: int, n_layers: int) -> tuple[Tensor, Tensor]:
    """Codes without the margin of TopK: a latent goes on where it is among the k largest, and stays
    on over the layers around while it is among those given.

    Args:
        indices, values: (layer, token, k_off) with k_off > k, the largest first.

    Returns:
        The same indices, and values that are 0 where a latent is off.
    """
    if not (len(indices) == n_layers and 0 < k < indices.shape[2]):
        raise ValueError(
            f"expected codes of {n_layers} layers with more than k = {k} latents for each vector, "
            f"got {tuple(indices.shape)}"
        )
    held, place = layers_of_pairs(indices, values > 0)
    first = torch.zeros_like(values, dtype=torch.bool)
    first[..., :k] = values[..., :k] > 0
    on = torch.zeros_like(held)
    layer = torch.arange(n_layers, device=indices.device)[:, None, None].expand_as(indices)
    on[place[first], layer[first]] = True
    for _ in range(n_layers - 1):
        on[:, 1:] |= on[:, :-1] & held[:, 1:]
        on[:, :-1] |= on[:, 1:] & held[:, :-1]
    kept = torch.zeros_like(first)
    active = values > 0
    kept[active] = on[place[active], layer[active]]
    return indices, torch.where(kept, values, 0)


def layers_of_pairs(
    indices: Tensor, active: Tensor, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """The pairs (token, latent) that are active at some layer, and at which layers.

    Args:
        indices: (layer, token, k), distinct within a vector; active: bool, of the same shape.

    Returns:
        (pair, layer) bool; and of each entry of `indices` the number of its pair, −1 where it is
        not active. Pairs are ordered by token, then by latent.
    """
    device = indices.device if device is None else torch.device(device)
    indices, active = indices.to(device), active.to(device)
    token = torch.arange(indices.shape[1], device=device)[None, :, None].expand_as(indices)
    size = int(indices.max()) + 1 if indices.numel() else 1
    pairs, number = (token[active] * size + indices[active]).unique(return_inverse=True)
    layer = torch.arange(len(indices), device=device)[:, None, None].expand_as(indices)
    found = torch.zeros(len(pairs), len(indices), dtype=torch.bool, device=device)
    found[number, layer[active]] = True
    place = torch.full_like(indices, -1)
    place[active] = number
    return found, place


def _shares(layers: Tensor, runs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, mean and contiguity from counts (…, n_layers) of pairs by their layers."""
    pairs = layers.sum(-1, keepdim=True)
    number = torch.arange(1, layers.shape[-1] + 1, dtype=layers.dtype)
    contiguous = runs[..., 1:].sum(-1) / layers[..., 1:].sum(-1)
    return layers / pairs, (layers * number).sum(-1) / pairs[..., 0], contiguous
