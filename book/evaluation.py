# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Evaluation
#
# **How much does the language model lose when it runs on reconstructions?**
#
# A dictionary is useful only if what it leaves out does not matter. Two kinds of numbers say so:
#
# - **Reconstruction.** FVU, the mean squared error over the variance: 0 is perfect, and predicting
#   the mean gives 1. Two variances are in use. *Global* takes one mean over all tokens and
#   dimensions; it is the one in the paper's released code, so in its Table 1. *Per-dimension* takes
#   the mean vector as its baseline; it is never smaller, because a mean vector is a better guess
#   than a mean number, and 1 minus it is what other libraries call explained variance.
# - **Downstream.** Replace the residual stream after *one* layer by its reconstruction, run the rest
#   of the model, and compare its predictions: the increase in cross-entropy (delta CE) and the
#   divergence $\operatorname{KL}(\text{original} \,\|\, \text{replaced})$, in nats per predicted token.
#
# L1 is the sum of a vector's activations; L0, the number of active latents, is $k$ by construction.

# In formulas, for vectors $\mathbf{x}_{t}$ after layer $\ell$ and their reconstructions $\hat{\mathbf{x}}_t$ (Eq. 3 and
# Section 4.1 of {cite:t}`lawson2025`; $\bar{\mathbf{x}}$ has one number for all dimensions, or one for each):
#
# $$
# \operatorname{FVU} = \frac{\sum_t \|\mathbf{x}_t - \hat{\mathbf{x}}_t\|^2}{\sum_t \|\mathbf{x}_t - \bar{\mathbf{x}}\|^2},
# \qquad
# \Delta\mathrm{CE}_\ell = \mathrm{CE}\bigl(\mathbf{x}_\ell \to \hat{\mathbf{x}}_\ell\bigr) - \mathrm{CE} .
# $$ (eq-fvu-delta-ce)

# %% tags=["remove-cell"]
import pandas as pd

from mlsae_book import charts, experiments, stages, widgets
from mlsae_book.charts import fidelity as fidelity_charts
from mlsae_book.tables import fidelity, sweeps
from mlsae_core import pipeline
from mlsae_core.spec import EvaluateSpec, load_experiment

charts.use_book_theme()
results = experiments.materialise(load_experiment("experiments/default.yml"))
table = results.evaluation

# %% tags=["remove-cell"]
factors = experiments.materialise(load_experiment("experiments/factors.yml"))
models = experiments.materialise(load_experiment("experiments/models.yml"))
every_model = models.artefacts["evaluate"] + experiments.used("evaluate")
seeds = experiments.materialise(load_experiment("experiments/seeds.yml"))
sparsity = experiments.materialise(load_experiment("experiments/sparsity.yml"))
lens_sizes = experiments.materialise(load_experiment("experiments/lens_sizes.yml"))
lens_sparsity = experiments.materialise(load_experiment("experiments/lens_sparsity.yml"))

# %% [markdown]
# ## By layer
#
# Choose two metrics.

# %% tags=["hide-input"]
charts.metric_by_layer(
    table,
    title="Later layers are harder to reconstruct, and cost more, but not in step",
    subtitle="One point per layer, over the test split. Choose a metric above and one beneath.",
)

# %% [markdown]
# **What to see.** FVU grows with every layer, of both kinds. Delta CE grows too, but not at every step: layer 4 is reconstructed
# worse than layer 3 and costs less. So FVU ranks these six layers nearly as the model's loss does. That is little evidence that it is
# a proxy for what the model needs: both rise with depth, and between models the two give different orders ({doc}`architectures`).
#
# The two FVU differ by a constant. Where the layers' mean vector is long, a good part of the *global* variance is that of one
# vector which all tokens share, and a bias would do for it. The bias of an MLSAE is one for all layers. The column *offset* of
# the table is that part: half of the variance of the first layer, a twentieth of the last. So the first layers' low global FVU
# is in part an easy half.
#
# **What would contradict it.** Layers that the two rank in different orders throughout. The one exchange here, of 0.015 nats, is no
# accident of this run: it is found with each of the seeds, the $k$ and the $R$ below.
#
# The same numbers as a table:

