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
# A sparse autoencoder writes an activation vector of a language model as a sum of a few directions
# out of many. {cite:t}`lawson2025` train *one* such dictionary on the residual stream of *every*
# layer, so that a latent means the same thing wherever it is active, and one can ask at which
# layers that is.
#
# With $h_j(x_{t,\ell})$ the activation of latent $j$ at token $t$ and layer $\ell$, the
# distribution of the latent over the layers is
#
# $$
# P(L = \ell \mid T = t, J = j) = \frac{h_j(x_{t,\ell})}{\sum_{\ell'} h_j(x_{t,\ell'})} .
# $$ (eq-layer-distribution)

# %% tags=["remove-cell"]
import numpy as np
import pandas as pd

from mlsae_core import charts

charts.use_book_theme()

# %% [markdown]
# A latent may live at one layer or at all of them. The picture draws both ends of that range and
# what lies between, *constructed*, not measured: bell-shaped distributions over six layers, from
# narrow ones at the left to wide ones at the right.

# %%
width, layer = np.meshgrid(np.linspace(0.2, 4.0, 120), np.arange(6), indexing="ij")
weight = np.exp(-0.5 * ((layer - 2.5) / width) ** 2)
shape = pd.DataFrame({"latent": np.repeat(np.arange(120), 6), "layer": layer.ravel()})
shape["probability"] = (weight / weight.sum(axis=1, keepdims=True)).ravel()
shape["order"] = shape["latent"]

# %%
charts.heatmap(
    shape,
    title="From latents of two layers to latents of all",
    subtitle="A column is a latent, sorted by the width of its distribution over layers.",
)

# %% [markdown]
# {eq}`eq-layer-distribution` sums to one over the layers of each latent.
#
# ```{bibliography}
# :filter: docname in docnames
# ```
