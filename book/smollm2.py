# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # On a model that people use
#
# **Does any of this hold in a model that was not trained for this book?**
#
# The other chapters are about models of 0.5 to 4 million parameters, trained here on docstrings. This one reads SmolLM2-135M-Instruct:
# a Llama of 30 layers and 576 dimensions with a vocabulary of 49,152, trained by others on 2 trillion tokens of web pages, code and
# mathematics. It lies in the Python package index, quantised to five or six bits a weight, so every reader can have it:
# `python -m mlsae_book fetch smollm2-135m` (93 MB, Apache-2.0). What is read is the dequantised model, which is not quite the
# one that was published.
#
# The dictionary has all 30 layers, $R = 8$ (4,608 latents) and $k = 32$, and read a million tokens of docstrings, an eighth of what there
# are: a thousandth of the paper's training at an eighth of its $R$. So it is a small dictionary of a real model, and what it fails to
# reconstruct says little about what a large one would. Nothing on this page is computed when the book is built, and all of it was computed
# on two cores.

# %% tags=["remove-cell"]
import json
from dataclasses import replace

import pandas as pd
from IPython.display import HTML

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments, stages
from mlsae_book.charts import carried as carried_charts
from mlsae_book.charts import layers as layer_charts
from mlsae_book.charts import positions as position_charts
from mlsae_book.charts import sweeps as sweep_charts
from mlsae_book.tables import carried, chosen, fidelity, layers, margins, positions, spread, sweeps
from mlsae_book.tables.transfer import Target
from mlsae_core.spec import DataSpec, load_experiment

# %% tags=["remove-cell"]
charts.use_book_theme()
experiment = load_experiment("experiments/fetched/smollm2.yml")
results = experiments.materialise(experiment)
[(_, run)] = results.runs

# %% tags=["remove-cell"]
fewer = replace(experiment.evaluate, tokens=4096, replaced=2048)
docstrings, wikipedia = Target(run.model, run.data), Target(run.model, DataSpec("wikipedia"))
targets = {
    "docstrings": docstrings,
    "docstrings, with sinks": replace(docstrings, massive="kept"),
    "Wikipedia": wikipedia,
}
elsewhere = layers.variance_sweeps(
    {"text": experiments.transfers(run, fewer, targets, stage="distributions")}
).set_index(["run", "ratio"])[["low", "value", "high", "permuted", "gaussian"]]

# %% [markdown]
# ## The first token is a sink
#
# In this model the first position of a sequence is not like the others, whatever token stands there. Such *massive activations*
# {cite:p}`sun2024` are known from most large models: attention heads that have nothing to do look at a token that carries
# nothing. Packed sequences are cut anywhere and do not begin with a token of their own, so the
# first token, any, takes that part.

# %% tags=["hide-input"]
by_position = experiments.tables(results.artefacts["massive"], "positions.csv")
whole = (by_position["first"] == 0) & (by_position["last"] == by_position["last"].max())
position_charts.by_position(
    by_position[~whole],
    title="From layer 11 to 27 the first position is forty to 170 times as long as the others",
    subtitle="Mean over the test text. Choose the metric, and whether tokens with massive activations count.",
)

# %% tags=["hide-input"]
massive = experiments.tables(results.artefacts["massive"], "massive.csv").set_index("layer")
massive["times"] = massive.norm / massive.norm_of_others
shown = {
    "vectors": "massive vectors",
    "tokens": "of tokens",
    "at_first": "at the first position",
    "norm": "their length",
    "norm_of_others": "length of others",
    "times": "times as long",
}
massive.loc[[0, 5, 10, 11, 12, 15, 20, 25, 27, 28, 29], list(shown)].rename(columns=shown).round(1)

