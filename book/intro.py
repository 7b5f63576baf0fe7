# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Multi-layer sparse autoencoders
#
# **At which layers does a feature of a language model live?**
#
# ## The words
#
# A transformer is a stack of *layers*. For every token it carries one vector along, the *residual stream*,
# which each layer reads and adds to. A *sparse autoencoder* (SAE) learns a *dictionary*: many directions,
# the *latents*, of which a few, each times its *activation*, sum up to such a vector. What in the text makes
# a latent active is the *feature* it stands for.
#
# People have trained one SAE per layer. Then a latent of layer 3 and a latent of layer 4 are different
# things by construction, even where both stand for the same feature. {cite:t}`lawson2025` train **one**
# dictionary on the vectors of **every** layer, a *multi-layer* SAE (MLSAE). Now a latent is the same thing
# wherever it is active, and at which layers that is can be counted.

# %% tags=["remove-cell"]
import pandas as pd

from mlsae_book import charts, experiments, tables
from mlsae_book.charts import layers as layer_charts
from mlsae_book.tables import layers
from mlsae_core import pipeline
from mlsae_core.spec import load_experiment

charts.use_book_theme()
experiment = load_experiment("experiments/default.yml")
session = pipeline.Session()
_, run = experiment.runs[0]

# %% tags=["hide-input", "nbval-ignore-output"]
passage = layer_charts.passage(
    layers.passage(
        session.lm(run.model),
        session.sae(run),
        "Return the number of elements along the given axis",
    ),
    token="axis",
    title="One token on its way, read by one dictionary after every layer",
    subtitle="The last word of “… along the given axis”. A column is a latent. Move the slider; click one to meet it.",
)
charts.with_cards(passage)

# %% [markdown]
# Two latents stay active from the first block to the last, most come and go. Is that a fact about what the model has learnt?
#
# ## Which of these is the trained model?
#
# Three pictures of 200 latents each. A column is a latent, strong in colour at the layers where it is mostly active. One is of a
# language model that was trained on text, one of the same model with *random weights*, which has learnt nothing, and in one the
# layers of the trained model were *permuted* at every token. Guess, and the pictures say what they are.

# %% tags=["hide-input"]
read = experiments.swept_distributions({"weights": "experiments/random.yml"})
[(_, trained, _), (_, random, _)] = read["weights"]
probs = {"A": random["probs"], "B": trained["probs_permuted"], "C": trained["probs"]}
layer_charts.guess(
    layers.guess_table(probs),
    {"A": "random weights", "B": "trained, layers permuted", "C": "trained"},
    trained="C",
    title="One of these language models has learnt something",
    subtitle="Choose the one that you take for it.",
)

# %% [markdown]
# ## What was found
#
# Two of them look much alike, and only one of the two has learnt anything. With small models that this project trained itself:
#
# - One dictionary for all layers can be trained, and most of its latents are active at **several** layers.
# - More than half of the spread over layers lies **within** single latents: 56 % here, 62 % after a shorter training.
# - A language model with **random weights**, which has learnt nothing, gives **nearly the same picture**: 55 %
#   in place of the 62 % ({doc}`variance`).
# - So the picture alone is no evidence for features that live across layers. Most of it is what **adding** does: in a stream that takes
#   what blocks compute for *other* tokens about as many latents stay active over a block, in our model ({doc}`carried`) and in
#   SmolLM2-135M, which people use ({doc}`smollm2`). Of features that are known {doc}`planted` says more.
# - The ratios printed in the paper are of another estimator, which alone takes our second ratio into their range, and our first out
#   of it ({doc}`variance`, {doc}`definitions`).
#
# ## The picture to keep in mind
#
# For latent $j$ and token $t$, let $h_j(x_{t,\ell})$ be the activation of the latent on the
# residual-stream vector after layer $\ell$. The latent's distribution over layers at that token is
#
# $$
# P(L = \ell \mid T = t, J = j) = \frac{h_j(x_{t,\ell})}{\sum_{\ell'} h_j(x_{t,\ell'})} ,
# $$ (eq-layer-distribution)
#
# which is Eq. 10 of the paper. Averaged over the tokens where the latent is active, it gives one
# column of the picture: dark where the latent is mostly active.

# %% tags=["hide-input"]
distributions = session.distributions(run, experiment.evaluate)
arrays, numbers = experiments.read_distributions(distributions)
heatmap = charts.heatmap(
    tables.latent_table(arrays),
    title="Most latents are spread over several layers; few belong to one",
    subtitle="A column is a latent, 600 of 2,048 evenly spaced in the order of their mean layer. Move "
    "the slider to keep the sharply located ones; click one to meet it.",
)
charts.with_cards(heatmap)

