"""Planted truth: residual streams made of known features, and every estimator held against them.

A world has features with known directions, known distributions over layers and a known share of
tokens at which they persist. It is a source of activations as a language model with its text is, so
the autoencoder is trained on it by `train.train` itself, and what the book's estimators say of the
autoencoder can be compared with what is true.

At a token a feature fires with probability p, with an activation a between 1/2 and 3/2. With
probability `persistence` it persists: layer l receives a · w_l / max w, w being the feature's
distribution over layers. Otherwise one layer, drawn from w, receives a. Either way E[P(L | t, j)]
is w, so Var(L | j) is that of w, and of it the share `persistence` lies within tokens: Eq. 12's
ratio is `persistence`, and Eq. 11's follows from the w (equations of Lawson et al. 2025).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlsae_core import analysis, metrics, store, train
from mlsae_core.activations import Batch
from mlsae_core.keys import keyed
from mlsae_core.sae import MLSAE
from mlsae_core.spec import (
    DataSpec,
    ModelSpec,
    RunSpec,
    SaeSpec,
    SiteSpec,
    Spec,
    TrainSpec,
    to_dict,
)

KINDS = ("single", "neighbours", "everywhere")
RECOVERED = 0.9  # a direction with a row of at least this cosine similarity is recovered
AMPLITUDE_SQUARE = 13 / 12  # E[a²] of a uniform on [1/2, 3/2]; E[a] is 1
TRAINING_STREAM = 2**32  # sequences from this number on are for training, those before for tests
EVALUATION_SEQUENCES = 16  # per batch
BATCH_TOKENS = 1024  # per optimiser step


@dataclass(frozen=True)
class PlantedSpec(Spec):
    """A world, the autoencoder trained on it, and the tokens on which both are compared.

    Args:
        n_features, d_model, n_layers: sizes.
        active: expected features at a token, all layers together.
        single, neighbours: shares of the features that live at one layer, or at one and half as
            much at each neighbour; the rest lives everywhere alike.
        persistence: share of a feature's tokens at which it is active at all of its layers at once.
        drift: angle in degrees by which a feature's direction turns from a layer to the next.
        noise: length of the noise vector, where a typical feature has length 1.
        growth: factor by which vectors grow from a layer to the next.
        expansion_factor, k, training_tokens: of the autoencoder.
        tokens: of the comparison.
        context_length: tokens per sequence, the unit that the bootstrap resamples.
    """

    n_features: int = 128
    d_model: int = 48
    n_layers: int = 5
    active: float = 16.0
    single: float = 1 / 3
    neighbours: float = 1 / 3
    persistence: float = 0.5
    drift: float = 0.0
    noise: float = 0.2
    growth: float = 1.3
    expansion_factor: int = 8
    k: int = 6
    training_tokens: int = 400_000
    tokens: int = 32_768
    context_length: int = 128
    seed: int = 0

    _prefix = "planted."

    def __post_init__(self):
        super().__post_init__()
        counts = ("n_features", "expansion_factor", "k", "training_tokens", "tokens")
        self._positive(*counts, "growth", "context_length")
        self._seed("seed")
        self._require(self.d_model >= 3, "d_model", "at least 3: two directions beside the ones")
        self._require(self.n_layers >= 2, "n_layers", "at least 2 layers to be distributed over")
        most = self.n_features
        self._require(0 < self.active < most, "active", f"above 0 and below n_features {most}")
        for name in ("single", "neighbours", "persistence"):
            self._require(0 <= getattr(self, name) <= 1, name, "a share from 0 to 1")
        both = self.single + self.neighbours
        self._require(both <= 1 + 1e-9, "neighbours", "a share that with `single` makes at most 1")
        self._require(0 <= self.drift <= 180, "drift", "degrees from 0 to 180")
        self._require(self.noise >= 0, "noise", "a length of 0 or more")
        latents = self.d_model * self.expansion_factor
        self._require(self.k <= latents, "k", f"at most the {latents} latents")
        shortest = self.context_length * 2
        self._require(self.tokens >= shortest, "tokens", f"at least two sequences ({shortest})")

    @property
    def run(self) -> RunSpec:
        """The training run, as `train.train` takes it; `model` and `data` are names alone."""
        return RunSpec(
            ModelSpec("planted"),
            DataSpec("planted", context_length=self.context_length),
            SiteSpec(),
            SaeSpec(self.expansion_factor, self.k),
            TrainSpec(self.training_tokens, self.seed, BATCH_TOKENS),
        )


class World:
    """A residual stream of known features: an `activations.ActivationSource`.

    Attributes:
        weights: (feature, layer), each row a feature's distribution over layers.
        kinds: (feature,) names of `KINDS`.
        directions: (layer, feature, d_model), unit length; perpendicular to the vector of ones,
            which standardising takes away.
        scale: (layer,), lengths of the layers relative to the first.
    """

    def __init__(self, spec: PlantedSpec):
        self.spec, self.site = spec, spec.run.site
        self.n_layers, self.d_model = spec.n_layers, spec.d_model
        self.device = torch.device("cpu")
        batch = spec.context_length * EVALUATION_SEQUENCES
        self.n_sequences = max(spec.tokens // batch, 1) * EVALUATION_SEQUENCES
        self.key = store.key("planted", keyed(spec), {})
        self.kinds, self.weights = _layer_weights(spec)
        generator = torch.Generator().manual_seed(spec.seed)
        plane = torch.randn(
            spec.n_features, spec.d_model, 2, generator=generator, dtype=torch.float64
        )
        plane = torch.linalg.qr(plane - plane.mean(1, keepdim=True))[0]
        layers = torch.arange(spec.n_layers)
        angle = torch.deg2rad(spec.drift * layers.double())[:, None, None]
        self.directions = (angle.cos() * plane[..., 0] + angle.sin() * plane[..., 1]).float()
        self.scale = spec.growth ** layers.float()

    # --- an activation source -----------------------------------------------------------------

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """The stream with its noise; see `activations.ActivationSource`.

        One pass is the sequences of the comparison; with a seed they are of the training part,
        which never ends. A token is its number in the world's stream.
        """
        for tokens in itertools.islice(self.tokens(size, seed, start), 0, None, every):
            x = self.draw(tokens)[1].flatten(1, 2)
            places = torch.ones_like(tokens, dtype=torch.bool).nonzero(as_tuple=True)
            yield Batch(x, x, tokens, *places)

    def tokens(self, size: int, seed: int | None = None, start: int = 0) -> Iterator[Tensor]:
        """The tokens of `batches`, (size, context_length), from batch `start` on."""
        context = torch.arange(self.spec.context_length)
        first, end = (0, self.n_sequences) if seed is None else (TRAINING_STREAM, 2**62)
        for number in range(first + start * size, end, size):
            sequences = torch.arange(number, min(number + size, end))
            yield sequences[:, None] * len(context) + context

    # --- the truth ----------------------------------------------------------------------------

    def draw(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """True activations, the stream with its noise, and the stream without it.

        (layer, batch, position, feature or d_model), of whole sequences of token numbers. Each
        sequence has a generator of its own, so it is no matter how they are batched.
        """
        numbers = (tokens[:, 0] // self.spec.context_length).tolist()
        drawn = [self._sequence(number) for number in numbers]
        codes, noise = (torch.stack(part, 1) for part in zip(*drawn, strict=True))
        clean = self.embed(codes)
        return codes, clean + self.scale[:, None, None, None] * noise, clean

    def embed(self, codes: Tensor) -> Tensor:
        """The stream that codes (layer, …, feature) make without noise, (layer, …, d_model)."""
        x = torch.bmm(codes.flatten(1, -2), self.directions).view(*codes.shape[:-1], self.d_model)
        return x * self.scale.view(-1, *[1] * (codes.ndim - 1))

    def _sequence(self, number: int) -> tuple[Tensor, Tensor]:
        """Codes (layer, position, feature) and noise (layer, position, d_model) of a sequence."""
        spec, n = self.spec, self.spec.context_length
        state = np.random.SeedSequence([spec.seed, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        fires = torch.rand(n, spec.n_features, generator=generator) < spec.active / spec.n_features
        token, feature = fires.nonzero(as_tuple=True)
        amplitude, persists, place = torch.rand(3, len(token), generator=generator)
        weights = self.weights[feature].float()
        layer = (place[:, None] > weights.cumsum(1)).sum(1).clamp(max=self.n_layers - 1)
        alone = torch.nn.functional.one_hot(layer, self.n_layers)
        together = weights / weights.amax(1, keepdim=True)
        share = torch.where((persists < spec.persistence)[:, None], together, alone)
        codes = torch.zeros(self.n_layers, n, spec.n_features)
        codes[:, token, feature] = (share * (0.5 + amplitude)[:, None]).T
        noise = torch.randn(self.n_layers, n, self.d_model, generator=generator)
        return codes, noise * (spec.noise / math.sqrt(self.d_model))

    @property
    def activation(self) -> Tensor:
        """Mean activation of each feature at each layer, (feature, layer)."""
        w, q = self.weights, self.spec.persistence
        p = self.spec.active / self.spec.n_features
        return p * (q * w / w.amax(1, keepdim=True) + (1 - q) * w)

    @property
    def offset(self) -> Tensor:
        """Mean of the stream at each layer, (layer, d_model), before layers grow."""
        return torch.einsum("fl,lfd->ld", self.activation, self.directions.double())

    def truth(self) -> dict[str, float]:
        """The quantities of `score`, from the specification alone, no token being drawn.

        adjacent_cosine and fvu are ratios of expectations: with independent features, the centred
        product of adjacent layers is Σ_f Cov(h_l, h_m) cos(drift), a layer's energy Σ_f Var(h_l)
        and that of the noise. (The mean of cosines over tokens is a little smaller.)
        """
        spec, w = self.spec, self.weights
        mean, variance = metrics.layer_moments(w)
        within, between = variance.mean(), mean.var(correction=0)
        p, q = spec.active / spec.n_features, spec.persistence
        together = w / w.amax(1, keepdim=True)
        first = self.activation
        second = p * AMPLITUDE_SQUARE * (q * together**2 + (1 - q) * w)
        product = p * AMPLITUDE_SQUARE * q * together[:, :-1] * together[:, 1:]
        energy = (second - first**2).sum(0) + spec.noise**2
        common = (product - first[:, :-1] * first[:, 1:]).sum(0)
        cosine = math.cos(math.radians(spec.drift)) * common / (energy[:-1] * energy[1:]).sqrt()
        active = p * (q * (w > 0) + (1 - q) * w)
        return {
            "mmcs_precision": 1.0,
            "mmcs_recall": 1.0,
            "recovered": 1.0,
            "latents_per_feature": 1.0,
            "ratio_latent": float(within / (within + between)),
            "ratio_latent_by_total": float(within / (within + between)),
            "ratio_token": q if within > 0 else float("nan"),
            "mean_entropy": float(torch.special.entr(w).sum(1).mean() / math.log(self.n_layers)),
            "active_layers": float((active > 1e-3).double().mean()),
            "adjacent_cosine": float(cosine.mean()),
            "fvu": float((spec.noise**2 / (energy + self.offset.square().sum(1))).mean()),
            "l0": float(active.sum(0).mean()),
        }


def _layer_weights(spec: PlantedSpec) -> tuple[list[str], Tensor]:
    """Kinds (feature,) and distributions (feature, layer); a kind's centres go round the layers."""
    counts = [round(spec.single * spec.n_features), round(spec.neighbours * spec.n_features)]
    counts[1] = min(counts[1], spec.n_features - counts[0])
    counts.append(spec.n_features - sum(counts))
    reach = {"single": [0.0, 1.0, 0.0], "neighbours": [0.5, 1.0, 0.5]}
    rows, kinds = [], []
    for kind, count in zip(KINDS, counts, strict=True):
        for i in range(count):
            centre = i % spec.n_layers
            row = torch.ones(spec.n_layers + 2, dtype=torch.float64)
            if kind != "everywhere":
                row.zero_()[centre : centre + 3] = torch.tensor(reach[kind], dtype=torch.float64)
            rows.append(row[1:-1] / row[1:-1].sum())
            kinds.append(kind)
    return kinds, torch.stack(rows)