# %% [markdown]
# A vector is called massive here if it is more than 20 times as long as the median of its sequence and layer, and its token is then
# left out at every layer (`massive: excluded` in a run's file): of training, of means, of every metric, and of what is replaced
# when a layer is put back.
#
# **What to see.** After block 11 the first vector of every sequence is a hundred times as long as the others and more, and it stays long to
# layer 27. (One of the sequences begins with the end of a document, a special token, which is left out of all metrics.) Before that, at
# layers 1 to 8, it is three to nine times as long as others, but not by enough to be called massive. Six tokens just after a first one are
# massive, too, and no other anywhere. We looked them up: each repeats the first, so all that attention can read there is the same, and so
# is the vector. These few tokens, 0.4 % of all, carry nearly all of the variance from layer 11 on, and still four fifths of it at layer 27.
# Without them (choose it) the mean length from the third position on is within about a fifth of that of the layer. At the second it is up
# to half as long again. How much is lost at a position goes with the layer: at layers 2 to 8 the FVU grows from the fifth position on, at
# the first layer it falls on the whole.
#
# **What would contradict it.** Sinks all over the sequences, or in some of them only: then they would be of a token, not of a place.
# (Larger models are reported to have them [anywhere in a sequence](https://github.com/saprmarks/dictionary_learning/pull/52).)
#
# ## What sinks do to the metrics
#
# The same dictionary, which has seen no sink, measured with them and without.

# %% tags=["hide-input"]
without, with_them = (
    results.evaluation,
    experiments.tables(results.artefacts["massive"], "evaluation.csv"),
)
both = pd.concat({"without sinks": without, "with sinks": with_them}, names=["vectors"])
charts.metric_by_layer(
    both.reset_index("vectors"),
    title="Sinks lower the FVU of the middle layers to a third, and raise what the model loses",
    subtitle="One dictionary, measured at all tokens and at those without massive activations.",
    color="vectors",
)

# %% tags=["hide-input"]
metrics = ["fvu_global", "fvu_per_dimension", "mse", "l1", "l0", "delta_ce", "kl"]
table = positions.both_ways(without, with_them, [5, 20], metrics).set_index("metric").round(4)
table.rename(index=charts.METRICS)

# %% [markdown]
# And what the chapter {doc}`drift` measures, of which no dictionary is a part:

# %% tags=["hide-input"]
both = experiments.measure(load_experiment("experiments/fetched/smollm2_kept.yml"), "drift")
[(_, excluded), (_, kept)] = both
positions.drift_both_ways(excluded, kept, [5, 20]).set_index("metric").round(3)

# %% [markdown]
# And the two ratios of {doc}`variance`, on 4,096 tokens both ways. On this page the *first ratio* is Eq. 11 and the *second* Eq. 12:

# %% tags=["hide-input"]
elsewhere.loc[["docstrings", "docstrings, with sinks"]].round(3)

# %% [markdown]
# **What to see.** The dictionary has never seen a sink, and can write it all the same: vectors are standardised one by one, so their length
# is no obstacle, and 4 % of the sink's variance is left. Since the sinks are most of the variance of layers 11 to 27, the FVU of these
# layers is little more than that, a third or two fifths of what it is without sinks: it measures one vector. MSE rises with their length;
# L0 and L1 do not notice. And the model loses more, a quarter in the mean over layers, with nothing changed but that the sinks are replaced
# as well: so small an error is not a small one there. So the better FVU goes with the worse loss. Without sinks the two rank the layers
# much alike; with them the layers of the lowest FVU are not those that cost least.
#
# Drift notices the sinks where they come up, from layer 10 to 11, in the centred similarity alone. Up to layer 27 the later ones are a
# little larger with them, since they are about a mean that the sinks have moved; not centred, similarities hardly change. Users of other
# libraries have met
# [an FVU that is very low](https://github.com/EleutherAI/sparsify/pull/113) for the same reason, and leave such tokens out as well.
#
# The ratios hardly notice the sinks: a latent is counted at every token alike, whatever the length of the vector. (The first ratio's
# intervals lie above its estimates here: of so few tokens it comes out too low, and a basic bootstrap takes that off.)
#
# **What would contradict it.** The same FVU both ways.
#
# **What it says of the paper's odd rows.** In the paper's Table 1 all models have an FVU of about 0.1 but two: Llama 3.2 3B has 0.30, and
# Gemma 2 2B has 0.21 and a loss of 1.5 nats. Their text was packed without a token for the beginning, as ours, and both models are known to
# have massive activations. A dictionary that can write the sinks has a *lower* FVU for them, one that cannot would have one near 1 at the
# layers that have them, and a model that breaks. Gemma 2's row, high in both, could be of the second kind. Llama's, with a high FVU and a
# low loss of 0.35, is of neither: sinks alone do not explain it. More cannot be said without these models.
#
# ## Latents over layers

