"""Terms that are explained where a page first uses them: by hovering, by keyboard, or by a tap.

One table; the build marks the first use of each term in a page's text, outside headings, code,
links and equations.
"""

from __future__ import annotations

import re
from html import escape

from docutils import nodes

#: Pattern of a term in running text → what it means. Of patterns that begin at the same place the
#: first one counts.
TERMS = {
    r"residual[- ]stream": "One vector per token, which every layer of a transformer reads and adds "
    "to; here as it is after each layer.",
    r"hook points?": "A place in a language model where vectors are read or replaced, such as the "
    "residual stream after layer 3 or the output of an MLP.",
    r"multi-layer SAEs?|MLSAEs?": "A sparse autoencoder that is trained on the vectors of all layers "
    "at once: one dictionary for all of them.",
    r"sparse autoencoders?|SAEs?": "A small network that writes a vector as a sum of few directions "
    "out of many, and is trained to lose little by it.",
    r"dead latents?": "A latent that was not active at any token of a long stretch of training.",
    r"latents?": "One of the directions of a dictionary, with the activation that says how much of "
    "it a vector holds.",
    r"decoder (?:row|direction|vector)s?": "The direction in the residual stream that one latent "
    "adds, times its activation.",
    r"dictionar(?:y|ies)": "All latents of one autoencoder together.",
    r"TopK": "Of all latents, the k with the largest activation are kept, and the others set to 0.",
    r"AuxK": "An additional loss which lets dead latents predict the error of the others, so that "
    "they come back to life.",
    r"expansion factors?": "Latents per dimension of the residual stream, R.",
    r"FVU": "Fraction of variance unexplained: squared error of a reconstruction over the variance "
    "of what it reconstructs. 0 is perfect, 1 as bad as the mean.",
    r"delta CE": "By how many nats per token the language model predicts worse when it runs on "
    "reconstructions.",
    r"KL(?: divergence)?": "Kullback–Leibler divergence, in nats: how far the predictions on "
    "reconstructions are from the original ones. 0 if they are the same.",
    r"nats?": "Unit of information with the natural logarithm; 1 nat is 1.44 bits.",
    r"tuned lens(?:es)?": "A linear map per layer, trained so that the last layer's readout makes "
    "sense of earlier layers as well.",
    r"MMCS": "Mean maximum cosine similarity: of each direction to the most similar other one, "
    "averaged.",
    r"null models?": "Data in which, by construction, the effect in question is absent; what it "
    "still shows there is no evidence.",
    r"bootstrap intervals?": "Range that holds 95 % of the values computed from sequences drawn "
    "again with replacement.",
    r"cross-entropy": "Mean surprise at the next token, in nats; lower is better.",
    r"steering": "Adding a latent's direction to the residual stream, to see what it does.",
    r"ablations?": "Taking a latent out of the residual stream, to see what is missing.",
    r"logits?": "A language model's scores of the next token, before they become probabilities.",
}  # fmt: skip
TERM = re.compile(rf"\b(?:{'|'.join(f'({pattern})' for pattern in TERMS)})\b", re.IGNORECASE)
#: Pages that are not read from beginning to end.
LEFT_OUT = ("api", "bibliography", "genindex")
#: Text in these is no running text.
OUTSIDE = (
    nodes.title, nodes.literal, nodes.literal_block, nodes.reference, nodes.math, nodes.table,
    nodes.footnote, nodes.citation, nodes.raw,
)  # fmt: skip


class explained(nodes.inline):
    """A term in running text; ``meaning`` says what it means, ``number`` counts them in a page."""


def explain(app, doctree: nodes.document, page: str):
    """Mark the first use of every term in a page."""
    if app.builder.format != "html" or page.startswith(LEFT_OUT):
        return
    seen: set[int] = set()
    for paragraph in list(doctree.findall(nodes.paragraph)):
        for text in list(paragraph.findall(nodes.Text)):
            if not _within(text, OUTSIDE):
                text.parent.replace(text, _marked(text.astext(), seen))


def _within(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    while node is not None and not isinstance(node, kinds):
        node = node.parent
    return node is not None


def _marked(text: str, seen: set[int]) -> list[nodes.Node]:
    parts, end = [], 0
    for found in TERM.finditer(text):
        if found.lastindex not in seen:
            seen.add(found.lastindex)
            meaning = list(TERMS.values())[found.lastindex - 1]
            parts += [nodes.Text(text[end : found.start()]),
                      explained(found[0], found[0], meaning=meaning, number=len(seen))]  # fmt: skip
            end = found.end()
    return [*parts, nodes.Text(text[end:])]


def _visit(translator, node: explained):
    name = f"term-{node['number']}"
    translator.body.append(f'<span class="term" tabindex="0" aria-describedby="{name}">')
    translator.context.append(
        f'<span role="tooltip" id="{name}">{escape(node["meaning"])}</span></span>'
    )


def _depart(translator, node: explained):
    translator.body.append(translator.context.pop())


def setup(app) -> dict:
    """Called by Sphinx, which finds this module in ``sphinx.extra_extensions`` of _config.yml."""
    app.add_node(explained, html=(_visit, _depart))
    app.connect("doctree-resolved", explain)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
