# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Variance ratios
#
# **Is a latent spread over layers because its tokens differ, or at every token?**
#
# A heatmap ({doc}`distributions`) shows that latents are spread, not by how much, nor why. Section 4.3 of
# {cite:t}`lawson2025` measures the spread by the variance of the layer index $L$, with a
# token $T$ and a latent $J$ drawn at random: $J$ uniformly from the latents that are active at least once, $T$ uniformly from
# the tokens at which $J$ is active, $L$ by Eq. 10. The law of total variance, used twice, splits it (Eq. 14 and 15):
#
# $$
# \operatorname{Var}(L) =
# \underbrace{\mathbb{E}[\operatorname{Var}(L \mid J, T)]}_{\text{within one token of a latent}}
# + \underbrace{\mathbb{E}[\operatorname{Var}(\mathbb{E}[L \mid J, T] \mid J)]}_{\text{between the tokens of a latent}}
# + \underbrace{\operatorname{Var}(\mathbb{E}[L \mid J])}_{\text{between latents}} .
# $$ (eq-total-variance)
#
# The first two terms together are $\mathbb{E}[\operatorname{Var}(L \mid J)]$. Since a variance grows with the
# number of layers, models are compared by ratios (Eq. 11 and 12):
#
# $$
# \frac{\mathbb{E}[\operatorname{Var}(L \mid J)]}{\operatorname{Var}(L)}
# \quad \text{and} \quad
# \frac{\mathbb{E}[\operatorname{Var}(L \mid J, T)]}{\mathbb{E}[\operatorname{Var}(L \mid J)]} .
# $$ (eq-variance-ratios)
#
# The first is 1 if every latent is spread over the layers as all of them together are, and 0 if every latent has a layer of its
# own. The second is 1 if what a latent does over its tokens it does at each of them, and 0 if at any one
# token it is active at one layer.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments
from mlsae_book.charts import layers as layer_charts
from mlsae_book.tables import layers, sweeps
from mlsae_core import pipeline
from mlsae_core.spec import EvaluateSpec, load_experiment

charts.use_book_theme()
default = load_experiment("experiments/default.yml")
made = experiments.swept("distributions")
made["Default run"] = experiments.measure(default, "distributions", training="4 M tokens")
ratios = layers.variance_sweeps(made)

# %% [markdown]
# ## The two ratios
#
# Choose what is swept; $R = 16$ and $k = 16$ where they do not vary, after 1 M tokens of training (4 M in *Default run*). SmolLM2-135M,
# among the models, has a recipe of its own ({doc}`smollm2`). Beside each run stand its null models (explained in {doc}`distributions`):
# the same codes with layers permuted at each token, and the codes of Gaussian vectors. Both make layers exchangeable, so of the *first*
# ratio both are 1 by construction, whatever the dictionary is like: to be below them says no more than that layers differ. Null models
# that contain a residual stream are in {doc}`carried`.

# %% tags=["hide-input"]
layer_charts.variance_ratios(
    ratios,
    title="The first ratio is below 1, and rises with k",
    subtitle="Choose the sweep: it is below 1 in every run. Lines: 95 % intervals, mostly smaller than a point.",
)

