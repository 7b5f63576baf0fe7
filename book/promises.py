# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What this promises and how it is tested
#
# **What may you rely on when you run this on your own model, and who has tried to break it?**
#
# Somebody who trains for days, or loads what strangers publish, wants to know beforehand what happens when a
# process is killed, a disk is full or a file is damaged. Each promise below has a test that fails without it.

# %% tags=["remove-cell"]
import pandas as pd

from mlsae_book.charts import links
from mlsae_book.tables import promises

# %% tags=["hide-input"]
links.coded(pd.read_csv("promises.csv"), "test")

# %% [markdown]
# ## Kills
#
# `make kills` stops every command at random moments, up to three times in a run, by SIGKILL or by a signal that it
# answers, lets it end, and compares every file that it wrote, bit by bit but for dates and seconds, with those of a
# run that nobody stopped. A user's files stand beside its inputs and outputs, and must be there at the end. The hub and
# the package index are folders of the test's own.

# %% tags=["hide-input"]
promises.kills("../tests/kills.json")

# %% [markdown]
# ## Damaged and hostile inputs
#
# `make fuzz` gives every command seeded inputs: good ones of which a part is cut, flipped, swapped, doubled, missing or
# hostile. An input is right where its command works, or ends within ten seconds and two gigabytes with
# one line that this project wrote.

# %% tags=["hide-input"]
promises.inputs("../tests/fuzz.json")

# %% [markdown]
# **What would contradict it.** A fault in the last column; each is an input that anybody can repeat, by its kind and
# number.
#
# ## Mutants
#
# Do the tests notice when the code is wrong? `make mutants` breaks seeded places of the core, one at a time, and
# `tests/MUTANTS.md` lists what survived and why.
#
# ## What it does not promise
#
# What a model or a text *says* is not looked at. A hub id without a revision is whatever stands there today. Single
# prompts, planted worlds and what is fetched, of seconds each, start anew after a stop. Known advisories on the
# dependencies were not looked up (`SECURITY.md`, which also says how to report a fault). On a GPU less has been tried than
# on processors: {doc}`benchmarks` says what.
