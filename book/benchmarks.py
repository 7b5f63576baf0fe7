# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How fast is it?
#
# **What does a training step cost beside other packages, and how far is it from the machine's limit?**
#
# {cite:t}`lawson2025` trained most of their MLSAEs, on a billion tokens each, in **12 to 24 hours on one
# NVIDIA RTX 3090**. On one NVIDIA H100, a faster card by far, the loop of this project would take **19 minutes** for as many tokens
# at their default shape, and longer where latents are dead: that is the rate of 240 steps ([below](on-a-gpu)), not a whole run. All
# numbers outside that section are of a *processor*: they come from `python -m benchmarks` on the machine below, in which all
# implementations of a suite took turns.

# %% tags=["remove-cell"]
import json
from pathlib import Path

import pandas as pd

from mlsae_book import charts
from mlsae_book.charts import benchmarks as draw
from mlsae_book.tables import benchmarks as tables

charts.use_book_theme()
found = json.loads(Path("../benchmarks/results.json").read_text(encoding="utf-8"))
gpu = tables.gpu("../benchmarks/gpu.json")

# %% tags=["remove-cell"]
results = pd.DataFrame(found["results"]).set_index("suite", drop=False)
cases = pd.DataFrame(found["cases"]).set_index("suite")
columns = ["case", "implementation", "per_second", "times_ours", "share_of_limit"]
columns += ["peak_megabytes", "note"]
digits = {"per_second": 0, "times_ours": 2, "share_of_limit": 2, "peak_megabytes": 0}

# %% tags=["hide-input"]
pd.Series({"quick run, of no weight": found["quick"], **found["machine"]}, name="").to_frame()

# %% [markdown]
# Some suites were run again later, at another commit:

# %% tags=["hide-input"]
later = cases["machine"].dropna().apply(pd.Series)[["commit", "threads", "date"]]
later.drop_duplicates()

# %% [markdown]
# If the first row says *True*, the run had tiny shapes, made only to see that everything works: its rates
# mean nothing.
#
# ## The training step
#
# One step is forward, backward, optimiser and the bookkeeping of dead latents, on a batch of random
# activations. All have the same vectors, latents, $k$ and Adam; where a quarter of the latents is dead,
# AuxK is on. The *dense oracle* is this project's definition, *as described* the paper's text written out
# plainly. The *limit* is one float32 product of all vectors with the encoder, which every method needs
# that works in float32 throughout. *bf16 candidates* does not: it looks for candidates in bfloat16, proves by a bound
# on the rounding that none is missing, and scores them again in float32, so it may pass the limit.

# %% tags=["hide-input"]
draw.rates(
    results.loc[["training step"]],
    name="training",
    axis="Activation vectors per second",
    title="The next fastest package takes four times as long, or more",
    subtitle="Medians; lines from the slowest round to the fastest. Choose the shape.",
)

# %% tags=["hide-input"]
steps = results.loc[["training step"], columns].set_index(["case", "implementation"])
steps.round(digits)

# %% [markdown]
# **What to see.** *Times as long* says how another implementation's time compares. What is left between
# the first row and the limit is selection, gradients and the optimiser: little at *pythia*, where a step reaches 0.87 of the
# limit, more at *mini*, whose product is small, and more where a quarter of the latents is dead and a second
# selection joins the first. Candidates found in bfloat16, then scored again exactly, pass the
# limit of float32 at *pythia* where none is dead (the limit itself was measured 14 % higher for the other case), and at *mini*
# they are slower. Other packages take 4.3 times as long, or more. Only k of the latents take part in
# anything but the one product, so a dense method repeats that product about five times over. Peak memory, in
# 10⁶ bytes, is that of a process that does nothing else, and contains Python and PyTorch.
#
# **What would contradict it.** A row of another package that is faster than ours, or a share of the limit
# that is smaller for the larger shape.
#
# At this rate a billion tokens would take, in hours, without the language model:

