"""Metrics: arrays in, numbers out.

Pure functions, and accumulators that see each batch once, take memory that does not grow with the
number of tokens, can be merged in any order and can be pickled, so that several processes can
share the work. All sums are float64.
"""

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
from mlsae_core.metrics.geometry import geometric_median
from mlsae_core.metrics.reconstruction import (
    LayerMoments,
    Reconstruction,
    ReconstructionResult,
    fvu,
)

__all__ = [
    "Downstream",
    "DownstreamResult",
    "LayerMoments",
    "Reconstruction",
    "ReconstructionResult",
    "ce_recovered",
    "centred_logit",
    "cross_entropy",
    "fvu",
    "geometric_median",
    "kl_divergence",
    "latent_importance",
    "logit_mse",
    "uniformity",
]
