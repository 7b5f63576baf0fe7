# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Beside Gemma Scope
#
# **Do three findings on large single-layer autoencoders hold for small multi-layer ones?**
#
# {cite:t}`lieberum2024` trained autoencoders on every layer of Gemma. Three of their questions can be
# asked of ours: whether a transcoder of the MLP does as well as an autoencoder of its output, what
# sparsity costs, and whether a dictionary survives fine-tuning. A fourth, how evenly active latents
# matter, was measured for {doc}`explorer` by layer, and is asked over L0 here.
#
# Theirs are JumpReLU autoencoders, in which L0 differs from vector to vector; ours have TopK, in
# which it is $k$ at the most. And theirs have a dictionary per layer, ours one for all. The last section puts six small
# autoencoders of their kind through everything, so that theirs can take the place.

# %% tags=["remove-cell"]
import pandas as pd

from mlsae_book import charts, experiments
from mlsae_book.charts import fidelity as fidelity_charts
from mlsae_book.charts import latents as latent_charts
from mlsae_book.charts import sweeps as sweep_charts
from mlsae_book.charts import transfer as transfer_charts
from mlsae_book.tables import fidelity, importance, layers, transfer
from mlsae_core.spec import DataSpec, EvaluateSpec, load_experiment

# %% tags=["remove-cell"]
charts.use_book_theme()
mlp = experiments.materialise(load_experiment("experiments/transcoder.yml"))
sparsity = experiments.materialise(load_experiment("experiments/sparsity.yml"))
latents = experiments.materialise(load_experiment("experiments/explorer.yml"))

# %% [markdown]
# ## Transcoders
#
# A transcoder reads what an MLP reads, its input $\mathbf{x}$ after the norm, and predicts what the MLP writes:
#
# $$
# \hat{\mathbf{y}} = g(\mathbf{x}) \approx \operatorname{MLP}(\mathbf{x}), \qquad \text{where an autoencoder has} \qquad
# \hat{\mathbf{y}} = g\bigl(\operatorname{MLP}(\mathbf{x})\bigr) .
# $$ (eq-transcoder)
#
# So it stands for the MLP, while the autoencoder describes only the result. It has the
# harder task: an autoencoder is told the answer. Both are compared where they act, by the loss
# when the MLP's output is replaced (their Figure 11). The same $R$, $k$ and text; one dictionary for all
# layers in either case. Choose two metrics.

# %% tags=["hide-input"]
charts.metric_by_layer(
    mlp.evaluation,
    title="The transcoder loses about twice as much, at every layer",
    subtitle="One point per layer, over the test split; R = 16, k = 16, 1 M training tokens.",
    color="case",
)

# %% [markdown]
# **What to see.** Whichever error is chosen, the transcoder is worse at every layer. Its FVU and its delta CE are about twice those of
# the autoencoder. So the sign is that of Gemma Scope's finding: replacing the MLP costs more than compressing its output. How much of
# it is the task, and how much the training, is not told apart (below). The costliest MLP is the first one, with 0.32 nats, though its
# output is the easiest to reconstruct.
#
# **What would contradict it.** A layer at which the difference is negative: there the transcoder would do
# better, having seen of the output two numbers alone (see below).

# %% tags=["hide-input"]
difference = fidelity.paired(mlp.evaluation, "case", "transcoder", "sae", "delta_ce")
difference.set_index("layer").round(4)

# %% [markdown]
# The difference is of single runs, but of one sign and near one factor at all layers. Part of it may be
# training rather than the task: 42 % of the transcoder's latents were never active in the test sample, and none
# of the autoencoder's, so it works with the smaller dictionary. One thing makes our transcoder's task easier than theirs: what it
# predicts is the standardised output, which is mapped back with the mean and standard deviation of the *true* output of each vector, as
# the autoencoder's is. That makes the comparison even, but a transcoder that took the place of
# the MLP would have to predict these two numbers as well.
#
# ## Sparsity and fidelity
#
# Their Figures 13 and 14 draw what is lost against L0: fewer active latents are easier to read and
# explain less. Ours are the runs of {doc}`evaluation` with $k$ from 4 to 64, on the residual stream.

