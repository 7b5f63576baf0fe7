# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Carried, rewritten or shared?
#
# **What does it mean that a latent is active at several layers?**
#
# The residual stream is a sum: what a block adds is still there after the next one, unless something takes it away. So a latent
# that is active at several layers may be so for reasons that have little in common:
#
# - it is **carried**: its direction was written once, and later blocks leave it alone;
# - it is **rewritten**: later blocks compute it again, add to it, or hand it over to another latent;
# - it is **shared**: the dictionary uses one row for different things at different layers;
# - or that it *stops* is no fact about the stream: TopK keeps the $k$ largest, and others have become larger.
#
# The variance ratios of {cite:t}`lawson2025` ({doc}`variance`) cannot tell these apart. This page tries to, in the order in which
# a sceptic would ask, beside null models that *contain* a residual stream where there are any, and toys in which the answer is known.

# %% tags=["remove-cell", "nbval-ignore-output"]
from functools import partial

from mlsae_book import charts, controls, experiments, stages, surrogates, toys
from mlsae_book.charts import carried as draw
from mlsae_book.tables import carried, margins
from mlsae_book.tables import together as at_once
from mlsae_core import pipeline
from mlsae_core.spec import load_experiment

charts.use_book_theme()
experiment = load_experiment("experiments/carried.yml")
measured = experiments.measure(experiment, "persistence")

# %% tags=["remove-cell"]
own = [carried.MEASURED, *carried.UPDATES, *carried.APART]
layers = experiments.tables(measured, "layers.csv")
pairs = experiments.tables(measured, "pairs.csv")
ranks = experiments.tables(measured, "ranks.csv")
survival = experiments.tables(measured, "survival.csv")
ratios = experiments.tables(measured, "ratios.csv")

# %% [markdown]
# ## At how many layers is a latent active at one token?
#
# Take every pair of a token $t$ and a latent $j$ that is active there at some layer, and count the layers,
#
# $$
# N_{tj} = \bigl|\{\ell : j \in \operatorname{TopK}(\mathbf{x}_{t,\ell})\}\bigr| .
# $$ (eq-layers-of-a-pair)
#
# The null models: **Gaussian vectors** of the same lengths, and at each layer the codes of **another token**, know of no stream. The
# other two start at the token's own first layer and go on as sums. To each token is added what the block adds at **another token**, or as
# much of it in a **random direction**, the part along the stream kept.
#
# *default* is trained on 4 M tokens, *seed 0* is the same run on 1 M, and *random weights*, on 1 M too, is to be read beside *seed 0*.

# %% tags=["hide-input"]
draw.beside(
    layers[layers.of.isin(own)],
    ("layers", "Layers at which the latent is active at the token"),
    ("share", "Share of the pairs (token, latent)"),
    "of",
    title="Most pairs are of one layer; for a trained model, in a stream of other tokens' updates as many",
    subtitle="Lines: 95 % intervals over sequences, mostly smaller than a point.",
    choices={"case": "Run"},
)

# %% [markdown]
# **What to see.** In the default run 57 % of the pairs are active at one layer. The rest is nearly always at layers that follow each
# other (*contiguous* in the table). That is far from Gaussian vectors or from other tokens, where nothing connects the layers. But a sum
# of *other tokens'* updates gives nearly as much, 59 %, and nearly the whole histogram. So that a latent is active at several layers of a
# token, and at how many, is in the trained model for the most part what adding does. With *random weights* it is less so: there more
# pairs are of one layer than in both sums (0.670 against 0.584).
#
# **What would contradict it.** A share of one-layer pairs far from that of the summed null models, on either side.
#
# The same in numbers. *single* is the share at one layer, *mean* the mean number of layers, *contiguous* the share of the other pairs
# whose layers follow each other:

# %% tags=["hide-input"]
columns = ["l0", "single", "single_low", "single_high", "mean", "contiguous"]
pairs[pairs.of.isin(own)].set_index(["case", "of"])[columns].round(3)

# %% [markdown]
# ## Or is it the margin of TopK?
#
# A latent stops where it is no longer among the $k$ largest. It may be just below. With the dictionary left as it is, the selection can
# be changed: other $k$; one threshold for all vectors that keeps as many latents in the mean, as BatchTopK does {cite:p}`bussmann2024`;
# or *hysteresis*, where a latent goes on when it is among the $k$ largest, and stays on over the layers around as long as it is among the
# $4k$ largest.
#
# The same is done to the two streams that are sums.