# %% tags=["hide-input"]
ours = results.loc[["training step"]].query("implementation == 'mlsae_core'")
ours[["case", "per_second", "hours_for_1e9_tokens"]].set_index("case").round(0)

# %% [markdown]
# That is longer than the paper's hours where the shape is the paper's (*pythia*): a
# processor of few cores is no graphics card. At the small shape of this book (*mini*) it is less than a day.
#
# ## The loop, evaluation, and distributions over layers
#
# Here the comparison is with the plain version alone: whole passes with logits, one hooked pass for each
# layer, dense (layer, token, latent) activations. Both must give the same numbers, or the run fails.

# %% tags=["hide-input"]
cases.query("agreement != ''")["agreement"].drop_duplicates().to_frame()

# %% tags=["hide-input"]
others = results.loc[["training loop", "evaluation", "distributions"]]
draw.rates(
    others.assign(case=others["suite"] + ", " + others["case"]),
    name="loop",
    axis="Tokens per second",
    title="A plain version takes 2.7 to 10 times as long for the same numbers",
    subtitle="Medians; lines from the slowest round to the fastest. Choose the work.",
)

# %% tags=["hide-input"]
others[columns].drop(columns=["share_of_limit", "note"]).round(digits)

# %% [markdown]
# Where the time of the training loop goes:

# %% tags=["hide-input"]
pd.DataFrame([cases.loc["training loop", "shares"]], index=["share of the time"]).round(2)

# %% [markdown]
# **What to see.** The plain version takes 2.7 to 10 times as long: least where most of the time is the language
# model's, which both need, and most where the dense activations of all layers are only to be summed. It also needs more
# memory. Of the training loop, six tenths are the autoencoder's step and most of the rest the language model's pass.
#
# **What would contradict it.** A plain version that is as fast.
#
# ### At the shape of a model that people use
#
# Thirty layers and a vocabulary of 49,152, as SmolLM2-135M has them ({doc}`smollm2`), with random weights. Every layer alone is replaced,
# so blocks run many times over, and each time with logits for the whole vocabulary. *minutes* are those of 32,768 tokens.

# %% tags=["hide-input"]
many = results.loc[["evaluation, 30 layers"], columns].set_index("implementation")
many = many[["per_second", "times_ours", "peak_megabytes"]]
many.assign(minutes=32_768 / many["per_second"] / 60).round(1)

# %% [markdown]
# **What to see.** 21 minutes and 3 GB. The plain version takes nearly twice as long, in less memory. (On 256 tokens the two had differed
# by a little more than they may, since a tie that falls otherwise changes what one token loses; here they agree.) An evaluation may
# also replace layers in fewer tokens than it reads (`replaced`), and says what interval that leaves.
#
# **What would contradict it.** A plain version that is as fast.
#
# ## Memory and the number of tokens
#
# The whole analysis of {doc}`distributions`, null models and intervals included, on more and more tokens:

# %% tags=["hide-input"]
memory = results.set_index("case", append=True)[["peak_megabytes"]]
memory.loc["memory of distributions"].round(0)

# %% [markdown]
# **What to see.** Nearly the same peak with twenty times the tokens: sums per latent are kept, not tokens.
#
# **What would contradict it.** A peak that grows with the tokens.
#
# ## Memory at larger shapes
#
# Two training steps with AuxK at the widths of larger models, each in a process of its own. Weights, their gradients and
# Adam's two moments take 32 bytes per latent and dimension. No activations of the language model are
# kept for a backward pass, so there is nothing to checkpoint.

# %% tags=["hide-input"]
memory.loc["memory"].round(0)

# %% [markdown]
# **What to see.** Either peak is 0.5 GB above what the weights and the optimiser need: scores are held for one chunk of
# vectors at a time, however many there are.
#
# **What would contradict it.** A peak far above those of the weights and the optimiser.
#
# (on-a-gpu)=
# ## On a GPU
#
# `python -m benchmarks.gpu` first asks whether the card computes the right numbers: largest relative errors of results
# and gradients against the definition in float64, on the CPU.