# --- estimators against the truth -----------------------------------------------------------------


def top_codes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Dense codes (layer, token, feature) as indices and values (layer, token, most active)."""
    most = max(int((codes > 0).sum(-1).max()), 1)
    values, indices = codes.topk(most, dim=-1)
    return indices, values


@torch.no_grad()
def score(world: World, sae: MLSAE) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every estimator of the book on the learned dictionary, on the true codes, and in truth.

    Returns:
        One row per ``estimator``: ``truth`` (from the specification), ``oracle`` (the estimator
        applied to the true codes and directions of the same tokens), ``estimate`` (to the
        autoencoder's), and for variance ratios the 95 % interval ``low``, ``high`` over sequences.
        One row per feature: ``feature``, ``kind``, ``cosine`` (mean over its layers of the largest
        similarity with a live row), ``recovered`` (share of its layers with at least 0.9),
        ``latents`` (different rows that these are), ``variance`` of the layer in truth and
        ``latent_variance`` that of the row most similar at its centre (with activation totals as
        weights ``latent_variance_by_total``), in squared layers.
    """
    n, d, size = world.n_layers, world.d_model, EVALUATION_SEQUENCES
    sequence = torch.arange(size).repeat_interleave(world.spec.context_length)
    learned = metrics.LayerDistribution(n, sae.n_latents, n_blocks=64)
    true = metrics.LayerDistribution(n, world.spec.n_features)
    fitted, floor = (metrics.Reconstruction(n, d) for _ in range(2))
    for index, tokens in enumerate(world.tokens(size)):
        codes, x, clean = (part.flatten(1, 2) for part in world.draw(tokens))
        output = sae(x)
        learned.update(output.topk.indices, output.topk.values, sequence + index * size)
        true.update(*top_codes(codes))
        fitted.update(x, output.recon, output.topk.values)
        floor.update(x, clean, top_codes(codes)[1])
    found, oracle = learned.compute(), true.compute()
    rows = sae.decoder[found.live]
    features = _features(world, rows, found)
    matched = features[features.latents > 0]
    estimate = _numbers(found) | {
        "mmcs_precision": metrics.mmcs_between(rows, _all_directions(world)).mean,
        "mmcs_recall": float(features.cosine.mean()),
        "recovered": float(features.recovered.mean()),
        "latents_per_feature": float(matched.latents.mean()) if len(matched) else float("nan"),
        **_reconstructed(fitted),
        "adjacent_cosine": _adjacent_cosine(world),
    }
    known = _numbers(oracle) | {
        **_reconstructed(floor),
        "adjacent_cosine": _adjacent_cosine(World(dataclasses.replace(world.spec, noise=0))),
    }
    table = pd.DataFrame({"truth": world.truth(), "oracle": known, "estimate": estimate})
    draws = learned.bootstrap(1000, torch.Generator().manual_seed(0))
    for name in ("ratio_latent", "ratio_token"):
        interval = metrics.basic_interval(estimate[name], getattr(draws, name))
        table.loc[name, ["low", "high"]] = interval
    table = table.loc[list(world.truth())]
    return table.rename_axis("estimator").reset_index(), features