# %% tags=["hide-input"]
fidelity_charts.against_sparsity(
    sparsity.evaluation.drop(columns=["mse", "l1"]),
    title="What is lost falls with every doubling of k, at every layer",
    subtitle="Lines are layers; one dictionary for all layers per point. L0 is the mean over tokens.",
)

# %% [markdown]
# **What to see.** All lines fall, in FVU, delta CE and KL, and none of them flattens: of all doublings the last one, to half as many
# latents as dimensions, lowers FVU and delta CE the most. So there is no $k$ here beyond which more latents no longer pay. FVU and delta
# CE agree on that, and disagree on the layers: at every $k$, layer 4 has a larger FVU and a smaller delta CE than layer 3. L0 is $k$: at
# no layer were fewer latents positive.
#
# **What would contradict it.** A line that rises: more active latents, and a worse reconstruction.

# %% tags=["hide-input"]
columns = ["l0", "fvu_global", "fvu_per_dimension", "delta_ce", "kl"]
fidelity.means(sparsity.evaluation, "k", columns).round(4)

# %% [markdown]
# ## How evenly active latents matter
#
# Their Figure 16 asks how many of a vector's active latents bear on the next token. The measure is $r_{L0}$
# ({eq}`eq-uniformity`; their Eq. 12–14), 1 where all active latents have effects of equal size on the
# correct next token's logit and $1/k$ where one has all of it. This is the dictionary of {doc}`training`.

# %% tags=["hide-input"]
of_default = experiments.tables(latents.artefacts["importance"], "importance.csv")
latent_charts.uniformity(
    importance.beside_activations(of_default),
    title="The measure grows with the layer, and would with gradients that know of no prediction",
    subtitle="Means and 95 % intervals over 512 sequences, four random positions in each. k = 16.",
)

# %% [markdown]
# **What to see.** $r_{L0}$ grows from layer to layer, and is below that of the activations alone throughout. We once concluded that more
# latents matter at later layers, and that the gradient sets them apart. The first does not stand: with the gradient of another token,
# or with a random direction, the measure rises in the same way. Of the second little is left ({doc}`explorer`).
#
# **What would contradict it.** Null models with another course over the layers.
#
# Their figure has L0 as its axis. Ours again with $k$ from 4 to 64, each a dictionary of 1 M training tokens, and beneath it how many
# latents would have to share the effect equally, $r_{L0} \cdot k$:

# %% tags=["hide-input"]
over_k = experiments.tables(sparsity.artefacts["importance"], "importance.csv")
latent_charts.uniformity_over_sparsity(
    importance.beside_activations(over_k),
    title="As k grows effects spread over more latents, and so they would in any direction",
    subtitle="Means and 95 % intervals over 512 sequences, four random positions in each. Choose the layer.",
)

# %% [markdown]
# The mean over layers, and by how much $r_{L0}$ with the vector's own gradient is the larger on the same vectors, with 95 % intervals
# over sequences:

# %% tags=["hide-input"]
importance.by_gradient(over_k, "k").round(3)

# %% tags=["hide-input"]
importance.beside_null_models(over_k, ["k", "layer"])

# %% [markdown]
# **What to see.** Gemma Scope finds that effects spread over more latents as L0 grows. So it is here: at $k = 4$ three latents would have
# to share the effect equally, and with each doubling of $k$ the number about doubles. At first it does not quite, since the
# *share* of the active latents falls, from 0.77 to 0.63 at $k = 32$; at $k = 64$ it is a little larger again. But with the gradient of
# another token, or a random direction, both curves are nearly the same, with that turn. So the spreading says that more activations are
# multiplied with something, and nothing of what the prediction needs. What the vector's own gradient adds is small: a share lower by
# 0.02 or so at most than with another token's, at all layers but the last of the two largest $k$. Beside a random direction it is lower
# as well, by up to twice as much, other than at the last layer of the two smallest $k$; at $k = 4$ it is higher there.
#
# **What would contradict it.** A curve of the next token's gradient with another slope than those of its null models.
#
# ## After fine-tuning
#
# Is a dictionary of the base model of use in a model that was fine-tuned from it? The tuned model
# `neox-6l-128d-qa` goes on from `neox-6l-128d` on questions about docstrings. The dictionary of
# {doc}`training` is measured in both, on the same questions (their Figures 19, 20 and 22), and on what
# each model writes itself when it continues the first 32 tokens of each sequence, by sampling at
# temperature 1 with a fixed seed (Figures 8 and 21). Of a rollout the continuation alone is
# measured; the prompt is context.

