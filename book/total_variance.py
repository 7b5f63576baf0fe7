# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The law of total variance
#
# **Do the parts of the variance add up, on real activations?**
#
# The two ratios of {doc}`variance` rest on a decomposition. With the layer $L$, token $T$ and latent
# $J$ as random variables, a single latent's spread over layers is what is left at one token plus how
# much its tokens differ (Eq. 14 of {cite:t}`lawson2025`, Appendix C.2),
#
# $$
# \operatorname{Var}[L] = \mathbb{E}[\operatorname{Var}[L \mid T]]
# + \operatorname{Var}[\mathbb{E}[L \mid T]] ,
# $$ (eq-total-variance-one)
#
# and over all latents (Eq. 15)
#
# $$
# \mathbb{E}[\operatorname{Var}[L \mid J]] = \mathbb{E}[\operatorname{Var}[L \mid T, J]]
# + \mathbb{E}[\operatorname{Var}[\mathbb{E}[L \mid T, J] \mid J]] ,
# $$ (eq-total-variance-latents)
#
# and above both stands $\operatorname{Var}[L] = \mathbb{E}[\operatorname{Var}[L \mid J]] +
# \operatorname{Var}[\mathbb{E}[L \mid J]]$. These are theorems, so they can only fail where
# the three distributions do not belong to one another: $P(L \mid j)$ has to be the mean of
# $P(L \mid t, j)$ over the tokens where the latent is active, and $P(L)$ the mean of those over the
# latents that are active. An estimator that counts inactive tokens as probability zero, or averages the
# ratios of batches, breaks them.
#
# Here every term is computed by its own definition, none as a difference of others, from the
# distributions at each token and latent themselves: on 16,384 tokens, since those do not fit into memory
# for a million.

# %% tags=["remove-cell", "nbval-ignore-output"]
from mlsae_book import charts, experiments, widgets
from mlsae_book.charts import sweeps as sweep_charts
from mlsae_book.tables import total_variance
from mlsae_core import pipeline
from mlsae_core.spec import EvaluateSpec, load_experiment

charts.use_book_theme()
_, run = load_experiment("experiments/default.yml").runs[0]
session = pipeline.Session()
source = session.source(run, EvaluateSpec(tokens=16_384))  # on a bare clone with progress bars

# %% tags=["hide-input"]
sae = session.sae(run)
indices, values = total_variance.codes(source, sae)
terms = total_variance.terms(indices, values, sae.n_latents)
sides = total_variance.both_sides(terms).set_index("law")
sides.drop(columns="difference").round(3)

# %% [markdown]
# **What to see.** Left is the first part plus the second, in each row; the last row is the latent
# that is active at the most tokens. In float64 the two sides differ by less than 1e-9 squared layers,
# Eq. 14 for every latent:

# %% tags=["hide-input"]
sides["difference"].lt(1e-9)

# %% [markdown]
# The book's numbers are not computed so, but from four sums per latent, in one pass and in memory that
# does not grow with the tokens. They have to be the same:

# %% tags=["hide-input"]
sums = total_variance.beside_the_sums(terms, indices, values, sae.n_latents)
sums.assign(same=sums["difference"].lt(1e-9)).drop(columns="difference").round(3)

# %% [markdown]
# **What would contradict it.** A difference beyond rounding, in any row: the estimator's
# distributions would not be distributions. `tests/test_analysis_total_variance.py` breaks one on purpose.
#
# ## Latent by latent
#
# Eq. 14 holds for each latent separately.

# %% tags=["hide-input", "nbval-ignore-output"]
by_rank = sweep_charts.variance_by_rank(
    total_variance.by_rank(terms.latents),
    title="Most of a latent's spread is between its tokens, less within one",
    subtitle="A latent's variance is the height of both parts together. Move the slider to read off one latent; "
    "click its number to meet it.",
)
charts.with_cards(by_rank)

# %% [markdown]
# **What to see.** For most of the latents that are drawn, about nine in ten, the larger part is the one between tokens. It is not so
# for all: for the most frequent latent, in the first table, it is the other way round.
#
# In JupyterLab, the same on other tokens:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.total_variance(session, run, (4_096, 8_192, 16_384, 32_768))

# %% [markdown]
# ## How this page was made
#
# The dictionary is that of {doc}`training`, the tokens are the first 16,384 of the test split, special
# ones left out. The numbers on the whole sample are in {doc}`variance`.

# %% tags=["hide-input"]
experiments.provenance(session.train(run))

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