# %% tags=["hide-input"]
columns = ["layer", "fvu_global", "fvu_per_dimension", "offset", "mse"]
columns += ["l1", "l0", "delta_ce", "kl"]
shown = table.assign(offset=1 - table.fvu_global / table.fvu_per_dimension)
shown[columns].set_index("layer").round(4)

# %% [markdown]
# How much of it is the sample of text? The same dictionary on the first 131,072 tokens of the test split, with 95 % intervals over its
# sequences in brackets, since the tokens of one sequence depend on each other:

# %% tags=["hide-input"]
[(_, again)] = experiments.measure(load_experiment("experiments/intervals.yml"), "evaluate")
columns = ["fvu_global", "fvu_per_dimension", "delta_ce", "kl"]
fidelity.with_intervals(pd.read_csv(again.file("evaluation.csv")), columns)

# %% [markdown]
# **What to see.** No two layers' intervals of either FVU meet. Those of delta CE meet only for layers 3 and 4, the two that change
# places. An interval over text says nothing of another training; the seeds below do.
#
# ## What a layer is worth
#
# Delta CE needs a scale. Replacing the residual stream by zero, or by its mean, destroys all that the layer knows of the text; the
# fraction of that damage which the reconstruction avoids is the *CE recovered*. It is a forgiving number, since the damage is large:
# read it beside delta CE, not instead. A uniform guess has a loss of 8.3 nats. In all rows but one, the last layer by zero, the loss
# after ablation is above that: ablation does harm of its own, and the fraction flatters. At layer 4 by zero it is mostly the size of
# its denominator. (The mean is that of the first 8192 tokens.)

# %% tags=["hide-input"]
ablation = ["ce_original", "ce_replaced", "ce_zero", "ce_mean"]
columns = [*ablation, "ce_recovered_zero", "ce_recovered_mean"]
table.set_index("layer")[columns].round(3)

# %% [markdown]
# In JupyterLab, the same with a control of the kernel's:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.metric_by_layer(table, list(charts.METRICS), "One metric by layer")

# %% [markdown]
# ## Text that was seen before
#
# A part of the test text stands in the training text ({doc}`setup`). Does that flatter the dictionary? On 65,536 tokens of the test
# split, *repeated* are those in spans of 32 that the training split has too:

# %% tags=["hide-input"]
settings = EvaluateSpec(tokens=65_536)
overlapping = stages.overlap(pipeline.Session(), results.runs[0][1], settings)
experiments.tables([({}, overlapping)], "apart.csv").set_index("text").round(3)

# %% [markdown]
# **What to see.** The *language model* predicts repeated text better by far. It may know some by heart, and what is repeated may be
# easy text as well; either way its loss on the whole split flatters it. The dictionary's FVU hardly differs, and it is not the lower
# on repeated text. So repeated text does not flatter the FVU of this book. Of its other measures this says nothing.
#
# **What would contradict it.** An FVU that is lower on repeated text.
#
# ## How much of it is chance?
#
# Three dictionaries that differ in their seed alone, so in their initial weights and the order of the
# text. They are trained on 1 M tokens, a quarter of the text of the one above.

# %% tags=["hide-input"]
fidelity_charts.repeated(
    fidelity.repeated(seeds.evaluation, "seed"),
    title="Seeds move what is lost at a layer by far less than the layers differ",
    subtitle="Points are means over three seeds; lines reach from the smallest to the largest.",
)

# %% tags=["hide-input"]
range_over_seeds = fidelity.repeated(seeds.evaluation, "seed", ["fvu_global", "l1", "delta_ce"])
range_over_seeds.query("layer == 'mean'").set_index("metric").round(4)

