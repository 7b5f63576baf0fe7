// What the parts of the explorer share: elements, legible tokens, colours, keys.

// An element with properties (`data-…`, `aria-…` as attributes) and children; text stays text.
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else if (name === "style")
      for (const [k, v] of Object.entries(value)) made.style.setProperty(k, v);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

// The style of what shows how active a latent is, from 0 to 1; explorer.css makes a colour of it.
const shade = (share) => ({
  "--share": share > 0 ? (0.15 + 0.85 * Math.min(1, share)).toFixed(3) : "0",
});

const number = (value, digits = 2) => value.toFixed(digits).replace("-", "−");
const percent = (share) =>
  share === 0
    ? "0 %"
    : share >= 0.0995
      ? `${(100 * share).toFixed(0)} %`
      : `${(100 * share).toPrecision(2)} %`;

class Vocabulary {
  // tokens: strings with one character for each byte.
  constructor(tokens) {
    this.tokens = tokens;
    this.decoder = new TextDecoder("utf-8", { fatal: true });
  }

  bytes(ids) {
    return Uint8Array.from(ids.map((id) => this.tokens[id]).join(""), (c) => c.charCodeAt(0));
  }

  text(ids) {
    return new TextDecoder().decode(this.bytes(ids));
  }

  // A token alone: line breaks, tabs and control characters as signs, bytes of a character that
  // takes several tokens as numbers, a space at either end as ␣.
  legible(id) {
    let text;
    try {
      text = this.decoder.decode(this.bytes([id]));
    } catch {
      return Array.from(this.bytes([id]), (b) => `⟨${b.toString(16).toUpperCase()}⟩`).join("");
    }
    return text
      .replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length))
      .replace(/\n/g, "↵")
      .replace(/\t/g, "⇥")
      .replace(/[\p{C}\p{Z}]/gu, (c) =>
        c === " " ? c : `⟨${c.codePointAt(0).toString(16).toUpperCase()}⟩`,
      );
  }

  // The same within running text, where a space is a space.
  running(id) {
    return this.legible(id).replaceAll("␣", " ");
  }

  chip(id) {
    return element("code", { className: "token" }, this.legible(id));
  }
}

// Arrow keys move among the elements that `[data-row]` marks; one of them is in the tab order.
function arrows(container) {
  container.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const here = event.target.closest("[data-row]");
    if (!here || !step[event.key]) return;
    const [row, column] = step[event.key];
    const next = container.querySelector(
      `[data-row="${+here.dataset.row + row}"][data-column="${+here.dataset.column + column}"]`,
    );
    event.preventDefault();
    if (!next) return;
    focusable(container, next);
    next.focus();
  });
}

function focusable(container, chosen) {
  for (const one of container.querySelectorAll("[data-row]"))
    one.tabIndex = one === chosen ? 0 : -1;
}

// A bar for each number, as high as its share of the largest.
function bars(values, label) {
  const largest = Math.max(...values, 1e-9);
  const made = values.map((v) =>
    element("i", { style: { height: `${v > 0 ? Math.max(4, (100 * v) / largest) : 0}%` } }),
  );
  return element("span", { className: "bars", role: "img", "aria-label": label }, ...made);
}

// A row of cells for the layers, the first at the left.
function cells(shares, label) {
  const made = shares.map((share) => element("i", { style: shade(share) }));
  return element("span", { className: "cells", role: "img", "aria-label": label }, ...made);
}
