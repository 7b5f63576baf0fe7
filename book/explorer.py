# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Latent explorer
#
# **What does one latent respond to, where in the model does it live, and what does it do there?**
#
# The other chapters average over latents. Here they are looked at one by one: at which layers a latent is
# active, on which text, what changes when it is switched on or off, and whether the latent most like it
# does the same work at another layer.
#
# The distribution over layers is that of Section 4.3 of {cite:t}`lawson2025`: at a token $t$ where latent
# $j$ is active,
#
# $$
# P(L = \ell \mid T = t, J = j) = \frac{h_j(x_{t\ell})}{\sum_{\ell'} h_j(x_{t\ell'})}
# $$ (eq-explorer-layers)
#
# (their Eq. 10), and $P(L \mid J = j)$ is its mean over those tokens.

# %% tags=["remove-cell"]
from IPython.display import HTML

from mlsae_book import charts, experiments, live
from mlsae_book.charts import latents as latent_charts
from mlsae_book.tables import cards, examples, importance, interventions, latents
from mlsae_core import pipeline
from mlsae_core.lens import Lens
from mlsae_core.spec import load_experiment

charts.use_book_theme()
default = experiments.materialise(load_experiment("experiments/default.yml"))
results = experiments.materialise(load_experiment("experiments/explorer.yml"))

# %% tags=["remove-cell"]
_, run = results.runs[0]
session, lens = pipeline.Session(), Lens.identity()
lm, sae = session.lm(run.model), session.sae(run)
arrays, _ = experiments.read_distributions(default.artefacts["distributions"][0][1])
found = examples.load(results.artefacts["examples"][0][1].file("examples.safetensors"))

# %% [markdown]
# ## Type a prompt
#
# The language model and the dictionary of this book are small enough to run in the page itself, in your
# browser, without a server or a network. Type a line of code or of documentation, which is all that this model has ever
# read, or take a latent from the list: below it stands what is known of it.
#
# <div class="latent-explorer"></div>
#
# **What to see.** Run the first example, "Return the number of elements along the given axis.", and look at the latents
# that are active at its last token. None of the sixteen of the first layer is among the sixteen of the last, although
# one dictionary serves both: click some, and watch one group of layers light up after the other. Then steer one of them
# after an early block, at every token, and look where it is still active.
#
# **How to read a card.** Layers: $P(\ell \mid j)$ and the fraction of tokens are over 993,887
# tokens of the test split, as in {doc}`distributions`; histograms, examples and the most frequent tokens are over the
# first 262,144 of them. Examples are the strongest, and some that were drawn from each quarter of the
# range of activations, because the strongest alone flatter: a latent that looks pure at its top is often mixed below.
# *Promotes* and *suppresses* are first-order effects, means over a text; what steering does to *your* prompt is computed
# when you ask for it, and is exact.
#
# **What would contradict it.** Examples of one latent that share nothing, in its highest quarter too.
#
# In JupyterLab the kernel runs the models in the place of the page, so `run` may be any: one that you trained, or
# published weights, of a language model of any size.

# %% tags=["nbval-ignore-output", "remove-output"]
settings = load_experiment("experiments/default.yml").evaluate
prompt = "Return the number of elements along the given axis."
live.explorer(session, run, settings, prompt=prompt)

# %% [markdown]
# ### Token or context?
#
# At each layer, the latents with three examples there, and the fraction of them of which all three are the same token:

# %% tags=["hide-input"]
examples.one_token(found).set_index("layer").round(3)

# %% [markdown]
# A latent that is active wherever one token stands is hardly more than an embedding; one that keeps
# its meaning over several tokens has to be computed by the blocks. The fraction falls from the first layer to the
# last, from 0.77 to 0.61, as it should if blocks do that. It does not fall to zero: even after the last block, most
# latents' three strongest examples are one token.
#
# But the strongest examples flatter. Of every latent, three examples from each part of the range of its activations, drawn
# at random:

# %% tags=["hide-input"]
all_cards = cards.load(results.artefacts["cards"][0][1].file("cards.safetensors"))
cards.one_token(all_cards).set_index("examples").round(3)

# %% [markdown]
# By the strongest, seven in ten latents are one token. In the lowest quarter of the range, which has nearly half of all
# activations, hardly any is. The median latent is active as if equally often on 82 different tokens; its card says on which. Whether
# the weak activations mean something, or only fill the $k$ places that every vector has, cannot be seen from examples.
#
# ## One latent in its text
#
# From here on we study the latent that is concentrated most sharply at the middle layer, among those
# active at a thousand tokens or more. The code chooses it:

