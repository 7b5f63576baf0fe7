// The explorer: everything that is chosen stands in the page's address, so it can be linked, and is
// there again after a reload or a step back.
(() => {
  const place = document.querySelector(".latent-explorer");
  if (!place) return;
  const START = {
    prompt: "",
    token: null,
    layer: 3,
    latent: null,
    change: "",
    amount: 10,
    at: "all",
    find: "",
    list: "0",
    sort: "number",
  };
  const NUMBERS = ["token", "layer", "latent", "amount"];
  const CHOICES = { change: ["", "steer", "ablate", "reconstruct"], at: ["all", "one"] };

  // What cannot be meant is left as it was at the start.
  const read = (index) => {
    const state = { ...START, layer: Math.min(START.layer, index.layers - 1) };
    const limits = {
      token: index.context,
      layer: index.layers,
      latent: index.latents.token.length,
    };
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      if (!(name in START)) continue;
      if (NUMBERS.includes(name)) {
        const number = Number(value);
        const fits =
          name === "amount" ? Math.abs(number) <= 40 : number >= 0 && number < limits[name];
        if (value !== "" && Number.isInteger(number) && fits) state[name] = number;
      } else if (!CHOICES[name] || CHOICES[name].includes(value)) state[name] = value;
    }
    if (state.list !== "" && !index.lists[state.list]) state.list = START.list;
    if (!Object.hasOwn(Find.SORTS, state.sort)) state.sort = START.sort;
    if (index.no_model !== null) state.prompt = "";
    return state;
  };

  const write = (state) => {
    const query = new URLSearchParams();
    for (const [name, value] of Object.entries(state)) {
      if (name in START && value !== START[name] && value !== null) query.set(name, value);
    }
    return `#${query}`;
  };

  const start = async () => {
    let index;
    try {
      index = await assets.json("index");
    } catch (error) {
      const status = place.querySelector(".status");
      status.textContent = `The explorer cannot start. ${error.message}`;
      status.classList.add("fault");
      return;
    }
    const vocabulary = new Vocabulary(index.vocabulary);
    const hasModel = index.no_model === null;
    place.querySelector(".prompt").hidden = !hasModel;
    place.querySelector(".status").textContent = hasModel
      ? RUNS.before(index.megabytes)
      : `The language model does not run in this page (${index.no_model}).`;
    let state = read(index);
    let turn = 0;
    let queue = Promise.resolve();

    // One after the other; what was overtaken by a later choice is left out.
    const show = () => {
      const mine = ++turn;
      place.setAttribute("aria-busy", "true");
      find.show(state);
      overview.show(state.latent);
      card.show(state.latent);
      queue = queue.then(async () => {
        if (mine !== turn) return;
        const settled = await prompt.show({ ...state });
        if (mine !== turn) return;
        state = { ...state, token: settled.token, latent: settled.latent, asked: false };
        if (write(state) !== location.hash) history.replaceState(null, "", write(state));
        overview.show(state.latent);
        await Promise.all([find.show(state), card.show(state.latent)]);
        if (mine === turn) place.setAttribute("aria-busy", "false");
      });
    };
    // isAsked: by a reader who wants a prompt to be run; isStep: of many, which are no way back.
    const choose = (chosen, { isAsked = false, isStep = false } = {}) => {
      state = { ...state, ...chosen, asked: isAsked };
      if (index.no_model !== null) state.prompt = "";
      const address = write(state);
      if (address === location.hash) isStep = true;
      if (isStep) history.replaceState(null, "", address);
      else history.pushState(null, "", address);
      if (isAsked && "prompt" in chosen) prompt.text.value = chosen.prompt;
      show();
    };
    const find = new Find(place, index, vocabulary, choose);
    const overview = new Overview(place, index, choose);
    const card = new Card(place.querySelector(".latent-card"), index, vocabulary, choose);
    const prompt = new Prompt(place, index, vocabulary, choose);
    addEventListener("popstate", () => {
      if (location.hash && !location.hash.includes("=")) return; // a heading of the page
      state = read(index);
      show();
    });
    show();
  };
  start();
})();
