// The list of all latents: searched by number and by token, sorted, or one of the short lists.
class Find {
  static PAGE = 25;
  static SORTS = {
    number: ["Own order", (l, j) => j],
    mean: ["Mean layer", (l, j) => l.mean_layer[j]],
    entropy: ["Spread over layers", (l, j) => -l.entropy[j]],
    sharpness: ["Sharpness", (l, j) => -l.sharpness[j]],
    density: ["Density", (l, j) => -l.density[j]],
    token: ["One token … context", (l, j) => l.spread[j]],
  };

  constructor(place, index, vocabulary, choose) {
    Object.assign(this, { place, index, vocabulary, choose });
    const pick = (selector) => place.querySelector(selector);
    [this.query, this.list, this.sort] = ["#le-find", "#le-list", "#le-sort"].map(pick);
    [this.found, this.body, this.more] = [".found", ".latents tbody", ".more"].map(pick);
    index.lists.forEach(({ title }, i) => {
      this.list.append(element("option", { value: String(i) }, title));
    });
    for (const [value, [title]] of Object.entries(Find.SORTS)) {
      this.sort.append(element("option", { value }, title));
    }
    const names = ["Latent", "Layers", "Mean", "Density", "Most often at"];
    const head = names.map((name) => element("th", { scope: "col" }, name));
    pick(".latents thead").append(element("tr", {}, ...head));
    const told = (how) =>
      choose({ find: this.query.value, list: this.list.value, sort: this.sort.value }, how);
    this.query.addEventListener("input", () => {
      this.list.value = "";
      told({ isStep: true });
    });
    this.list.addEventListener("change", () => told());
    this.sort.addEventListener("change", () => told());
    pick("form.find").addEventListener("submit", (event) => event.preventDefault());
    this.more.addEventListener("click", () => this.add());
  }

  show({ find, list, sort, latent }) {
    this.chosen = latent;
    const key = JSON.stringify([find, list, sort]);
    if (key !== this.key) {
      this.key = key;
      if (this.query.value !== find) this.query.value = find;
      [this.list.value, this.sort.value] = [list, sort];
      const l = this.index.latents;
      const all = list === "" ? this.matches(find) : this.index.lists[list].latents.slice();
      if (list === "" || sort !== "number") {
        const score = Find.SORTS[sort][1];
        all.sort((a, b) => score(l, a) - score(l, b) || a - b);
      }
      this.left = all;
      this.found.textContent = all.length
        ? `${all.length.toLocaleString("en")} latents`
        : `No latent has the number, or is most often active at a token with, “${find}”.`;
      this.body.replaceChildren();
      this.add();
    }
    for (const row of this.body.children) {
      row.classList.toggle("chosen", +row.dataset.latent === latent);
    }
  }

  matches(find) {
    const wanted = find.trim().toLowerCase();
    const { token } = this.index.latents;
    const all = token.map((_, j) => j);
    if (wanted === "") return all;
    if (/^\d+$/.test(wanted) && +wanted < all.length) return [+wanted];
    return all.filter((j) => this.vocabulary.legible(token[j]).toLowerCase().includes(wanted));
  }

  add() {
    const l = this.index.latents;
    for (const j of this.left.splice(0, Find.PAGE)) {
      const shares = l.probs[j].map((p) => p / 100);
      const label = `P(layer | latent): ${shares.join(", ")}`;
      const open = element("button", { type: "button", className: "latent" }, String(j));
      open.addEventListener("click", () => this.choose({ latent: j }));
      const row = element(
        "tr",
        { "data-latent": j },
        element("td", {}, open),
        element("td", {}, cells(shares, label)),
        element("td", {}, number(l.mean_layer[j])),
        element("td", {}, percent(l.density[j])),
        element("td", {}, this.vocabulary.chip(l.token[j]), ` ${percent(l.share[j])}`),
      );
      row.classList.toggle("chosen", j === this.chosen);
      this.body.append(row);
    }
    this.more.hidden = !this.left.length;
  }
}