# %% [markdown]
# **What to see.** Lines that hide behind their points, but for L1, where those of the first two layers overlap. The mean FVU over
# layers moves by about 0.0014 between seeds. Delta CE moves by about 0.003 nats. These are the yardsticks for differences between the
# runs further down. Layer 4 costs less than layer 3 with all three seeds. Three seeds give a range, not a confidence interval.
#
# **What would contradict it.** Lines as long as the distances between layers.
#
# ## Over R and k
#
# Figures 8, 9 and 10 of the paper: FVU, MSE, L1, delta CE and KL against the expansion factor
# $R = n / d$ at fixed $k$, and against $k$ at fixed $R$. Choose the metric, and whether each layer is
# drawn or the mean over layers alone.

# %% tags=["hide-input"]
over = {"R, at k = 16": factors.evaluation, "k, at R = 16": sparsity.evaluation}
fidelity_charts.over_sweep(
    fidelity.over(sweeps.stack(over)),
    title="Each doubling of R or k lowers what is lost, at every layer; k buys more",
    subtitle="Lines are layers, the dashed line is their mean. 1 M training tokens each, one seed.",
)

# %% [markdown]
# **What to see.** As in the paper, FVU, MSE, delta CE and KL fall at every layer with each doubling of either. Doubling $R$ lowers
# the mean FVU less and less, by 15 % at first; doubling $k$ lowers it by about a fifth three times and by more than a third the
# fourth (in the tables). L1 falls with $R$ and rises with $k$, as in the paper. And MSE, which no variance divides, rises with the
# layer throughout. The paper's exception, a last layer that gets worse at large $R$, is not found up to $R = 64$; theirs go to 256.
#
# **What would contradict it.** A line that rises with $R$ or $k$, other than L1's with $k$. Each point is one run, but each step of
# the mean is at least four times the range over seeds, other than those of L1 beyond $R = 8$. The last two of these are about that
# range or less, so whether L1 goes on falling there is not known.

# %% tags=["hide-input"]
columns = ["fvu_global", "fvu_per_dimension", "mse", "l1", "delta_ce", "kl", "dead"]
fidelity.means(factors.evaluation, "expansion_factor", columns).round(4)

# %% tags=["hide-input"]
fidelity.means(sparsity.evaluation, "k", columns).round(4)

# %% [markdown]
# At $R = 16$ and $k = 16$ this is the recipe of the first chart with a quarter of its training text. Four times the text lowered the
# mean FVU to 0.127, and delta CE by a somewhat larger fraction (measured on more test text). A doubling of $k$ does more.
#
# ### Through the tuned lens
#
# Figure 12 of the paper: the same where vectors go through a tuned lens before the dictionary, and back after it ({doc}`tuned_lens`).
# FVU and MSE are of the translated vectors, so of another variance than above; delta CE and KL are of the model's own
# predictions, as above.

# %% tags=["hide-input"]
over = {
    "R, tuned lens": lens_sizes.evaluation,
    "k, tuned lens": lens_sparsity.evaluation,
}
fidelity_charts.over_sweep(
    fidelity.over(sweeps.stack(over)),
    title="Through the lens, too, each step in R or k lowers what is lost, at every layer",
    subtitle="Lines are layers, dashed their mean. Aligned lens, 1 M training tokens, one seed; else R = 16, k = 16.",
)

# %% [markdown]
# What the lens changes over $R$, in the mean over layers: the numbers with it, less those without it. (Over $k$: {doc}`tuned_lens`.)

# %% tags=["hide-input"]
columns = ["fvu_global", "fvu_per_dimension", "delta_ce", "kl"]
with_lens = fidelity.means(lens_sizes.evaluation, "expansion_factor", columns)
without = fidelity.means(factors.evaluation, "expansion_factor", columns)
(with_lens - without).dropna().round(4)

# %% [markdown]
# **What to see.** FVU and delta CE fall with $R$ and with $k$ at every layer, as without a lens. What the lens changes depends on what is
# asked. At all three sizes the global FVU is larger with it and that per dimension smaller: the variances that divide them are others.
# Delta CE, which nothing divides, is a little smaller with the lens at $R = 1$, the same at 4 and a little larger at 16. At 1 and 16 the
# difference is more than the range over seeds above; but that range is of one size without a lens, and here is one run each.
#
# **What would contradict it.** A line that rises with $R$ or $k$.
#
# ## The last layer and dead latents
#
# In Figure 11 the FVU of the last layer rises with the fraction of dead latents. The authors ascribe it to
# the auxiliary loss, which grows with the scale of the activations, and that is largest at the last layer.
# Here the auxiliary loss is computed on standardised vectors, which have no scale.

