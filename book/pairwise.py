# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Pairwise cosine similarities
#
# **Does a multi-layer dictionary hold the same feature once per layer?**
#
# One dictionary for all layers might cheat: learn a feature of one layer and the same feature of another
# as two latents. Such twins would have similar decoder rows, and there would be $n_L$ of each.
# Appendix B.6 of {cite:t}`lawson2025` (Figure 24) looks at the cosine similarities of *all* pairs of
# rows, between two controls of equal shape:
#
# - *independent*: rows from $\mathcal{N}(0, I)$, whose similarities follow $\mathcal{N}(0, 1/d)$;
# - *copies*: $n / n_L$ rows from $\mathcal{N}(0, I)$, each copied $n_L$ times, plus noise from
#   $\mathcal{N}(0, I)$, whose twins have a similarity around one half. This is what cheating would look
#   like.
#
# Both are isotropic, and activations are not. A third control, of {doc}`mmcs`, are rows that have the second moments of the standardised
# activations of `neox-6l-128d` and nothing else of them. It depends on the number of rows alone.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments, widgets
from mlsae_book.charts import sweeps as sweep_charts
from mlsae_book.tables import geometry, sweeps
from mlsae_core import pipeline
from mlsae_core.spec import EvaluateSpec, load_experiment

charts.use_book_theme()
made = experiments.swept("geometry")

# %% tags=["remove-cell"]
_, run = load_experiment("experiments/default.yml").runs[0]
session = pipeline.Session()
source, sae = session.source(run, EvaluateSpec(tokens=8192)), session.sae(run)
mmcs = experiments.tables(made["Expansion factor R"], "mmcs.csv")
of_size = mmcs[mmcs["rows"] == "dictionary"].set_index("expansion_factor").latents
control = geometry.anisotropic(source, sae, of_size).above.set_axis(of_size.index)

# %% [markdown]
# ## By sparsity
#
# Copies would be bought with what is spare: many latents, few of them active at once. So choose $k$.

# %% tags=["hide-input"]
by_sparsity = sweeps.stack({"k": experiments.tables(made["Sparsity k"], "cosines.csv")})
sweep_charts.histogram(
    geometry.densities(by_sparsity, "pairs"),
    axis="Cosine similarity of two rows",
    title="At k = 4 more pairs lie above 0.4 than among copies",
    subtitle="Share of pairs in bins of 0.02, linear above, logarithmic below; R = 16. Choose k: from 8 on there are fewer.",
    series="rows",
    logarithmic=True,
    limit=0.4,
)

# %% [markdown]
# In JupyterLab, with a control of the kernel's:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.cosines(by_sparsity)

# %% [markdown]
# The share of the pairs above 0.4, in 10,000, where hardly any independent pair lies:

# %% tags=["hide-input", "nbval-ignore-output"]
share = geometry.above(by_sparsity, 0.4).set_index(["run", "rows"])["share"]
share = share.unstack("rows").reindex(by_sparsity["run"].unique())
share.assign(as_activations=control[16]).mul(1e4).round(2)

# %% [markdown]
# **What to see.** On the logarithmic axis the copies have a second hump around one half; no dictionary has one, its tail falls all the
# way. But at $k = 4$ more pairs lie above 0.4 than in the control of copies, 41 against 22. At $k = 8$ there are less than half as many
# as in that control, and with larger $k$ hardly any. So the paper's finding, that there are few similar pairs beside the positive
# control, holds for our larger $k$ and fails for the smallest. Similar rows need not be the same feature at two layers: this histogram
# knows nothing of layers. At the two largest $k$ there is a tail on the left too, towards opposite rows.
#
# But neither of the two controls knows where activations point. Of rows that do, and know nothing else, six times as many pairs lie above
# 0.4 as at $k = 4$ (*rows as activations*). So even there the dictionary's similar rows are fewer than its inputs alone would give, and
# no sign of a feature that is held more than once. Nor would their absence at larger $k$ show that none is.
#
# **What would contradict it.** A dictionary whose tail does not depend on $k$, or a hump at one half.
#
# ## By size