# %%
middle = lm.n_layers // 2
latent = latents.sharpest(arrays, middle, least=1000)
middle, latent

# %% [markdown]
# Its strongest examples. The colour says how active the latent is at each token, at the layer where the
# example was found; the token with the largest activation is bold and underlined.

# %% tags=["hide-input"]
HTML(examples.html(examples.token_table(found, lm.tokenizer, [latent], most=8)))

# %% [markdown]
# And its activation at the same eight tokens, at every layer:

# %% tags=["hide-input"]
by_layer = examples.layer_table(found, [latent], most=8)
by_layer.pivot(index="rank", columns="layer", values="activation").round(2)

# %% [markdown]
# ## What it does: steering and ablation
#
# A latent's decoder row $w_j$ is a direction in the space of standardised vectors. To *steer*, add
# $\alpha$ to the latent's activation, which in the residual stream's own units is
#
# $$
# x \leftarrow x + \alpha \, \sigma \, w_j ,
# $$ (eq-steer)
#
# with $\sigma$ the standard deviation of that vector over its dimensions. So $\alpha$ is counted in activations and means the
# same at every layer and token. To *ablate*, take $\alpha = -h_j(x)$, vector by vector: nothing happens where the
# latent is inactive. What the dictionary fails to reconstruct stays in place, so unlike in
# {doc}`evaluation` the effect is that of the latent alone. Both happen after one block, at all tokens that are
# not special, and the rest of the model runs on.

# %% tags=["remove-cell", "nbval-ignore-output"]
blocks = session.blocks(run, "test")  # on a bare clone with progress bars
size = float(found["values"][middle, latent].max())
strengths = (-size, -size / 2, size / 2, size, 2 * size)
arguments = lm, sae, lens, run.site
text = next(blocks.batches(4))
steered = interventions.intervene(*arguments, text, middle, latent, strengths)
cost = interventions.losses(steered).rename(columns={"change": "alpha"})

# %% tags=["hide-input", "nbval-ignore-output"]
latent_charts.steering_cost(
    cost,
    title="Steering changes the predictions the more, the further it goes",
    subtitle="Four test sequences, all tokens steered, by up to twice the latent's largest activation.",
)

# %% [markdown]
# Which tokens become likelier, or less likely, on average over all positions? Choose how far to steer.

# %% tags=["hide-input", "nbval-ignore-output"]
latent_charts.promoted(
    interventions.promoted(steered, lm.tokenizer, most=8),
    title="The tokens that the latent writes for, and against",
    subtitle="Change of the logit, relative to the mean over the vocabulary.",
)

# %% [markdown]
# **What to see.** Tokens many of which could follow the bold ones of the examples above. The list for a positive step should be near the
# reverse of that for a negative one as long as steps are small; for large steps the model leaves the
# region where it is anything like linear, and the lists part.
#
# **What would contradict it.** Promoted tokens that have nothing to do with what follows the
# bold tokens above: then what the latent responds to and what it does are two things.
#
# ### At later layers
#
# The same steps, seen by the same dictionary at the later layers. If the residual stream simply carried
# what was written, the latent would stay active to the end. The control switches to the
# change of the whole vector.

# %% tags=["hide-input", "nbval-ignore-output"]
latent_charts.later_layers(
    interventions.later_layers(steered, sae, lens),
    title="What was written stays in the stream; the latent falls out of the k largest",
    subtitle="Means over all steered tokens, as the dictionary reads them; the first layer is the changed one.",
)

# %% [markdown]
# Which latents change most, at each layer, for the step of once the largest activation:

# %% tags=["hide-input"]
most = interventions.most_changed(steered, sae, lens, most=4)
one = most[most.change == size]
one.pivot(index="layer", columns="rank", values="latent")

# %% [markdown]
# **What to see.** At the changed layer the steered latent comes first. At later layers, others take its place, or do not. The change of the
# whole vector shrinks by a fifth or less relative to it, while the latent's activation falls much faster, after small steps nearly to
# nothing. Earlier versions of this page read that as blocks that do not carry on what was written. We withdraw it: the latent was chosen
# because it is active at one layer, so that it fades at the next is how it was found, and a threshold alone would do the same. Over latents
# drawn at random, most of an activation at the next layer *is* what was carried there ({doc}`carried`).
#
# ### Ablation
#
# On the sequences of its own strongest examples at that layer, where it matters most:

