# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Other architectures
#
# **Is what we found a matter of how GPT-NeoX is built?**
#
# Appendix B.3 of {cite:t}`lawson2025` trains MLSAEs on GPT-2 small, Llama 3.2 3B and Gemma 2 2B as well (heatmaps and single prompts
# in Figures 13 to 18) and finds pictures like those of Pythia. But these models differ from Pythia in everything at once: size, text,
# tokenizer, training. Ours differ in the architecture alone. Each has six layers of 128 dimensions and read the same 9 M tokens of
# the same text, cut by the same tokenizer, with the same seed:
#
# - `neox-6l-128d`: rotary positions, attention and MLP side by side;
# - `gpt2-6l-128d`: learned positions, attention before the MLP;
# - `llama-6l-128d`: rotary positions, RMS norms without means, gated MLPs;
# - `gemma2-6l-128d`: norms before and after every part, soft-capped logits, sliding and full attention in turns,
#   and embeddings multiplied by $\sqrt{d}$.
#
# The charts show SmolLM2-135M as well, a Llama that people use ({doc}`smollm2`). It differs from these in everything at once, as the
# paper's models do, and so does its dictionary ($R = 8$, $k = 32$). It says what a difference that is *not* of the architecture alone looks
# like.

# %% tags=["remove-cell"]
from mlsae_book import charts, experiments, stages, widgets
from mlsae_book.charts import layers as layer_charts
from mlsae_book.charts import sweeps as sweep_charts
from mlsae_book.tables import layers, spread, sweeps
from mlsae_core import pipeline
from mlsae_core.spec import load_experiment

charts.use_book_theme()
results = experiments.materialise(load_experiment("experiments/architectures.yml"))
measured = results.artefacts["distributions"] + experiments.used("distributions")
read = experiments.read_all(measured)

# %% [markdown]
# The models, with what they lose on validation text, in nats per token. Their parameters differ by 8 % at most. GPT-NeoX
# was trained in float32, the other three with products in bfloat16, so that a few hundredths of a nat between them say nothing.

# %% tags=["hide-input"]
models = experiments.suite().set_index("model").loc[results.evaluation.model.unique()]
models[["parameters", "training_tokens", "validation_loss", "bigram_loss", "seconds", "commit"]]

# %% [markdown]
# ## Heatmaps
#
# The counterparts of the paper's heatmaps, with that of GPT-NeoX.

# %% tags=["hide-input"]
sweep_charts.gallery(
    sweeps.stack({"model": spread.sampled(read, 80)}),
    title="Four architectures, one picture: latents prefer layers and are spread over several",
    subtitle="80 latents of each dictionary, evenly spaced in the order of their mean layer.",
)

# %% [markdown]
# The paper notes that in Llama more latents are active only at the first layer than elsewhere. Latents with more than
# 90 % of their probability at the first layer, and at the last, as fractions of the live ones:

# %% tags=["hide-input"]
spread.at_the_ends(read).set_index("model").round(3)

# %% [markdown]
# **What to see.** A broad diagonal in each of the four: as the paper says of its models, the pictures are alike. (So is that of random
# weights in the {doc}`gallery`, so this is no sign that they learn the same.) By the mean entropy ({doc}`entropy`) the latents of
# `gpt2-6l-128d` are the most concentrated, and those of `llama-6l-128d` the least. Latents of the first layer alone are rare in all of
# them, 1.9 % at most, and in the four of the last rarer still. The paper's note on Llama is not found here: ours has the *fewest* latents
# at its first layer. So what they saw in their Llama need not be a matter of the architecture.
#
# **What would contradict it.** A model whose columns are all strong in one cell, or whose share at the first layer is
# many times the median of the others.
#
# ## Single prompts
#
# The counterparts of the paper's figures of single prompts, with its prompt.

# %% tags=["hide-input"]
prompt = stages.PROMPTS[0]
single = experiments.tables(results.artefacts["prompts"], "prompts.csv")
layer_charts.prompts(
    layers.name_prompts(single, [prompt]),
    title="In single prompts many latents are active at one layer only, most of them for want of tokens",
    subtitle="A column is a latent, sorted by its mean layer in this prompt. Choose the model.",
)

# %% [markdown]
# In JupyterLab, type one of your own for one of the models:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.prompt_layers(pipeline.Session(), results.runs[1][1], prompt)

