# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Evaluation
#
# **How much does the language model lose when it runs on reconstructions?**
#
# A dictionary is useful only if what it leaves out does not matter. Two kinds of numbers say so:
#
# - **Reconstruction.** FVU, the mean squared error over the variance: 0 is perfect, and predicting
#   the mean gives 1. Two variances are in use. *Global* takes one mean over all tokens and
#   dimensions; it is the one in the paper's released code, so in its Table 1. *Per-dimension* takes
#   the mean vector as its baseline; it is never smaller, because a mean vector is a better guess
#   than a mean number, and 1 minus it is what other libraries call explained variance.
# - **Downstream.** Replace the residual stream after *one* layer by its reconstruction, run the rest
#   of the model, and compare its predictions: the increase in cross-entropy (delta CE) and the
#   divergence $\operatorname{KL}(\text{original} \,\|\, \text{replaced})$, in nats per predicted token.
#
# L1 is the sum of a vector's activations; L0, the number of active latents, is $k$ by construction.

# %% tags=["remove-cell"]
from mlsae_core import charts, pipeline, widgets
from mlsae_core.spec import load_experiment

charts.use_book_theme()
results = pipeline.materialise(load_experiment("experiments/default.yml"))
table = results.evaluation

# %% [markdown]
# ## By layer
#
# Choose a metric.

# %% tags=["hide-input"]
charts.metric_by_layer(
    table,
    title="Later layers are harder to reconstruct, and cost more, but not in step",
    subtitle="One point per layer, over the test split.",
)

# %% [markdown]
# **What to see.** FVU grows with every layer, from about 0.05 to 0.2, and the per-dimension FVU is always
# the larger of the two. Delta CE grows too, from 0.1 to 0.4 nats, but not at every step: layer 4 is
# reconstructed worse than layer 3 and costs less. So FVU ranks the layers nearly as the
# model's loss does: a good proxy for what the model needs, not an exact one.
#
# **What would contradict it.** Layers that the two rank in different orders throughout. The one
# exchange here, of 0.015 nats, has no interval yet and may be noise.
#
# The same numbers as a table:

# %% tags=["hide-input"]
columns = ["layer", "fvu_global", "fvu_per_dimension", "mse", "l1", "l0", "delta_ce", "kl"]
table[columns].set_index("layer").round(4)

# %% [markdown]
# ## What a layer is worth
#
# Delta CE needs a scale. Replacing the residual stream by zero, or by its mean, destroys all that
# the layer knows of the text; the fraction of that damage which the reconstruction avoids is the *CE
# recovered*. It is a forgiving number, since the damage is large: read it beside delta CE, not
# instead. Where ablation costs more than the 8.3 nats of a uniform guess it does harm of its own, and
# the fraction flatters: layer 4's is mostly the size of its denominator. (The mean is that of the
# first 8192 tokens.)

# %% tags=["hide-input"]
ablation = ["ce_original", "ce_replaced", "ce_zero", "ce_mean"]
columns = [*ablation, "ce_recovered_zero", "ce_recovered_mean"]
table.set_index("layer")[columns].round(3)

# %% [markdown]
# In JupyterLab, the same with a control of the kernel's:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.metric_by_layer(table, list(charts.METRICS), "One metric by layer")

# %% [markdown]
# ## Beside the paper
#
# The mean over layers, as in Table 1 of {cite:t}`lawson2025`. Theirs is for much larger models, with
# $R = 64$, $k = 32$, 1 B training tokens of the Pile and 1 M test tokens; it is context, not a target.

# %% tags=["hide-input"]
ours = table[["fvu_global", "l1", "delta_ce"]].mean().round(3)
ours.rename("mean over layers").to_frame().T

# %% tags=["hide-input"]
pipeline.published("table1").set_index("model")

# %% [markdown]
# Our mean FVU lies among the paper's, our delta CE below all of its standard MLSAEs. We do
# not read that as a merit of the dictionary: the language model, the text, the tokenizer, $R$ and $k$ all
# differ. L1 is not comparable for the last reason alone.
#
# ## How this page was made
#
# The dictionary is the one of {doc}`training`. Special tokens are excluded from FVU, MSE,
# L1 and L0; delta CE and KL score every prediction of a next token, and *tokens* in the row of the
# training counts all positions. The code released with the paper reports
# $\operatorname{KL}(\text{replaced} \,\|\, \text{original})$, summed over positions. The original pass is computed once, and all replaced layers share one growing batch through the rest
# of the model.

# %% tags=["hide-input"]
results.provenance.set_index("stage")

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