# %% [markdown]
# **What to see.** The columns change gradually from left to right. For more than a third of the latents
# the first layer has the largest share, but for only one in ten more than half. Move the slider to 0.5
# and roughly a third of the columns stay; at 0.9, one in fifty. So latents are shared between layers, and
# yet the layers are not interchangeable. A model with random weights draws such a diagonal, too
# ({doc}`gallery`): each layer adds something of its own, learnt or not. (Here every token at which a
# latent is active counts the same; the paper's heatmaps weight tokens by activation.)
#
# **What would contradict it.** If a dictionary shared by all layers were only six dictionaries in
# one, every column would be a single dark cell, and the slider would fade nothing before its right
# end. If the layers did not matter at all, every column would look like its neighbours, as it does
# when the layers are shuffled within each token (column *permuted* of the table below).
#
# How much of the spread over layers is left when one looks at one latent, or at one latent at one
# token? These are the two ratios of the paper's Eqs. 11 and 12, with 95 % bootstrap intervals over
# sequences. {cite:t}`lawson2025` report 54–88 % and 1–10 % for models from 70 M to 3 B parameters.

# %% tags=["hide-input"]
tables.variance_table(numbers).set_index("quantity")

# %% [markdown]
# The first ratio says that more than half of the spread over layers is found *within* single latents. It
# lies at the lower end of the paper's range. The 1 of both null models says nothing against it or for it:
# where layers are permuted, or the input is noise, no latent prefers a layer, so all of the spread lies
# within latents by construction. The null models that count have a residual stream: a language model with random weights, and streams to
# which each block adds what it computed for *another* token. One is a little below the measured number, the other somewhat above
# ({doc}`carried`).
#
# The second does not agree with the paper: more than a quarter of a latent's spread is left at a single
# token, where the paper reports at most a tenth. The model, $R$, $k$ and the length of training all differ
# from the paper's, and so does the estimator: the released code averages ratios over batches and counts
# tokens where a latent is inactive, so its distributions do not sum to one. The estimator alone would be
# enough ({doc}`variance`).
#
# ## What this book is
#
# Every page is a notebook that ran. Nearly all is about language models that this project trained itself, so that
# everything about them is known: their text, their tokenizer, their seed, their loss. One that people use has a chapter of its own
# and stands beside them in some charts.
#
# | chapter | question |
# | --- | --- |
# | {doc}`setup` | What is the residual stream, and what do its vectors look like at each layer? |
# | {doc}`training` | How is one dictionary trained for all layers? |
# | {doc}`evaluation` | How much does the language model lose when it runs on reconstructions? |
# | {doc}`drift` | How much does the residual stream change from layer to layer? |
# | {doc}`distributions` | At which layers are latents active, over much text and at a single prompt? |
# | {doc}`variance` | How much of the spread over layers is within a latent, how much at one token? |
# | {doc}`carried` | Is what is active at several layers carried, rewritten or shared? |
# | {doc}`tuned_lens` | Does the picture change in a basis that follows the drift? |
# | {doc}`single_layer` | Is one dictionary for all layers as good as one for each? |
# | {doc}`explorer` | What does a single latent stand for, and what does it do? Type a prompt and see. |
# | {doc}`smollm2` | Does any of this hold in a model that people use? |
#
# The appendices hold the rest of the paper's figures, its neighbours ({doc}`gemma_scope`), a test on
# features that we planted ourselves ({doc}`planted`), and every definition beside its test
# ({doc}`definitions`). {doc}`figures` maps each figure and table of the paper to its page.
#
# ## How to use it
#
# - **Read** it here: every chart reacts, also without a network and without Python behind it.
# - **Run** it: `make lab` opens a copy of the chapters in JupyterLab, where the controls that need a
#   kernel work as well. Whatever you change there, the book stays as it is.
# - **Change** it: a chapter names an experiment, a few lines of YAML in `experiments/`. Change
#   `k`, `layers` or `model` and run the chapter again; only what is missing is computed.
# - **Train on your own model**: `python -m mlsae_core train SPEC.yml`, where `model` is any Hugging
#   Face causal language model, a folder or a hub id, and `data` any text.
# - **Load a published MLSAE**:
#   `MLSAE.from_pretrained("tim-lawson/mlsae-pythia-70m-deduped-x64-k32")`.

# %% [markdown]
# ## How this page was made

# %% tags=["hide-input"]
made = [session.train(run), distributions]
pd.DataFrame(map(experiments.provenance, made)).set_index("stage")

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