# %% [markdown]
# **What to see.** The first ratio rises with $k$, from 0.50 to 0.80: the fewer latents are active, the more each keeps to some of the
# layers. The second falls. With Gaussian input it is near zero at every $k$: at one token a latent is active at several layers far
# more than vectors without a common origin would make it. With layers permuted it is as measured at $k = 4$, and more than measured
# from $k = 8$ on. There the layers of a latent at one token are nearer to each other than chance would place them.
#
# With $R$ both ratios fall. Part of that is the sample: at large $R$ there are many latents that are active at few tokens
# ({doc}`entropy`), which makes their spread look small (next section). And the second falls no faster than its null model: what is
# measured is about two thirds of the value with layers permuted at every $R$. The paper has the first rise with the number of
# latents; ours does not.
#
# Over our models the first ratio goes from 0.54 (GPT-2) to 0.65 (neox-4l-64d). SmolLM2-135M is below them all, and so is its second
# ratio, though that has the highest value with layers permuted; but its $R$, $k$ and text are others. With the size of GPT-NeoX the first
# *falls*, where the paper's broadly rises with that of Pythia. The second rises with that size, but so, and more steeply, does its value
# with layers permuted.
#
# A lens at its own layers raises the first ratio, from 0.62 to 0.75; with the alignment of the released code it is a little lower
# than without a lens. The paper reports that a lens lowers it, to 0.41 or less: of ours only the released alignment goes that way,
# and not so far. (With dictionaries of a lens that read activations without it, as in the released scripts, nothing is measured here:
# {doc}`tuned_lens`.) In the default run, the same recipe on four times the training text, the first ratio is 0.56 and the second is
# higher. So in this pair of runs longer training makes latents keep more to their layers.
#
# **Random weights.** The last sweep is a null model of another kind: an MLSAE trained in the same way on a copy of `neox-6l-128d`
# whose weights were drawn at random and never trained. Its first ratio is 0.55, below the trained model's. So that latents prefer
# layers is no sign of anything that was learnt: each block adds something of its own, random or not, and a dictionary that has to
# reconstruct it deals its latents out. ({cite:t}`heap2025` find that other measures of autoencoders, too, say much the same of random
# transformers.) This page once concluded that training makes latents serve more layers. We withdraw that: with the other choice of
# $P(J)$ the order is reversed (next section), and the two models differ in how far their layers turn and in how well they are
# reconstructed. {doc}`carried` has random weights that turn as far.
#
# An interval can lie beside its own estimate, as at $k = 4$ and at $R = 64$. A latent that was active at few tokens is too narrow in
# the sample. A resample leaves out some of its tokens and makes it narrower still, and a *basic* interval corrects for that bias by
# reflecting it about the estimate.
#
# **What would contradict it.** A first ratio near 1 with random weights: then preferring layers would be something learnt. It is not
# what we find.
#
# ## Which latents count, and how sure the numbers are
#
# Eq. 11 takes $P(J)$ as uniform, so that a latent active at three tokens counts as much as one active at thousands. The other choice is
# in proportion to the tokens at which it is active, $P(J = j) \propto n_j$. Neither is wrong; a conclusion should not depend on it.

# %% tags=["hide-input"]
read = experiments.swept_distributions()
weighted = sweeps.across(layers.weighted_ratio, read)
weighted.pivot(index=["sweep", "position", "run"], columns="weighting", values="value").round(3)

# %% [markdown]
# **What to see.** Weighted by tokens, every ratio is smaller: busy latents keep more to their layers. Over $k$ and $R$ the order of
# the runs stays. Over the models it does not quite: Llama moves past two of the GPT-NeoX. Between trained and random weights it turns
# round, to 0.48 and 0.50. So the sign of that difference belongs to $P(J)$.
#
# There are two more reasons for caution. The variance between the tokens of a latent is estimated from the $n_j$ of them in the sample,
# which makes it too small by $(n_j - 1)/n_j$. The intervals above allow for it in their place, not in the estimate; the estimate
# without that bias stands beside it here, for the runs whose dictionaries are at hand, on fewer tokens:

# %% tags=["hide-input"]
carried = load_experiment("experiments/carried.yml")
corrected = experiments.tables(experiments.measure(carried, "persistence"), "ratios.csv")
corrected = corrected[(corrected.of == "measured") & (corrected.ratio == "Eq. 11")]
shown = corrected.assign(corrected=corrected.corrected.map({False: "plug-in", True: "corrected"}))
shown.pivot(index="case", columns=["weighting", "corrected"], values="value").round(3)

# %% [markdown]
# The correction is small on these, 0.004 at most. And intervals over the text are not all of the uncertainty. Three dictionaries of
# one model that differ in nothing but the seed of their training:

# %% tags=["hide-input"]
seeds = experiments.measure(load_experiment("experiments/seeds.yml"), "distributions")
of_seeds = layers.variance_sweep(seeds).set_index(["ratio", "seed"])[["low", "value", "high"]]
of_seeds.sort_index().round(4)

# %% [markdown]
# **What to see.** In either ratio there are two intervals that do not even meet. Seeds differ by 0.004, about as much as an interval
# is wide. Three seeds are few to judge by, so we read nothing into a difference of less than about 0.01 between two single runs,
# however narrow their intervals.
#
# **What would contradict it.** Seeds whose intervals all overlap.
#
# ## The three parts
#
# The ratios hide each other: the second is a fraction of a fraction. Stacked, the three terms of
# {eq}`eq-total-variance` sum to $\operatorname{Var}(L)$. If all layers were equally likely that would be
# $(n_L^2 - 1) / 12$, 2.92 for six layers.

# %% tags=["hide-input"]
layer_charts.variance_parts(
    layers.variance_sweeps(made, layers.variance_parts),
    title="Over k variance moves from between latents to between tokens, over R from one token to between latents",
    subtitle="A bar is a run. Choose whether its parts are fractions or squared layers.",
)

# %% [markdown]
# **What to see.** With $k$ the part between latents falls, from 50 % to 20 %. The part between the tokens of a latent takes it over,
# and that within one token shrinks as well. With $R$ the part within one token falls, from 27 % to 9 %, and the part between latents
# takes that over; the part between tokens hardly moves. In the default run the parts between latents and between tokens are nearly
# equal. Its $\operatorname{Var}(L)$ is 3.34, more than uniform layers would give, so probability crowds towards the first and the
# last layer.
#
# ## Beside the paper
#
# The paper states ranges in its text, for $R = 64$, $k = 32$ and 10 M tokens of the Pile:

# %% tags=["hide-input"]
published = experiments.published("variance_ratios")
published.set_index(["source", "ratio"])

# %% [markdown]
# Ours, as the range over the runs of each sweep, SmolLM2 among the models:

# %% tags=["hide-input"]
ratios.groupby(["sweep", "ratio"], sort=False).value.agg(["min", "max"]).round(3)

# %% [markdown]
# The first ratio lies in the paper's range but for the smallest $k$ and for SmolLM2. The second lies above the paper's range and comes down
# to its upper end only at the largest $k$. Language model, $R$, $k$ and text differ, and so does the estimator (next), which alone is
# enough for that. It is worth knowing what a low second ratio would mean: with Gaussian input, where activity at several layers is chance,
# it is 0.012 at $k = 16$, within the paper's range.
#
# ## How much the definition matters
#
# The code released with the paper computes both ratios in another way: within each batch, with probability
# zero where a latent is inactive, and it averages the ratios of the batches ({doc}`definitions`). On the same
# tokens of the default run, in batches of 512:

# %% tags=["remove-cell", "nbval-ignore-output"]
_, run = default.runs[0]
session = pipeline.Session()
source = session.source(run, EvaluateSpec(tokens=8192))  # on a bare clone with progress bars

# %% tags=["hide-input"]
layers.ratio_definitions(source, session.sae(run)).set_index("definition").round(3)

# %% [markdown]
# **What to see.** On the same tokens the released code's way turns our second ratio into 0.04, and the first into 0.93. That code
# averages over tokens at which a latent is silent, too, so that probabilities sum to far less than one. Of such,
# $\operatorname{E}[L^2] - \operatorname{E}[L]^2$ is nearly $\operatorname{E}[L^2]$, for one latent as for all together. So the
# estimator alone takes our second ratio into the paper's range, and the first out of it: numbers of the two kinds should not be set
# beside each other.
#
# ## How this page was made
#
# The three variances come from four sums per latent, exactly, in one pass, so that they do not depend on the batch. The
# intervals are basic bootstrap intervals from 64 blocks of sequences drawn 1000 times with replacement: they
# cover the choice of text, not of the seed of training.

# %% tags=["hide-input"]
sweeps.across(experiments.notes, made).drop(columns="position").set_index(["sweep", "run"])

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