# %% tags=["hide-input"]
read = experiments.all_distributions(results)
sweep_charts.gallery(
    sweeps.stack({"model": spread.sampled(read)}),
    title="Latents of a real model prefer layers, and are spread over several",
    subtitle="100 latents, evenly spaced in the order of their mean layer.",
)

# %% tags=["hide-input"]
ratios = layers.variance_sweeps({"dictionary": results.artefacts["distributions"]})
columns = ["low", "value", "high", "permuted", "gaussian"]
ratios.set_index("ratio")[columns].round(3)

# %% tags=["hide-input"]
read = experiments.all_distributions(results)
spread.entropies(read).merge(spread.at_the_ends(read)).set_index("case").round(3)

# %% [markdown]
# **What to see.** The diagonal of the small models' pictures, with a crowd at the first layer: a quarter of the latents have their largest
# probability there, though latents that live there alone are rare. Eq. 11 and Eq. 12 are both far below what they are with layers permuted.
# So latents of this model prefer layers. That at one token they keep to a few is less than it seems: Gaussian vectors, which know of no
# stream, have a smaller Eq. 12 still, since their pairs are mostly of one layer. The first ratio is lower than in our small models, but
# $R$, $k$ and the number of layers are others, and by the entropy they are alike. The mean entropy is
# 0.74 of its maximum, as in {doc}`entropy`, and well below that with layers permuted: latents are spread over many of the 30 layers, and
# not evenly.
#
# **What would contradict it.** A measured ratio at its null models.
#
# ## The same layers, one dictionary each
#
# How much does the shared dictionary give up? At a small budget, a thirtieth of the text above, there are dictionaries of six single
# layers: as large as the shared one ($R = 8$), and with $R = 1$, so that thirty of them have as many latents as a shared one with
# $R = 30$.

# %% tags=["remove-cell"]
declared = load_experiment("experiments/fetched/smollm2_single.yml")
single = experiments.materialise(declared).evaluation
own = single[single.layer.isin([0, 5, 11, 17, 23, 29])]
named = {"all layers, R 30": "for all, R = 30", "all layers": "for all, R = 8"}
named |= {r"layer \d+, .*": "for each, R = 1", r"layer \d+": "for each, R = 8"}
own = own.assign(dictionary=own.case.replace(named, regex=True))

# %% tags=["hide-input"]
charts.metric_by_layer(
    own,
    title="At a small budget one layer's own dictionary has the lower FVU, at equal size",
    subtitle="Dictionaries of 32,768 tokens, measured at six layers. Choose the metric.",
    color="dictionary",
)

# %% tags=["hide-input"]
shown = {"fvu_global": "FVU", "delta_ce": "delta CE"}
table = fidelity.with_intervals(own, list(shown), 3).rename(columns=shown)
table = table.assign(dictionary=own.dictionary.tolist()).set_index("dictionary", append=True)
table.sort_index(level="layer", sort_remaining=False)

# %% [markdown]
# **What to see.** At equal size a dictionary of one layer has the lower FVU at all six, and the intervals meet at layer 11 alone. In
# proportion the gain is largest at the last layer, and smallest in the middle. That is no wonder: thirty of them would have thirty times
# the latents. What the model loses is lower at the first and the last layer. In between the intervals meet, and at three of the four layers
# the estimate is higher.
#
# At an equal number of latents in all ($R = 1$ for each, $R = 30$ for all) each layer's own has the lower FVU at layers 5, 23 and 29. At
# the other three the intervals meet, and at layer 11 the two are equal. Its loss is lower at the last layer and higher at layer 5;
# elsewhere the intervals meet. In our small model the shared dictionary has the lower FVU in the middle ({doc}`single_layer`); here
# nowhere. But the shared one with $R = 30$ is no better than with $R = 8$: after so short a training it has no use for more latents, and
# what it would do with them later we do not know. (A token is left out where it is massive at a layer that is read. So the dictionaries of
# layers 0, 5 and 29 alone were trained and measured on the first positions as well, and a part of the difference there is due to that.)
#
# **What would contradict it.** At equal size, an FVU as low in the shared one: then sharing would cost nothing.
#
# ## On prose
#
# The dictionary read docstrings alone. SmolLM2 was trained on all sorts of text, so how good is the dictionary elsewhere? The only prose
# of some length that we found in the package index under a free licence are 106 articles of the English Wikipedia, which gensim carries
# for its tests (CC BY-SA; `python -m mlsae_book fetch wikipedia`). They are measured on 4,096 tokens, of which half are replaced.

