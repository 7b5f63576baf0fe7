# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Setup
#
# **What is the residual stream, and what do its vectors look like at each layer?**
#
# A transformer with $n_L$ layers turns a token into a vector $x_0 \in \mathbb{R}^d$ and then lets every
# block add to it. The *residual stream* after block $\ell = 0, \dots, n_L - 1$ is
#
# $$
# x_{\ell} = x_{\ell - 1} + \operatorname{attention}_\ell + \operatorname{mlp}_\ell ,
# $$ (eq-residual)
#
# and only after the last block do the final norm and the unembedding turn it into logits. The
# vectors $x_{t,\ell}$ for tokens $t$ and layers $\ell$ are all that an MLSAE ever sees. They are read by
# hooks on the blocks, *before* the final norm: the `output_hidden_states` of most implementations
# hold the last vector after it.

# %% tags=["remove-cell", "nbval-ignore-output"]
from pathlib import Path

from mlsae_book import charts, experiments, stages, tables, widgets
from mlsae_core import pipeline
from mlsae_core.spec import EvaluateSpec, load_experiment

charts.use_book_theme()
experiment = load_experiment("experiments/default.yml")
_, run = experiment.runs[0]
session = pipeline.Session()
blocks = session.blocks(run, "test")  # on a bare clone with progress bars

# %% [markdown]
# ## The language models
#
# The models are small enough to study on a laptop, and they are not toys: GPT-NeoX, the architecture of
# the Pythia suite, in three sizes, and GPT-2, Llama and Gemma 2 in the middle one. Each learned to write docstrings from
# the text below; one, `-qa`, was then fine-tuned to answer questions about them. The book studies
# `neox-6l-128d` unless it says otherwise. The script that trained them is part of the project:
# `python -m mlsae_book pretrain NAME`.

# %% tags=["hide-input"]
experiments.suite().set_index("model").T

# %% tags=["hide-input"]
charts.loss_curve(
    experiments.model_logs(),
    title="Validation follows the training loss down",
    subtitle="Cross-entropy per predicted token; the learning rate falls linearly to zero. Choose a model.",
)

# %% [markdown]
# **What to see.** A model that knows nothing has a loss of $\ln 4096 \approx 8.3$ nats, and one that knows
# the frequencies of tokens 6.7. The table says how far a model gets that knows only the previous token
# (*bigram*). One epoch, or a quarter of one for `-qa`, ends far below that, the lower the larger the GPT-NeoX, and GPT-2 above the others
# of its size. The
# curves' validation points read 256 sequences, the table's loss all of the validation split; the
# distance between the two says how much a sample of this size varies. (The fine-tuned model's numbers
# are for its own text of questions and answers.)
#
# **What would contradict it.** A validation loss that rises while the training loss falls: the
# model would be learning its text by heart, and not even what the splits have in common. A curve that falls does not exclude that it
# has learnt much by heart, since much of the validation text stands in the training text, too.
#
# ## The text
#
# The embedded corpus is the docstrings of the packages that the book itself needs, read from their
# sources without importing them. So every reader already has it, and it can be rebuilt
# from the pinned releases in `data/docstrings.yml`. A document belongs to the train, validation or
# test split by its own hash: the splits share no document. They do share text, since functions of a package are documented in the same words
# (next section). Documents are joined by an end-of-text
# token, 1024 at a time, and cut into sequences of 256 tokens, as in Appendix A of the paper.

# %% tags=["hide-input"]
experiments.corpus(session, run).set_index("split")

# %% [markdown]
# And of the test split, the share of the tokens that lie in a span which stands word for word in the training split, by the length of
# the span in tokens:

# %% tags=["hide-input"]
overlapping = stages.overlap(session, run, EvaluateSpec(tokens=65_536))
experiments.tables([({}, overlapping)], "shares.csv").set_index("span").round(3)

# %% [markdown]
# **What to see.** More than a quarter of the tokens stand in spans of 32 that the model was trained on. {doc}`evaluation` shows what is measured
# on these and on the rest.
#
# **What would contradict it.** Shares near zero: then the splits would be as different as two texts can be.
#
# Vectors at end-of-text tokens are *excluded*: from training, and from every mean and count over
# activations. (The code released with the paper sets them to zero, so that they still count.)
#
# ## The vectors
#
# The norm of the residual stream, layer by layer, at every token of a prompt. Choose a prompt.

# %% tags=["hide-input", "nbval-ignore-output"]
prompts = [
    "When John and Mary went to the store, John gave",
    "Return the mean of the array elements along the given axis.",
    "The residual stream after every layer, as a tensor of shape (layer, token).",
]
lm = session.lm(run.model)
charts.prompt_norms(
    tables.prompt_norms(lm, prompts),
    title="Every vector is longer after the last layer than after the first",
    subtitle="Each cell is the L2 norm of the vector after one block at one token.",
)

# %% [markdown]
# **What to see.** From the first to the last layer the mean norm grows by a factor of about 1.7, though
# not at every token in every block. Commas, full stops and words such as *of* and *to* start with the shortest vectors and grow most. This growth is why the autoencoder standardises every vector before
# it reads it ({doc}`training`), and why errors are divided by a variance before they are compared
# between layers ({doc}`evaluation`).
#
# **What would contradict it.** A token whose vector is shorter after the last layer than after the
# first. A dip on the way, as at some tokens here, does not.
#
# In JupyterLab, type a prompt of your own:

# %% tags=["nbval-ignore-output", "remove-output"]
widgets.prompt_norms(lm, "Compute the singular value decomposition of a matrix.")

# %% [markdown]
# ## How this page was made
#
# The experiment that all pages use unless they say otherwise:

# %% tags=["hide-input"]
print(Path("experiments/default.yml").read_text())
