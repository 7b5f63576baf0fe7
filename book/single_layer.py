# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Single-layer autoencoders
#
# **What does one dictionary for all layers give up, against one for each?**
#
# A multi-layer autoencoder (MLSAE) is worth having only if it does at each layer about as well as an
# autoencoder that was trained there alone. Appendix B.4 of {cite:t}`lawson2025` trains one on
# each layer and applies each to every layer. That is possible since all layers have the same width,
# and each vector is standardised by itself before it is encoded. For a metric $m$, such as FVU (Eq. 3), this makes a matrix
#
# $$
# M_{ij} = m\bigl(\text{autoencoder trained at layer } i,\ \text{vectors of layer } j\bigr),
# $$ (eq-transfer-matrix)
#
# with the row of the MLSAE, trained at all layers, beneath it. The diagonal is the standard: the same
# architecture with the same $R$, $k$ and text, and nothing to learn but its own layer.
#
# Each of them reads as much *text* as the MLSAE, which is as many vectors per layer; so the MLSAE
# takes as many optimiser steps as one of them, on batches with $n_L$ times the vectors.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments
from mlsae_book.charts import transfer as transfer_charts
from mlsae_book.tables import fidelity, transfer
from mlsae_core.spec import load_experiment

charts.use_book_theme()
single = experiments.materialise(load_experiment("experiments/single.yml"))
sparsity = experiments.materialise(load_experiment("experiments/sparsity.yml"))

# %% tags=["remove-cell"]
mlsae = sparsity.evaluation.query("k == 16")  # the same R, k, text and tokens
cells = transfer.matrix(experiments.tables(single.artefacts["transfer"], "transfer.csv"), mlsae)
small = experiments.materialise(load_experiment("experiments/single_small.yml"))
models = experiments.materialise(load_experiment("experiments/models.yml"))
small_cells = transfer.matrix(
    experiments.tables(small.artefacts["transfer"], "transfer.csv"),
    models.evaluation.query("model == 'neox-4l-64d'"),
)

# %% [markdown]
# ## Layer by layer
#
# The counterpart of Figures 20 and 21 (Figure 19 is under *The smallest model*), on `neox-6l-128d` with $R = 16$, $k = 16$ and 1 M training
# tokens. As in the paper the last layer is left out: what stands there is the next-token
# prediction, and not an intermediate result. Tick the box to see it. Choose a metric.

# %% tags=["hide-input"]
transfer_charts.matrix(
    cells,
    title="Each is best at its own layer, and one for all layers is second at every one",
    subtitle="Rows: where it was trained. Columns: where it was measured. Stronger colour is worse (log scale).",
)

# %% [markdown]
# **What to see.** Down every column the smallest number stands on the diagonal, in all four metrics: an autoencoder does best where
# it was trained. Along every row FVU grows with each step away from the diagonal, since adjacent layers are the most alike
# ({doc}`drift`). The row beneath is second in every column. At layer 1, say, the MLSAE has an FVU of 0.097, the layer's own
# autoencoder 0.066, and the best that is borrowed from another layer has more than twice that.
#
# The price of sharing falls with depth. The MLSAE's FVU is 2.2 times that of the diagonal at the first layer, and 1.1 times at the
# last that is shown.
#
# **What would contradict it.** A row beneath that is worse than the neighbours of the diagonal: then
# a dictionary borrowed from the next layer would do better than one that has seen all layers.
#
# Means over the layers but the last:

# %% tags=["hide-input"]
transfer.summary(cells).round(4)

# %% [markdown]
# *Own* is the diagonal, *other* everything off it. *Spread* is the largest less the smallest
# over layers. *Own is best* counts the layers at which the autoencoder trained there is the best of the
# single-layer ones: all five.
#
# In the means, one dictionary for all raises FVU and delta CE by about a quarter each. A dictionary of another layer raises them to
# more than three and four times the diagonal's. A quarter is about what $k$ buys: with twice the active latents an MLSAE of the same
# size reaches the diagonal.

# %% tags=["hide-input"]
inner = sparsity.evaluation.query("layer < 5")
fidelity.means(inner, "k", ["fvu_global", "fvu_per_dimension", "delta_ce", "kl"]).round(4)

# %% [markdown]
# At $k = 32$ delta CE and KL are below *own* in the mean. Global FVU is the same, within what seeds do, and FVU per dimension a
# little above. All of these are single runs, but the differences between the MLSAE and the diagonal have one sign at all layers and
# in all metrics, and their means are more than ten times what seeds alone do to the MLSAE's ({doc}`evaluation`).
#
# ## The smallest model
#
# The same on `neox-4l-64d`, with half the latents and four layers. Tick the box for the last one.

# %% tags=["hide-input"]
transfer_charts.matrix(
    small_cells,
    title="In four layers, too, the dictionary for all of them is second everywhere",
    subtitle="Rows: where it was trained. Columns: where it was measured. Stronger colour is worse (log scale).",
)

# %% tags=["hide-input"]
transfer.summary(small_cells).round(4)

# %% [markdown]
# **What to see.** The same order in every column: own layer, MLSAE, the rest. The price is highest at the first layer again, 1.7
# times the diagonal's FVU. In the mean over the layers but the last FVU is 29 % higher, and delta CE by a third, both by a little
# more than in `neox-6l-128d`.
#
# ## Through a tuned lens
#
# The counterpart of Figure 22, on the smallest model: every autoencoder is trained on vectors that the layer's
# translator has moved towards the last layer's basis ({doc}`tuned_lens`), and measured at another layer through that
# layer's translator. FVU is that of the lens space, delta CE and KL are taken after the way back.