# %% tags=["hide-input"]
[(_, there)] = experiments.transfers(run, fewer, {"prose": wikipedia}, stage="evaluate")
of_prose = pd.read_csv(there.file("evaluation.csv"))
texts = pd.concat({"docstrings": results.evaluation, "Wikipedia": of_prose}, names=["text"])
charts.metric_by_layer(
    texts.reset_index("text"),
    title="On prose the FVU is about twice as high, and the loss several times",
    subtitle="One dictionary, trained on docstrings. Choose the metric.",
    color="text",
)

# %% tags=["hide-input"]
columns = ["fvu_global", "fvu_per_dimension", "ce_original", "delta_ce", "delta_ce_low"]
columns += ["delta_ce_high", "kl"]
texts.groupby("text", sort=False)[columns].mean().round(3).rename(columns=charts.METRICS)

# %% tags=["hide-input"]
elsewhere.loc[["docstrings", "Wikipedia"]].round(3)

# %% [markdown]
# **What to see.** The model itself finds this prose a little easier than docstrings. The dictionary does not: its FVU is twice as high in
# the mean over layers. What the model loses is five times as much, nearly one and a half nats. A dictionary is one of a model and a text,
# then, and the small loss in the table of claims belongs to docstrings. (The bounds in the table are means of the layers' bounds, not an
# interval of the mean.)
#
# The first ratio is higher on prose, and the intervals are far apart. So Eq. 11 depends on the text that is read about as much as it
# differs between our models ({doc}`variance`), and numbers of different texts should not be compared, ours with the paper's among them. The
# second ratio is lower.
#
# **What would contradict it.** The same FVU on both texts.
#
# ## Seeds, k, R, and random weights
#
# Further dictionaries read a thirtieth of the text: of three seeds, of other $k$ and $R$, of the model
# with its sinks, and of SmolLM2's shape with random weights. Compare them with each other only; so little training leaves an FVU of more
# than twice the one above.

# %% tags=["hide-input"]
small = experiments.materialise(load_experiment("experiments/fetched/smollm2_small.yml"))
of_small = layers.variance_sweeps({"dictionary": small.artefacts["distributions"]})
layer_charts.variance_ratios(
    of_small,
    title="Three seeds agree, and in Eq. 11 random weights are far below them",
    subtitle="Lines: 95 % bootstrap intervals over blocks of sequences. 4,096 test tokens.",
)

# %% [markdown]
# The three seeds in numbers, with a 95 % interval over trainings (Student's $t$):

# %% tags=["hide-input"]
seeds = of_small[of_small.run.str.startswith("seed")]
seeds = seeds.assign(seed=seeds.run.str.removeprefix("seed ").astype(int))
carried.trainings(seeds, "value", ["ratio"])

# %% tags=["hide-input"]
shown = ["fvu_global", "delta_ce", "l0"]
means = small.evaluation.groupby("case", sort=False)[shown].mean().round(3)
means.rename(columns=charts.METRICS)

