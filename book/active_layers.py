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
# The variance of the layer index treats layers as positions: a latent active at layers 0 and 5 has more
# of it than one active at 2, 3 and 4. Counting layers is blunter. Appendix C.3 of
# {cite:t}`lawson2025` calls a layer *active* for a latent where the latent is non-zero at more than a
# threshold $\tau$ of the $N$ tokens (theirs: 10,000 of 10 million, 0.1 %), and takes the mean over latents of
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
# **What to see.** At the threshold of 0.1 % the share rises with $k$, as in the paper's Figure 28: 0.39, 0.60, 0.82
# and 0.84 for $k$ from 4 to 32. At $k = 64$ it is back at 0.42, since a third of the latents are above the
# threshold at no layer: 64 of 2,048 latents are enough to use a part of them all the time and the rest rarely.
# With $R$ from 1 to 64 it falls from 0.99 to 0.30, as in the paper; at 64, too, nearly half of the latents are above the
# threshold nowhere. But at the lowest threshold nearly every latent is active at nearly every layer (0.86 to 1.00), and at one of
# 10 % hardly any is active anywhere (0.09 or less, but for $R$ of 1 and 2): the number is a reading of the threshold before it is one of
# the dictionary.
#
# ## What the threshold does by itself
#
# A layer has $k$ active latents at each token, so the mean latent is active at $k/n$ of them, whatever
# was learnt: 0.8 % at $R = k = 16$, but 0.2 % at $k = 4$, near the threshold. Part of the trend is that
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
# **What to see.** From $k = 4$ to 16 the share now rises from 0.69 to 0.85, where it went from 0.39 to 0.82; it
# then falls, to 0.78 at $k = 32$ and 0.28 at $k = 64$. So little of the paper's trend in $k$ is left beyond the arithmetic. More than half of the fall with $R$ is kept, from 0.97 to 0.59. Over models the share is 0.67 (neox-8l-192d) to 0.84 (Gemma 2) at the
# paper's threshold, and falls with the size of GPT-NeoX, 0.84, 0.82 and 0.67, as in the paper; but that is the arithmetic again, since a
# larger model has more latents at the same $k$: in units of the mean count it is 0.78, 0.85 and 0.79. The lens at its own layers keeps its lead (0.92 against 0.85 without), for all of them have
# the same $k$ and $n$. With random weights the share is 0.84 at the paper's threshold and 0.87 at this one, where trained ones
# have 0.82 and 0.85: this number does not tell a model that has learnt from one that has not.
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
