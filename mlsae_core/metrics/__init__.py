"""Metrics: arrays in, numbers out.

Pure functions, and accumulators that see each batch once, take memory that does not grow with the
number of tokens, can be merged in any order and can be pickled, so that several processes can
share the work. All sums are float64.
"""

from mlsae_core.metrics.distribution import (
    DistributionResult,
    LayerDistribution,
    Variances,
    basic_interval,
    gaussian_like,
    permute_layers,
)
from mlsae_core.metrics.downstream import (
    Downstream,
    DownstreamResult,
    ce_recovered,
    centred_logit,
    cross_entropy,
    kl_divergence,
    latent_importance,
    logit_mse,
    uniformity,
)
from mlsae_core.metrics.examples import Examples, TopExamples
from mlsae_core.metrics.geometry import (
    CosineHistogram,
    Drift,
    DriftResult,
    MaxCosine,
    Similar,
    adjacent_cosine,
    copied_rows,
    cosine_histogram,
    gaussian_rows,
    geometric_median,
    mmcs,
    mmcs_between,
    most_similar,
)
from mlsae_core.metrics.lifetimes import Correlation, Matches, best_matches, chain_lengths
from mlsae_core.metrics.persistence import (
    Persistence,
    PersistenceResult,
    Survival,
    SurvivalResult,
    hysteresis,
    layers_of_pairs,
    random_updates,
    shuffled_updates,
)
from mlsae_core.metrics.reconstruction import (
    LayerMoments,
    Reconstruction,
    ReconstructionResult,
    fvu,
)

__all__ = [
    "Correlation",
    "CosineHistogram",
    "DistributionResult",
    "Downstream",
    "DownstreamResult",
    "Drift",
    "DriftResult",
    "Examples",
    "LayerDistribution",
    "LayerMoments",
    "Matches",
    "MaxCosine",
    "Persistence",
    "PersistenceResult",
    "Reconstruction",
    "ReconstructionResult",
    "Similar",
    "Survival",
    "SurvivalResult",
    "TopExamples",
    "Variances",
    "adjacent_cosine",
    "basic_interval",
    "best_matches",
    "ce_recovered",
    "centred_logit",
    "chain_lengths",
    "copied_rows",
    "cosine_histogram",
    "cross_entropy",
    "fvu",
    "gaussian_like",
    "gaussian_rows",
    "geometric_median",
    "hysteresis",
    "kl_divergence",
    "latent_importance",
    "layers_of_pairs",
    "logit_mse",
    "mmcs",
    "mmcs_between",
    "most_similar",
    "permute_layers",
    "random_updates",
    "shuffled_updates",
    "uniformity",
]
