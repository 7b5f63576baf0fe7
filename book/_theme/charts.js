// Draws every Vega-Lite figure of the page, again whenever the page turns dark or light, is
// printed, or (for charts of several panels) changes its width.  What a reader has chosen stays.
(() => {
  const merge = (base, over) => {
    const result = { ...base };
    for (const [key, value] of Object.entries(over)) {
      const both = value && base?.[key] && !Array.isArray(value);
      result[key] = both && typeof value === "object" ? merge(base[key], value) : value;
    }
    return result;
  };
  const isDark = () => document.documentElement.dataset.theme === "dark";
  // Vega sizes single views and layers to their container by itself, panels not.
  const panels = (spec) => spec.vconcat ?? [];

  class Chart {
    constructor(figure) {
      this.view = figure.querySelector(".chart-view");
      this.controls = figure.querySelector(".chart-controls");
      this.spec = JSON.parse(figure.querySelector("script").textContent);
      this.margin = 0;
    }

    async draw(dark = isDark()) {
      const spec = structuredClone(this.spec);
      if (dark) spec.config = merge(spec.config ?? {}, DARK_CHARTS);
      const width = this.view.clientWidth;
      for (const panel of panels(spec)) {
        if (panel.width > 0) panel.width = Math.max(120, Math.min(panel.width, width - this.margin));
      }
      const old = this.result;
      const chosen = old && Object.fromEntries(
        (old.vgSpec.signals ?? []).filter((s) => s.bind).map((s) => [s.name, old.view.signal(s.name)]),
      );
      this.result = await vegaEmbed(this.view, spec, {
        mode: "vega-lite",
        renderer: "svg",
        bind: this.controls,
        actions: false,
        tooltip: { theme: dark ? "dark" : "light" },
        patch: (vega) => {
          for (const signal of vega.signals ?? []) {
            if (chosen && signal.name in chosen) signal.value = chosen[signal.name];
          }
          return vega;
        },
      });
      old?.finalize();
      this.width = width;
    }

    // The first drawing tells how much the axes and legends add to the declared width.
    async fit() {
      await this.draw();
      const [panel] = panels(this.spec);
      if (!panel?.width) return;
      const svg = this.view.querySelector("svg");
      const drawn = Math.min(panel.width, this.view.clientWidth - this.margin);
      this.margin = Math.max(0, svg.width.baseVal.value - drawn);
      if (svg.width.baseVal.value > this.view.clientWidth) await this.draw();
    }
  }

  const charts = [...document.querySelectorAll(".vega-lite-chart")].map((f) => new Chart(f));
  const drawAll = (dark) => Promise.all(charts.map((chart) => chart.draw(dark)));
  window.chartsDrawn = Promise.all(charts.map((chart) => chart.fit()));

  new MutationObserver(() => { window.chartsDrawn = drawAll(); }).observe(
    document.documentElement, { attributeFilter: ["data-theme"] },
  );
  addEventListener("beforeprint", () => { if (isDark()) drawAll(false); });
  addEventListener("afterprint", () => { if (isDark()) drawAll(); });
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      for (const chart of charts) {
        if (panels(chart.spec).length && chart.view.clientWidth !== chart.width) chart.draw();
      }
    }, 150);
  });
})();