# %% tags=["hide-input"]
beside_sums = experiments.measure(load_experiment("experiments/margins.yml"), "margins")
selections = experiments.tables(beside_sums, "selections.csv")
draw.beside(
    selections.rename(columns={"single_low": "low", "single_high": "high"}),
    ("selection", "Which latents count as active"),
    ("single", "Share of the pairs active at one layer"),
    "of",
    title="The margin makes one-layer pairs, in sums of other tokens' updates too",
    subtitle="The dictionary is the same throughout; lines: 95 % intervals over sequences.",
    choices={"case": "Run"},
)

# %% tags=["hide-input"]
last = selections[selections.selection.isin(["k", carried.MARGINS[-1]])]
last.set_index(["case", "selection", "of"])[["single", "single_low", "single_high"]].round(3)

# %% [markdown]
# **What to see.** With other $k$, or one threshold, about half of the pairs are still of one layer, so the share is no matter of $k$.
# With hysteresis it is 0.19. So most latents that seem to belong to one layer at a token are still among the $4k$ largest next door. But
# in a stream of other tokens' updates the share falls as far, to 0.20. That a latent lingers just below the margin is, again, what adding
# does, and says nothing of what these blocks do. Both are so after the shorter training (*seed 0*) too. With *random weights* more of the
# share stays than in sums, 0.34 against 0.22: there latents linger less than adding would make them.
#
# Where do the one-layer latents stand, and where next door? The share of the active pairs by their rank, among the largest of a vector,
# where they are active and at the better of the neighbouring layers:

# %% tags=["hide-input"]
carried.rank_classes(ranks[ranks.case == "default"]).round(3)

# %% [markdown]
# **What to see.** Three quarters of the one-layer pairs stand in the last half of the ranks even where they are active; of the other
# pairs 0.395 do. Next door 42 % are among the next sixteen, and a third is beyond the 64 largest. At most those can be said to belong to
# a layer, and in sums hysteresis leaves as many. (Ranks themselves were not taken of sums.)
#
# **What would contradict it.** A share that falls less under hysteresis than it does in sums. The toy whose features are handed over to
# others (below) keeps nearly half of it. Here a third stays, as in the null model; with random weights half.
#
# ## Do blocks keep what is active, or erase it?
#
# The survival of a latent over $m$ blocks is
#
# $$
# S_{\ell, m} = P\bigl(j \in \operatorname{TopK}(\mathbf{x}_{\ell+m}) \mid j \in \operatorname{TopK}(\mathbf{x}_\ell)\bigr) .
# $$ (eq-survival)
#
# It is less than 1 even where blocks do nothing to what is active, since they add other things. What it would be then is the survival
# with another token's update: equal to it, and the stream merely passes latents through; above it, and blocks write them again; below,
# and they erase them.

# %% tags=["hide-input"]
draw.beside(
    survival.assign(gap=survival.gap.map("{} block(s)".format)),
    ("layer", "Layer at which the latent is active"),
    ("rate", "Share that is active so many blocks later"),
    "of",
    title="Latents survive a block about as often as they would another token's update",
    subtitle="Lines: 95 % intervals over sequences. Choose the run and the number of blocks.",
    choices={"case": "Run", "gap": "Over"},
)

# %% [markdown]
# The difference to the null model, with intervals that resample both on the same sequences:

# %% tags=["hide-input"]
excess = survival[(survival.of == "another token's updates") & (survival.gap == 1)]
excess = excess.assign(measured=excess.rate + excess.excess).rename(columns={"rate": "null"})
columns = ["measured", "null", "excess", "excess_low", "excess_high"]
excess.set_index(["case", "layer"])[columns].round(3)

# %% [markdown]
# **What to see.** About half of the active latents survive a block, and with another token's update as many, within 0.03. The first block
# keeps a little more of them than that. The second cannot be told from the null model. The last three keep a little less. So a block
# passes on, in the mean, what is active, and neither writes it again nor erases it to any great extent. Over all five blocks, though,
# more survive than in the null model: 0.12 against 0.09 (in the chart, *5 block(s)*). So the differences of single blocks, most of them
# negative, do not simply add up; perhaps since latents differ (below).
#
# The shorter training (*seed 0*) has the same pattern, but for the second block, where the excess is just above zero. That the test can
# fail is seen with *random weights*. There survival is below the null model after every block, by 0.08 at first. That its layers turn by
# other angles than the trained model's is not the reason (below). Perhaps the dictionary of such a model holds tokens at layers, and what
# a block adds leads from one of them to the next.
#
# The average hides latents that differ. Of those active at 100 tokens in 16 sequences or more, *more* and *less* are the shares that
# survive the block more or less often than with another token's update, beyond two standard errors over sequences. What chance alone
# gives is measured: *another token's updates, twice* holds one draw of the null model against another.