# %% tags=["hide-input"]
own = examples.sequences(found, blocks, middle, latent)
ablated = interventions.intervene(*arguments, own, middle, latent, ["ablate"])
interventions.losses(ablated).round(4)

# %% [markdown]
# *changed* is the fraction of tokens at which the latent was active, and so removed; the losses are means over all
# predictions of those sequences, so a latent active at one token in twenty has its effect diluted as
# much.
#
# ## Duplicates, or drift?
#
# Most latents that are concentrated at one layer could be so for two reasons. The feature may exist at
# that layer only. Or it exists at many, but its direction turns from layer to layer, so that the
# dictionary holds one latent for each stretch of layers: the same feature under several numbers. The
# second leaves traces. The most similar other latent would have a high cosine similarity, live at a neighbouring layer, and at
# tokens where the one is active at layer $\ell$, the other would be active at $\ell + 1$, or at $\ell - 1$.
#
# For every latent with $\max_\ell P(\ell \mid j) \ge 1/2$, by the cosine similarity of its nearest other latent:

# %% tags=["hide-input"]
pairs = experiments.tables(results.artefacts["duplicates"], "duplicates.csv")
summary = latents.drift_summary(pairs)
columns = ["latents", "same_layer", "null_same_layer", "neighbouring", "null_neighbouring"]
summary.set_index("cosine")[columns].round(3)

# %% [markdown]
# *neighbouring*: fraction whose most similar latent peaks one layer before or after; *null model*: what is
# expected if the other latents of the class were dealt anew. And how often the two hand over, beside the same with
# other latents dealt anew:

# %% tags=["hide-input"]
latent_charts.handover(
    latents.handover_table(summary),
    title="Similar latents share tokens, at the same layer as often as at the next: it decides nothing",
    subtitle="Means over latents concentrated at one layer. Choose where the other is looked for.",
)

# %% [markdown]
# **What to see.** Two similar latents meet at the same tokens seven to twenty times as often as by chance, and more often the more
# similar they are. But they do so at the same layer as often as at the next or the one before, and most similar latents peak at
# the *same* layer (0.54 to 0.68; by chance 0.24 to 0.30). We once took that for feature splitting, and against features that turn
# from layer to layer and change their number on the way. We withdraw it: among planted features that do turn the comparison of
# the two layers decides nothing either ({doc}`planted`). In
# absolute terms the hand-overs are few, about 8 % for nine in ten of these latents: they cannot explain why a latent
# stops. No two rows are really alike: the largest cosine similarity is 0.62, the last class is empty, and the one before has 19 latents.
#
# **What would contradict it.** The diagnostic has one side only: a column *neighbouring* well above its null, and hand-overs to the next
# layer that are more frequent than meetings at the same one, would show features that turn; their absence shows nothing. A direction that
# turns by much between two layers would escape us, since its two latents would not be similar; only the text that they share could show it.
#
# The pairs with the highest similarity, all latents. One of them does look like a feature that changes its number:
# 1154, at the first layers, and 31, at the later ones, active at the same tokens; *itself next* says how often a latent is active
# at the next layer itself.

# %% tags=["hide-input"]
columns = ["latent", "partner", "cosine", "mean_layer", "partner_mean_layer"]
columns += ["next", "null_next", "same", "self_next"]
latents.most_alike(pairs).set_index("latent")[columns[1:]]

# %% [markdown]
# ## Do all active latents matter?
#
# $k$ latents are active at every vector; do they all matter? The *uniformity of active latent importance*
# of {cite:t}`lieberum2024` weighs each by its first-order effect,
#
# $$
# y = f(x) \odot W_\text{dec} \nabla_x \mathcal{L}, \qquad p = \frac{|y|}{\sum |y|}, \qquad
# r_{L0} = \frac{e^{S(p)}}{\lVert y \rVert_0}
# $$ (eq-uniformity)
#
# (their Eq. 12–14), with $\mathcal{L}$ the correct next token's logit minus the mean logit, at the vector's own
# position, and $S$ the entropy. It is 1 where all active latents have effects of equal size and $1/k$ where one
# has all of it.

