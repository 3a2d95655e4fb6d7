// An answer token by token: colours for how likely a token was or for its expert, and a panel with its experts.

import { element, fixed, layerName, prepareCanvas, resolveColor } from "./dom.js";
import { hideTip, showTip } from "./tip.js";

const MANY_LAYERS = 16; // above, the grid is one picture without a line of text a layer
const GRID_WIDTH = 176;
const GOLDEN_ANGLE = 137.508;

/** Names and width of the MoE layers, from `/routing`; `fit` covers a server that does not tell. */
export const shape = { layers: [], numExperts: 0 };

function fit(routes) {
  const largest = Math.max(0, ...routes.flat());
  const names = shape.layers.length === routes.length ? shape.layers : routes.map((_, index) => `MoE ${index + 1}`);
  return { names: names.map(layerName), numExperts: Math.max(shape.numExperts, largest + 1) };
}

const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "no text of its own";

/** Rows of experts, the chosen ones lit. */
function drawStrip(rows, numExperts, rowHeight) {
  const canvas = element("canvas", { "aria-hidden": "true" });
  const cell = Math.max(1, Math.min(11, Math.floor(GRID_WIDTH / numExperts)));
  const context = prepareCanvas(canvas, cell * numExperts, rowHeight * rows.length);
  const [off, on] = [resolveColor("var(--cell)"), resolveColor("var(--accent)")];
  const gap = cell > 3 ? 1 : 0;
  rows.forEach((row, layer) => {
    context.fillStyle = off;
    for (let expert = 0; expert < numExperts; expert += 1) {
      context.fillRect(expert * cell, layer * rowHeight, cell - gap, rowHeight - 1);
    }
    context.fillStyle = on;
    const lit = Math.max(2, cell - gap);
    row.forEach((expert) => context.fillRect(Math.min(expert * cell, cell * numExperts - lit), layer * rowHeight, lit, rowHeight - 1));
  });
  return canvas;
}

function describeExperts(token, whyNot) {
  if (!token.routes) return [element("p", { class: "tip-note" }, whyNot)];
  const { names, numExperts } = fit(token.routes);
  const head = element("p", { class: "tip-note" }, `Its experts, of ${numExperts} in each of ${names.length} MoE layer${names.length === 1 ? "" : "s"}`);
  if (names.length > MANY_LAYERS) {
    const words = token.routes.map((row, layer) => `${names[layer]}: ${row.join(", ")}`).join("; ");
    const order = element("p", { class: "tip-note" }, `${names[0]} at the top, ${names.at(-1)} at the bottom`);
    return [head, order, drawStrip(token.routes, numExperts, 4), element("p", { class: "offscreen" }, words)];
  }
  const rows = token.routes.map((row, layer) => element("tr", {},
    element("th", { scope: "row" }, names[layer]),
    element("td", {}, drawStrip([row], numExperts, 12)),
    element("td", { class: "ids" }, row.join(" "))));
  return [head, element("table", { class: "routes" }, ...rows)];
}

function describe(token, whyNot) {
  const likely = token.logprob === null ? "probability unknown"
    : `probability ${fixed(100 * Math.exp(token.logprob), 1)} % · log ${fixed(token.logprob, 2).replace("-", "−")}`;
  return [
    element("p", { class: "tip-head" }, element("code", {}, visible(token.text)), element("span", {}, `id ${token.id}`)),
    element("p", {}, likely),
    ...describeExperts(token, whyNot),
  ];
}

export class TokenView {
  constructor(tokens, colour) {
    this.tokens = tokens;
    this.isLive = false;
    this.numKnown = 0;
    this.text = element("div", { class: "token-text", role: "group", "aria-label": "Tokens of the answer; the arrow keys go from one to the next" });
    this.select = element("select", { on: { change: () => this.choose() } });
    this.legend = element("span", { class: "token-legend" });
    this.onColour = () => {};
    this.node = element("div", { class: "token-view" },
      element("div", { class: "token-bar" }, element("label", {}, "Colour ", this.select), this.legend), this.text);
    this.colour = colour;
    this.listen();
    this.update();
  }