# %% tags=["hide-input"]
fidelity_charts.last_layer(
    fidelity.last_layer(factors.evaluation, "expansion_factor"),
    title="The last layer gains from R as the others do; hardly a latent is dead",
    subtitle="Dead: never active at any layer in the test sample. k = 16.",
)

# %% [markdown]
# **What to see.** Two lines that fall together, and few dead latents, one in a hundred at most. So the paper's effect has little
# cause to appear here, and does not. In relative terms the last layer does fall behind, from 1.5 times the others' FVU to 1.8 times
# at the largest $R$. But half of that has come about by $R = 8$, where no latent is dead.
#
# The third quantity of that figure, the auxiliary loss (*AuxK*, before its weight of a 32nd), is a mean over each quarter of the training,
# and with it the latents that are dead by the *training* window:

# %% tags=["hide-input"]
course = fidelity.auxiliary(factors.log, "expansion_factor")
course.pivot_table(index="expansion_factor", columns="part", values=["auxk", "dead"]).round(4)

# %% [markdown]
# **What to see.** Zero, but at the two largest $R$ late in training. At the largest it ends near 1: what dead latents make of the error
# explains none of it there.
#
# **What would contradict it.** Lines that go apart where the bars grow.
#
# ### A run with many dead latents
#
# Latents die where there are many of them and few are active. Two short trainings with $R = 64$ and $k = 4$, one with the auxiliary loss
# as everywhere in this book, one with weight 0. Until the first latent dies they are the same run. A latent is dead after
# 50,000 tokens without an activation.

# %% tags=["hide-input"]
dead = experiments.materialise(load_experiment("experiments/dead.yml"))
weights = {0: "none", 0.03125: "1/32"}
course = fidelity.auxiliary(dead.log.assign(run=dead.log.aux_alpha.map(weights)), "run", parts=40)
fidelity_charts.dead_latents(
    course,
    title="With the loss that is to revive them, twice as many latents are dead in the end",
    subtitle="Means over fortieths of the training: 200,000 tokens, one seed. Above 1, AuxK is worse than nothing.",
    by="Weight of AuxK",
)

# %% tags=["hide-input"]
found = dead.evaluation.assign(weight=dead.evaluation.aux_alpha.map(weights))
lost = fidelity.means(found, "weight", ["delta_ce", "kl"])
fidelity.last_layer(found, "weight").set_index("run").join(lost).round(4)

# %% [markdown]
# **What to see.** The loss does not revive latents here: in the end 40 % are dead with it, and half as many without. AuxK says that it
# acts: without the loss, what dead latents write would leave five times the error, with it little more than the error itself. But it
# stays above 1, so to write nothing would be better all along. Perhaps a latent that has learnt to write little is all the less
# among the four largest. That was not tested, nor whether a longer training would turn the curve.
#
# No cost of the extra dead is seen: the last layer's FVU is nearly the same in both trainings all along, and in the test sample (the
# table) the one with more dead latents loses a little *less*, in FVU and in delta CE. (*dead* in the table are latents that the sample
# never activates, so more than in the chart.) So the last layer is not worse where more latents are dead, as the paper's figure would have
# it. But many are dead in both, and no run of this shape has few, to compare with. With one seed, one size and a short training at a
# learning rate of 0.006, this is no verdict on the loss.
#
# **What would contradict it.** A curve of dead latents with the loss that bends below the one without, or a last layer that falls
# behind where more latents are dead.
#
# ## Over models
#
# Three sizes of GPT-NeoX, and three other architectures in the middle one, at the same $R$ and $k$, so with
# dictionaries in proportion to their widths. And SmolLM2-135M, a model that people use ({doc}`smollm2`), with $R = 8$ and $k = 32$.