# %% tags=["hide-input"]
uniform = experiments.tables(results.artefacts["importance"], "importance.csv")
latent_charts.uniformity(
    importance.beside_activations(uniform),
    title="Effects on the next token are hardly less even than effects on nothing",
    subtitle="Means and 95 % intervals over 512 sequences, four random positions in each.",
)

# %% [markdown]
# **What to see.** $r_{L0}$ with the gradient of the vector's own next token is between 0.54 and 0.69: of the active latents, so many
# would have to share the effect equally. At every layer that is less even than the activations are. What does that owe to the
# prediction? Two null models multiply the same activations with the gradient of another token, and with a random direction. In the table
# their difference to the vector's own, with 95 % intervals over sequences:

# %% tags=["hide-input"]
means = importance.by_gradient(uniform).round(3)
means.join(importance.beside_null_models(uniform, ["layer"]), suffixes=("", ", difference"))

# %% [markdown]
# **What to see.** The null models rise with the layer in the same way, and are nearly as uneven. A product of activations with *any*
# direction is less even than the activations are, and that is about nine tenths of the distance. The rest is the prediction's: with the
# vector's own gradient the effect is a little less even than with another token's at every layer, by 0.02 or so, and no interval reaches
# zero. Beside a random direction it is by up to twice as much, but at the last layer the interval has zero in it. So what this page once
# concluded stays withdrawn: that the gradient sets latents apart, and that a large activation does not make a latent matter. Of the
# prediction the measure says little.
#
# **What would contradict it.** Own effects far less even than those of both null models.
#
# {cite:t}`lieberum2024` show the same measure in their Figure 16, for single-layer autoencoders of much
# larger models, and give no numbers to set beside ours. Their axis is L0: {doc}`gemma_scope` has ours with $k$ from 4 to 64.
#
# ## Your own run
#
# `python -m mlsae_book report my-run.yml pages` writes the explorer of any run into the folder `pages`, with its evaluation
# above it: of one that was just trained, or of published weights. Where the language model is too large for a page, or of
# another architecture, the page says so and has all but the prompt. Then `live.explorer(session, run, settings)` in JupyterLab
# has the prompt as well.
#
# ## Beside other explorers
#
# What a reader can do here, in the application of {cite:t}`lawson2025`, in Neuronpedia, and with SAEDashboard. The first
# needs a server with the models, the second is one, and the third writes pages for a chosen set of latents.
#
# | | this page | in JupyterLab | paper's application | Neuronpedia | SAEDashboard |
# | --- | --- | --- | --- | --- | --- |
# | type a prompt | yes | yes | yes | yes | no |
# | active latents by layer and token | yes | yes | yes | by layer | in part |
# | tokens coloured by a latent | every layer at once | every layer at once | yes | yes | yes |
# | any latent | all 2,048; of any run by `report` | any run | yes | yes | those chosen |
# | histogram of activations by layer | yes | yes | of the prompt | one layer | one layer |
# | distribution over layers | yes | yes | of the prompt | no | no |
# | examples from every part of the range | yes | yes | no | yes | yes |
# | promoted and suppressed tokens | by layer | by layer | by steering | yes | yes |
# | nearest latents | yes | yes | no | yes | yes |
# | reconstruct a layer | yes | yes | yes | no | no |
# | steer, ablate: predictions before and after | yes | yes | steer | steer | no |
# | search by a token of the examples, sort | yes | yes | no | yes | no |
# | a link to what is shown | everything | no | the prompt | yes | no |
# | explanations in words | no | no | no | yes | no |
# | larger models | no | yes | yes | yes | yes |
# | without server and network | yes | a kernel | no | no | yes |
#
# ## How this page was made
#
# The model in the page is plain JavaScript with 24 bits of every weight. Half precision would not do: it changes
# probabilities by up to 0.0013, and an activation by up to half a per cent. A WebAssembly runtime would have to fetch its
# binary, which a page that is opened from a file may not. Tests hold tokens, activations, latents and predictions to
# those of the module, in a browser.
#
# The dictionary and the distributions are those of {doc}`training` and `experiments/default.yml`. Cards, examples, pairs and
# importance come from one pass each over part of the test split (`experiments/explorer.yml`): three examples
# per latent and layer with sixteen tokens of context. Special tokens are context, never
# examples. Nearest tokens and the effects of steering are computed while the page is built.

# %% tags=["hide-input"]
results.provenance.set_index("stage")

# %% [markdown]
# ```{bibliography}
# :filter: docname in docnames
# ```