# %% tags=["hide-input"]
by_size = sweeps.stack({"R": experiments.tables(made["Expansion factor R"], "cosines.csv")})
sweep_charts.histogram(
    geometry.densities(by_size, "pairs"),
    axis="Cosine similarity of two rows",
    title="At k = 16 no size has as many pairs above 0.4 as copies have",
    subtitle="As above, for neox-6l-128d, k = 16. Choose R.",
    series="rows",
    logarithmic=True,
    limit=0.4,
)

# %% tags=["hide-input", "nbval-ignore-output"]
share = geometry.above(by_size, 0.4).set_index(["run", "rows"])["share"]
share = share.unstack("rows").reindex(by_size["run"].unique())
share.assign(as_activations=control.to_numpy()).mul(1e4).round(2)

# %% [markdown]
# **What to see.** Hardly any pairs lie above the limit in small dictionaries, and about one in 10,000 from $R = 16$ on. Each row of the
# control of copies has five others like it, whatever the size, so that their share falls as the dictionary grows. As a fraction of that
# the dictionary's share grows all the way, from nothing to a seventh. A little below the limit (0.2 to 0.4, in the chart) the smallest
# dictionaries have fewer pairs than copies, and those from $R = 8$ on at least twice as many: similar rows there are, but no humps of
# twins. The third control has more pairs above the limit than the dictionary at every size, by a factor of two hundred or more (in the
# table).
#
# ## By model
#
# What the paper's figure varies.

# %% tags=["hide-input"]
by_model = sweeps.stack({"Model": experiments.tables(made["Model"], "cosines.csv")})
sweep_charts.histogram(
    geometry.densities(by_model, "pairs"),
    axis="Cosine similarity of two rows",
    title="In no model are there as many pairs above 0.4 as among copies",
    subtitle="As above, R = 16, k = 16 (SmolLM2: 8, 32). Choose a model; the controls have its size.",
    series="rows",
    logarithmic=True,
    limit=0.4,
)

# %% tags=["hide-input"]
share = geometry.above(by_model, 0.4).set_index(["run", "rows"])["share"]
share.unstack("rows").reindex(by_model["run"].unique()).mul(1e4).round(2)

# %% [markdown]
# **What to see.** In each model similar pairs are few beside copies, by a factor of ten or more. In neox-4l-64d, whose rows have half the
# dimensions, even independent rows have twice as many as the dictionary. In SmolLM2-135M ({doc}`smollm2`), with another $R$ and $k$, they
# are rarest beside copies. (The third control was not drawn for other models.)
#
# **What would contradict it.** A model whose share comes near that of its copies.
#
# ## Through a lens
#
# A tuned lens is to make layers alike ({doc}`tuned_lens`). If twins stood for one feature in the languages of
# two layers, they would be fewer there.

# %% tags=["hide-input"]
by_lens = sweeps.stack({"basis": experiments.tables(made["Tuned lens"], "cosines.csv")})
sweep_charts.histogram(
    geometry.densities(geometry.together(by_lens), "pairs"),
    axis="Cosine similarity of two rows",
    title="The lens leaves the tail on the right as it was",
    subtitle="As above, R = 16, k = 16. A dictionary is named by its basis.",
    series="rows",
    logarithmic=True,
    limit=0.4,
)

# %% tags=["hide-input"]
share = geometry.above(by_lens, 0.4).set_index(["run", "rows"])["share"]
share.unstack("rows").reindex(by_lens["run"].unique()).mul(1e4).round(2)

# %% [markdown]
# **What to see.** With the lens there are as many pairs above the limit as without, about one in 10,000: no difference to speak of. On
# the left, towards opposite rows, there are somewhat more (in the chart).
#
# **What would contradict it.** Far fewer similar pairs through a lens than without.

# %% [markdown]
# ## How this page was made
#
# The numbers depend on the trained dictionaries alone. The controls are drawn once, with one seed.

# %% tags=["hide-input"]
sweeps.across(experiments.notes, made).drop(columns="position").set_index(["sweep", "run"])

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
