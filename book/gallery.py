# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gallery of heatmaps
#
# **How does the picture change with the dictionary's size, its sparsity, the model and the lens?**
#
# Appendix D of {cite:t}`lawson2025` prints the heatmap of {doc}`distributions` again for every
# combination of model, $R$ and $k$ (Figures 30 to 41; Figures 13, 15 and 17 are those of other
# architectures). Here the reader turns the pages. A column is a latent, its colours are
# $P(L = \ell \mid j)$ of {eq}`eq-layer-distribution`, and columns are sorted by the mean layer.

# %% tags=["remove-cell"]
from mlsae_core import charts, experiments, widgets
from mlsae_core.analysis import spread, sweeps
from mlsae_core.charts import sweeps as sweep_charts

charts.use_book_theme()
read = experiments.swept_distributions()

# %% [markdown]
# ## Sparsity

# %% tags=["hide-input"]
sweep_charts.gallery(
    sweeps.stack({"k": spread.sampled(read["Sparsity k"])}),
    title="From k = 4 to 32 fewer latents belong to one layer",
    subtitle="100 latents of each dictionary, evenly spaced in the order of their mean layer; R = 16. Choose k.",
)

# %% [markdown]
# **What to see.** At $k = 4$ many columns are strong in one cell; by $k = 32$ most are pale over several layers. The
# mean entropy ({doc}`entropy`) says the same: 0.68 and 0.82 of what it could be, but 0.78 at $k = 64$.
#
# ## Expansion factor

# %% tags=["hide-input"]
sweep_charts.gallery(
    sweeps.stack({"R": spread.sampled(read["Expansion factor R"])}),
    title="With more latents, more of them belong to few layers",
    subtitle="100 latents of each dictionary, evenly spaced in the order of their mean layer; k = 16. Choose R.",
)

# %% [markdown]
# **What to see.** The larger the dictionary, the more strong cells: mean entropy falls from 0.86 at $R = 1$ to 0.69 at 64.
#
# ## Model

# %% tags=["hide-input"]
sweep_charts.gallery(
    sweeps.stack({"model": spread.sampled(read["Model"])}),
    title="Four layers or six, four architectures: the picture is of one kind",
    subtitle="100 latents of each dictionary, evenly spaced in the order of their mean layer; R = 16, k = 16. Choose a model.",
)

# %% [markdown]
# **What to see.** A diagonal in each; GPT-2's has the most strong cells, Llama's the fewest ({doc}`architectures`).
#
# ## Tuned lens
#
# The counterpart of Figures 6, 38 and 40; what the lens does is the subject of {doc}`tuned_lens`.

# %% tags=["hide-input"]
sweep_charts.gallery(
    sweeps.stack({"basis": spread.sampled(read["Tuned lens"])}),
    title="Through a lens at its own layers, latents are spread over more of them",
    subtitle="100 latents of each dictionary, evenly spaced in the order of their mean layer; R = 16, k = 16. Choose a basis.",
)

# %% [markdown]
# **What to see.** Aligned, the lens makes columns paler (mean entropy 0.87 instead of 0.77); with the alignment of
# the released code there are more columns of one strong cell (0.71).
#
# **What would contradict it.** A run whose columns are all alike, or all of one strong cell: layers that do not
# matter, or one dictionary per layer under a common name.
#
# ## At full resolution
#
# In JupyterLab, with up to 600 latents, and weighted by activation as in the paper's figures:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.heatmaps([*read["Sparsity k"], *read["Expansion factor R"], *read["Model"]])

# %% [markdown]
# ## How this page was made
#
# Every token at which a latent is active counts the same. The paper's single-prompt heatmaps (Figures
# 31, 33, 35, 37, 39 and 41) have their place in {doc}`distributions`, where the prompt can be chosen.

# %% tags=["hide-input"]
notes = sweeps.across(experiments.notes, experiments.swept("distributions"))
notes.drop(columns="position").set_index(["sweep", "run"])

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
