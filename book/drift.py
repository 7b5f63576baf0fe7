# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Drift
#
# **How much does the residual stream change from one layer to the next?**
#
# One dictionary for all layers makes sense only if the layers write in nearly the same language. Every
# block *adds* to the residual stream, so what one layer wrote can still be read at the next. Section 4.2 of
# {cite:t}`lawson2025` looks at two numbers before it trains anything:
#
# - the mean $L^2$ norm of the vectors at each layer, $\mathbb{E}_t \lVert x_{t,\ell} \rVert$ (Figure 4);
# - the mean cosine similarity of a token's vectors at adjacent layers (Figure 1),
#
# $$
# \mathbb{E}_t \left[
# \frac{(x_{t,\ell} - \mu_\ell) \cdot (x_{t,\ell+1} - \mu_{\ell+1})}
# {\lVert x_{t,\ell} - \mu_\ell \rVert \, \lVert x_{t,\ell+1} - \mu_{\ell+1} \rVert}
# \right] , \qquad \mu_\ell = \mathbb{E}_t [ x_{t,\ell} ] .
# $$ (eq-drift)
#
# The vectors are centred, because a large offset that all tokens share makes any two of them look alike. No
# dictionary takes part in this chapter: these are facts about the language models.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments
from mlsae_book.charts import drift as drift_charts
from mlsae_book.tables import drift
from mlsae_core.spec import load_experiment

charts.use_book_theme()
made = experiments.measure(load_experiment("experiments/drift.yml"), "drift")
made += experiments.used("drift")
layers, pairs = experiments.tables(made, "layers.csv"), experiments.tables(made, "pairs.csv")

# %% [markdown]
# ## Norms
#
# Choose a model to pick its line out; `neox-6l-128d-qa` is `neox-6l-128d` after more training on questions. SmolLM2-135M is one that
# people use, of 30 layers, read without its attention sinks ({doc}`smollm2`).

# %% tags=["hide-input"]
drift_charts.norms(
    layers,
    title="Vectors grow from the first layer to the last, if not at every step",
    subtitle="Mean over tokens; ± 2 standard errors are mostly smaller than a point. Dashed: SmolLM2.",
    dashed="SmolLM2-135M",
)

# %% [markdown]
# **What to see.** Norms grow from the first layer to the last in every model, as the paper finds in its own. Those of Llama and Gemma
# 2 more than double (in the table at the end). GPT-2's and SmolLM2's grow, too, but with a step down on the way. Training on questions
# adds little to those of `neox-6l-128d`, 3 % at most. In SmolLM2, which has five times as many layers, they grow nineteenfold.
#
# **What would contradict it.** A trained model whose vectors shrink from first to last layer.
#
# ## Adjacent layers
#
# Choose a model, or switch the centring off.

# %% tags=["hide-input"]
drift_charts.cosines(
    drift.adjacent(pairs),
    title="Adjacent layers are alike, about their means too; so are sums and their parts",
    subtitle="Mean over tokens at layers ℓ and ℓ + 1; ± 2 standard errors. The axis begins at 0.5. Dashed: SmolLM2.",
    dashed="SmolLM2-135M",
)

# %% [markdown]
# **What to see.** The larger a GPT-NeoX, in layers and width, the more alike are its neighbours, perhaps since a block has less to do:
# the mean over pairs rises from 0.79 to 0.92 (in the table at the end). They are most alike at or just after the middle. In GPT-2, Llama
# and Gemma 2 the first layer and the second are the least alike. In SmolLM2 it is the last two: nowhere else does one block turn the
# stream as far. Centring moves every pair by less than a tenth: an offset that all tokens share is not what makes neighbours alike.
#
# **What would contradict it.** Similarities near zero after centring: then nothing but a common offset
# would be shared, and a dictionary for all layers would be as many dictionaries as there are layers.
#
# ## As alike as a sum and its part
#
# A block adds to what it reads, so the two are alike whatever it adds. If a block's update were perpendicular to the stream, the
# cosine would be the ratio of the two lengths,
#
# $$
# \mathbf{u} \perp \mathbf{x} \quad\Rightarrow\quad
# \cos(\mathbf{x}, \mathbf{x} + \mathbf{u}) = \frac{\lVert \mathbf{x} \rVert}{\lVert \mathbf{x} + \mathbf{u} \rVert} .
# $$ (eq-perpendicular)
#
# So this ratio, and not zero, is what similarity has to be held against. The same model with random weights stands at the end
# of the tables.

