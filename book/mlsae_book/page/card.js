// The card of one latent: all that is known of it.
class Card {
  // place: the element; index: numbers of all latents; choose(state) is told what was clicked.
  constructor(place, index, vocabulary, choose) {
    Object.assign(this, { place, index, vocabulary, choose });
    this.shown = null;
  }

  async show(latent) {
    if (latent === this.shown) return this.drawn;
    this.shown = latent;
    this.drawn = latent === null ? null : this.draw(latent);
    return this.drawn;
  }

  async draw(latent) {
    const shard = Math.floor(latent / this.index.shard);
    let card;
    try {
      card = (await assets.json(`latents-${String(shard).padStart(2, "0")}`))[
        latent % this.index.shard
      ];
    } catch (error) {
      if (latent !== this.shown) return;
      this.shown = null;
      this.place.replaceChildren(
        this.heading(latent),
        element("p", { className: "fault" }, `Its card cannot be shown. ${error.message}`),
      );
      return;
    }
    if (latent !== this.shown) return;
    this.place.replaceChildren(
      this.heading(latent),
      this.summary(latent, card),
      this.layers(card),
      this.effects(card),
      this.similar(card),
      ...this.examples(card),
    );
  }

  heading(latent) {
    return element("h3", { id: "le-card" }, `Latent ${latent}`);
  }

  summary(latent, card) {
    const { latents } = this.index;
    const known = card.top.length > 0;
    const parts = [
      `Active at ${percent(latents.density[latent])} of tokens, largest activation `,
      `${number(card.largest)}, mean layer ${number(latents.mean_layer[latent])}. `,
    ];
    if (!known) return element("p", {}, ...parts, "Not active in the text of the examples.");
    const kind =
      card.spread < 5
        ? "Close to one token: "
        : card.spread < 40
          ? "Some tokens, most often "
          : "Many tokens, most often ";
    const list = card.top.flatMap(([id, part]) => [this.vocabulary.chip(id), ` ${percent(part)} `]);
    const as = `(as if equally often on ${number(card.spread, 0)} tokens).`;
    return element("p", {}, ...parts, kind, ...list, as);
  }

  layers(card) {
    const rows = card.probs.map((share, layer) => {
      const counts = card.histogram[layer];
      const all = counts.reduce((a, b) => a + b);
      const label = `${all} activations from 0 to ${card.largest}: ${counts.join(", ")}`;
      const bar = element("i", { style: { width: `${100 * share}%` } });
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, String(layer)),
        element(
          "td",
          {},
          element("span", { className: "bar", "aria-hidden": "true" }, bar),
          ` ${number(share)}`,
        ),
        element("td", {}, percent(card.density[layer])),
        element(
          "td",
          {},
          bars(
            counts.map((c) => Math.log1p(c)),
            label,
          ),
        ),
      );
    });
    return table(
      "Where it is active",
      `Histograms: activations from 0 to ${number(card.largest)}, counted logarithmically.`,
      ["Layer", "P(layer | latent)", "Tokens", "Activations"],
      rows,
    );
  }

  effects(card) {
    const title = "What it does to the predictions";
    if (!card.promoted.length) {
      const why = "Left out: of so large a model it would take many hours.";
      return element("div", {}, element("h4", {}, title), element("p", { className: "hint" }, why));
    }
    const words = (pairs) =>
      pairs.flatMap(([id, by]) => {
        const chip = this.vocabulary.chip(id);
        chip.title = `${by > 0 ? "+" : ""}${number(by, 3)}`;
        return [chip, " "];
      });
    const rows = card.promoted.map((promoted, layer) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, String(layer)),
        element("td", {}, ...words(promoted)),
        element("td", {}, ...words(card.suppressed[layer])),
      ),
    );
    return table(
      title,
      "Tokens whose logits change most for one activation more after that block; mean over a text.",
      ["Layer", "Promotes", "Suppresses"],
      rows,
    );
  }

  similar(card) {
    const { latents } = this.index;
    const near = card.nearest.flatMap(([latent, cosine]) => [
      this.link(latent),
      ` ${number(cosine)} (layer ${number(latents.mean_layer[latent], 1)}) `,
    ]);
    const words = card.words.flatMap(([id, cosine]) => [
      this.vocabulary.chip(id),
      ` ${number(cosine)} `,
    ]);
    return element(
      "div",
      {},
      element("h4", {}, "What it is like"),
      element("p", {}, "Nearest latents, by cosine similarity, with their mean layers: ", ...near),
      element("p", {}, "Nearest tokens, by their embeddings: ", ...words),
    );
  }

  link(latent) {
    const button = element("button", { type: "button", className: "latent" }, String(latent));
    button.addEventListener("click", () => this.choose({ latent }));
    return button;
  }

  examples(card) {
    const quarter = (n) => `${75 - 25 * (n - 1)} to ${100 - 25 * (n - 1)} % of the largest`;
    const parts = [element("h4", {}, "Examples")];
    parts.push(
      element(
        "p",
        { className: "hint" },
        "Blue: how active it is, at the layer of the example. Cells: at every layer, at the token ",
        "that is underlined. A click makes a prompt of the text.",
      ),
    );
    for (let group = 0; group < 5; group++) {
      const own = card.examples.filter(([g]) => g === group);
      if (!own.length) continue;
      const count = group && card.quarters[4 - group].toLocaleString("en");
      const title = group ? `${quarter(group)}: ${count} tokens` : "Strongest";
      parts.push(
        element("h5", {}, title),
        element("ul", { className: "examples" }, ...own.map((e) => this.example(e))),
      );
    }
    return parts;
  }

  example([, activation, layer, peak, ids, around, byLayer]) {
    const largest = Math.max(...around, 1);
    const text = ids.map((id, place) => {
      const tag = place === peak ? "b" : "span";
      return element(tag, { style: shade(around[place] / largest) }, this.vocabulary.running(id));
    });
    const use = element(
      "button",
      { type: "button", className: "text", title: "Run this text as a prompt" },
      ...text,
    );
    use.addEventListener("click", () => {
      this.choose(
        { prompt: this.vocabulary.text(ids), token: peak, layer, change: "" },
        { isAsked: true },
      );
    });
    const strongest = Math.max(...byLayer, 1);
    const values = byLayer.map((v) => number((v / strongest) * activation, 1));
    const label = `Activation by layer: ${values.join(", ")}`;
    return element(
      "li",
      {},
      use,
      element(
        "span",
        { className: "facts" },
        cells(
          byLayer.map((v) => v / strongest),
          label,
        ),
        ` ${number(activation, 1)} at layer ${layer}`,
      ),
    );
  }
}

function table(title, hint, names, rows) {
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  return element(
    "div",
    { className: "scroll" },
    element("h4", {}, title),
    element("p", { className: "hint" }, hint),
    element(
      "table",
      { "aria-label": title },
      element("thead", {}, head),
      element("tbody", {}, ...rows),
    ),
  );
}
