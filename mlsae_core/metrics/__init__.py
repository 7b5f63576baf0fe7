"""Metrics: arrays in, numbers out.

Pure functions, and accumulators that see each batch once, take memory that does not grow with the
number of tokens, can be merged in any order and can be pickled, so that several processes can
share the work (`Drift` keeps a row for each sequence). All sums are float64.
"""

from mlsae_core.metrics.distribution import (
    DistributionResult,
    LayerDistribution,
    Variances,
    Weighting,
    gaussian_like,
    layer_moments,
    permute_layers,
    permute_tokens,
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
from mlsae_core.metrics.effects import Effects, EffectsResult
from mlsae_core.metrics.examples import Examples, TopExamples
from mlsae_core.metrics.geometry import (
    CosineHistogram,
    Drift,
    DriftResult,
    MaxCosine,
    Similar,
    copied_rows,
    cosine_histogram,
    gaussian_rows,
    geometric_median,
    mmcs,
    mmcs_between,
    most_similar,
)
from mlsae_core.metrics.groups import Groups, GroupsResult
from mlsae_core.metrics.lifetimes import Correlation, Matches, best_matches, chain_lengths
from mlsae_core.metrics.persistence import (
    Excess,
    ExcessResult,
    Persistence,
    PersistenceResult,
    Survival,
    SurvivalResult,
    drifted,
    hysteresis,
    layers_of_pairs,
    of_batch,
    random_updates,
    shuffled_updates,
)
from mlsae_core.metrics.reconstruction import (
    LayerMoments,
    Reconstruction,
    ReconstructionResult,
    fvu,
)
from mlsae_core.metrics.resampling import basic_interval
