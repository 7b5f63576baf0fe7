// A prompt: its tokens and layers, active latents, changes, and what follows.
class Prompt {
  constructor(place, index, vocabulary, choose) {
    Object.assign(this, { place, index, vocabulary, choose });
    const pick = (selector) => place.querySelector(selector);
    this.status = pick(".status");
    [this.text, this.sample, this.results] = ["#le-prompt", "#le-sample", ".run"].map(pick);
    [this.strips, this.legend] = [".strips", ".legend"].map(pick);
    [this.active, this.next, this.later] = ["table.active", "table.next", ".later"].map(pick);
    [this.activeHint, this.nextHint] = [".active-hint", ".next-hint"].map(pick);
    [this.effect, this.output] = [".effect", ".amount output"].map(pick);
    const names = ["#le-change", "#le-layer", "#le-at", "#le-amount"];
    [this.change, this.layer, this.at, this.amount] = names.map(pick);
    for (let layer = 0; layer < index.layers; layer++) {
      this.layer.append(element("option", { value: String(layer) }, String(layer)));
    }
    for (const text of Prompt.SAMPLES) this.sample.append(element("option", { value: text }, text));
    this.done = {}; // what was run and changed
    this.listen(pick);
  }

  static SAMPLES = [
    "Return the number of elements along the given axis.",
    "x : array_like, optional\n    The input array.",
    "Raises ValueError if the input is empty.",
    "When John and Mary went to the store, John gave",
    "def mean(values):\n    return sum(values) / len(values)",
  ];

  listen(pick) {
    const run = (prompt) => this.choose({ prompt, token: null }, { isAsked: true });
    pick("form.prompt").addEventListener("submit", (event) => {
      event.preventDefault();
      run(this.text.value);
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      run(this.text.value);
    });
    this.sample.addEventListener("change", () => {
      if (this.sample.value) run(this.sample.value);
      this.sample.value = "";
    });
    const told = () => {
      this.choose({
        change: this.change.value,
        layer: +this.layer.value,
        at: this.at.value,
        amount: +this.amount.value,
      });
    };
    for (const control of [this.change, this.layer, this.at, this.amount]) {
      control.addEventListener("change", told);
    }
    this.amount.addEventListener("input", () => this.sayAmount(+this.amount.value));
    pick("form.change").addEventListener("submit", (event) => event.preventDefault());
    this.strips.addEventListener("click", (event) => {
      const token = event.target.closest("[data-token]");
      if (!token) return;
      const cell = event.target.closest("[data-layer]");
      this.choose({ token: +token.dataset.token, ...(cell && { layer: +cell.dataset.layer }) });
    });
    this.strips.addEventListener("keydown", (event) => this.move(event));
    this.active.addEventListener("click", (event) => {
      const cell = event.target.closest("[data-latent]");
      if (cell) this.choose({ latent: +cell.dataset.latent, layer: +cell.dataset.column });
    });
    arrows(this.active);
  }

  // Arrow keys: to the next token, and from layer to layer of it.
  move(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const by = step[event.key];
    if (!by || !this.state) return;
    event.preventDefault();
    const within = (value, size) => Math.max(0, Math.min(size - 1, value));
    const token = within(this.state.token + by[0], this.done.ids.length);
    const layer = within(this.state.layer + by[1], this.index.layers);
    this.choose({ token, layer }, { isStep: true });
    this.strips.children[token].focus();
  }

  say(text, isFault = false) {
    this.status.textContent = text;
    this.status.classList.toggle("fault", isFault);
  }

  sayAmount(amount) {
    this.output.textContent = `${amount > 0 ? "+" : ""}${number(amount, 0)}`;
  }

  // Runs what is new in a state and shows it; gives a state in which all that was open is chosen.
  async show(state) {
    if (document.activeElement !== this.text) this.text.value = state.prompt;
    [this.change.value, this.layer.value] = [state.change, String(state.layer)];
    [this.at.value, this.amount.value] = [state.at, String(state.amount)];
    this.sayAmount(state.amount);
    this.amount.closest("label").hidden = state.change !== "steer";
    if (state.prompt === "") {
      this.results.hidden = true;
      if (state.asked && this.index.no_model === null)
        this.say("Type a prompt first: some words, or a line of code.", true);
      return state;
    }
    this.results.hidden = false;
    if (!(await this.run(state.prompt))) return state;
    const { ids, codes } = this.done;
    const token = Math.min(state.token ?? ids.length - 1, ids.length - 1);
    const latent = state.latent ?? codes[state.layer].indices[token * this.k];
    this.state = state = { ...state, token, latent };
    await this.alter(state);
    this.draw(state);
    await this.predict(state);
    return state;
  }