# %% tags=["hide-input"]
by_model = experiments.tables(every_model, "evaluation.csv")
charts.metric_by_layer(
    by_model,
    title="In each of our models FVU grows with every layer; delta CE need not",
    subtitle="One point per layer. Ours: R = 16, k = 16, 1 M training tokens each, one seed.",
    color="model",
    relative=True,
)

# %% tags=["hide-input"]
by_model.groupby("model", sort=False)[["fvu_global", "fvu_per_dimension", "delta_ce"]].mean().round(
    3
)

# %% [markdown]
# **What to see.** In all six of ours FVU grows with every layer, in global FVU more than twofold from the first to the last. What the
# architectures do to it is the subject of {doc}`architectures`. Of the three GPT-NeoX, the larger one has at every common layer the
# smaller global FVU, by more than seeds move it. Yet its *mean* is the larger, from 0.130 in the smallest to 0.161 in the largest,
# since it has more layers and the last ones are the hardest. Per dimension there is no such order: at the first three layers the
# smallest model has the smallest FVU (at the first two by less than seeds move it), further on the largest model may have. Delta CE falls
# with the size at every common layer but one, the last of the smallest model. In the paper FVU and delta CE remain consistent over
# the sizes of Pythia. MSE depends on the scale of a model's activations, L1 on its width.
#
# SmolLM2's line is of another shape. Its global FVU is as high at the first layer as in the middle and lowest at the third; its delta CE
# is nearly flat over the first half and grows from there, most at the last layer. FVU ranks its layers much as the loss does
# ({doc}`smollm2`): less closely than in four of our models, and more than in `gpt2-6l-128d` and `neox-4l-64d`.
#
# **What would contradict it.** A size that is below the others at all layers in both kinds of FVU, as GPT-2 is below the
# GPT-NeoX of its size.
#
# ## Beside the paper
#
# The mean over layers, as in Table 1 of {cite:t}`lawson2025`. Theirs is for much larger models, with
# $R = 64$, $k = 32$, 1 B training tokens of the Pile and 1 M test tokens; it is context, not a target.
# Ours is the dictionary of the first chart, with $R = 16$, $k = 16$ and 4 M training tokens:

# %% tags=["hide-input"]
ours = table[["fvu_global", "l1", "delta_ce"]].mean().round(3)
ours.rename("mean over layers").to_frame().T

# %% [markdown]
# The paper's, Table 1a without and 1b with a tuned lens:

# %% tags=["hide-input"]
experiments.published("table1").set_index("model")

# %% [markdown]
# Where our delta CE lies below the paper's we do not read that as a merit of the dictionary: the language
# model, the text, the tokenizer, $R$ and $k$ all differ, and a small model has less to lose. L1 is not
# comparable, since it grows with the width of the vectors and with $k$.
#
# ## How this page was made
#
# The dictionary is the one of {doc}`training`. Special tokens are excluded from FVU, MSE, L1 and L0; delta CE and KL score every
# prediction of a next token, and *tokens* in the row of the training counts all positions. The code released with the paper reports
# $\operatorname{KL}(\text{replaced} \,\|\, \text{original})$, summed over positions. The original pass is computed once, and all
# replaced layers share one growing batch through the rest of the model.

# %% tags=["hide-input"]
results.provenance.set_index("stage")

# %% tags=["hide-input"]
seeds.provenance.query("stage == 'evaluate'").set_index("seed")

# %% tags=["hide-input"]
factors.provenance.query("stage == 'evaluate'").set_index("expansion_factor")

# %% tags=["hide-input"]
lens_sizes.provenance.query("stage == 'evaluate'").set_index("expansion_factor")

# %% tags=["hide-input"]
experiments.notes(every_model).set_index("model")

# %% tags=["hide-input"]
sparsity.provenance.query("stage == 'evaluate'").set_index("k")

# %% tags=["hide-input"]
dead.provenance.set_index(["aux_alpha", "stage"])

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