# %% tags=["remove-cell"]
questions = DataSpec(path="docstring-questions")
targets = transfer.base_and_tuned("neox-6l-128d", "neox-6l-128d-qa", questions)
settings = EvaluateSpec(tokens=65_536, ablations=False)
[(_, run)] = load_experiment("experiments/default.yml").runs
measured = experiments.transfers(run, settings, targets)
tuned = experiments.tables(measured, "transfer.csv")

# %% tags=["hide-input"]
charts.metric_by_layer(
    tuned,
    title="In the tuned model FVU is up by half, delta CE by a fifth",
    subtitle="One point per layer; each model on the given text and on its own rollouts. Trained in the base model.",
    color="target",
)

# %% [markdown]
# **What to see.** On the same text FVU is larger in the tuned model than in the base model at every layer, in the mean by half; fine-tuning
# moved the activations some way off what the dictionary learnt. But the dictionary still fits: at all layers but the last FVU is below the
# best that {doc}`single_layer` shows for a dictionary borrowed from another layer. The mean delta CE rises less, from 0.23 to 0.28
# nats, and KL hardly.
#
# A model's own text changes little of this: global FVU on rollouts is within 0.015 of that on the given text, at all layers
# and in both models. Delta CE is positive throughout, so in no case do reconstructions lower the loss.
#
# **What would contradict it.** An FVU in the tuned model near that of a dictionary at the wrong layer: then
# little would have survived.

# %% tags=["hide-input"]
columns = ["fvu_global", "fvu_per_dimension", "ce_original", "delta_ce", "kl"]
fidelity.means(tuned, "target", columns).round(4)

# %% [markdown]
# Or is the tuned model harder to reconstruct, whatever the dictionary? Each of the two with one of its own, trained on as many tokens of
# docstrings and measured on docstrings:

# %% tags=["hide-input"]
own = experiments.materialise(load_experiment("experiments/tuned_model.yml"))
fidelity.means(own.evaluation, "model", columns).round(4)

# %% [markdown]
# **What to see.** It is not: with a dictionary of its own the tuned model's FVU is that of the base model. So what is lost above is the
# fit of a dictionary to a model that has moved. (Its delta CE is larger; but this is text that the model was not tuned on.)
#
# And where the tuned model's text is its own? The same two dictionaries, both in the tuned model, on questions and on its rollouts (their
# Figure 21), over 32,768 tokens:

# %% tags=["remove-cell"]
in_tuned = {"given text": targets["tuned, given text"], "rollouts": targets["tuned, rollouts"]}
settings = EvaluateSpec(tokens=32_768, ablations=False)
base_or_own = experiments.transfers_of(own.runs, settings, in_tuned)
on_rollouts = experiments.tables(base_or_own, "transfer.csv")
dictionary = on_rollouts.model.map({"neox-6l-128d": "base", "neox-6l-128d-qa": "own"})
on_rollouts["case"] = on_rollouts.target + ", " + dictionary

# %% tags=["hide-input"]
charts.metric_by_layer(
    on_rollouts,
    title="In the tuned model its own dictionary loses less, on questions as on rollouts",
    subtitle="In the tuned model, with its own dictionary and the base model's, each of 1 M training tokens of docstrings.",
    color="case",
)

# %% tags=["hide-input"]
fidelity.means(on_rollouts, "case", columns).round(4)

