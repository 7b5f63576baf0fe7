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
# Appendix D of {cite:t}`lawson2025` prints the heatmap of {doc}`distributions` again for every combination of model, $R$ and $k$, and
# that of a single prompt beside each. Here they stand one below the other. A column is a latent, its colours are $P(L = \ell \mid j)$ of
# {eq}`eq-layer-distribution`, and columns are sorted by the mean layer. Every picture has a choice: *many tokens*, or *one
# prompt*, the paper's "When John and Mary went to the store, John gave". In the latter an empty cell is a layer at which the latent
# is never active. The figures of the paper that belong to each section:
#
# | Section | Many tokens | One prompt |
# |---|---|---|
# | Sparsity | Figures 32, 36 | Figures 33, 37 |
# | Expansion factor | Figures 30, 34 | Figures 31, 35 |
# | Model ({doc}`architectures`) | Figures 13, 15, 17 | Figures 14, 16, 18 |
# | Tuned lens | Figure 6 | Figure 7 |
# | Sparsity, with the tuned lens | Figure 40 | Figure 41 |
# | Expansion factor, with the tuned lens | Figure 38 | Figure 39 |

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
# From few active latents per vector to many.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Sparsity k"],
    title="Over many tokens, fewer latents belong to one layer the larger k is, up to 32",
    subtitle=f"{sample}; R = 16.",
    swept="k = ",
)

# %% [markdown]
# **What to see.** At $k = 4$ many columns are strong in one cell; by $k = 32$ most are pale over several layers. The mean entropy
# ({doc}`entropy`) says the same: it rises up to there, and is lower again at $k = 64$. In the prompt the share of latents that are
# active at one layer only falls from $k = 8$ on; with layers permuted it falls as well (table at the end).
#
# ## Expansion factor
#
# From as many latents as dimensions to many times more.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Expansion factor R"],
    title="Over many tokens, larger dictionaries have more latents of few layers",
    subtitle=f"{sample}; k = 16.",
    swept="R = ",
)

# %% [markdown]
# **What to see.** The larger the dictionary, the more strong cells: mean entropy falls from 0.86 at $R = 1$ to 0.69 at $R = 64$. In
# the prompt this looks far plainer, with 8 % of the latents at one layer only at the smallest $R$ and 55 % at the largest. But with
# layers permuted that share rises nearly as far (table at the end), so it is mostly a matter of how few tokens a latent has.
#
# ## Model
#
# More about the other architectures is in {doc}`architectures`.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Model"],
    title="Four layers to eight, four architectures: the picture is of one kind",
    subtitle=f"{sample}; R = 16, k = 16.",
)

# %% [markdown]
# **What to see.** A diagonal in each. The fewer layers, the more strong cells: `neox-4l-64d` has the most, `neox-8l-192d` the fewest.
# Of the models of six layers GPT-2 has the most and Llama the fewest. In the prompt the three GPT-NeoX have the same order, with
# layers permuted, too: among fewer layers a latent is at one of them more easily.
#
# ## Tuned lens
#
# What the lens does is the subject of {doc}`tuned_lens`.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Tuned lens"],
    title="Through a lens at its own layers, latents are spread over more of them",
    subtitle=f"{sample}; R = 16, k = 16.",
    swept="Basis: ",
)

# %% [markdown]
# **What to see.** Aligned, the lens makes columns paler: the mean entropy is 0.87 with it and 0.77 without. With the alignment of the
# released code there are more columns of one strong cell than without a lens.
#
# ## Sparsity, with the tuned lens
#
# With the aligned lens.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Sparsity k, tuned lens"],
    title="Through the aligned lens, too, the more latents are active, the paler they are",
    subtitle=f"{sample}; R = 16.",
    swept="k = ",
)

# %% [markdown]
# **What to see.** Paler at each $k$ than without the lens, in mean entropy, too. (Whether that is highest at $k = 32$ here as well
# was not measured.) In the prompt fewer of the latents are active at one layer only than without the lens at $k = 16$ and $k = 64$,
# but not at $k = 4$ (table at the end).
#
# ## Expansion factor, with the tuned lens
#
# With the aligned lens.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Expansion factor R, tuned lens"],
    title="Over many tokens, so it is with the lens: larger dictionaries, more latents of few layers",
    subtitle=f"{sample}; k = 16.",
    swept="R = ",
)

# %% [markdown]
# **What to see.** The trend is that of the dictionaries without a lens, each a step paler: at $R = 64$ the mean entropy is 0.80 with
# it and 0.69 without. In the prompt the share of the latents at one layer only rises with $R$ as it does without it.
#
# ## Random weights
#
# A null model for all of these: the same architecture with weights that were never trained.

# %% tags=["hide-input"]
sweep_charts.gallery(
    cells[cells.sweep == "Random weights"],
    title="With random weights the diagonal is there, too, and sharper",
    subtitle=f"{sample}; R = 16, k = 16.",
    swept="Weights: ",
)

# %% [markdown]
# **What to see.** Without training there is a diagonal all the same, and it has *more* strong cells: the mean entropy is 0.68 with
# random weights and 0.77 with trained ones. So these pictures show that layers differ; that something was learnt they do not show
# ({doc}`variance`).
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
# **What to see.** Everywhere the prompt's share is larger than with layers permuted, in most runs by 6 to 9 points, and by less
# through the aligned lens and at the two smallest $R$. But by far the larger part of it is there with layers permuted, too, and
# follows $R$, $k$ and the lens as the whole does: what the single prompts show is first of all how few tokens they have. Nor is what
# is left a sign of something learnt: random weights are among the furthest above, with the smallest model and the lens as released.
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