  get k() {
    return this.done.codes[0].indices.length / this.done.ids.length;
  }

  async run(prompt) {
    if (this.done.prompt === prompt) return true;
    this.say(this.ask ? "Running…" : "Loading the model…");
    try {
      this.ask ??= await startEngine();
      const start = performance.now();
      const { ids, codes, left } = await this.ask("run", prompt);
      if (!ids.length) throw new Error("The prompt has no tokens.");
      this.done = { prompt, ids, codes, changed: "" };
      const time = `${(performance.now() - start).toFixed(0)} ms`;
      const words = ids.length === 1 ? "1 token" : `${ids.length} tokens`;
      const { context } = this.index;
      const cut = `The model reads ${context} tokens; the last ${left} of the prompt are left out. `;
      const broken = prompt.isWellFormed?.() === false ? "Half a character was read as �. " : "";
      this.say(`${left ? cut : ""}${broken}${words}, ${time} in ${RUNS.where}.`, Boolean(left));
      return true;
    } catch (error) {
      this.results.hidden = true;
      this.say(`The prompt could not be run. ${error.message}`, true);
      return false;
    }
  }

  async alter({ change, layer, latent, amount, at, token }) {
    const wanted = change && {
      kind: change,
      layer,
      latent,
      amount,
      token: at === "one" ? token : null,
    };
    const key = JSON.stringify(wanted);
    if (key === this.done.changed) return;
    this.done.later = null;
    if (wanted) {
      this.done.later = (await this.ask("change", wanted)).codes;
      this.done.divergence = await this.ask("divergence");
    }
    this.done.changed = key;
  }

  // The chosen latent's activation at a token and a layer, with the change where it reaches.
  activation(token, layer, state, changed = true) {
    const later = changed && this.done.later?.[layer - state.layer];
    const { indices, values } = later || this.done.codes[layer];
    const k = indices.length / this.done.ids.length;
    const at = indices.subarray(token * k, (token + 1) * k).indexOf(state.latent);
    return at < 0 ? 0 : values[token * k + at];
  }

  draw(state) {
    const { ids } = this.done;
    const layers = [...Array(this.index.layers).keys()];
    const found = ids.map((_, t) => layers.map((layer) => this.activation(t, layer, state)));
    const largest = Math.max(...found.flat());
    const made = ids.map((id, t) => {
      const here = t === state.token;
      const stack = layers.map((layer) =>
        element("i", {
          "data-layer": layer,
          className: here && layer === state.layer ? "chosen" : "",
          style: shade(found[t][layer] / largest),
          title: `layer ${layer}: ${number(found[t][layer])}`,
        }),
      );
      const values = found[t].map((v) => number(v, 1)).join(", ");
      const word = this.vocabulary.legible(id);
      const said = `${word}, token ${t + 1}; latent ${state.latent} by layer: ${values}`;
      return element(
        "button",
        {
          type: "button",
          role: "option",
          "data-token": t,
          "aria-selected": String(here),
          "aria-label": said,
          tabIndex: here ? 0 : -1,
        },
        element("span", { className: "stack" }, ...stack.reverse()),
        element("span", { className: "word" }, word),
      );
    });
    const focused = this.strips.contains(document.activeElement);
    this.strips.replaceChildren(...made);
    if (focused) made[state.token].focus();
    const what = state.change ? " with the change" : "";
    const text = largest
      ? `Latent ${state.latent}${what}: full blue is ${number(largest)}.`
      : `Latent ${state.latent} is not active in this prompt${what}. Choose another below.`;
    const card = element("button", { type: "button", className: "latent" }, "Its card ↓");
    card.addEventListener("click", () => document.getElementById("le-card")?.scrollIntoView());
    this.legend.replaceChildren(text, " ", card);
    this.drawActive(state, layers);
    this.drawLater(state, layers);
  }

