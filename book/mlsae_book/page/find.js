// The list of all latents: searched by number and by token, sorted, or one of the short lists.
class Find {
  static PAGE = 25;
  // How a latent has a token that was searched, the closest first: what its row says before that
  // token, and what is said of all like it.
  static HOW = [
    ["", "most often active at such a token"],
    [", in an example at ", "active at one in an example"],
    [", in an example beside ", "with one in the text of an example"],
  ];
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

  // What a search finds in examples comes in files of its own: shown when they are there.
  show({ find, list, sort, latent }) {
    this.chosen = latent;
    const key = JSON.stringify([find, list, sort]);
    if (key !== this.key) {
      this.key = key;
      if (this.query.value !== find) this.query.value = find;
      [this.list.value, this.sort.value] = [list, sort];
      const ids = list === "" ? this.searched(find) : null;
      this.matches = new Map();
      if (ids) this.mostOften(ids);
      const fill = () => this.fill(find, list, sort, ids);
      fill();
      this.settled = ids ? this.inExamples(ids, key).then((isNew) => isNew && fill()) : null;
    }
    for (const row of this.body.children) {
      row.classList.toggle("chosen", +row.dataset.latent === latent);
    }
    return this.settled;
  }

  fill(find, list, sort, ids) {
    const l = this.index.latents;
    let all = [...l.token.keys()];
    if (list !== "") all = this.index.lists[list].latents.slice();
    else if (ids) all = [...this.matches.keys()];
    else if (find.trim() !== "") all = [+find.trim()];
    if (list === "" || sort !== "number") {
      const score = Find.SORTS[sort][1];
      const close = (j) => (sort === "number" ? (this.matches.get(j)?.how ?? 0) : 0);
      all.sort((a, b) => close(a) - close(b) || score(l, a) - score(l, b) || a - b);
    }
    this.left = all;
    const counts = Find.HOW.map(([, said], how) => {
      const count = [...this.matches.values()].filter((match) => match.how === how).length;
      return count && `${count.toLocaleString("en")} ${said}`;
    }).filter(Boolean);
    const words = `${all.length.toLocaleString("en")} latents`;
    this.found.textContent = all.length
      ? [words, counts.join(", ")].filter(Boolean).join(": ")
      : `No latent has the number, or such a token in an example: “${find}”.`;
    this.body.replaceChildren();
    this.add();
  }

  // The ids of tokens that have a text in them, its first space being theirs; null for a number,
  // and for nothing.
  searched(find) {
    const { token } = this.index.latents;
    const plain = find.trim();
    if (plain === "" || (/^\d+$/.test(plain) && +plain < token.length)) return null;
    const wanted = find.trimEnd().replace(/^ +/, "␣").toLowerCase();
    this.words ??= this.index.vocabulary.map((_, id) => this.vocabulary.legible(id).toLowerCase());
    return new Set([...this.words.keys()].filter((id) => this.words[id].includes(wanted)));
  }

  mostOften(ids) {
    this.index.latents.token.forEach((id, j) => {
      if (ids.has(id)) this.matches.set(j, { how: 0, id });
    });
  }

  // Adds the latents that have a token in an example; whether these are still what is asked for.
  async inExamples(ids, key) {
    const firsts = this.index.token_shards;
    const shardOf = (id) => firsts.findLastIndex((first) => first <= id);
    const shards = [...new Set([...ids].map(shardOf))];
    const names = shards.map((shard) => `tokens-${String(shard).padStart(2, "0")}`);
    let found;
    try {
      found = await Promise.all(names.map((name) => assets.json(name)));
    } catch (error) {
      if (key === this.key) this.found.textContent += ` Examples cannot be searched. ${error.message}`;
      return false;
    }
    if (key !== this.key) return false;
    for (const id of ids) {
      const shard = shardOf(id);
      let latent = 0;
      for (const step of found[shards.indexOf(shard)][id - firsts[shard]]) {
        latent += step >> 1;
        const how = step & 1 ? 1 : 2;
        if (how < (this.matches.get(latent)?.how ?? 3)) this.matches.set(latent, { how, id });
      }
    }
    return true;
  }

  add() {
    const l = this.index.latents;
    for (const j of this.left.splice(0, Find.PAGE)) {
      const shares = l.probs[j].map((p) => p / 100);
      const label = `P(layer | latent): ${shares.join(", ")}`;
      const open = element("button", { type: "button", className: "latent" }, String(j));
      open.addEventListener("click", () => this.choose({ latent: j }));
      const match = this.matches.get(j);
      const here = match?.how ? [Find.HOW[match.how][0], this.vocabulary.chip(match.id)] : [];
      const row = element(
        "tr",
        { "data-latent": j },
        element("td", {}, open),
        element("td", {}, cells(shares, label)),
        element("td", {}, number(l.mean_layer[j])),
        element("td", {}, percent(l.density[j])),
        element("td", {}, this.vocabulary.chip(l.token[j]), ` ${percent(l.share[j])}`, ...here),
      );
      row.classList.toggle("chosen", j === this.chosen);
      this.body.append(row);
    }
    this.more.hidden = !this.left.length;
  }
}
