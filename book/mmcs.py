# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Mean max cosine similarity
#
# **How alike are the directions of a dictionary?**
#
# When a dictionary grows, one feature may be split over several latents, whose decoder rows then point
# nearly the same way. {cite:t}`sharkey2022` measure how near a learned dictionary $X$ comes to a true
# one $X'$ by the mean max cosine similarity (Eq. 13 of {cite:t}`lawson2025`):
#
# $$
# \operatorname{MMCS}(X, X') = \frac{1}{|X|} \sum_{x \in X} \max_{x' \in X'}
# \frac{x \cdot x'}{\|x\| \, \|x'\|} .
# $$ (eq-mmcs)
#
# A language model has no true dictionary, so the paper compares a dictionary with itself: the largest
# cosine similarity of each decoder row with any *other* row. All ordered pairs count here; the code
# released with the paper looks at half of them, and a maximum over fewer is smaller.
#
# A maximum over more rows is larger even if nothing is alike, since random directions in $d$
# dimensions come closer to each other the more there are. So every number below stands beside those of
# two dictionaries of the same shape: *independent*, Gaussian vectors, and *copies*, where each of
# $n / n_L$ Gaussian vectors is there $n_L$ times with noise of its own length.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments, widgets
from mlsae_book.charts import sweeps as sweep_charts
from mlsae_book.tables import geometry, sweeps
from mlsae_core import pipeline
from mlsae_core.spec import EvaluateSpec, load_experiment

charts.use_book_theme()

# %% tags=["remove-cell"]
lens = {
    "Sparsity k, tuned lens": "experiments/lens_sparsity.yml",
    "Expansion factor R, tuned lens": "experiments/lens_sizes.yml",
}
made = experiments.swept("geometry") | experiments.swept("geometry", lens)
mmcs = sweeps.across(experiments.tables, made, "mmcs.csv")

# %% [markdown]
# ## By sparsity, size, model and basis
#
# Choose what varies: $k$ or $R$ (both also through the tuned lens), the model, the basis that the dictionary was trained in
# ({doc}`tuned_lens`), or whether the language model was trained at all.
# $R = 16$ and $k = 16$ where they do not vary; of SmolLM2-135M ({doc}`smollm2`) $R = 8$ and $k = 32$.

# %% tags=["hide-input"]
sweep_charts.points(
    mmcs,
    value="mmcs",
    axis="MMCS (cosine similarity)",
    title="MMCS falls with k, to that of random directions",
    subtitle="Points: means over rows; lines: first to third quartile. With R it rises, and so does theirs: choose R.",
    interval=("q25", "q75"),
    series="rows",
)

# %% [markdown]
# **What to see.** The MMCS falls as $k$ rises, as in the paper's Figure 23, from 0.49 at the smallest $k$ to 0.29. The independent
# control has 0.30. So most of each number says nothing about the dictionary but its shape, and from $k = 32$ on rows are no nearer to one
# another than random directions are. The paper has no such baseline beside its numbers; part of their fall with the size of the model
# must be that random directions in more dimensions are further apart. A lens hardly matters at $k = 16$ and 64, nor at
# three values of $R$, though the basis is another; at $k = 4$ the MMCS is 0.02 smaller through it.
#
# With $R$ the MMCS rises, as in the paper, but so does the control's. In the smallest dictionaries rows keep further apart than chance
# would place them, and from $R = 8$ on they are nearer. With the size of GPT-NeoX the MMCS falls from the smallest to the next and then
# stays, where in Table 2 it falls throughout with that of Pythia. The controls fall all the way: beside chance, the rows of a larger
# model are nearer to one another. Models of equal width share their control. Among them GPT-2 has the largest MMCS and Gemma 2 the
# smallest, but they are near to one another, with one run each. With random weights it is 0.35, as with trained ones. In SmolLM2-135M,
# which is three times as wide as the widest of ours, the MMCS is the smallest of all and lies furthest above its control.
#
# **What would contradict it.** An MMCS that rises with $k$, or does not leave the control at any $k$.
#
# ## Rows that point where the activations do
#
# Activations do not fill their space evenly, and a dictionary that reconstructs them cannot either. So a control of isotropic rows is
# too easy to beat. A harder one has the second moments of the standardised activations of `neox-6l-128d` and nothing else of them. It
# depends on the number of rows, so on $R$, and not on $k$:

# %% tags=["hide-input", "nbval-ignore-output"]
_, run = load_experiment("experiments/default.yml").runs[0]
session = pipeline.Session()
of_size = mmcs[(mmcs.sweep == "Expansion factor R") & (mmcs["rows"] != "copies")]
of_size = of_size.pivot_table(index=["latents", "run"], columns="rows", values="mmcs").reset_index(
    "run"
)
source, sae = session.source(run, EvaluateSpec(tokens=8192)), session.sae(run)
control = geometry.anisotropic(source, sae, of_size.index).set_index("latents")
of_size.rename(columns={"run": "R"}).assign(as_activations=control.mmcs).round(3)

# %% [markdown]
# **What to see.** Rows that merely point where the activations point have 0.50 at $R = 16$ (*rows as activations*), the dictionary 0.35.
# At every $R$ they are nearer to one another than its rows are, and at the smallest $k$ its 0.49 (in the table below) comes near them and
# is not above. So beside *this* control the rows of all these dictionaries keep apart. Being above the isotropic one is then by itself no
# sign of features that were learnt more than once, and that the MMCS leaves it at small $k$ is none of splitting. (For the other models
# and through a lens the control was not drawn.)
#
# **What would contradict it.** A dictionary whose rows are nearer to one another than these.
#
# ## Table 2
#
# Ours, mean and standard deviation over rows, beside the control:

# %% tags=["hide-input"]
kept = mmcs[mmcs["rows"] != "copies"].set_index(["sweep", "run", "rows"])
kept[["mmcs", "std", "q50"]].round(3)

# %% [markdown]
# The paper's, with $R = 64$ and $k = 32$. Its models are wider, so their rows have more room:

# %% tags=["hide-input"]
experiments.published("table2").set_index("model")

# %% [markdown]
# ## The whole distribution
#
# A mean hides whether all rows have a neighbour or a few have a twin.

# %% tags=["hide-input"]
cosines = sweeps.stack({"k": experiments.tables(made["Sparsity k"], "cosines.csv")})
sweep_charts.histogram(
    geometry.densities(cosines, "maxima"),
    axis="Largest cosine similarity with another row",
    title="At small k the whole distribution moves to the right, its tail most",
    subtitle="Share of rows in bins of 0.02. Choose k.",
    series="rows",
)

# %% [markdown]
# **What to see.** At $k = 4$ even the lower quartile of the rows lies above nearly all of the independent control: most rows have a
# neighbour nearer than chance would give. At $k = 16$ the two distributions overlap for most of their width.
#
# In JupyterLab, with a control of the kernel's:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.cosines(cosines)

# %% [markdown]
# ## How this page was made
#
# The numbers depend on the trained dictionaries alone, but for the control with second moments. The controls are drawn once, with one seed.

# %% tags=["hide-input"]
sweeps.across(experiments.notes, made).drop(columns="position").set_index(["sweep", "run"])

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