@torch.no_grad()
def mechanism(world: World) -> pd.DataFrame:
    """Where Eq. 11 and 12 go wrong when the directions are known: no dictionary is trained.

    Returns:
        One row per ``codes``: the true ones; these cut to the k largest of each vector; what a
        linear encoder with the true directions makes of the vectors, k of them or as many as are
        truly active; with ``Eq. 11``, ``Eq. 12`` and ``l0``.
    """
    spec, n = world.spec, world.n_layers
    encoder = MLSAE(spec.d_model, spec.n_features, spec.k)
    found, active, tokens = {}, {}, 0
    for numbers in world.tokens(EVALUATION_SEQUENCES):
        codes, x, _ = (part.flatten(1, 2) for part in world.draw(numbers))
        tokens += x.shape[1]
        scaled = encoder.standardise(x)[0]
        scores = torch.bmm(scaled, world.directions.transpose(1, 2)).relu()
        order = scores.argsort(-1, descending=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(spec.n_features).expand_as(order)
        )
        truly = (codes > 0).sum(-1, keepdim=True)
        ways = {
            "true": codes,
            "true, the k largest": codes * (codes >= codes.topk(spec.k)[0][..., -1:]),
            "true directions, k latents": scores * (rank < spec.k),
            "true directions, the true number": scores * (rank < truly),
        }
        for way, dense in ways.items():
            total = found.setdefault(way, metrics.LayerDistribution(n, spec.n_features))
            total.update(*top_codes(dense))
            active[way] = active.get(way, 0) + int((dense > 0).sum())
    rows = []
    for way, total in found.items():
        result = total.compute()
        row = {"codes": way, "Eq. 11": result.ratio_latent, "Eq. 12": result.ratio_token}
        rows.append(row | {"l0": active[way] / (n * tokens)})
    return pd.DataFrame(rows)