# %% [markdown]
# **What to see.** At every layer the tuned model's own dictionary loses less than the base model's, in FVU, delta CE and KL, though it
# has seen no question in training either. In the mean it saves about a quarter of each, and rollouts change nothing of that. The
# two dictionaries differ by far more than seeds do ({doc}`evaluation`, though on docstrings and in the base model). That the gap is
# wider in FVU than in the loss, as Gemma Scope finds on rollouts, is not seen: as a fraction of what is lost it is the
# same in both. One pair of models, and one run of each dictionary.
#
# **What would contradict it.** Lines of the two dictionaries that meet: then fine-tuning would have left nothing to learn anew.
#
# ## A set of single-layer autoencoders, in Gemma Scope's format
#
# Whoever has Gemma 2 and Gemma Scope at hand can put them through all of this. Six autoencoders of our own stand in for
# them: one for each layer of the default model, with 512 latents, trained briefly as BatchTopK with $k = 16$,
# without standardisation, and written to files as Gemma Scope's are: `params.npz` in a folder for each layer,
# JumpReLU, with the threshold that BatchTopK has learnt. From here on these files alone are read. The spec is
# `experiments/scope.yml`. With other two lines it is Gemma Scope's, here the first six layers:
#
# ```yaml
#   model: google/gemma-2-2b
#   dictionary: {path: google/gemma-scope-2b-pt-res, folders: [layer_0/width_16k/average_l0_105, layer_1/width_16k/average_l0_102, layer_2/width_16k/average_l0_141, layer_3/width_16k/average_l0_59, layer_4/width_16k/average_l0_124, layer_5/width_16k/average_l0_68]}
# ```
#
# The same lines change `experiments/scope_alone.yml`, which measures each of the six at all layers. Beside them stands an
# MLSAE that was trained in the same way on all six layers, with a sixth of the latents that the set has in all.

# %% tags=["remove-cell"]
together = experiments.materialise(load_experiment("experiments/scope.yml"))
alone = experiments.materialise(load_experiment("experiments/scope_alone.yml"))
one = experiments.materialise(load_experiment("experiments/scope_mlsae.yml"))
both = [
    together.evaluation.assign(dictionaries="one for each layer"),
    one.evaluation.assign(dictionaries="one for all"),
]

# %% [markdown]
# **Loss by layer** (Figures 13 and 14, at one sparsity). Every vector is read by the autoencoder of its layer.

# %% tags=["hide-input"]
charts.metric_by_layer(
    pd.concat(both).drop(columns=["mse", "l1"]),
    title="The set loses less up to layer 3, then the MLSAE, with more active latents",
    subtitle="One point per layer, over 8,192 tokens of the test split. Choose two metrics.",
    beneath="l0",
    color="dictionaries",
)

# %% [markdown]
# **What to see.** The set has nearly one L0, about 14. The MLSAE has one threshold for all layers, and vectors, which grow
# longer from layer to layer, exceed it with more and more latents: 7 at the first layer, 27 at the last. So it loses most where it has
# fewest. In delta CE it loses less than the set at the last two layers, where it has more latents active. In
# {doc}`single_layer`, where every vector is standardised and has the same L0, the MLSAE is second at each layer.
#
# **What would contradict it.** An MLSAE that loses less with the same L0.
#
# **Transfer.** What does the autoencoder of layer $i$ do at layer $j$? The vector has the same width there, so that it can be
# encoded; nothing was trained for it. That a latent of layer $i$'s autoencoder is "active at layer $j$" means that a vector of
# layer $j$ exceeds the latent's threshold in the direction that the encoder learnt at layer $i$, and no more. Since these
# autoencoders take vectors as they are, and not standardised, there are two ways to exceed it: to
# have what the latent stands for, or to lie elsewhere and be longer.

# %% tags=["hide-input"]
as_they_are = experiments.tables(alone.artefacts["transfer"], "transfer.csv")
errors = ("fvu_global", "delta_ce", "kl", "l0")
transfer_charts.matrix(
    transfer.matrix(as_they_are, one.evaluation, errors),
    title="Borrowed at later layers, an autoencoder may be worse than the mean vector",
    subtitle="Rows: where it was trained. Columns: where it was measured. Stronger colour is larger (log scale).",
)

# %% [markdown]
# As a control, vectors of each layer are moved to the mean, and scaled to the spread, of those of the layer where the
# autoencoder was trained; the reconstruction is moved back. What is left is a difference of directions.

# %% tags=["hide-input"]
moved = experiments.tables(alone.artefacts["transfer_matched"], "transfer.csv")
transfer_charts.matrix(
    transfer.matrix(moved, one.evaluation, errors),
    title="With mean and spread made alike, each is the best of the six at its own layer",
    subtitle="The same, with the mean and the spread of each column's vectors made those of the row's layer.",
)

