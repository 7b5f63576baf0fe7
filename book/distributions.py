# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Distributions over layers
#
# **Is a latent active at one layer, or at many?**
#
# For latent $j$ and token $t$, the activations $h_j$ at the layers, divided by their sum, make a
# distribution over layers (Eq. 10 of {cite:t}`lawson2025`):
#
# $$
# P(L = \ell \mid T = t, J = j) = \frac{h_j(x_{t,\ell})}{\sum_{\ell'} h_j(x_{t,\ell'})} .
# $$ (eq-over-layers)
#
# Two ways lead from tokens to a latent. **Mean over active tokens**: average this distribution over the
# tokens at which the latent is active at some layer, each counting the same; the variances of
# {doc}`variance` are of this one. **Activation totals**: sum activations over tokens first and normalise
# then, so that tokens with large activations count for more; the paper's heatmaps show these
# (Appendix C.1). Both can be chosen below, and so can two *null models*, which say what the
# picture would be without anything to find:
#
# - **layers permuted**: at every token, the six layers' codes are dealt to the layers at random. Which
#   latents are active, and how often, stays; that they prefer a layer goes.
# - **Gaussian input**: the dictionary encodes vectors of random direction, as long as the real ones.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments, stages, widgets
from mlsae_book.charts import layers as layer_charts
from mlsae_book.charts import sweeps as sweep_charts
from mlsae_book.tables import layers, spread, sweeps
from mlsae_core import pipeline
from mlsae_core.spec import load_experiment

charts.use_book_theme()
experiment = load_experiment("experiments/default.yml")
measured = experiments.measure(experiment, "distributions")
single = experiments.measure(experiment, "prompts")
arrays, numbers = experiments.read_distributions(measured[0][1])

# %% [markdown]
# ## Over many tokens
#
# Choose the weighting, or a null model. A click on a column leads to the latent's card in {doc}`explorer`.

# %% tags=["hide-input"]
aggregate = layer_charts.aggregate(
    layers.aggregate_table(arrays),
    layers.SOURCES,
    title="Over many tokens, most latents are spread over several layers",
    subtitle="A column is a latent; 400 of them, evenly spaced in the order of their mean layer E[L | j].",
)
charts.with_cards(aggregate)

# %% [markdown]
# Latents that are never active in the sample, *dead* here, have no distribution and are left out of the picture:

# %% tags=["hide-input"]
layers.spread_table(arrays).set_index("of").round(3)

# %% [markdown]
# *latents* and *dead* are numbers of latents; *at one layer* is the fraction of latents with more than 99 % of their probability at one
# layer, *largest* the mean over latents of the largest probability, *entropy* that of the entropy over its maximum, $\ln n_L$.
#
# **What to see.** Each choice has an order of its own. The picture is a broad diagonal: latents prefer layers, and the preference changes
# gradually from the first to the last. Hardly any belongs to one layer (three of 2048); on average the favourite layer has 0.46 of the
# probability, where no preference would be 0.17, and the entropy is three quarters of its maximum. Under both null models nothing is left
# of it. By activation totals latents look more spread still (0.37; entropy 0.81), for which the weighting gives a reason: a token at
# which the latent is active at several layers adds more to the totals than one at which it is active at one.
#
# **What would contradict it.** A picture that looks like the null model's: with layers permuted, every latent
# has the same share of every layer, up to chance. But a picture unlike the null models' is not yet a fact about what the
# language model has learnt: one with random weights has such a diagonal, too ({doc}`gallery`, {doc}`variance`).
#
# ## A model that people use
#
# The same picture of a dictionary of SmolLM2-135M, with 30 layers ({doc}`smollm2`), beside that of our default run. Choose the model.

# %% tags=["hide-input"]
ours = experiments.measure(experiment, "distributions", model="neox-6l-128d")
both = experiments.read_all(ours + experiments.used("distributions"))
sweep_charts.gallery(
    sweeps.stack({"model": spread.sampled(both)}),
    title="A diagonal in a model of 30 layers, too, with a crowd at the first",
    subtitle="100 latents, evenly spaced in the order of their mean layer E[L | j].",
)