def _numbers(found: metrics.DistributionResult) -> dict[str, float]:
    by_total = found.probs_by_total[:, found.live].T
    mean, variance = metrics.layer_moments(by_total)
    within, between = variance.mean(), mean.var(correction=0)
    return {
        "ratio_latent": found.ratio_latent,
        "ratio_latent_by_total": float(within / (within + between)),
        "ratio_token": found.ratio_token,
        "mean_entropy": found.mean_entropy,
        "active_layers": float(found.active_layers()[found.live].mean()),
    }


def _reconstructed(errors: metrics.Reconstruction) -> dict[str, float]:
    result = errors.compute()
    return {"fvu": float(result.fvu_global.mean()), "l0": float(result.l0.mean())}


def _all_directions(world: World) -> Tensor:
    """(direction, d_model): every feature at every layer where it lives."""
    return world.directions.transpose(0, 1)[world.weights > 0]


def _features(world: World, rows: Tensor, found: metrics.DistributionResult) -> pd.DataFrame:
    """One row per feature, see `score`; rows are those of the live latents."""
    similar = metrics.mmcs_between(world.directions.transpose(0, 1).flatten(0, 1), rows)
    cosine, best = (part.view(-1, world.n_layers) for part in similar[2:])
    support = world.weights > 0
    hit = support & (cosine >= RECOVERED)
    layers = support.sum(1)
    match = best.gather(1, world.weights.argmax(1, keepdim=True))[:, 0]
    by_token, by_total = (p[:, found.live].T for p in (found.probs, found.probs_by_total))
    return pd.DataFrame(
        {
            "feature": range(len(support)),
            "kind": world.kinds,
            "cosine": ((cosine * support).sum(1) / layers).numpy(),
            "recovered": (hit.sum(1) / layers).numpy(),
            "latents": [len(set(b[h].tolist())) for b, h in zip(best, hit, strict=True)],
            "variance": metrics.layer_moments(world.weights)[1].numpy(),
            "latent_variance": metrics.layer_moments(by_token)[1][match].numpy(),
            "latent_variance_by_total": metrics.layer_moments(by_total)[1][match].numpy(),
        }
    )


