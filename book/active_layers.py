# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Active layers
#
# **At how many layers is a latent active?**
#
# The variance of the layer index treats layers as positions: a latent active at the first and the last layer has more
# of it than one active at three layers in between. Counting layers is blunter. Appendix C.3 of
# {cite:t}`lawson2025` calls a layer *active* for a latent where the latent is non-zero at more than a
# threshold $\tau$ of the $N$ tokens (theirs: 0.1 %), and takes the mean over latents of
#
# $$
# \frac{1}{n_L} \, \bigl| \{ \ell : |\{ t : h_j(x_{t,\ell}) > 0 \}| > \tau N \} \bigr| .
# $$ (eq-active-layers)
#
# The paper itself says that the number depends strongly on the threshold. So here the threshold is
# yours to choose.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments, widgets
from mlsae_book.charts import sweeps as sweep_charts
from mlsae_book.tables import spread, sweeps

charts.use_book_theme()
read = experiments.swept_distributions()
table = sweeps.across(spread.active_layers, read)

# %% tags=["hide-input"]
sweep_charts.active_layers(
    table,
    title="The answer is the threshold's: from nearly all layers to none",
    subtitle="Above, one line a run, darker for later ones; below, the runs at the threshold chosen.",
)

# %% [markdown]
# At the paper's threshold, with the latents that are above it at no layer:

# %% tags=["hide-input"]
paper = table.query("threshold == 0.001").set_index(["sweep", "run"])
paper[["active_layers", "nowhere"]].round(3)

# %% [markdown]
# **What to see.** At the paper's threshold the share rises with $k$ up to $k = 32$, as in the paper's Figure 28. At $k = 64$ it is back
# near its first value. There, as at $k = 4$, a third of the latents are above the threshold at no layer: perhaps so many active ones
# are enough to use a part of the dictionary all the time and the rest rarely. With $R$ the share falls, as in the paper; at $R = 64$
# nearly half of the latents are above the threshold nowhere. But at the lowest threshold nearly every latent is active at nearly every
# layer, and at a tenth of the tokens hardly any is active anywhere, but for the smallest $R$ (the chart). So the number is a reading of
# the threshold before it is one of the dictionary.
#
# ## What the threshold does by itself
#
# A layer has $k$ active latents at each token, so the mean latent is active at $k/n$ of them, whatever
# was learnt. At $k = 4$ that is 0.2 % in a dictionary of $R = 16$, near the threshold. Part of the trend is that
# arithmetic. Measured against a tenth of the mean latent's count instead, what is left of it is the
# dictionary's own:

# %% tags=["hide-input"]
sweep_charts.points(
    sweeps.across(spread.active_layers, read, (0.1,), True),
    value="active_layers",
    axis="Active layers (fraction of all layers)",
    title="With the threshold in units of the mean count, most of the rise with k is gone",
    subtitle="Threshold: a tenth of the count of the mean latent at the mean layer. Choose what varies.",
)

# %% [markdown]
# **What to see.** With $k$ the share now rises only up to $k = 16$, and by less than half of what it did (0.69 to 0.85, where it was
# 0.39 to 0.82). Then it falls. So well under half of the paper's trend in $k$ is left beyond the arithmetic. More than half of the fall
# with $R$ is kept.
#
# With the size of GPT-NeoX the share falls at the paper's threshold, as in the paper. But that is the arithmetic again, since a larger
# model has more latents at the same $k$: in units of the mean count the model of middle size has the most. The lens at its own layers
# keeps its lead, for all bases have the same $k$ and $n$. With random weights the share is 0.87 in these units, as high as with trained
# ones (0.85), and so it is at the paper's threshold (the table): this number does not tell a model that has learnt from one that has not.
# SmolLM2-135M, of 30 layers, has the lowest share of the models either way ($R = 8$, $k = 32$, on less text).
#
# **What would contradict it.** Lines in the first chart that keep their order and distance at every
# threshold: then the choice of one would not matter.
#
# In JupyterLab, the heatmaps behind these numbers:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.heatmaps(read["Sparsity k"])

# %% [markdown]
# ## How this page was made
#
# The mean is over all latents, active or not, so that rare ones count as active nowhere. Counts are over
# the test tokens of each run's evaluation, special ones left out.

# %% tags=["hide-input"]
notes = sweeps.across(experiments.notes, experiments.swept("distributions"))
notes.drop(columns="position").set_index(["sweep", "run"])

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