# %% tags=["hide-input"]
treated = experiments.tables(beside_sums, "treated.csv")
treated = treated[treated.of.isin(["another token's updates", margins.CHANCE])]
treated.set_index(["case", "of", "layer"]).loc["default"].round(3)

# %% [markdown]
# **What to see.** Single latents are treated: after every block a quarter or more of them survive more often than with another token's
# update, ten times what chance gives or more. The share that survives *less* often is smaller: hardly so after the second and the third
# block, much so after the first. Some are kept and some erased, and in the mean over what is active the two nearly cancel. Whether a
# block does so *because* the latent is active is another question (next section). How many are found depends on how much text is read.
# How *large* the differences are is better known from their quantiles over latents, of the pass above:

# %% tags=["hide-input"]
latents = experiments.tables(measured, "latents.csv")
latents = latents[(latents.of == "another token's updates") & (latents.case == "default")]
latents.set_index("layer")[["latents", "q05", "q25", "q50", "q75", "q95"]].round(3)

# %% [markdown]
# Half of the latents survive a block within about 0.1 of what the null model says (*25 % quantile* to *75 % quantile*), nine in ten
# within 0.28, and a part of that is the noise of few tokens.
#
# **What would contradict it.** An excess of the same sign at every layer, and large: then blocks would treat what is active in a way of
# their own.
#
# ## Carried or recomputed?
#
# Survival counts; it does not say why. So take latent $j$ out of the vector after block $\ell$, $\mathbf{x}_\ell - h \sigma
# \mathbf{w}_j$, at one token, and read its activation $a$ after block $\ell + m$, before TopK. Once with the whole model run again, and
# once with all updates in between kept as they were, so that nothing but the loss itself arrives. As shares of $a$ these are
#
# $$
# \rho = \frac{\sum (a - a_\text{run again})}{\sum a}, \qquad \delta = \frac{\sum (a - a_\text{updates kept})}{\sum a} .
# $$ (eq-carried)
#
# Both near 1: carried. $\rho$ near 0 while $\delta$ is near 1: blocks compute it again. $\rho$ above $\delta$: they add to what is there.
# The null models take out as long a piece of another latent that is active in the same vector, or of a random direction.

# %% tags=["hide-input"]
taken_out = experiments.measure(load_experiment("experiments/ablated.yml"), "effects")
ablated = experiments.tables(taken_out, "effects.csv")
draw.beside(
    carried.drops(ablated),
    ("gap", "Blocks between taking out and reading"),
    ("value", "Drop of the activation (share of it)"),
    "kind",
    title="Three quarters of a later activation is what was carried there; blocks do not restore it",
    subtitle="Latents still active at the later layer, all layers together; 95 % intervals over sequences.",
    choices={"case": "Run"},
)

# %% [markdown]
# **What to see.** After one block both drops are 0.74, and after more blocks not far from that. So where a latent stays active, what is
# active later is for three quarters the very piece that was there before. Blocks do not restore it: $\rho$ would be near 0. And after one
# block little is added *because* of it: the interval of $\rho - \delta$ has zero in it (*all* in the table below). After three blocks it
# has not: there blocks have added 0.04 of the activation. The last quarter was written in between, or stands in other parts of the
# vector, whether or not the latent had been active. The null models have at most 0.05. This says nothing of latents that have stopped.
#
# The difference after one, two and three blocks; and after one, by where the latent is at home:

# %% tags=["hide-input"]
homes = ablated[
    (ablated.taken == "the latent") & (ablated.after == "active there") & (ablated.layer == -1)
]
columns = ["samples", "total", "direct", "blocks", "blocks_low", "blocks_high"]
homes[(homes.gap == 1) | (homes.home == "all")].set_index(["gap", "home"])[columns].round(3)