def _adjacent_cosine(world: World) -> float:
    """Mean over pairs of the mean cosine of adjacent layers."""
    found = analysis.drift(world, EVALUATION_SEQUENCES, progress=False)
    return float(found.centred.diagonal(1).mean())


# --- results --------------------------------------------------------------------------------------


def learn(spec: PlantedSpec) -> tuple[World, MLSAE]:
    """A world and the autoencoder trained on it, by the project's own training loop."""
    world = World(spec)
    return world, train.train(spec.run, world, description="planted").sae.eval()


def _scored(spec: PlantedSpec) -> dict[str, pd.DataFrame]:
    return dict(zip(("estimators", "features"), score(*learn(spec)), strict=True))


#: What is measured of a world and the dictionary that is trained on it: stage → its tables.
MEASURED = {"planted": _scored}
store.STAGES |= dict.fromkeys(MEASURED, 1)


def find_or_compute(
    spec: PlantedSpec,
    mode: Literal["cached", "read-only"] = "cached",
    stage: str = "planted",
) -> store.Artefact:
    """The result of a world: `estimators.csv` and `features.csv`, see `score`, or what another
    stage of `MEASURED` gives.

    Raises:
        StoreError: with ``read-only``, where it does not exist.
    """
    content = to_dict(spec)
    identity = store.key(stage, keyed(spec), {})
    if found := store.find(stage, identity):
        return found
    if mode == "read-only":
        raise store.StoreError(
            f"{stage} {identity} does not exist: expected the result of {content}; "
            f'`planted.find_or_compute(spec, stage="{stage}")` computes it in about a minute'
        )

    def fill(folder: Path) -> dict:
        for name, table in MEASURED[stage](spec).items():
            table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
        return {"tokens": spec.training_tokens}

    return store.write(stage, identity, content, {}, fill)