  drawActive(state, layers) {
    const { codes, ids } = this.done;
    this.activeHint.replaceChildren(
      "After each block, 0 to ",
      String(layers.length - 1),
      ", the latents that are active at token ",
      this.vocabulary.chip(ids[state.token]),
      ", the strongest first, without any change. A click shows the card.",
    );
    const head = layers.map((layer) =>
      element(
        "th",
        {
          scope: "col",
          className: layer === state.layer ? "chosen" : "",
          "aria-label": `Layer ${layer}`,
        },
        String(layer),
      ),
    );
    this.active.tHead.replaceChildren(element("tr", {}, ...head));
    const start = state.token * this.k;
    const largest = layers.map((layer) => codes[layer].values[start]);
    const rows = [...Array(this.k).keys()].map((rank) => {
      const row = layers.map((layer) => {
        const [latent, value] = [
          codes[layer].indices[start + rank],
          codes[layer].values[start + rank],
        ];
        if (!value) return element("td");
        const said = `latent ${latent}, ${number(value)} at layer ${layer}`;
        const button = element(
          "button",
          {
            type: "button",
            className: `latent${latent === state.latent ? " chosen" : ""}`,
            "data-latent": latent,
            "data-row": rank,
            "data-column": layer,
            "aria-label": said,
            "aria-pressed": String(latent === state.latent),
            title: said,
            style: shade(value / largest[layer]),
          },
          String(latent),
        );
        return element("td", {}, button);
      });
      return element("tr", {}, ...row);
    });
    const focus = document.activeElement?.closest?.("table.active [data-row]")?.dataset;
    this.active.tBodies[0].replaceChildren(...rows);
    const at = (row, column) =>
      this.active.querySelector(`[data-row="${row}"][data-column="${column}"]`);
    const here =
      (focus && at(focus.row, focus.column)) ??
      this.active.querySelector(".latent.chosen") ??
      at(0, 0);
    focusable(this.active, here);
    if (focus) here?.focus();
  }

  drawLater(state, layers) {
    this.later.hidden = !this.done.later;
    this.effect.textContent = "";
    if (!this.done.later) return;
    const kl = number(this.done.divergence, 4);
    this.effect.textContent = `The predictions move by ${kl} nats (KL divergence, mean over tokens).`;
    this.later.querySelector("p").textContent =
      `Latent ${state.latent} after each block, mean over the tokens:`;
    const head = layers.map((layer) => element("th", { scope: "col" }, String(layer)));
    const shown = this.later.querySelector("table");
    shown.tHead.replaceChildren(element("tr", {}, element("th", { scope: "col" }, ""), ...head));
    const { ids } = this.done;
    const row = (name, changed) => {
      const means = layers.map((layer) => {
        const sum = ids.reduce((all, _, t) => all + this.activation(t, layer, state, changed), 0);
        return element("td", {}, number(sum / ids.length));
      });
      return element("tr", {}, element("th", { scope: "row" }, name), ...means);
    };
    shown.tBodies[0].replaceChildren(row("before", false), row("after", true));
  }

  async predict(state) {
    const given = { token: state.token, most: 8 };
    const { ids, before, after } = await this.ask("likeliest", given);
    const last = after ?? before;
    const order = [...ids.keys()].sort((a, b) => last[b] - last[a]);
    const names = after ? ["Token", "Before", "After", "Points"] : ["Token", "Probability"];
    const head = names.map((name) => element("th", { scope: "col" }, name));
    const rows = order.map((i) => {
      const numbers = after
        ? [
            percent(before[i]),
            percent(after[i]),
            `${after[i] >= before[i] ? "+" : ""}${number(100 * (after[i] - before[i]), 1)}`,
          ]
        : [percent(before[i])];
      const width = { width: `${100 * last[i]}%` };
      const bar = element(
        "span",
        { className: "bar", "aria-hidden": "true" },
        element("i", { style: width }),
      );
      return element(
        "tr",
        {},
        element("td", {}, this.vocabulary.chip(ids[i])),
        ...numbers.map((n, column) =>
          element("td", {}, ...(column === names.indexOf("After") - 1 || !after ? [bar, n] : [n])),
        ),
      );
    });
    this.nextHint.replaceChildren(
      "What may follow token ",
      this.vocabulary.chip(this.done.ids[state.token]),
    );
    this.next.tHead.replaceChildren(element("tr", {}, ...head));
    this.next.tBodies[0].replaceChildren(...rows);
  }
}
