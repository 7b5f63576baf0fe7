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
# combination of model, $R$ and $k$, and that of a single prompt beside each (Figures 30 to 41; Figures 13 to 18 are those of
# other architectures). Here the reader turns the pages. A column is a latent, its colours are
# $P(L = \ell \mid j)$ of {eq}`eq-layer-distribution`, and columns are sorted by the mean layer. Every picture has a
# second choice: *many tokens*, or *one prompt*, the paper's "When John and Mary went to the store, John gave". In the
# latter an empty cell is a layer at which the latent is never active.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments, stages, widgets
from mlsae_book.charts import sweeps as sweep_charts
from mlsae_book.tables import spread, sweeps

charts.use_book_theme()
every = experiments.SWEEPS | experiments.LENS_SWEEPS
read = experiments.swept_distributions(every)
single = experiments.swept("prompts", every)
prompts = sweeps.across(experiments.tables, single, "prompts.csv")
cells = spread.galleries(read, prompts, stages.PROMPTS[0], most=80)
sample = "At most 80 latents of each dictionary, evenly spaced in the order of their mean layer"

# %% [markdown]
# ## Sparsity
#
# Figures 32 and 36; of one prompt, 33 and 37.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Sparsity k"],
    title="Over many tokens, fewer latents belong to one layer the larger k is, up to 32",
    subtitle=f"{sample}; R = 16. Choose k.",
)

# %% [markdown]
# **What to see.** At $k = 4$ many columns are strong in one cell; by $k = 32$ most are pale over several layers. The
# mean entropy ({doc}`entropy`) says the same: 0.68 and 0.82 of what it could be, but 0.78 at $k = 64$. In the prompt 44 % to 51 % of the latents are active
# at one layer only up to $k = 16$, and 27 % at 64.
#
# ## Expansion factor
#
# Figures 30 and 34; of one prompt, 31 and 35.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Expansion factor R"],
    title="With more latents, more of them belong to few layers",
    subtitle=f"{sample}; k = 16. Choose R.",
)

# %% [markdown]
# **What to see.** The larger the dictionary, the more strong cells: mean entropy falls from 0.86 at $R = 1$ to 0.69 at 64. In
# the prompt this is far plainer: 8 % of the latents are active at one layer only at $R = 1$, 55 % at 64.
#
# ## Model
#
# Figures 13 to 18 and more about them are in {doc}`architectures`.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Model"],
    title="Four layers to eight, four architectures: the picture is of one kind",
    subtitle=f"{sample}; R = 16, k = 16. Choose a model.",
)

# %% [markdown]
# **What to see.** A diagonal in each. The fewer layers, the more strong cells: neox-4l-64d has the most, neox-8l-192d the fewest; of the models of
# six layers GPT-2 has the most and Llama the fewest ({doc}`architectures`). In the prompt
# 36 % (neox-8l-192d) to 58 % (neox-4l-64d) of the latents are active at one layer only.
#
# ## Tuned lens
#
# Figures 6 and 7; what the lens does is the subject of {doc}`tuned_lens`.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Tuned lens"],
    title="Through a lens at its own layers, latents are spread over more of them",
    subtitle=f"{sample}; R = 16, k = 16. Choose a basis.",
)

# %% [markdown]
# **What to see.** Aligned, the lens makes columns paler (mean entropy 0.87 instead of 0.77); with the alignment of
# the released code there are more columns of one strong cell (0.71).
#
# ## Sparsity, with the tuned lens
#
# Figures 40 and 41, with the aligned lens.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Sparsity k, tuned lens"],
    title="Through the aligned lens, too, the more latents are active, the paler they are",
    subtitle=f"{sample}; R = 16. Choose k.",
)

# %% [markdown]
# **What to see.** Paler at each $k$ than without the lens: mean entropy is 0.81, 0.87 and 0.90, where it was 0.68, 0.77 and 0.78. (Whether it, too, is
# highest at 32 was not measured.) In the prompt 47 %, 37 % and 25 % of the latents are active at one layer only: fewer than
# without the lens at 16 and 64 (44 % and 27 %), not at 4 (44 %).
#
# ## Expansion factor, with the tuned lens
#
# Figures 38 and 39, with the aligned lens.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Expansion factor R, tuned lens"],
    title="Larger dictionaries have more latents of few layers with the lens, too",
    subtitle=f"{sample}; k = 16. Choose R.",
)

# %% [markdown]
# **What to see.** The trend is that of the dictionaries without a lens, each a step paler: mean entropy falls from 0.95 at $R = 1$ to 0.80 at
# 64, where it fell from 0.86 to 0.69. In the prompt 8 % to 48 % of the latents are active at one layer only, where it was 8 % to 55 %.
#
# ## Random weights
#
# A null model for all of these: the same architecture with weights that were never trained.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Random weights"],
    title="With random weights the diagonal is there, too, and sharper",
    subtitle=f"{sample}; R = 16, k = 16. Choose the weights.",
)

# %% [markdown]
# **What to see.** Without training there is a diagonal all the same, and it has *more* strong cells (mean entropy 0.68
# instead of 0.77). So these pictures show that layers differ; that something was learnt they do not show ({doc}`variance`).
#
# ## How much of a single prompt is the size of the sample
#
# A prompt of ten tokens gives most latents one or two tokens to be active at. Fractions of its latents that are active at one
# layer only, and what they would be with layers permuted at each token ({doc}`distributions`):

# %% tags=["hide-input"]
spreads = sweeps.across(experiments.tables, single, "spread.csv")
spreads = spreads[spreads.prompt == stages.PROMPTS[0]]
spreads.pivot_table("one_layer", ["sweep", "position", "run"], "of").droplevel("position").round(3)

# %% [markdown]
# **What to see.** Everywhere the prompt's share is larger than with layers permuted, by 6 to 9 points in most runs, by 1 to 5 through the aligned lens and at
# the two smallest $R$. But by far the larger
# part of it is there with layers permuted, too, and follows $R$, $k$ and the lens as the whole does: what the single prompts show
# is first of all how few tokens they have. Furthest above stand random weights (14 points), the smallest model (13), and
# the lens as released (15).
#
# **What would contradict it.** A run whose columns are all alike, or all of one strong cell: layers that do not
# matter, or one dictionary per layer under a common name. Of the prompts, a share no larger than with layers permuted.
#
# ## At full resolution
#
# In JupyterLab, with up to 600 latents, and weighted by activation as in the paper's figures:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.heatmaps([*read["Sparsity k"], *read["Expansion factor R"], *read["Model"]])

# %% [markdown]
# ## How this page was made
#
# Every token at which a latent is active counts the same. Other prompts are in {doc}`distributions`; any prompt can be
# typed there, in JupyterLab.

# %% tags=["hide-input"]
notes = sweeps.across(experiments.notes, experiments.swept("distributions", every))
notes.drop(columns="position").set_index(["sweep", "run"])

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