def worlds(
    spec: PlantedSpec,
    field: str,
    values: Sequence[float],
    mode: Literal["cached", "read-only"] = "cached",
    stage: str = "planted",
) -> dict[str, pd.DataFrame]:
    """The tables of worlds that differ in one field, which is their first column, by name.

    Also ``provenance``: how each was made.
    """
    parts: dict[str, list[pd.DataFrame]] = {}
    for value in values:
        artefact = find_or_compute(dataclasses.replace(spec, **{field: value}), mode, stage)
        names = ("tokens", "seconds", "commit", "written")
        made = {"key": artefact.key} | {name: artefact.meta.get(name) for name in names}
        tables = {file: pd.read_csv(artefact.file(file)) for file in artefact.meta["files"]}
        for file, table in (tables | {"provenance": pd.DataFrame([made])}).items():
            table.insert(0, field, value)
            parts.setdefault(Path(file).stem, []).append(table)
    return {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}


#: Other worlds and dictionaries, one field at a time; that of the default is among them.
OTHERS = {
    "seed": (0, 1, 2, 3, 4),
    "k": (3, 6, 12),
    "expansion_factor": (4, 8, 16),
    "training_tokens": (400_000, 1_600_000),
    "tokens": (8_192, 32_768, 131_072),
}


def others(spec: PlantedSpec, mode: Literal["cached", "read-only"] = "cached") -> pd.DataFrame:
    """Truth, oracle and estimate of Eq. 11 and 12 over the values of `OTHERS`.

    Returns:
        One row per ``field`` and ``value``: the three of each ratio, and the estimated ``fvu``.
    """
    rows = []
    for field, values in OTHERS.items():
        for value in values:
            artefact = find_or_compute(dataclasses.replace(spec, **{field: value}), mode)
            found = pd.read_csv(artefact.file("estimators.csv")).set_index("estimator")
            row = {"field": field, "value": value}
            for name, ratio in (("Eq. 11", "ratio_latent"), ("Eq. 12", "ratio_token")):
                of = ("truth", "oracle", "estimate")
                row |= {f"{name}, {column}": found.loc[ratio, column] for column in of}
            rows.append(row | {"fvu": found.estimate["fvu"]})
    return pd.DataFrame(rows)


def series(estimators: pd.DataFrame, keys: Sequence[str] = ("drift",)) -> pd.DataFrame:
    """The estimators of several worlds, one row per value, for `charts.planted.estimators`.

    Returns:
        ``keys``, ``estimator``, ``series`` (truth, oracle, estimate), ``value``, and ``low`` and
        ``high``, which the estimate alone has, and not every one.
    """
    names = ["truth", "oracle", "estimate"]
    fixed = [*keys, "estimator", "low", "high"]
    long = estimators.melt(fixed, names, "series", "value").dropna(subset="value")
    long.loc[long.series != "estimate", ["low", "high"]] = float("nan")
    return long[[*keys, "estimator", "series", "value", "low", "high"]]


def by_kind(features: pd.DataFrame) -> pd.DataFrame:
    """Means over the features of each (drift, kind), of all columns that are numbers."""
    means = features.drop(columns="feature").groupby(["drift", "kind"], sort=False)
    return means.mean().reset_index()
