# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training
#
# **How is one dictionary trained for all layers?**
#
# ## The autoencoder
#
# Every residual-stream vector $x \in \mathbb{R}^d$, whatever its layer, is first standardised over its
# own dimensions, $x' = (x - \mu) / (\sigma + 10^{-5})$. The encoder keeps the $k$ largest of $n = R d$
# pre-activations, and the decoder writes the vector as a sum of the $k$ latents' directions
# {cite:p}`gao2024`:
#
# $$
# h = \operatorname{ReLU}\bigl(\operatorname{TopK}(W_\text{enc} (x' - b_\text{pre}))\bigr), \qquad
# \hat{x}' = W_\text{dec} h + b_\text{pre}, \qquad \hat{x} = \hat{x}' \sigma + \mu .
# $$ (eq-autoencoder)
#
# $R$ is the *expansion factor* and $k$ the sparsity. Both matrices are shared by all layers: that is
# the whole idea. (Eq. 1 of the paper prints $W_\text{enc} x - b_\text{pre}$; the bias has the dimension of
# $x$, so the bracket is meant.)
#
# ## The loss
#
# The *fraction of variance unexplained* at layer $\ell$ is the mean squared error over the variance of
# the vectors at that layer. The loss is its mean over layers, plus a small term that revives *dead*
# latents, those without an activation anywhere for many tokens, by letting the $k_\text{aux}$ largest of
# them reconstruct the error that the live ones leave:
#
# $$
# \mathcal{L} = \frac{1}{n_L} \sum_\ell
# \frac{\operatorname{E}\,(x_\ell - \hat{x}_\ell)^2}{\operatorname{Var}(x_\ell)} + \alpha \, \text{AuxK},
# \qquad \alpha = \tfrac{1}{32} .
# $$ (eq-loss)
#
# The error that AuxK reconstructs is a constant to the gradient (in the code released with the paper
# it is not), and it is measured in the
# standardised space, so that it does not depend on the scale of a layer.

# %% tags=["remove-cell"]
import pandas as pd

from mlsae_book import charts, experiments, tables, widgets
from mlsae_book.charts import links
from mlsae_core import pipeline
from mlsae_core.spec import flat, load_experiment

charts.use_book_theme()

# %% [markdown]
# ## A live run
#
# Nothing is prepared here: this cell trains a dictionary for all six layers from nothing, while the
# page is built. `force` trains even if the result is known.

# %% tags=["nbval-ignore-output", "remove-output"]
live = load_experiment("experiments/live.yml")
_, live_run = live.runs[0]
live_artefact = pipeline.Session("force").train(live_run)
live_log = pd.read_csv(live_artefact.file("log.csv"))

# %% tags=["hide-input", "nbval-ignore-output"]
charts.training_curves(
    tables.long_log(live_log),
    title="A dictionary for six layers, trained just now",
    subtitle="Choose a layer to follow its curve.",
)

# %% [markdown]
# The weights of that run depend on the processor in their last digits, so the check that this page
# is tested by is a coarse one: the dictionary explains most of the variance after less than a minute.

# %%
bool(live_log.fvu.iloc[-1] < 0.5), len(live_log) > 50

# %% [markdown]
# In JupyterLab, train others. The first time takes as long as it takes; after that the result is
# found under its key.

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.live_training(live_run, k=[4, 8, 16, 32], factors=[2, 4, 8, 16])

# %% [markdown]
# ## The shipped run
#
# The same code with twenty times the tokens and twice the latents, whose weights are in
# `data/shipped/`. All chapters study this one unless they say otherwise.

# %% tags=["hide-input"]
experiment = load_experiment("experiments/default.yml")
results = experiments.materialise(experiment)
charts.training_curves(
    tables.long_log(results.log),
    title="The earlier the layer, the better it is reconstructed",
    subtitle="FVU of each training batch, global variance; choose a layer to follow its curve.",
)

# %% [markdown]
# **What to see.** All six curves fall together, and they are still falling slowly at the end. From early
# on they are ordered by layer. No latent is dead, so AuxK has nothing to do in this run.
#
# **What would contradict it.** A layer whose curve stays flat while the others fall: the shared
# dictionary would be serving some layers at the expense of another. Or a growing share of dead
# latents, which would make the dictionary smaller than its name.
#
# ## The settings
#
# Everything the result is a function of. The paper's values are the defaults where the run is as
# long as the paper's (1 B tokens); shorter runs take smaller batches and a larger learning rate, by a
# rule that is written in `mlsae_core/spec.py`.

# %% tags=["hide-input"]
settings = pd.json_normalize(flat(experiment.runs[0][1])).T.fillna("default").astype(str)
links.coded(settings[0].rename_axis("field").reset_index(name="value"), "field")

# %% [markdown]
# ## How this page was made

# %% tags=["hide-input"]
results.provenance.set_index("stage")

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