# %% [markdown]
# **What to see.** The seeds hardly differ in the first ratio. With random weights it is 0.51, where they have 0.75: so at this budget, too,
# that latents prefer layers is no sign of learning, since the model that has learnt nothing shows more of it. (Its interval over text is
# wide and does not contain its estimate; the order is clear all the same. The second ratio is higher, but its interval overlaps with that
# of a seed.) But the dictionary's own training moves the first ratio by as much, as the next section shows. The two are not alike
# otherwise: of the random model this dictionary reconstructs little. (It loses next to nothing with it, since there is nothing to lose.)
#
# More active latents raise the first ratio, as in our models ({doc}`variance`), and lower FVU and loss. From
# $R = 4$ to 16 the first ratio rises a little and the second falls to a half, while FVU hardly moves: after so short a training more
# latents are of no use yet.
#
# A dictionary that was trained with the sinks, and is measured with them, has less than half the FVU of the one without, and loses more.
# Its first ratio is higher, 0.80, by more than seeds differ.
#
# **What would contradict it.** A first ratio near 1 with random weights, or seeds as far apart as conditions.
#
# ## Does longer training tell trained weights from random ones?
#
# The small budget, eight times as much, and the million tokens of the dictionary above; the ratios on the same 4,096 test tokens.

# %% tags=["remove-cell"]
longer = experiments.materialise(load_experiment("experiments/fetched/smollm2_longer.yml"))
after = layers.variance_sweeps({"longer": longer.artefacts["distributions"]})
budgets = {32_768: of_small, 262_144: after, 1_048_576: elsewhere.reset_index()}
budgets = pd.concat(budgets, names=["tokens"]).reset_index("tokens")
trained = dict.fromkeys(["seed 0", "trained weights", "docstrings"], "trained")
budgets["weights"] = budgets.run.replace(trained | {"random weights": "random"})
budgets = budgets[budgets.weights.isin(["trained", "random"])]

# %% tags=["hide-input"]
columns = ["low", "value", "high", "permuted", "gaussian"]
budgets.set_index(["ratio", "weights", "tokens"])[columns].sort_index().round(3)

# %% tags=["hide-input"]
shown = ["fvu_global", "delta_ce", "dead"]
longer.evaluation.groupby("case", sort=False)[shown].mean().round(3).rename(columns=charts.METRICS)

# %% [markdown]
# **What to see.** The first ratio falls with training, for trained weights and for random ones alike. At either budget the random ones are
# far below, and the intervals do not meet; even after a million tokens the trained ones are above what the random ones have after a quarter
# of that. So at equal training a low first ratio is no sign that the model has learnt. The second rises with training; of random weights
# its intervals overlap. The dictionary of random weights hardly learns: its FVU stays near 0.7. After the longer training nearly a quarter
# of its latents are dead, and most of the others are seldom active. So its ratios are of few tokens, which pulls the first one down: with
# layers permuted it is 0.86, where many tokens give 1. Divided by that it is still far below that of trained weights.
#
# **What would contradict it.** Random weights whose first ratio stays where it is, or rises.
#
# ## Carried, rewritten or shared?
#
# The questions of {doc}`carried`, put to this model and its dictionary of a million tokens. Is a latent still active a block later, more or
# less often than with *another token's update* in the place of the block's own, or with as much of it in a *random direction*? Above
# zero beside another token's update, and blocks write again what is active; below, and they erase it. Random directions show what an
# update of that size does anyway. Read on 8,192 test tokens.

# %% tags=["remove-cell"]
followed = experiments.measure(
    load_experiment("experiments/fetched/smollm2_carried.yml"), "persistence"
)
survival = experiments.tables(followed, "survival.csv")
pairs = experiments.tables(followed, "pairs.csv")

# %% tags=["hide-input"]
above = survival[survival.of != carried.MEASURED].drop(columns=["low", "high"])
carried_charts.beside(
    above.rename(columns={"excess_low": "low", "excess_high": "high"}),
    ("layer", "Layer at which the latent is active"),
    ("excess", "Survival above that in the null model"),
    "of",
    title="Survival over a block is within 0.05 of that with another token's update",
    subtitle="Lines: 95 % intervals over sequences.",
    choices={"gap": "Blocks"},
)