# %% [markdown]
# *home* says whether the latent's mean layer lies before the one at which it was taken out, at it, or after it; *blocks* is $\rho -
# \delta$. A latent past its home is carried whole, and blocks take a little away because of it. One that has its home before it is still
# being written ($\delta$ is 0.61), and blocks add a little to it for being there. What blocks do because of it is small beside what is
# carried.
#
# **What would contradict it.** A $\rho$ well below $\delta$, as in the toy whose blocks compute features again.
#
# ## Would we have seen it?
#
# Toys: streams in which features are axes, the dictionary is the right one, and blocks do a known thing (`mlsae_book.toys`). All of them
# go through the same code as the model.

# %% tags=["hide-input", "nbval-ignore-output"]
toys.signatures().set_index("blocks").round(2)

# %% [markdown]
# *total* is $\rho$ and *direct* $\delta$, of latents that are still active one block later.
#
# **What to see.** Each kind of block has its signature. Where features are *carried*, survival is that of the null model and
# $\rho = \delta$. *Amplified*: an excess, and $\rho > \delta$. *Erased*: far fewer survive. *Recomputed*: $\rho = 0$, and somewhat fewer
# survive. *Rewritten*, handed over to other features: $\rho = 0$ as well, so that alone does not tell the two apart; but few survive, and
# nearly half of the one-layer share stays with hysteresis.
#
# ## What do Eq. 11 and 12 measure?
#
# The two ratios of the same codes and null models (corrected for the bias of few tokens, $P(J)$ uniform over latents):

# %% tags=["hide-input"]
both = ratios[ratios.corrected & (ratios.weighting == "latents")]
draw.beside(
    both,
    ("ratio", "Ratio of variances"),
    ("value", "Value"),
    "of",
    title="Eq. 11 hardly asks for the token; Eq. 12 does, and other tokens' updates give most of it",
    subtitle="Lines: 95 % intervals over sequences. Choose the run.",
    choices={"case": "Run"},
)

# %% [markdown]
# **What to see.** Deal each layer the codes of another token, and Eq. 11 is 0.63 where 0.55 is measured. It asks at which layers a latent
# is used over all the text, and hardly for what happens at a token. Eq. 12 does ask: measured at 0.28, it is near zero without the token.
# But a stream that takes other tokens' updates has 0.24. So most of Eq. 12 does not ask what the blocks do at this token. It is not what
# *any* sum gives, though: with updates in random directions it is 0.13, and Eq. 11 is larger, perhaps since such updates do not point
# where the blocks write in the mean.
#
# With *random weights* Eq. 11 is 0.55, where the trained model has 0.61 after as long a training (*seed 0*). But there the stream of
# other tokens' updates is far from it, at 0.84; that of *seed 0* is at 0.67. So much the same ratio can stand beside quite different null
# models.
#
# Most intervals of Eq. 11 lie above their own estimate: sequences drawn twice make a small bias. Read them as widths.
#
# **What would contradict it.** A measured value far from that of the streams of other tokens' updates, as with random weights.
#
# ## Do the second moments suffice?
#
# The null models above are fed to a dictionary that was trained on the real activations. A harder question is what a dictionary finds
# that was *trained* on a null model. Two are drawn from. The first is a **Gaussian** over all layers at once, token by token, with the mean
# and the covariance of the activations,
#
# $$
# (\tilde{\mathbf{x}}_{t,0}, \dots, \tilde{\mathbf{x}}_{t,n_L-1}) \sim \mathcal{N}(\boldsymbol\mu, \boldsymbol\Sigma), \qquad
# \boldsymbol\Sigma = \operatorname{Cov}(\mathbf{x}_{t,0}, \dots, \mathbf{x}_{t,n_L-1}) .
# $$ (eq-gaussian-surrogate)
#
# Its layers have the offsets, the norms, the drift and the correlations of the real ones, and its tokens nothing that is sparse. The second
# is a language model with **random weights**, as it is drawn, and with what each block adds scaled so that adjacent layers are as alike as
# in the trained model,
#
# $$
# \mathbf{x}_{\ell+1} = \mathbf{x}_\ell + \alpha_\ell \mathbf{u}_\ell, \qquad
# \mathbb{E}_t \cos(\mathbf{x}_\ell - \boldsymbol\mu_\ell, \mathbf{x}_{\ell+1} - \boldsymbol\mu_{\ell+1})
# = \text{that of the trained model} .
# $$ (eq-same-drift)
#
# | if what is found of the activations is … | the Gaussian gives | random weights, same drift |
# | --- | --- | --- |
# | a matter of second moments alone | the same | something else, unless drift is all that matters |
# | a matter of drift alone | the same | the same |
# | a matter of what the model computes | something else | something else |