# %% [markdown]
# **What to see.** As they are, vectors of later layers are read with too many latents and those of earlier ones with too few:
# the first layer's autoencoder has 13 active at home and up to 199 elsewhere. So FVU passes 1, which is worse than the mean vector; and
# at layers 3 and 4 delta CE is smallest with the autoencoder of the layer before, which has about twice as many latents active there. With
# mean and spread made alike L0 differs far less, and the diagonal has the smallest FVU, delta CE and KL of each column. Of what borrowing
# costs (*other* less *own* in the tables) more than half is mean and spread, in FVU and in delta CE. The rest is what these two leave,
# directions among it. (*Own is best* counts the layers but the last at which the autoencoder trained there has the smallest number.)
#
# **What would contradict it.** A second picture like the first: then mean and spread would not be what tells layers apart.

# %% tags=["hide-input"]
columns = ["own", "other", "mlsae", "best_at_own"]
transfer.summary(transfer.matrix(as_they_are, one.evaluation, errors))[columns].round(3)

# %% tags=["hide-input"]
transfer.summary(transfer.matrix(moved, one.evaluation, errors))[columns].round(3)

# %% [markdown]
# **Distributions over layers.** Taken together the set has nothing to show: a latent of layer $i$'s autoencoder reads layer
# $i$ alone, so that $P(L = i \mid j) = 1$ by construction. Each autoencoder by itself at all layers has a picture. Choose the vectors
# that they read.

# %% tags=["remove-cell"]
read = experiments.all_distributions(alone, "everywhere")
read_moved = experiments.all_distributions(alone, "everywhere_matched")

# %% tags=["hide-input"]
sweep_charts.gallery(
    transfer.heatmaps(read, read_moved),
    title="As they are, latents of every layer's autoencoder are most active at the last",
    subtitle="46 latents of each autoencoder, evenly spaced in the order of their mean layer.",
)

# %% [markdown]
# *Own* is the mean over latents of $P(L = i \mid j)$ at the layer $i$ where the autoencoder was trained; a latent without
# preference would have a sixth. *own, moved* is the same of vectors moved to its own layer's mean and spread, *own, random
# directions* of random directions as long as the vectors of each layer; *last* is the share of the last layer, of vectors as they are.

# %% tags=["hide-input"]
transfer.own_shares(read, read_moved).set_index("trained").round(3)

# %% [markdown]
# **What to see.** Whichever layer an autoencoder is of, its latents have about half of their probability or more at the last layer, where
# vectors are longest, and those of the first four layers have 6 % or less at their own. It is not that longer vectors are enough: random
# directions as long give these layers more (*own, random directions*). With mean and spread made alike the last layer's share falls, but
# the own layer does not win: it has the *least* of the six, or no more than the least. With these vectors an autoencoder is sparsest where
# it was trained (at the last layer, level with its neighbour), and elsewhere takes more latents. Perhaps it takes them for what it does not
# know: then where a borrowed latent is active says where vectors fit its dictionary worst. A picture like those of {doc}`distributions`
# takes a dictionary that was trained on all layers. Even of the MLSAE here (the table below), whose one threshold longer vectors exceed
# more often, the largest probability is 0.48 on average, and 0.36 under the null model with Gaussian input.
#
# **What would contradict it.** A share of the own layer, with mean and spread made alike, above a sixth.
#
# The MLSAE of this section:

# %% tags=["hide-input"]
layers.spread_table(experiments.all_distributions(one)[0][1]).set_index("of").round(3)

# %% [markdown]
# **How evenly active latents matter** (Figure 16). Here L0 differs from vector to vector.

# %% tags=["hide-input"]
effects = experiments.tables(together.artefacts["importance"], "importance.csv")
latent_charts.uniformity(
    importance.beside_activations(effects),
    title="Effects are less even than activations, at every layer alike and in any direction",
    subtitle="Means and 95 % intervals over 32 sequences, four random positions in each.",
)

# %% tags=["hide-input"]
means = importance.by_gradient(effects).round(3)
means.join(importance.beside_null_models(effects, ["layer"]), suffixes=("", ", difference"))