  listen() {
    const tokenOf = (event) => event.target.closest(".token");
    this.text.addEventListener("pointerover", (event) => {
      if (tokenOf(event)) this.show(tokenOf(event));
      else hideTip();
    });
    this.text.addEventListener("pointerleave", () => {
      const focused = this.text.contains(document.activeElement) ? document.activeElement : null;
      if (focused) this.show(focused);
      else hideTip();
    });
    this.text.addEventListener("focusin", (event) => this.focus(tokenOf(event)));
    this.text.addEventListener("focusout", hideTip);
    this.text.addEventListener("click", (event) => tokenOf(event)?.focus());
    this.text.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const at = [...this.text.children].indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -at, End: this.tokens.length - 1 - at }[event.key];
    if (event.key === "Escape") hideTip();
    if (step === undefined || at < 0) return;
    event.preventDefault();
    this.text.children[Math.max(0, Math.min(this.tokens.length - 1, at + step))].focus();
  }

  focus(span) {
    if (!span) return;
    this.text.querySelectorAll('[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
    span.tabIndex = 0;
    this.show(span);
  }

  show(span) {
    const index = [...this.text.children].indexOf(span);
    const boxes = span.getClientRects();
    if (index < 0 || !boxes.length) return;
    showTip(boxes[0], describe(this.tokens[index], this.whyNot(index)));
  }

  whyNot(index) {
    if (this.isLive) return "Its experts are not known yet.";
    const isLast = index === this.tokens.length - 1;
    return isLast ? "Its experts are unknown: it was not fed back to the model." : "Its experts are not known.";
  }

  /** Add the tokens that are new, and colour those whose experts have become known. */
  update(isLive = false) {
    this.isLive = isLive;
    const spans = this.text.children;
    this.tokens.slice(spans.length).forEach((token) => {
      const text = token.text.replace(/\n/g, "⏎\n") || "·";
      const isEmpty = token.text === "";
      this.text.append(element("span", {
        class: isEmpty ? "token empty" : "token", role: "button", tabindex: spans.length ? -1 : 0, "aria-describedby": "tip",
      }, text));
    });
    const known = this.tokens.filter((token) => token.routes).length;
    if (known !== this.numKnown || !this.select.options.length) this.offer();
    this.numKnown = known;
    this.paint();
  }

  /** The ways of colouring: the layers appear with the first token whose experts are known. */
  offer() {
    const routes = this.tokens.find((token) => token.routes)?.routes;
    const count = 2 + (routes ? routes.length : 0);
    if (this.select.options.length === count) return;
    const option = (value, text) => element("option", { value }, text);
    const layers = routes ? fit(routes).names.map((name, index) => option(`layer-${index}`, `expert of ${name}`)) : [];
    this.select.replaceChildren(option("likely", "probability"), option("none", "none"), ...layers);
    this.select.value = this.colour;
    if (!this.select.value) this.select.value = "likely";
  }

  choose() {
    this.colour = this.select.value;
    this.onColour(this.colour);
    this.paint();
  }

  paint() {
    const way = this.select.value;
    const layer = way.startsWith("layer-") ? Number(way.slice(6)) : -1;
    this.text.dataset.colour = layer >= 0 ? "expert" : way;
    this.legend.textContent = layer >= 0 ? "one hue an expert, the first of the token’s" : way === "likely" ? "the deeper, the less likely" : "";
    [...this.text.children].forEach((span, index) => {
      const token = this.tokens[index];
      const expert = layer >= 0 ? token.routes?.[layer]?.[0] : undefined;
      span.classList.toggle("unknown", layer >= 0 && expert === undefined);
      span.style.setProperty("--hue", String(((expert ?? 0) * GOLDEN_ANGLE) % 360));
      span.style.setProperty("--surprise", String(token.logprob === null ? 0 : 1 - Math.exp(token.logprob)));
    });
  }
}
