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
# {cite:t}`lieberum2024` trained autoencoders on every layer of Gemma 2. Three of their questions can be
# asked of ours: whether a transcoder of the MLP does as well as an autoencoder of its output, what
# sparsity costs, and whether a dictionary survives fine-tuning. A fourth, how evenly active latents
# matter, was measured for {doc}`explorer` and is repeated here in short.
#
# Theirs are JumpReLU autoencoders, in which L0 differs from vector to vector; ours have TopK, in
# which it is $k$ at the most. And theirs have a dictionary per layer, ours one for all.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments
from mlsae_book.charts import fidelity as fidelity_charts
from mlsae_book.charts import latents as latent_charts
from mlsae_book.tables import fidelity, transfer
from mlsae_core.spec import DataSpec, EvaluateSpec, load_experiment

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
# layers in either case. Choose a metric.

# %% tags=["hide-input"]
charts.metric_by_layer(
    mlp.evaluation,
    title="The transcoder loses about twice as much, at every layer",
    subtitle="One point per layer, over the test split; R = 16, k = 16, 1 M training tokens.",
    color="case",
)

# %% [markdown]
# **What to see.** Whichever error is chosen, the transcoder is worse at every layer. Its FVU is about twice that of the
# autoencoder, from layer 2 on between 0.39 and 0.52; its delta CE is the larger by a factor of 2.0 to 2.3. So Gemma
# Scope's finding holds: replacing the MLP costs more than compressing its output. The costliest MLP is the
# first one, 0.32 nats against 0.14, though its output is the easiest to reconstruct.
#
# **What would contradict it.** A layer at which the difference is negative: there the transcoder would do
# better, having seen of the output two numbers alone (see below).

# %% tags=["hide-input"]
difference = fidelity.paired(mlp.evaluation, "case", "transcoder", "sae", "delta_ce")
difference.set_index("layer").round(4)

# %% [markdown]
# The difference is of single runs, but of one sign and near one factor at all six layers. Part of it may be
# training rather than the task: 42 % of the transcoder's latents were never active in the test sample, and none
# of the autoencoder's, so it works with the smaller dictionary. One thing makes our transcoder's task easier than theirs: what it predicts is the standardised
# output, which is mapped back with the mean and standard deviation of the *true* output of each vector, as
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
# **What to see.** All lines fall, in FVU, delta CE and KL, and up to $k = 64$ none of them flattens: the last doubling,
# to 64 latents for 128 dimensions, lowers the mean FVU by 35 % and delta CE by 43 %, the most of all four. So there is
# no $k$ here beyond which more latents no longer pay. FVU and delta CE agree on that, and disagree on the layers: at
# every $k$, layer 4 has a larger FVU and a smaller delta CE than layer 3. L0 is $k$: at no layer were fewer
# latents positive.
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
latent_charts.uniformity(
    experiments.tables(latents.artefacts["importance"], "importance.csv"),
    title="The measure grows with the layer, and would with gradients that know of no prediction",
    subtitle="Means and 95 % intervals over 512 sequences, four random positions in each. k = 16.",
)

# %% [markdown]
# **What to see.** $r_{L0}$ grows at every step, from 0.54 after the first layer to 0.69 after the last, and the
# intervals of no two layers overlap. It is below the same measure of the activations alone throughout. We once concluded that more
# latents matter at later layers, and that the gradient sets them apart. Neither stands: with gradients of another token, or random
# ones, the measure rises in the same way ({doc}`explorer`), so the rise says nothing of the prediction.
#
# **What would contradict it.** A later layer with an interval below that of an earlier one. Gemma Scope finds
# that effects spread over more latents as L0 grows; with one $k$ this chart cannot say.
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
# **What to see.** On the same text the mean FVU is 0.188 in the tuned model and 0.127 in the base model, and larger at
# every layer; fine-tuning moved the activations some way off what the dictionary learnt. But the
# dictionary still fits: at each of the first five layers FVU is below the best that {doc}`single_layer` shows for a
# dictionary borrowed from another layer, 0.26 against 0.29 at layer 4. The mean delta CE rises less, from 0.23 to
# 0.28 nats, and KL hardly, from 0.28 to 0.29.
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
# Or is the tuned model harder to reconstruct, whatever the dictionary? Each of the two with one of its own, trained on 1 M tokens of
# docstrings and measured on docstrings:

# %% tags=["hide-input"]
own = experiments.materialise(load_experiment("experiments/tuned_model.yml"))
fidelity.means(own.evaluation, "model", columns).round(4)

# %% [markdown]
# **What to see.** It is not: with a dictionary of its own the tuned model's FVU is that of the base model. So what is lost above is the
# fit of a dictionary to a model that has moved. (Delta CE is larger, 0.39 against 0.33, where the text is no longer what the
# model was tuned on.)
#
# ## What the paper says
#
# These figures print no numbers. Their text says that:
#
# - transcoders of Gemma 2B's MLPs raise the loss by more than autoencoders of the output (Figure 11). Ours do;
# - the base model's autoencoders can *lower* the tuned model's loss on user prompts (Figure 20), which
#   fine-tuning did not train it to predict. Ours do not; but our tuned model was trained on questions and answers
#   alike, and predicts both better than the base model (2.5 nats against 4.4);
# - on rollouts they reach a reasonable FVU, with a gap to autoencoders of the tuned model that is wider than in
#   the loss (Figure 21), and at 2B they transfer well by FVU (Figure 22). In ours the gap is the wider one in FVU too,
#   54 % on rollouts, against 20 % in delta CE; it is the distance to the same dictionary in the base model.
#
# Figure 23 rescales the tuned model's activations to the norm that the base model's have. Our
# autoencoders standardise each vector by itself before they encode it and undo that afterwards, so a
# common factor changes neither which latents are active nor FVU: there is nothing to be shown.
#
# ## How this page was made

# %% tags=["hide-input"]
mlp.provenance.set_index("case")

# %% tags=["hide-input"]
sparsity.provenance.query("stage == 'evaluate'").set_index("k")

# %% tags=["hide-input"]
latents.provenance.query("stage == 'importance'").set_index("stage")

# %% tags=["hide-input"]
experiments.notes(measured).set_index("target")

# %% tags=["hide-input"]
own.provenance.set_index(["model", "stage"])

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
