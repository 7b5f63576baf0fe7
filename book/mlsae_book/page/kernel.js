// In JupyterLab, in the place of files and of the page's own model: the kernel answers.  Questions
// and answers are the texts of two hidden widgets beside this frame, whose class names its element
// has; one after the other.
const { ask: askKernel, ...assets } = (() => {
  const text = (part) => {
    const name = document.documentElement.dataset[part];
    const found = parent.document.querySelector(`.${name} textarea`);
    if (!found) throw new Error("The kernel cannot be reached. Execute the cell again.");
    return found;
  };
  const SLOW =
    "The kernel has not answered for ten seconds: is it busy? " +
    "If it was started anew, execute the cell again.";
  const status = () => document.querySelector(".status");
  let asked = 0;
  let last = Promise.resolve();
  const send = async (method, given) => {
    const question = text("asked");
    const mark = `${Math.random()} ${++asked} `;
    question.value = mark + JSON.stringify([method, given ?? null]);
    question.dispatchEvent(new Event("input", { bubbles: true }));
    const slow = setTimeout(() => (status().textContent = SLOW), 10_000);
    while (!text("answered").value.startsWith(mark)) await new Promise((r) => setTimeout(r, 20));
    clearTimeout(slow);
    if (status().textContent === SLOW) status().textContent = "";
    const { result, error } = JSON.parse(text("answered").value.slice(mark.length));
    if (error) throw new Error(error);
    return result;
  };
  const ask = (method, given) => {
    const answer = last.then(() => send(method, given));
    last = answer.catch(() => {});
    return answer;
  };
  const found = new Map();
  const json = (name) => {
    if (!found.has(name)) found.set(name, ask("asset", name));
    found.get(name).catch(() => found.delete(name));
    return found.get(name);
  };
  return { ask, json };
})();

const RUNS = { where: "the kernel", before: () => "Model and dictionary run in the kernel." };
const startEngine = async () => async (method, given) => {
  const answer = await askKernel(method, given);
  for (const code of answer.codes ?? []) {
    code.indices = Int32Array.from(code.indices);
    code.values = Float32Array.from(code.values);
  }
  return answer;
};

// The frame is as high as what is in it, and light or dark as JupyterLab is.
(() => {
  const root = document.documentElement;
  const fit = () => (frameElement.style.height = `${root.offsetHeight}px`);
  new ResizeObserver(fit).observe(root);
  const shade = () => {
    root.dataset.theme = parent.document.body.dataset.jpThemeLight === "false" ? "dark" : "light";
    root.style.colorScheme = root.dataset.theme;
  };
  shade();
  new MutationObserver(shade).observe(parent.document.body, {
    attributeFilter: ["data-jp-theme-light"],
  });
  if (root.dataset.start) location.hash = root.dataset.start;
})();
