# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Entropy
#
# **How far is a latent from belonging to one layer, whatever the order of the layers?**
#
# Variance needs layers to be positions, and active layers need a threshold. The entropy of
# $P(L \mid j)$ needs neither (Appendix C.4 of {cite:t}`lawson2025`): divided by its maximum,
#
# $$
# \frac{-1}{\ln n_L} \sum_\ell P(L = \ell \mid j) \ln P(L = \ell \mid j) ,
# $$ (eq-entropy)
#
# it is 0 for a latent that is active at one layer and 1 for one that is equally active at all, and
# models with different numbers of layers can be compared. The paper shows its mean over latents in
# Figure 29.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments, widgets
from mlsae_book.charts import sweeps as sweep_charts
from mlsae_book.tables import spread, sweeps

charts.use_book_theme()
read = experiments.swept_distributions()
table = sweeps.across(spread.entropies, read)

# %% tags=["hide-input"]
sweep_charts.points(
    table,
    value="entropy",
    axis="Entropy of P(layer | latent) (fraction of ln n_L)",
    title="The mean latent has two thirds or more of the entropy it could have, untrained too",
    subtitle="Points are means over latents; lines reach from the first quartile to the third. Choose what varies.",
    interval=("q25", "q75"),
)

# %% [markdown]
# **What to see.** Entropy rises with $k$ up to $k = 32$, as in the paper, and is lower again at $k = 64$, where a third of the latents are
# hardly used ({doc}`active_layers`). A lens at its own layers raises it from 0.77 to 0.87; aligned as in the released code it lowers it.
# With $R$ it falls, and with the size of GPT-NeoX it rises a little, both as in the paper. Part of the fall with $R$ is that latents are
# active at fewer tokens (*often* in the table). Of the architectures GPT-2 has the least and Llama the most. SmolLM2-135M, a model that
# people use (of 30 layers; $R = 8$, $k = 32$), lies among ours. That does not say that its latents serve as large a part of the layers:
# the maximum is a logarithm ({doc}`distributions`).
#
# With layers permuted within each token entropy is near 1, and it must be: a latent has no layer of its own there, by construction. So to
# lie below that null model says only that layers are not interchangeable. It says nothing of what the model has learnt: with random
# weights the mean entropy is 0.68, lower than with trained ones ({doc}`variance` says more). The lines are long: in one dictionary there
# are latents of nearly one layer and latents of all. These are single runs without intervals, so small differences carry nothing.
#
# **What would contradict it.** An entropy as high as the permuted one: latents without a layer; or one
# near 0: six dictionaries in one.
#
# The same as a table. *permuted* is the mean with layers permuted at each token. *often* is the mean over the latents that are active at
# 100 tokens or more: of few tokens an entropy comes out too small, and at large $R$ there are many such latents.

# %% tags=["hide-input"]
quantiles = ["q05", "q25", "q50", "q75", "q95"]
table.set_index(["sweep", "run"])[["entropy", "often", "permuted", *quantiles]].round(3)

# %% [markdown]
# ## The distribution behind the mean

# %% tags=["hide-input"]
sweep_charts.histogram(
    sweeps.stack({"k": spread.entropy_histogram(read["Sparsity k"])}),
    axis="Entropy of P(layer | latent) (fraction of ln n_L)",
    title="Latents of all layers are many, but there are others down to one layer",
    subtitle="Share of the live latents in bins of 0.025. Choose k.",
)

# %% [markdown]
# In JupyterLab, the heatmaps behind these numbers:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.heatmaps(read["Sparsity k"])

# %% [markdown]
# ## How this page was made
#
# The mean is over the latents that are active at least once in the test tokens of each run's
# evaluation. Every token at which a latent is active counts the same.

# %% tags=["hide-input"]
notes = sweeps.across(experiments.notes, experiments.swept("distributions"))
notes.drop(columns="position").set_index(["sweep", "run"])

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