# %% [markdown]
# And how much of that is the size of the sample:

# %% tags=["hide-input"]
spreads = experiments.tables(
    results.artefacts["prompts"] + experiments.used("prompts"), "spread.csv"
)
spreads[spreads.prompt == prompt].drop(columns="prompt").set_index(["model", "of"]).round(3)

# %% [markdown]
# **What to see.** Of the prompt's latents about 40 % are active at one layer only, in each of our architectures. As in
# {doc}`distributions`, most of that is the size of the sample: with layers permuted at each token it is little less, and what is left is
# 6 or 7 points. In SmolLM2 both are lower, and less is left, 4 points.
#
# **What would contradict it.** An architecture in which the prompt's share is no larger than with layers permuted.
#
# ## Variance ratios
#
# The counterpart of the three models in Figure 5; the ratios are explained in {doc}`variance`.

# %% tags=["hide-input"]
ratios = layers.variance_sweeps({"Architecture": measured})
layer_charts.variance_ratios(
    ratios,
    title="The architecture moves the first ratio by less than R or k do",
    subtitle="95 % bootstrap intervals over blocks of sequences, mostly smaller than a point. With null models.",
)

# %% tags=["hide-input"]
ratios.pivot(index="run", columns="ratio", values=["low", "value", "high"]).round(3)

# %% [markdown]
# **What to see.** The first ratio is lowest in `gpt2-6l-128d`, 0.54, and highest in Gemma, 0.63; the second is lowest in
# `gpt2-6l-128d`, too, and highest in Llama. No two intervals overlap, but the intervals cover the text alone: two dictionaries of one
# model that differ in their seed have disjoint ones, too ({doc}`variance`). Beside the range over seeds, `gpt2-6l-128d` and Llama
# stand apart in the first ratio, `gpt2-6l-128d` alone under the other choice of $P(J)$ as well. Gemma and GPT-NeoX, one run each,
# hardly do. Over $k$ and over $R$ the ratio goes further than here, up to 0.80.
#
# **What would contradict it.** A ratio of the four outside of what $k$ does to that of GPT-NeoX, or one at its null models.
#
# ## Reconstruction and loss
#
# The counterpart of the three rows of Table 1. Choose two metrics; MSE depends on the scale of a model's
# activations and is not to be compared between models.

# %% tags=["hide-input"]
evaluated = results.artefacts["evaluate"] + experiments.used("evaluate")
evaluation = experiments.tables(evaluated, "evaluation.csv")
charts.metric_by_layer(
    evaluation,
    title="Of our four GPT-2 has the lowest mean FVU, yet its first two layers cost most",
    subtitle="One point per layer. Ours: R = 16, k = 16, 1 M training tokens each, one seed.",
    color="model",
    relative=True,
)

# %% tags=["hide-input"]
averages = ["fvu_global", "fvu_per_dimension", "l1", "delta_ce", "kl"]
evaluation.groupby("model", sort=False)[averages].mean().round(4)

# %% [markdown]
# **What to see.** Global FVU grows with every layer in all four of ours. That of `gpt2-6l-128d` is the smallest at five of the six layers.
# But replacing its first layer costs 0.31 nats where Llama's costs 0.12, and its second layer, too, is the dearest of the four. So
# between models FVU does not rank what is lost: by the mean FVU of either kind the order is `gpt2-6l-128d`, Llama, Gemma, GPT-NeoX;
# by the mean delta CE it is Llama, Gemma, GPT-NeoX, `gpt2-6l-128d`. Nor is it that the last had more to lose, since it is the weakest
# model of the four.
#
# **What would contradict it.** The same order of the models in FVU and in delta CE.
#
# ## Beside the paper

# %% tags=["hide-input"]
published = experiments.published("table1")
published[published.model.str.contains("GPT-2|Llama|Gemma|Pythia-160m")].set_index("model")

# %% [markdown]
# Of Pythia-160m and GPT-2 small, which are of similar size, the latter has the lower FVU and the higher delta CE; so it has here
# beside GPT-NeoX. The paper's Gemma stands out with its delta CE, and its Llama with its FVU. With size, text, tokenizer and training
# alike, neither stands out here. So nothing on this page says that those numbers are a matter of the architecture alone.
#
# ## How this page was made

# %% tags=["hide-input"]
results.provenance.set_index(["model", "stage"])

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