# %% [markdown]
# **What to see.** After most blocks survival is within 0.02 of that with another token's update, and mostly a little below it. It is just
# further below after the block that follows layer 9, and clearly so after those that follow layers 17 and 19. After the one that follows
# layer 1 alone it is clearly above, by 0.017. Over five blocks (choose them) it is below at some layers in the middle, and above at the
# first four and from layer 18 on. Over twenty it is above throughout. So in the mean a block passes on what is active, as {doc}`carried`
# finds of our small model. That more is left over many blocks is so here over twenty, there over five. Updates in random directions would
# leave more, but after three of the late blocks. Elsewhere a real update moves a few more latents out of the $k$ largest than a random one,
# whichever token it comes from.
#
# **What would contradict it.** An excess of one sign after every block, and large.
#
# At how many layers is a latent active at one token? *single* is the share of the pairs (token, latent) at one layer, *contiguous*
# that of the others whose layers follow each other:

# %% tags=["hide-input"]
columns = ["l0", "single", "single_low", "single_high", "mean", "contiguous"]
own = [carried.MEASURED, *carried.UPDATES, *carried.APART]
pairs[pairs.of.isin(own)].set_index("of")[columns].round(3)

# %% [markdown]
# Is that the margin of TopK? A latent that is on goes on as long as it is among the $4k$ largest:

# %% tags=["hide-input"]
margin = experiments.measure(load_experiment("experiments/fetched/smollm2_carried.yml"), "margins")
selections = experiments.tables(margin, "selections.csv")
last = selections[selections.selection.isin(["k", carried.MARGINS[-1]])]
last.set_index(["selection", "of"])[["single", "single_low", "single_high", "mean"]].round(3)

# %% [markdown]
# And of the latents that are active often, which survive a block more or less often than with another token's update, beyond two standard
# errors? Means over the blocks; *twice* is what chance gives:

# %% tags=["hide-input"]
treated = experiments.tables(margin, "treated.csv")
treated = treated[treated.of.isin(["another token's updates", margins.CHANCE])]
treated.groupby("of", sort=False)[["latents", "more", "less"]].mean().round(3)

# %% [markdown]
# **What to see.** Of the pairs 42 % are of one layer, and in sums of other tokens' updates 39 %. With hysteresis a third
# of that is left, and in the sums a little less. So in this model, too, that a latent seems to belong to one layer at a token is for the
# most part the margin of TopK and what adding does. The difference to the sums is larger than in our small model, and has the other sign:
# a few more pairs are of one layer. With hysteresis that stays, and the intervals do not meet.
# Single latents are treated by blocks, as there: nine times as many as by chance survive more often than with another token's update, and
# six times as many less often. The two nearly cancel in the mean over what is active.
#
# **What would contradict it.** With hysteresis, a share that stays far above that of the sums.
#
# Why is a latent still active? It is taken out at one token, and its activation is read after later blocks, with the model run again (ρ,
# *total*) and with all updates in between as they were (δ, *direct*). Sixteen sequences, one token of each at every layer:

# %% tags=["hide-input"]
taken = experiments.measure(load_experiment("experiments/fetched/smollm2_ablated.yml"), "effects")
ablated = experiments.tables(taken, "effects.csv")
kept = (ablated.after == carried.AFTER[0]) & (ablated.layer == -1) & (ablated.home == "all")
columns = ["samples", "total", "direct", "blocks", "blocks_low", "blocks_high"]
shown = ablated[kept & ablated.gap.isin([1, 2, 3, 5, 10, 20])]
shown.set_index(["taken", "gap"])[columns].round(3)

# %% [markdown]
# **What to see.** After one block 0.80 of the activation of a latent that is still active was carried there. With the model run again
# the drop is 0.77. The difference is small and grows: after five blocks it is 0.07 of the activation. For the latent itself no interval
# of *blocks* has zero in it. So blocks write a little less of a latent if it is there than if it is not. One may say that they take some
# of it away, or that they make up for what is missing: the ablation shows the difference alone. In our small model they add a little
# instead, after two and three blocks ({doc}`carried`). Other latents and random directions hardly matter.
#
# **What would contradict it.** A ρ near zero: then blocks would compute again what is active.
#
# And the two ratios of the same codes and null models, corrected for the bias of few tokens:

# %% tags=["hide-input"]
ratios = experiments.tables(followed, "ratios.csv")
both = ratios[ratios.corrected]
both.pivot_table("value", "of", ["ratio", "weighting"], sort=False).round(3)