# %% tags=["hide-input"]
tables.shown(gpu.dropna(subset="name"), "env")

# %% tags=["hide-input"]
tables.shown(gpu.dropna(subset="tera_per_second"), "env")

# %% tags=["hide-input"]
tables.shown(gpu, "right")

# %% [markdown]
# Then whole training runs at the paper's default shape: Pythia-70m (here with random weights, on random tokens, both of
# which cost the same), R = 64, $k$ = 32, 131,072 tokens a step, bfloat16 under autocast.

# %% tags=["hide-input"]
draw.rates(
    tables.loops(gpu),
    name="gpu",
    axis="Tokens per second",
    title="With kernels of its own a GPU trains twice as fast",
    subtitle="With the language model; 16 steps on one H100. Choose how many latents are dead.",
)

# %% tags=["hide-input"]
tables.shown(gpu, "paper")

# %% tags=["hide-input"]
tables.shown(gpu, "peer")

# %% tags=["hide-input"]
tables.shown(gpu, "real")

# %% [markdown]
# **What to see.** With kernels of its own (`--kernel triton`) and the language model compiled (`--compile`) the loop does
# nine tenths of a million tokens a second while no latent is dead (240 steps), where plain PyTorch does less than half of that (16).
# With an eighth of the latents dead, and AuxK, it is slower by a quarter (the chart). A whole step takes sparsify at least 4.2 times as long on the
# same card. And the book's default run ends where the CPU's does ({doc}`evaluation`), at an FVU of 0.127, in every precision.
#
# Does the card ever wait for the host? In a trace of the loop, the time in which it computes anything, and of that the shares; the
# trace itself slows the host, so the first is a lower bound. Beneath, the same loop while checkpoints are written one after the other,
# which happens beside it.

# %% tags=["hide-input"]
tables.shown(gpu, "busy")

# %% tags=["hide-input"]
tables.shown(gpu, "checkpoints")

# %% [markdown]
# **What to see.** The card is busy for more than nine tenths of the time, so running the language model on a stream of its own could
# fill no more than the rest; what kernels gain that share the card was not measured. Checkpoints cost nothing that could be seen.
#
# The default run's dictionary was measured on the card and on a processor. Of each quantity the sum of all differences over the sum
# of the values; the largest:

# %% tags=["hide-input"]
tables.shown(gpu, "measures")

# %% [markdown]
# Where a micro-batch spends its time, beside the *roofline*: the least time in which the card can move
# the bytes and multiply the matrices that are needed.

# %% tags=["hide-input"]
tables.shown(gpu, "parts")

# %% tags=["hide-input"]
tables.shown(gpu, "step")

# %% [markdown]
# **What to see.** The product of all vectors with the encoder is at eight tenths of the roofline, and takes a third of
# the time. What a decode or a backward pass gathers partly stays in the cache, so it can be faster than memory alone.
# Farthest from it is the choice among dead latents; most time beyond it takes the selection, which makes 4.58 ms of the scores' 2.64.
#
# **What would contradict it.** A verdict that is neither *ok* nor *the same bits*, an FVU beyond 0.127 ± 0.002, or a part far from its roofline
# that takes much of the time.
#
# ## How this page was made
#
# The page reads `benchmarks/results.json` and `benchmarks/gpu.json`, which `python -m benchmarks` and
# `python -m benchmarks.gpu` write; nothing is timed when the book is built. Of a card, rows that name another one or a commit of their own
# were measured apart and put beside the others by hand, as were the kinds of kernels in the trace. On a machine with other packages installed the same command compares with them; one that is
# missing or fails is named in the column `note`.
#
# ```{bibliography}
# :filter: docname in docnames
# ```