# %% tags=["remove-cell"]
trained_on = experiments.surrogates(load_experiment("experiments/surrogates.yml"))
found = experiments.tables(trained_on, "surrogate.csv")
found = found.assign(seed=found.seed.map("seed {}".format))
null_models = [surrogates.REAL, surrogates.GAUSSIAN, surrogates.RANDOM, surrogates.MATCHED]
moments = found[found.condition.isin(null_models)]

# %% tags=["hide-input"]
trained = partial(
    draw.beside,
    x=("condition", "What the dictionary is trained on, and measured on"),
    y=("value", "Value"),
    series="seed",
    subtitle="Two trainings each; lines: 95 % intervals over sequences, where there are any.",
    choices={"measure": "Shown"},
)
trained(moments, title="Neither second moments nor drift give the real ratios")

# %% [markdown]
# Means over two seeds (which are those of random weights as well), and in brackets both. *latents* and *tokens* say which $P(J)$;
# *single* is the share of pairs at one layer; *survival* is over one block:

# %% tags=["hide-input"]
carried.over_seeds(moments).T

# %% [markdown]
# **What to see.** The Gaussian is no copy of the real thing. Its Eq. 11 is *smaller*, 0.41 beside 0.55, and more of its pairs are of one
# layer: out of second moments alone a dictionary makes latents that prefer layers, and more so than out of activations. So an Eq. 11 far
# below 1 is no sign of anything that is sparse; nor, as random weights show, of anything that is learnt. That real latents are spread
# over *more* layers than the Gaussian's is what has to be explained by what the Gaussian lacks. (It is also reconstructed much worse,
# with an FVU of 0.345, presumably since nothing in it is sparse.)
#
# With random weights drift does matter: scaled to the trained model's, Eq. 11 goes from 0.51 to 0.58, past the real one, and the pairs of
# one layer become fewer. Eq. 12 goes from 0.20 to 0.24. The real one is above all three null models, at 0.28, and both trainings agree.
# So a part of Eq. 12 is left that neither second moments nor drift give: a seventh or so, by tokens a twelfth. With $P(J)$ by tokens
# (*tokens*) the order of the conditions in Eq. 11 is the same, but for random weights as drawn, which then lie above the real model and
# no longer below.
#
# Survival stays below its null model with random weights, by 0.05, when their drift is matched: that is not why.
#
# **What would contradict it.** A Gaussian whose ratios are those of the activations: then second moments would be all there is to say. Or
# trainings of one condition as far apart as two conditions. Two seeds give a range, and no interval.
#
# ### Would we have seen it?
#
# Three worlds in which the answer is known, all with the mean and the covariance over layers of a small planted one ({doc}`planted`). In
# the first the vectors are made of *features*, so second moments are not all there is. The last *is* a Gaussian: there they suffice by
# construction. In the middle one, half of the covariance comes from features and half from a Gaussian. Each world is put through what the
# activations went through: a dictionary is trained on it, and another on a Gaussian with the moments of its vectors, drawn anew. All is
# done five times, each with its own world and training.

# %% tags=["remove-cell"]
tried = controls.seeds(controls.WORLD, range(5), mode="read-only")
made = controls.compared(tried["moments"])
over_worlds = partial(
    draw.beside,
    x=("measure", "What is measured of the dictionary"),
    series="world",
    subtitle="Means of five worlds, each with its training; lines: 95 % intervals over them.",
)

# %% tags=["hide-input"]
over_worlds(
    controls.differences(made),
    y=("value", "Its Gaussian less the world itself"),
    title="A Gaussian is told from features, and not from another Gaussian",
)

# %% tags=["hide-input"]
controls.in_numbers(made)