# %% tags=["hide-input"]
_, random = experiments.measure(
    load_experiment("experiments/random.yml"), "drift", model="random weights"
)
every = [*made, random]
of_all = experiments.tables(every, "layers.csv"), experiments.tables(every, "pairs.csv")
drift.beside_sums(*of_all).set_index(["model", "layer", "other"]).round(3)

# %% [markdown]
# **What to see.** *perpendicular* is the ratio of the mean norms, *more* what the measured cosine (not centred) is above it. The first
# four pairs of `neox-6l-128d` are *less* alike than perpendicular updates would leave them: their blocks take away as well as add. In
# Llama, but for one pair, in most of SmolLM2 and in the later layers of `neox-8l-192d` it is the other way. With random weights the two
# differ by less than 0.02. (A ratio above 1, as in GPT-2, belongs to vectors that shrink, which no perpendicular update makes them do.)
# So that neighbours are alike is for the most part what a sum is: in a model that has learnt nothing they are nearly as much so.
#
# **What would contradict it.** Cosines far above the ratio at every pair: then blocks would mostly lengthen what is there.
#
# ## All pairs
#
# Adjacent layers may be alike while the first and the last are not.

# %% tags=["hide-input"]
drift_charts.matrix(
    drift.matrix(pairs),
    title="Similarity falls with the distance of the layers",
    subtitle="Mean cosine similarity of every two layers' vectors; the diagonal is 1 and left out.",
)

# %% [markdown]
# **What to see.** The first and the last layer of `neox-6l-128d` have 0.44, and the ends of the other two GPT-NeoX nearly the same. So
# with more layers the steps are smaller, the whole way is not. Of SmolLM2's 30 layers the two ends are no longer alike: what the first
# layer wrote is nearly gone at the last, though at every step but one neighbours are alike. Among our other architectures GPT-2's ends
# are the least alike and Llama's the most. In all models centring *raises* the similarity of the two ends, by 0.13 at most: their offsets
# differ more than their tokens do. A dictionary for all layers has to serve two ends whose similarity is below one half, or next to none.
#
# The null model of the last section is in the table below, too: *first and last layer, if updates were perpendicular* is the ratio of the
# first norm to the last. In every model the ends (*first and last layer, not centred*) are *less* alike than that: over the whole way,
# blocks take away from what the first layer wrote. Of our own, Llama's are nearest to it. With random weights the two are nearly the
# same, 0.394 and 0.405: to take away more than that is something that training does, if hardly in Llama.
#
# The numbers:

# %% tags=["hide-input"]
drift.summary(*of_all).set_index("model").round(3)

# %% [markdown]
# ## Beside the paper
#
# Figures 1 and 4 of the paper are pictures without a table, so there is no number to set beside ours; its
# text says that norms grow over the layers and that adjacent layers are relatively similar. The
# relative layer is $\ell / n_L$ in Figure 4, and for pairs here $\ell / (n_L - 1)$.
#
# The paper adds a GPT-2, a Llama and a Gemma 2 to its models; so does {doc}`architectures`.
#
# ## How this page was made
#
# Two passes over the first 131,072 tokens of the test split (of SmolLM2 fewer, see the table): the first for each layer's mean vector, the
# second for norms and similarities about it. Special tokens are left out. Standard errors are over
# sequences, since the tokens of one depend on each other; they say how well the means are known, not how
# much tokens differ.

# %% tags=["hide-input"]
experiments.notes(made).set_index("model")

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