# %% tags=["hide-input"]
layers.spread_table(both[-1][1]).set_index("of").round(3)

# %% [markdown]
# **What to see.** Latents of SmolLM2 prefer layers as those of our model do. The favourite layer has a quarter of the probability, where
# layers permuted leave a twentieth, and the entropy is about as far below its maximum as in our
# model. So a latent there serves more layers. But it serves a smaller part of them: the same fraction of the logarithm of more layers is
# a smaller fraction of the layers.
#
# **What would contradict it.** An entropy at that of its null models.
#
# ## How much, not only where
#
# Normalising each column hides how rarely, or how weakly, a latent is active. The totals, without
# normalisation (Figure 25), range over orders of magnitude, so the colour shows a power of them; the paper
# takes the square root. Move the slider: at 1 colours are proportional to totals, and few latents can be seen
# at all.

# %% tags=["hide-input"]
totals = layer_charts.totals(
    layers.totals_table(arrays),
    title="A tenth of the latents carries 43 % of all activation",
    subtitle="The same 400 latents in the same order; colour: total activation over all tokens, of the largest.",
)
charts.with_cards(totals)

# %% [markdown]
# **What to see.** The busiest hundredth of the latents carries 15 % of all activation, the busiest tenth 43 %;
# the busiest latent has a hundred times the total of the median one. Busy latents stand at every place in the order.
#
# ## Single prompts
#
# The paper's prompt comes from {cite:t}`wang2022`; the others are the sort of text our model knows. Latents whose
# activations are all below $10^{-3}$ are left out, as in Figure 3. Empty cells are zero. The third choice,
# totals that are not normalised, is Figure 26.

# %% tags=["hide-input"]
prompts = layer_charts.prompts(
    experiments.tables(single, "prompts.csv"),
    title="In one prompt, far more latents are active at one layer only, most of them for want of tokens",
    subtitle="A column is a latent, sorted by its mean layer in this prompt. Choose the prompt and what is shown.",
)
charts.with_cards(prompts)

# %% [markdown]
# In JupyterLab, type one of your own:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.prompt_layers(pipeline.Session(), experiment.runs[0][1], stages.PROMPTS[0])

# %% [markdown]
# But a prompt of ten tokens gives most latents one or two tokens to be active at, so its picture would be
# sharper than the aggregate whatever the latents are like. The null model with layers permuted, drawn twenty times
# for each prompt, says how sharp:

# %% tags=["hide-input"]
experiments.tables(single, "spread.csv").set_index(["prompt", "of"]).round(3)

# %% [markdown]
# **What to see.** About half of a prompt's latents are active at one layer only (44 % to 53 %), as against three of 2048 over many
# tokens: the paper's observation holds here. But most of that is the size of the sample. With layers
# permuted it is still around two fifths (35 % to 49 %), since a latent that is active once is at one layer however layers are dealt. The
# difference, 4 to 9 points in these four prompts, which have no interval, is what is left for latents that come back at the same
# layer. So the step from Figure 2 to Figure 3 is first a step from many tokens to few, and only then a fact about latents.
#
# What neither picture shows is a latent at *one token*: at how many layers is it active there? More than half of the pairs of a
# token and a latent are active at one layer; but most of these latents are not gone at the next layer, they fall out of the
# $k$ largest. {doc}`carried` counts both, and finds them much the same in a stream that adds other tokens' updates.
#
# **What would contradict it.** Prompts whose latents are no more concentrated than in the aggregate: then
# being spread over layers would be a property of the latent, not of the mixture of tokens.
#
# ## Beside the paper
#
# Its Figures 2 and 3 carry no numbers; the text says that aggregate heatmaps spread more in larger
# models, and that many more latents are of a single layer for a single prompt. The ratios that put a number on
# both are the subject of {doc}`variance`.
#
# ## How this page was made
#
# Means and totals are accumulated exactly in one pass. The code released with the paper counts tokens at which a
# latent is inactive as probability zero, so that its distributions do not sum to one; here they are no part of
# the mean.

# %% tags=["hide-input"]
experiments.notes(experiments.measure(experiment, "train") + measured + single).set_index("stage")

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