# %% [markdown]
# **What to see.** Where the world is a Gaussian, its Gaussian gives the same: no measure in the table differs by more than 0.001, and every
# interval of a difference has zero in it. Where it is made of features, nearly all of them differ. So had second moments sufficed for the
# activations, this would have shown it, and their differences are many times what trainings alone make here.
#
# Three limits. Eq. 12 with $P(J)$ uniform over latents is the one measure that hardly knows features from their Gaussian; with $P(J)$ by
# tokens it does. The sign says nothing in general: the Gaussian's Eq. 11 is larger than that of these features, and smaller than that of
# the activations. And features that are diluted are nearly lost: with half of the covariance, Eq. 11 cannot be told from the Gaussian's.
# Survival, FVU, the share at one layer and Eq. 12 by tokens can, but differ by less than a fifth as much as with features alone; the
# small difference of the other Eq. 12 stays. So equal ratios would not have shown that there are no features.
#
# **What would contradict it.** A difference between the Gaussian world and its Gaussian, or none between features and theirs.
#
# ## Offsets and norms
#
# A tuned lens moves Eq. 11 ({doc}`tuned_lens`), and it changes three things at once: the layers' means, their lengths, and their
# directions. Here each of the first two is changed alone. The dictionary sees $\mathbf{x}_\ell$ with
#
# $$
# \mathbf{x}_\ell - \boldsymbol\mu_\ell, \qquad
# \frac{\mathbf{x}_\ell - m}{\sigma} - \mathbf{b}_\ell, \qquad \text{or} \qquad \mathbf{x}_\ell \text{ as it is}
# $$ (eq-offsets)
#
# in the place of $(\mathbf{x}_\ell - m) / \sigma$, the standardised vector: *each layer's mean taken off* before it is standardised; *a
# bias for each layer*, $\mathbf{b}_\ell$ being the mean of the standardised vectors (a lens that is nothing but a bias); *not
# standardised*. If the layers' offsets were what Eq. 11 sees, the first two would move it as the lens does; if their norms were, the
# third would.

# %% tags=["hide-input"]
changes = [surrogates.REAL, surrogates.CENTRED, surrogates.BIASES, surrogates.RAW]
changed = found[found.condition.isin(changes)]
trained(changed, title="Taking off each layer's mean raises Eq. 11 by more than a tuned lens does")

# %% tags=["hide-input"]
carried.over_seeds(changed).T

# %% [markdown]
# **What to see.** With the layers' means taken off, Eq. 11 rises from 0.55 to 0.73, and with a bias for each layer to 0.71. The aligned
# lens raises it by 0.13 ({doc}`tuned_lens`, shorter trainings). So a rise of that size needs no lens that brings the layers' directions
# together: the layers' *offsets* are enough. With them in place a latent can tell the layer from the offset, without them less so. FVU
# stays as it was. At a token fewer pairs are of one layer, too, and Eq. 12 falls. Without standardisation Eq. 11 rises by less than half
# of that, so lengths matter less than offsets. (FVU is per dimension, and of the vectors as the condition has them: with *a bias for each
# layer*, of standardised ones.)
#
# **What would contradict it.** An Eq. 11 without offsets as it is with them.
#
# ### Would we have seen it?
#
# Planted features again, in two worlds that differ in nothing but the mean of each layer: it is zero, or a random vector half as long as
# the layer's typical one.

# %% tags=["hide-input"]
moved = controls.compared(tried["offsets"])
over_worlds(
    controls.differences(moved),
    y=("value", "Means taken off less the world itself"),
    title="Taking each layer's mean off moves Eq. 11 only where layers have offsets",
)

# %% tags=["hide-input"]
controls.in_numbers(moved)

# %% [markdown]
# **What to see.** With offsets Eq. 11 is 0.648. Taken off, it is 0.845, and in the world that never had any 0.842. Fewer pairs are of one
# layer then, too, and more latents survive. Where there are no offsets, taking means off changes nothing: all intervals of the differences
# have zero in them. So without offsets the change does nothing. What it does to the activations, a larger Eq. 11, fewer one-layer pairs
# and more survival, it does here where there are offsets. Two measures are another matter. Eq. 12 hardly moves here and falls by far more
# for the activations, so offsets like these are not the reason for that. And FVU falls here, where that of the activations stays.
#
# **What would contradict it.** Ratios that move where there are no offsets, or do not move where there are.
#
# ## Several layers at once
#
# If one dictionary serves all layers, its reconstructions should be able to stand in at several of them: each is then made of what the
# ones before have let through. Neither the paper nor any library we know of measures that. Beside the MLSAE stand dictionaries for each
# layer, of as many latents at each layer, and of a sixth of them, so as many in all; and the layers' means.

# %% tags=["hide-input"]
equal = load_experiment("experiments/equal.yml")
sets = experiments.budgets(equal)
together = experiments.tables(experiments.together(sets, equal.evaluate), "together.csv")

# %% tags=["hide-input"]
draw.beside(
    at_once.from_the_first(together[together.of == "reconstruction"]),
    ("layers", "Layers that are reconstructed at once, from the first on"),
    ("value", "Delta CE (nats per predicted token)"),
    "dictionary",
    title="Layers reconstructed at once cost less than one by one",
    subtitle="Difference to that sum, with 95 % intervals over sequences. Choose what is shown.",
    choices={"what": "Shown"},
)

