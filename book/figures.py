# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Map of the figures
#
# **Where is Figure 24?**
#
# Every figure and table of {cite:t}`lawson2025`, and those of the appendix of {cite:t}`lieberum2024` that
# bear on multi-layer SAEs: the page of this book that answers the same question, and in what
# it differs. All of it is on language models that this project trained, with fewer than five million parameters,
# so no number is a copy of theirs. Where the counterpart shows less than the original, the last column begins with *less*. The pages put the printed numbers beside ours where there are any.

# %% tags=["remove-cell"]
import pandas as pd

from mlsae_book.charts import links

table = pd.read_csv("figures.csv")

# %% [markdown]
# ## Multi-layer SAEs

# %% tags=["hide-input"]
links.linked(table.query("paper == 'MLSAE'").drop(columns="paper"), "page")

# %% [markdown]
# ## Gemma Scope

# %% tags=["hide-input"]
links.linked(table.query("paper == 'Gemma Scope'").drop(columns="paper"), "page")

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
