"""The explorer's page in JupyterLab, where the kernel runs the models: of any run, however large.

The page is that of `offline`, in a frame of the notebook. What it would take from files or compute
itself it asks the kernel, through the texts of two hidden widgets (``page/kernel.js``), so nothing
more than the widgets has to work, on another machine either.
"""

from __future__ import annotations

import json
import secrets
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import ipywidgets
import torch
from torch import Tensor

from mlsae_book import offline
from mlsae_book.tables import interventions
from mlsae_core.lens import Lens
from mlsae_core.metrics import kl_divergence
from mlsae_core.pipeline import Session
from mlsae_core.spec import EvaluateSpec, SubjectSpec
from mlsae_core.text import token_ids

if TYPE_CHECKING:
    from mlsae_core.lm import LanguageModel
    from mlsae_core.sae import MLSAE


class Engine:
    """Runs prompts: all that the page asks of a model, as ``page/engine.js`` answers it.

    Layers are counted among those of the dictionary. Codes are, of one layer, ``indices`` and
    ``values`` of all tokens, as many of each, the largest first, 0 where fewer are active.
    """

    def __init__(self, lm: LanguageModel, sae: MLSAE, layers: list[int], context: int) -> None:
        self.lm, self.sae, self.layers, self.context = lm, sae, layers, context

    @torch.no_grad()
    def run(self, text: str) -> dict:
        """Token ``ids``, the ``codes`` of every layer, and how many tokens were ``left`` out."""
        found = token_ids(self.lm.tokenizer, [text])[0]
        ids = found[: self.context]
        if not ids:
            return {"ids": [], "codes": [], "left": 0}
        tokens = torch.tensor([ids], device=self.lm.device)
        self.original = self.lm.original(tokens)
        residual = self.original.residual
        self.before, self.after = self.lm.logits(residual[-1])[0].float(), None
        codes = self._codes(residual[self.layers, 0])
        return {"ids": ids, "codes": codes, "left": len(found) - len(ids)}

    @torch.no_grad()
    def change(self, given: dict) -> dict:
        """Change the vectors after one block and run the rest; ``codes`` from that layer on.

        given: ``kind`` (steer, ablate, reconstruct), ``layer``, ``latent``, ``amount`` and
        ``token``, None for all of them.
        """
        block = self.layers[given["layer"]]
        x = self.original.residual[block]
        if given["kind"] == "reconstruct":
            rows = self.sae(x.float()).recon
        else:
            by = "ablate" if given["kind"] == "ablate" else given["amount"]
            rows = x + interventions.shift(
                self.sae, Lens.identity(), x[0].float(), block, given["latent"], [by]
            )
        if given["token"] is not None:
            here = torch.arange(x.shape[1], device=x.device) == given["token"]
            rows = torch.where(here[:, None], rows, x)
        streams = interventions.resume(self.lm, self.original, block, rows.to(x.dtype))
        self.after = self.lm.logits(streams[-1])[0].float()
        later = [streams[one - block][0] for one in self.layers[given["layer"] :]]
        return {"codes": self._codes(torch.stack(later))}

    def likeliest(self, given: dict) -> dict:
        """Of the tokens after ``token``, the ``most`` likely without the change, and with it:
        ``ids``, and their probabilities ``before`` and ``after``."""
        both = (self.before, self.after)
        rows = [None if x is None else x[given["token"]].softmax(-1).cpu() for x in both]
        ids = sorted({i for p in rows if p is not None for i in p.topk(given["most"])[1].tolist()})
        before, after = (None if p is None else p[ids].tolist() for p in rows)
        return {"ids": ids, "before": before, "after": after}

    def divergence(self, _: None) -> float:
        """The mean over tokens of KL(before ‖ after) of the predictions, in nats."""
        return kl_divergence(self.before, self.after).double().mean().item()

    def _codes(self, x: Tensor) -> list[dict]:
        """Codes of vectors (layer, token, d_model), as JSON can have them."""
        values, indices = self.sae.encode(x.float())
        most = max(1, int((values > 0).sum(-1).max()))
        order = values.argsort(dim=-1, descending=True, stable=True)[..., :most]
        parts = {"indices": indices.gather(-1, order), "values": values.gather(-1, order)}
        rows = {name: part.flatten(1).tolist() for name, part in parts.items()}
        return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


class Answers:
    """What the page asks: prompts of the model, and the files that it would find beside it."""

    def __init__(self, session: Session, run: SubjectSpec, settings: EvaluateSpec) -> None:
        self.shown = offline.read(session, run, settings)
        lm = session.lm(run.model)
        layers = run.site.indices(lm.n_layers)
        self.engine = Engine(lm, session.sae(run), layers, self.shown.context)
        self.index = offline.index(self.shown) | {"no_model": None}
        self.postings = offline.postings(self.shown)

    def answer(self, method: str, given: Any) -> Any:
        """What a question has as its answer; KeyError for another."""
        known = {name: getattr(self.engine, name) for name in ("run", "change", "likeliest")}
        known |= {"divergence": self.engine.divergence, "asset": self.asset}
        return known[method](given)

    def asset(self, name: str) -> Any:
        """What a file of the page holds."""
        kind, _, number = name.partition("-")
        if kind == "latents":
            return offline.cards(self.shown, int(number))
        if kind == "tokens":
            begun = [*self.index["token_shards"], len(self.postings)]
            return self.postings[begun[int(number)] : begun[int(number) + 1]]
        return self.index


def explorer(
    session: Session, run: SubjectSpec, settings: EvaluateSpec, **start: str | int
) -> ipywidgets.VBox:
    """The explorer of a run, which the kernel answers.

    Args:
        settings: what the cards are read from; cards that are not there are computed.
        start: what is chosen first, as in the page's address: ``latent=962``, ``prompt="a b"``.

    Raises:
        SpecError: a run whose latents have no cards.
    """
    answers = Answers(session, run, settings)
    name = f"explorer-{secrets.token_hex(4)}"
    hidden = {"layout": {"display": "none"}}
    asked, answered = ipywidgets.Textarea(**hidden), ipywidgets.Textarea(**hidden)
    asked.add_class(f"{name}-asked")
    answered.add_class(f"{name}-answered")

    def answer(change) -> None:
        *mark, question = change["new"].split(" ", 2)
        try:
            found = {"result": answers.answer(*json.loads(question))}
        except Exception as error:  # whatever it is, the page waits for an answer
            found = {"error": f"{type(error).__name__}: {error}"}
        answered.value = f"{' '.join(mark)} {json.dumps(found)}"

    asked.observe(answer, "value")
    frame = ipywidgets.HTML(
        f'<iframe title="Explorer" srcdoc="{escape(document(name, urlencode(start)))}"'
        ' style="width: 100%; height: 60rem; border: 0"></iframe>'
    )
    return ipywidgets.VBox([frame, asked, answered])


def document(name: str, start: str = "") -> str:
    """HTML of the page, whose widgets have classes that begin with a name."""

    def sources(names: tuple[str, ...], ending: str) -> str:
        files = (offline.PAGE / f"{one}.{ending}" for one in names)
        return "\n".join(file.read_text(encoding="utf-8") for file in files)

    scripts = sources(("kernel", *offline.PANELS), "js")
    return f"""<!doctype html>
<html lang="en" data-asked="{name}-asked" data-answered="{name}-answered" data-start="{escape(start)}">
<meta charset="utf-8">
<base href="about:srcdoc">
<title>Explorer</title>
<style>{sources(offline.STYLES[::-1], "css")}</style>
<main>
{offline.markup()}</main>
<script>{scripts}</script>
</html>
"""