# %% tags=["hide-input"]
together.pivot_table(
    index=["of", "dictionary"], columns="layers", values=["delta_ce", "excess"], sort=False
).round(3)

# %% [markdown]
# *delta CE* and *excess*, the difference to the sum of each alone, in the mean over all runs of so many adjacent layers; *mean*: the
# layers' means stand in.
#
# **What to see.** Errors do not add up: in the mean every number of layers costs less than the layers one by one, perhaps since what one
# reconstruction has lost the next cannot lose again. The layers' means, which lose most, save by far the most. At one layer the dictionary
# for all layers is worse than the layer's own (0.535 against 0.472 nats). At two, three and four layers together it is as good in the mean
# over all runs, and a little ahead (0.900 against 0.913 for two). Over five and six the own ones lead again. But these means have no
# intervals, and from the first layer on (the chart, *together*) the own dictionaries are ahead at every number of layers. Dictionaries of a
# sixth of the latents are behind in the mean.
#
# Nor is the saving a mark of sharing. It is larger for the MLSAE than for the layers' own dictionaries. But dictionaries of a sixth of
# the latents, which share nothing and lose more at each layer, save about as much, and from four layers on more. That an MLSAE reads at
# the next layer what it has written at this one is not shown.
#
# **What would contradict it.** For the MLSAE: a saving well beyond that of dictionaries that share nothing and lose as much at one layer.
# It is one seed of each, and short training.
#
# ## How long do features live without an MLSAE?
#
# Dictionaries of single layers share nothing. A latent of one layer and one of the next are matched where each is the one whose
# activations, on the same tokens, correlate best with the other's (as {cite:t}`li2016` match networks); a chain of matches is a lifetime.

# %% tags=["hide-input"]
again = {2: experiments.by_case(equal)["layer 2, seed 1"]}
[shared], each, _ = sets.values()
lives = stages.lifetimes(pipeline.Session(), shared, each, again, equal.evaluate)
matches = experiments.tables([({}, lives)], "matches.csv")
matches[matches.least == 0.5].set_index(["of", "layer"])[
    ["latents", "share", "correlation", "same"]
].round(3)

# %% tags=["hide-input"]
chains = experiments.tables([({}, lives)], "chains.csv")
chains = chains.fillna({"least": 0})
chains.pivot_table(index=["of", "least", "mean"], columns="layers", values="share").round(3)

# %% [markdown]
# *least* is the correlation that a match must have (0: not asked), *same* the share of an MLSAE's matches that are the latent itself.
#
# **What to see.** About a fifth of the latents or fewer have a match at the next layer (at a correlation of 0.5), where other tokens give
# 1 %. So most chains are of one layer. Most latents of the MLSAE live at four or more (at more than a tenth of the tokens of their best
# layer). But the ceiling is as low: of one and the same layer, dictionaries of two seeds share 12 %. Short chains then say that
# dictionaries trained so briefly are not found again, not that features are short-lived. (Those of adjacent layers have one seed, so
# their first weights in common, and still share little.) Within the MLSAE half of the latents or more are matched at most layers, nearly
# always with themselves. This experiment decides nothing yet.
#
# **What would contradict it.** Two seeds of a layer that share most latents: then chains would be lifetimes.
#
# ## Another training
#
# Intervals over sequences know nothing of the training. The default run beside two that differ from it in their seed alone: the excess of
# survival over another token's update, for one block and for all five, and what ablations find. *mean* is that of the three, with a 95 %
# interval over trainings (Student's $t$, which for three is wide).

# %% tags=["hide-input"]
three = load_experiment("experiments/carried_seeds.yml")
repeated = experiments.measure(three, "persistence"), experiments.measure(three, "effects")
excess = experiments.tables(repeated[0], "survival.csv")
excess = excess[(excess.of == "another token's updates") & excess.gap.isin([1, 5])]
carried.trainings(excess, "excess", ["gap", "layer"])

# %% tags=["hide-input"]
drops = experiments.tables(repeated[1], "effects.csv")
drops = drops[(drops.taken == "the latent") & (drops.after == "active there") & (drops.layer == -1)]
drops = drops[drops.home == "all"].melt(["gap", "seed"], ["total", "direct", "blocks"], "drop")
carried.trainings(drops, "value", ["drop", "gap"])

