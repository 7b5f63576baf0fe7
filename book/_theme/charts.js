// Draws every Vega-Lite figure of the page, and again when the page turns dark or light, is printed
// or changes its width.  What a reader has chosen stays chosen.
(() => {
  const merge = (base, over) => {
    const result = { ...base };
    for (const [key, value] of Object.entries(over)) {
      const both = value && base?.[key] && !Array.isArray(value);
      result[key] = both && typeof value === "object" ? merge(base[key], value) : value;
    }
    return result;
  };
  const root = document.documentElement;
  const isDark = () =>
    root.dataset.theme === "dark" ||
    (root.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  // Charts above each other; like single ones they fill the column where they name no width.
  const panels = (spec) => (spec.vconcat ?? []).filter((panel) => !panel.width);

  const LINE = 14; // pixels
  // On a phone the title above a y axis takes several lines: axes and legends make room for them.
  const wrap = (spec, width) => {
    let most = 1;
    const lines = (title) =>
      title.split(" ").reduce((all, word) => {
        const longer = `${all.at(-1)} ${word}`;
        return longer.length * 6.2 > width ? [...all, word] : [...all.slice(0, -1), longer];
      }, [""]).map((line) => line.trim());
    const visit = (view) => {
      const y = view.encoding?.y;
      if (y && typeof y.title === "string" && y.axis !== null) {
        y.title = lines(y.title);
        y.axis = { ...y.axis, titleY: -12 - LINE * (y.title.length - 1) };
        most = Math.max(most, y.title.length);
      }
      const named = view.encoding?.color?.legend;
      if (named?.columns) named.columns = Math.min(named.columns, 2); // long names
      [...(view.layer ?? []), ...(view.vconcat ?? [])].forEach(visit);
    };
    visit(spec);
    if (spec.vconcat) spec.spacing = (spec.spacing ?? 20) + LINE * (most - 1);
    const legend = { offset: 34 + LINE * (most - 1), columns: 3, columnPadding: 6, labelFontSize: 11 };
    spec.config = merge(spec.config, { legend });
  };

  class Chart {
    constructor(figure) {
      this.view = figure.querySelector(".chart-view");
      this.controls = figure.querySelector(".chart-controls");
      this.spec = JSON.parse(figure.querySelector("script").textContent);
      delete this.spec.$schema; // JupyterLab wants version 5, the book's own Vega-Lite is newer
    }

    async draw(dark) {
      const width = this.view.clientWidth;
      if (this.dark === dark && this.width === width) return;
      const first = this.width === undefined;
      [this.dark, this.width] = [dark, width];
      await this.embed();
      const [panel] = panels(this.spec);
      if (!panel) return;
      const drawn = () => this.view.querySelector("svg").width.baseVal.value;
      // The first drawing tells how much the axes add to the declared width of a panel.
      if (first) {
        this.margin = drawn() - this.spec.config.view.continuousWidth;
        await this.embed();
      }
      // Text may reach beyond a narrow panel and so add more than beside a wide one.
      if (drawn() > this.width + 1) {
        this.margin += drawn() - this.width;
        await this.embed();
      }
    }

    async embed() {
      const spec = structuredClone(this.spec);
      if (this.dark) spec.config = merge(spec.config ?? {}, DARK_CHARTS);
      if (!spec.width && (spec.mark || spec.layer)) {
        spec.width = this.width; // Vega's own "container" follows the window, not the column
        spec.autosize = { type: "fit-x", contains: "padding" };
      }
      for (const panel of panels(spec)) {
        if (this.margin !== undefined) panel.width = Math.max(120, this.width - this.margin);
      }
      if (this.width < 480) wrap(spec, this.width - 40);
      const old = this.result;
      const chosen = new Map();
      for (const { name, bind } of old?.vgSpec.signals ?? []) {
        if (bind) chosen.set(name, old.view.signal(name));
      }
      old?.finalize();
      this.result = await vegaEmbed(this.view, spec, {
        mode: "vega-lite",
        renderer: "svg",
        bind: this.controls,
        actions: false,
        tooltip: { theme: this.dark ? "dark" : "light" },
      });
      const { cards } = this.spec.usermeta ?? {};
      if (cards) {
        this.view.style.cursor = "pointer";
        this.result.view.addEventListener("click", (_, item) => {
          if (item?.mark.marktype === "area") return; // one mark of many latents
          const latent = item?.datum?.latent;
          if (latent !== undefined) location.href = `${cards}#latent=${latent}`;
        });
      }
      for (const [name, value] of chosen) this.result.view.signal(name, value);
      await this.result.view.runAsync();
    }
  }

  const charts = [...document.querySelectorAll(".vega-lite-chart")].map((f) => new Chart(f));
  // From top to bottom, each shown before the next is drawn; and one drawing of all after the other,
  // so that the last wish wins.
  window.chartsDrawn = Promise.resolve();
  const draw = () => {
    window.chartsDrawn = window.chartsDrawn.then(async () => {
      for (const chart of charts) {
        await chart.draw(isDark());
        await new Promise((shown) => setTimeout(shown));
      }
    });
  };
  draw();
  new MutationObserver(draw).observe(root, { attributeFilter: ["data-theme"] });
  let waiting;
  const resized = new ResizeObserver(() => {
    clearTimeout(waiting);
    waiting = setTimeout(draw, 150);
  });
  for (const chart of charts) resized.observe(chart.view);
})();