# %% [markdown]
# **What to see.** With the codes of *another token at each layer*, Eq. 11 is a little smaller than what is measured; in our small model
# it is larger ({doc}`carried`). In both it asks mostly at which layers latents are used over all the text. Eq. 12 asks for the token, too:
# without it, less than a third is left. Sums of other tokens' updates have more than half of it; in our small model they have most.
# And sums of random directions have hardly less than those; in our small model about half as much. So what sums give of Eq. 12 is in this
# model what nearly any sum gives.
#
# That is with latents counted alike. Counted by their tokens ({doc}`variance`), seven tenths of Eq. 12 are left without the token, and
# Gaussian vectors have more than is measured. In our small model this choice matters little here.
#
# **What would contradict it.** An Eq. 11 without the token far above what is measured.
#
# ## The paper's prompt
#
# The prompt of the paper's Figure 3 is one that this model can complete, as none of ours can:

# %% tags=["hide-input"]
prompt = stages.PROMPTS[0]
said = experiments.tables(results.artefacts["predictions"], "predictions.csv")
said[said.prompt == prompt].set_index("rank")[["token", "probability"]].round(3)

# %% tags=["hide-input"]
single = experiments.tables(results.artefacts["prompts"], "prompts.csv")
sweep_charts.gallery(
    layers.sample_prompt(sweeps.stack({"model": single}), prompt),
    title="Three in ten of the prompt's latents are at one layer, hardly more than by chance",
    subtitle="100 latents of the prompt, evenly spaced in the order of their mean layer in it.",
)

# %% tags=["hide-input"]
spreads = experiments.tables(results.artefacts["prompts"], "spread.csv")
spreads[spreads.prompt == prompt].drop(columns="prompt").set_index("of").round(3)

# %% [markdown]
# **What to see.** The model gives three quarters of the probability to *Mary*. Of the latents of the prompt 31 % are active at one layer
# only, and with layers permuted at each token 27 %: as in {doc}`distributions`, most of that is how few tokens a prompt has, and a few
# points are more.
#
# **What would contradict it.** A prompt's share no larger than with layers permuted.
#
# ## Twenty latents
#
# Latents that are active at 16 tokens or more, sorted by mean layer and cut into twenty groups of equal size; of each group
# the one with the largest activation, with the four tokens at which it is most active. The rule chose them, nobody did; the names
# are ours, and a question mark says that we found none.

# %% tags=["hide-input"]
[(_, artefact)] = results.artefacts["chosen"]
latents = json.loads(artefact.file("latents.json").read_text("utf-8"))
names = pd.read_csv("smollm2_latents.csv", index_col="latent").name.to_dict()
HTML(chosen.as_html(latents, names))