# %% [markdown]
# **What to see.** The excess over one block has the same sign in all three trainings at every block but the second, and there its interval
# has zero in it. The others leave zero out: more survive the first block than another token's update, and fewer the last three. Over all
# five blocks more survive, in each of the three. The drops (*total* is $\rho$, *direct* $\delta$, *blocks* their difference) agree as well:
# three quarters of an activation are carried. What blocks add because of the latent cannot be told from nothing after one block, as in the
# default run alone. After two and three blocks it can: 0.021 and 0.042 of the activation.
#
# **What would contradict it.** Signs that change from one training to the other.
#
# ## Verdicts
#
# | what one might think | asked by | what would show it | what is found | verdict |
# | --- | --- | --- | --- | --- |
# | At a token, a latent belongs to one layer | selections without a margin | a one-layer share that stays above that of sums | it falls from 0.57 to 0.19, in sums to 0.20 | the margin of TopK, and what adding does |
# | Blocks write again what is active, or erase it | survival beside another token's update | an excess, or a lack | both, within 0.03 at one block, with the same signs in three trainings but at the second block; of single latents about half differ | in the mean hardly; single latents survive more or less often |
# | A latent that stays is computed anew | ablation, updates kept or not | a total drop near 0 | 0.74, and as much with updates kept | for three quarters carried |
# | Eq. 11 below 1 shows features with layers of their own | streams of other tokens' updates; a dictionary of a Gaussian | null models far above | 0.62 and 0.41, where 0.55 is measured | no: second moments alone give less |
# | Eq. 12 shows features that stay | streams of other tokens' updates | a null model far below | 0.24, where 0.28 is measured; in random directions 0.13 | for the most part what other tokens' updates give |
# | The ratios are those of second moments, or of drift | dictionaries trained on a Gaussian, and on random weights with the same drift | the same ratios | Eq. 11: 0.41 and 0.58 for 0.55; Eq. 12: 0.23 and 0.24 for 0.28 | of second moments no: a planted Gaussian and its copy have equal ratios; of drift nearly, though not quite |
# | A tuned lens shows that layers have more in common | each layer's mean taken off, or a bias for each | no such rise of Eq. 11 | from 0.55 to 0.73 and 0.71; in planted worlds only where there are offsets | offsets alone do as much |
# | A dictionary for all layers is only smaller | several layers at once | no larger a saving than without sharing | in the mean as good as a dictionary for each layer at two to four layers; smaller dictionaries save as much | undecided |
# | Features live as long as the latents of an MLSAE | chains of dictionaries of single layers | chains as long | short ones, but two seeds share as little | undecided |
#
# So what do the two ratios measure? Eq. 11: at which layers the rows of a dictionary are used over all the text. It hardly depends on
# what happens at a token, and it depends on the choice of $P(J)$ ({doc}`variance`) and on the layers' offsets. Eq. 12: for how many
# layers the stream keeps a latent among the $k$ largest, most of which other tokens' updates would do as well. Neither tells carried from
# rewritten. In this model what is active at several layers of a token has mostly been *carried* there. In a model with random weights
# much the same Eq. 11 stands beside other null models, so it need not have the same cause.
#
# **What would change this.** A model, perhaps a larger one, whose blocks restore or erase what is active: survival would leave the null
# models, and $\rho$ would leave $\delta$. SmolLM2-135M is a first step ({doc}`smollm2`): there, too, survival is near its null model and
# most of a later activation is what was carried, but where that is taken out blocks make up for a little. Features that move between
# tokens, which we do not follow: everything here is read at the token itself. And features that turn from layer to layer, which hand over
# to other latents; to survival that looks like erasing. All of this page is one small language model, and dictionaries with TopK.
#
# ## How this page was made
#
# `experiments/carried.yml`, `margins.yml`, `ablated.yml`, `surrogates.yml`, `equal.yml` and `carried_seeds.yml` declare the runs.
# Survival and ratios come from one pass, margins beside sums from another, the ablations from a third in which each change has a copy of
# its sequence to itself. The dictionaries of equal budget are trained on 200,000 tokens each, with one seed but for one of them. The
# worlds of the controls are `mlsae_book.controls`, ten dictionaries of 100,000 tokens to a seed.

# %% tags=["hide-input"]
experiments.notes([*measured, *beside_sums, *taken_out]).set_index(["case", "stage"])

# %% tags=["hide-input"]
experiments.notes(trained_on).set_index(["condition", "seed"])

# %% tags=["hide-input"]
tried["provenance"].set_index("seed")

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