# %% [markdown]
# **What to see.** $r_{L0}$ is about 0.7 at every layer, in no order of layers, and that of activations alone is above 0.9. We once read
# from such a gap that the gradient tells apart what is about equally active. That stays withdrawn: random directions and the gradients
# of other tokens leave nearly the same gap. With the own gradient the effect is less even at every layer, but by 0.05
# at most: beside another token's gradient one of the six intervals excludes zero, and beside a random direction four do. The growth from
# layer to layer that the MLSAE has above is not there; but these are few vectors, and other dictionaries.
#
# **What would contradict it.** Of the missing growth: intervals that rise from layer to layer.
#
# **After fine-tuning** (Figures 19 to 23). As above, but on 8,192 tokens; and here Figure 23 has something to show, since
# these autoencoders do not standardise: in *tuned, rescaled* every vector of the tuned model is multiplied by the ratio of its
# layer's mean norms in the two models.

# %% tags=["remove-cell"]
targets = transfer.base_and_tuned("neox-6l-128d", "neox-6l-128d-qa", questions, rescaled=True)
settings = EvaluateSpec(tokens=8_192, ablations=False)
[(_, run)] = together.runs
set_measured = experiments.transfers(run, settings, targets)
set_tuned = experiments.tables(set_measured, "transfer.csv")

# %% tags=["hide-input"]
charts.metric_by_layer(
    set_tuned.drop(columns=["mse", "l1"]),
    title="In the tuned model more latents are active, which hides a part of what is lost",
    subtitle="One point per layer; autoencoders of the base model, each at its own layer.",
    beneath="l0",
    color="target",
)

# %% tags=["hide-input"]
fidelity.means(set_tuned, "target", ["fvu_global", "l0", "ce_original", "delta_ce", "kl"]).round(4)

# %% [markdown]
# **What to see.** On the same text FVU is larger in the tuned model than in the base model, but delta CE is smaller. Vectors of the tuned
# model are longer, so that 18 latents are active instead of 14. Rescaled to the base model's norms they have 16, and both FVU and delta
# CE are above those of the base model. So what fine-tuning costs is in part hidden by more latents, and still is a little when rescaled.
# As for the MLSAE above, a model's own text changes FVU little.
#
# **What would contradict it.** A line of the rescaled vectors that lies on that of the base model: then fine-tuning would have
# changed nothing but norms.
#
# ## What the paper says
#
# These figures print no numbers. Their text says that:
#
# - effects spread over more latents as L0 grows (Figure 16). Ours do, and so do those of null models, which their figure does not have;
# - transcoders of Gemma 2B's MLPs raise the loss by more than autoencoders of the output (Figure 11). Ours do;
# - the base model's autoencoders can *lower* the tuned model's loss on user prompts (Figure 20), which
#   fine-tuning did not train it to predict. Ours do not; but our tuned model was trained on questions and answers
#   alike, and predicts them better than the base model;
# - on rollouts they reach a reasonable FVU, with a gap to autoencoders of the tuned model that is wider than in
#   the loss (Figure 21), and the small model's transfer well by FVU (Figure 22). Ours have that gap, as wide in the loss as in
#   FVU.
#
# Figure 23 rescales the tuned model's activations to the norm that the base model's have. The
# MLSAE standardises each vector by itself before it encodes it and undoes that afterwards, so a
# common factor changes neither which latents are active nor FVU; for the set above it does.
#
# ## How this page was made

# %% tags=["hide-input"]
mlp.provenance.set_index("case")

# %% tags=["hide-input"]
sparsity.provenance.query("stage in ('evaluate', 'importance')").set_index(["k", "stage"])

# %% tags=["hide-input"]
latents.provenance.query("stage == 'importance'").set_index("stage")

# %% tags=["hide-input"]
experiments.notes(measured).set_index("target")

# %% tags=["hide-input"]
own.provenance.set_index(["model", "stage"])

# %% tags=["hide-input"]
experiments.notes(base_or_own).set_index(["model", "target"])

# %% tags=["hide-input"]
pd.concat([together.provenance, one.provenance]).set_index("stage")

# %% tags=["hide-input"]
alone.provenance.set_index(["layers", "stage"])

# %% tags=["hide-input"]
experiments.notes(set_measured).set_index("target")

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