# %% tags=["remove-cell"]
lens = experiments.materialise(load_experiment("experiments/single_lens.yml"))
lens_table = experiments.tables(lens.artefacts["transfer"], "transfer.csv")
lens_cells = transfer.matrix(
    lens_table.query("layers != 'all'"), lens.evaluation.query("layers == 'all'")
)

# %% tags=["hide-input"]
transfer_charts.matrix(
    lens_cells,
    title="Through a lens borrowed autoencoders cost less in the mean, and the own ones more",
    subtitle="neox-4l-64d, aligned. Rows: where it was trained. Columns: where it was measured.",
)

# %% tags=["hide-input"]
transfer.summary(lens_cells).round(4)

# %% [markdown]
# **What to see.** Off the diagonal the lens helps in the mean: delta CE falls from 0.99 to 0.87 nats. (So does FVU, of another
# variance.) It does not at every pair: what was learnt at layer 1 and is used at layer 0, or at layer 2 and used at layer 1, costs
# more than without the lens. So layers are more alike in the lens space on the whole, and what is learnt at one is mostly of more use
# at another. The paper finds the reverse: on Pythia-70m the lens *degrades* single-layer autoencoders at other layers; but its lens
# has another alignment ({doc}`tuned_lens`). On the diagonal the lens costs a little. For the MLSAE it costs more: delta CE rises from
# 0.33 to 0.44 nats. The order in every column stays: own layer, MLSAE, the rest.
#
# **What would contradict it.** A mean off the diagonal that is no lower than without a lens. (FVU is of another variance in
# the lens space; delta CE and KL are comparable, and there is one seed of each.)
#
# ## The paper
#
# Figures 19 to 21 print no numbers, so none stand beside ours. Appendix B.4 says of them that:
#
# - the single-layer autoencoder of a layer does best at that layer, on the diagonal. Ours do;
# - the MLSAE does about as well as the single-layer autoencoder of each layer. Ours comes nearer to it than
#   any other does, and is a quarter worse on average;
# - the MLSAE is more consistent across layers. It is, beside any one single-layer autoencoder: its FVU spans 0.14
#   over the columns, and every row above spans more. Beside the diagonal it is so by little (see *spread*),
#   as each layer has a difficulty of its own;
# - on Pythia-410m, FVU changes sharply between the autoencoders of layers 4 and 5. Ours show no such step.
#
# ## What it costs
#
# Section 3.2 of the paper notes that an MLSAE costs about as much to train as $n_L$ single-layer
# autoencoders on the same number of tokens: the encoder's products are the same, one for each vector.
# What differs is the number of parameters, and with it the memory, which is $n_L$ times less.

# %% tags=["hide-input"]
each = single.provenance.query("stage == 'train'")
one = sparsity.provenance.query("stage == 'train' and k == 16")
found = fidelity.costs(each, one, d_model=128, expansion_factor=16)
found.drop(columns=["seconds", "vectors_per_second"]).round(1)

# %% [markdown]
# The memory of training is arithmetic: 16 bytes a parameter, for the weight, its gradient and Adam's two
# moments. The language model runs once for the MLSAE and once for each of the others (up to its layer).
#
# ## At equal budget
#
# An MLSAE that reads six layers has, per layer, a sixth of the latents, and with them it loses a quarter. Is that because layers
# share what there is to learn? This page once said so. The control is a dictionary for each layer of a *sixth* of the latents: if
# that loses no more, nothing was shared. All of these are trained on 200,000 tokens, with 384 latents for a sixth, which is a little
# more than one.

# %% tags=["hide-input"]
equal = experiments.materialise(load_experiment("experiments/equal.yml"))
control = equal.evaluation.assign(dictionary=equal.evaluation.case.map(fidelity.budget))
control = control[~control.case.str.contains("seed")]
control.pivot(index="dictionary", columns="layer", values="fvu_per_dimension").round(3)

# %% [markdown]
# **What to see.** At the first two layers and the last, the MLSAE is worse than a dictionary of a sixth of its latents. At layers 2
# to 4 it is better, and makes up for a quarter to a half of what a sixth loses. So sharing gains something where layers are most
# alike, and at the ends it costs more than it brings. These runs are short, and one of each; longer ones may be kinder to the
# dictionary that has most to learn.
#
# **What would contradict it.** A row *a sixth of the latents* that lies above the MLSAE's at every layer by as much as that lies
# above *as many latents*: then layers would share nearly all.
#
# ## How this page was made
#
# The stage `transfer` of a run measures its dictionary at every layer of the model. It is one pass of
# the same evaluation as in {doc}`evaluation`, so its diagonal is the evaluation of the single-layer run
# itself; a test compares both with a hooked pass of the whole model per layer.

# %% tags=["hide-input"]
single.provenance.query("stage != 'evaluate'").set_index("layers")

# %% tags=["hide-input"]
small.provenance.query("stage != 'evaluate'").set_index("layers")

# %% tags=["hide-input"]
lens.provenance.query("stage != 'evaluate'").set_index("layers")

# %% tags=["hide-input"]
sparsity.provenance.query("k == 16").set_index("stage")

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