# %% [markdown]
# **What to see.** Nineteen of twenty have a name after a look at four texts, and each name is a token, or a token and what goes with it.
# The rule asks for the largest activation. Of the first thirteen latents all four texts are at layer 0 (which the results have, not the
# table), whatever their mean layer. After one block little is there but the token just read. Of the latent of “top” three of four are at
# the layers just above. Of the other six all are at layer 20 or later, though some of these latents are active at the first layers, too.
# The one without a name is of the last layer, and is active at six tokens of seven. So these are names of what a latent does when it is
# loudest; they do not say what it does at the other layers.
#
# **What would contradict it.** Texts of one latent that have nothing in common, in most rows.
#
# ## The paper's claims, one by one
#
# | claim of {cite:t}`lawson2025` | theirs | here, with its 95 % interval | null model, or with sinks | verdict |
# | --- | --- | --- | --- | --- |
# | norms grow over the layers | a picture (Figure 4) | 47 to 895, at all steps but one | with sinks at all steps | holds |
# | vectors of adjacent layers are alike | a picture (Figure 1) | 0.87 to 0.95, but 0.61 at the last step | with sinks 0.66 where they come up | holds, but for the last step |
# | latents prefer layers: Eq. 11 is below 1 | 0.54 to 0.88 | 0.505 [0.502, 0.513]; at the small budget 0.747 [0.740, 0.754] over three seeds | 0.994 permuted, 0.987 Gaussian; with sinks 0.489, without 0.488 (4,096 tokens); on prose 0.608; random weights 0.51 at the small budget, and 0.36 where trained ones have 0.62 after eight times as much | holds, below their range; no sign of learning, since random weights are lower at equal training |
# | at one token a latent is at few layers: Eq. 12 is small | 0.01 to 0.10 | 0.124 [0.121, 0.125] | 0.44 permuted, 0.04 Gaussian; with sinks 0.126, without 0.126 (4,096 tokens) | holds beside layers permuted, but Gaussian vectors have less (latents counted by their tokens: more); their estimator gives smaller numbers ({doc}`variance`) |
# | in one prompt many latents are at one layer only | a picture (Figure 3) | 31 % of 1,038 latents | 27 % permuted | holds, but is mostly the size of the sample |
# | over many tokens latents are at several layers | a picture (Figure 2) | entropy 0.74 of its maximum | 0.986 permuted | holds |
# | an FVU of 0.1 goes with a loss of half a nat | 0.08 to 0.11, 0.40 to 0.57 (Pythia) | 0.102; 0.28, from 0.12 [0.09, 0.15] to 1.16 [1.07, 1.24] | with sinks 0.058; 0.36. On prose 0.199; 1.45 | on the text it was trained on: FVU alike, the loss smaller but at the last six layers |
# | Llama has many latents at the first layer alone | a picture (Figure 13) | 0.5 % of the latents | | not found |
# | (not asked) what is active later was carried there | | $\delta$ 0.80 [0.76, 0.84], $\rho$ 0.77 [0.73, 0.80] after one block | 0.005 another latent, 0.012 a random direction | mostly carried, as in our model; blocks write 0.03 less where it is there |
# | (not asked) a latent belongs to one layer at a token | | 42 % of the pairs, 14 % with hysteresis | 39 % and 12 % in sums of other tokens' updates | for the most part the margin of TopK, and what adding does |
# | larger models spread latents over more layers | over five Pythias | one model | | cannot be said |
#
# ## What was not done
#
# At a million tokens there is one dictionary, whose intervals are over the text alone. Three seeds, other $k$ and $R$ and single layers
# have the small budget only, and random weights eight times as much at most. $R$ ends at 30. No surrogate was trained on, and no tuned
# lens. Survival has one dictionary, and ablations sixteen sequences.
#
# ## How this page was made
#
# Trained and measured on two cores, which several jobs shared most of the time, so *seconds* are more than quiet ones take. CE and KL are
# of 8,192 of the 32,768 test tokens, in whole sequences spread evenly; their intervals are over sequences. Prose, the ratios with sinks,
# and all shorter trainings are measured on 4,096 tokens. There CE and KL are of 2,048 of them (prose, single layers) or of 512 (the
# others). The dictionary is shipped, and was measured, with its weights rounded to half precision. What that costs, in the means over
# layers:

# %% tags=["hide-input"]
[(_, trained)] = results.artefacts["train"]
pd.Series(trained.meta["half"], name="").drop("float32").to_frame().T

# %% tags=["hide-input"]
results.provenance.set_index("stage")

# %% tags=["hide-input"]
experiments.notes([*followed, *margin, *taken]).set_index(["case", "stage"])

# %% [markdown]
# What it costs: on two quiet cores with AVX-512, FVU, delta CE and KL of all 30 layers take 21 minutes for 32,768 tokens, of which all are
# replaced, and 3 GB of memory ({doc}`benchmarks`). With a quarter of them replaced, as here, one core took 14 minutes, with another job
# beside it. In training one core read 120 to 140 tokens a second, with another job beside it.
#
# With the model at hand, `python -m mlsae_core train SPEC.yml` with `model: smollm2-135m` and a few thousand tokens trains a dictionary of
# your own in minutes. `python -m mlsae_book reproduce book/experiments/fetched/smollm2.yml` makes this one again and compares it, in about
# four hours; it continues where it was stopped.
#
# ```{bibliography}
# :filter: docname in docnames
# ```
