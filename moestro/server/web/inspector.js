// One token beside the text: how likely it was, what else could have come, its experts with their weights, and its path
// through the layers. It has a place of its own, in the panel or above the composer, and covers nothing.

import { bits, strongest } from "./colours.js";
import { byId, element, fixed, layerName, percent, svg, whole } from "./dom.js";
import { t } from "./strings.js";

const MANY_LAYERS = 16; // above, rows of the path are thin, and the table is folded
const PATH = { left: 52, width: 248, pad: 6 };

/** Names and width of the MoE layers, from `/routing`; `fit` covers a server that does not tell. */
export const shape = { layers: [], numExperts: 0 };

export function fit(routes) {
  const largest = Math.max(0, ...routes.flat());
  const names = shape.layers.length === routes.length ? shape.layers : routes.map((_, index) => String(index + 1));
  return { names, numExperts: Math.max(shape.numExperts, largest + 1) };
}

/** Text with signs for what cannot be seen: line ends, tabs, spaces, control characters. */
export const visible = ({ text, name }) => (text || (name ?? "")).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣")
  .replace(/[\x00-\x1f]/g, (letter) => String.fromCharCode(0x2400 + letter.charCodeAt(0))).replace(/\x7f/g, "␡") || t("token.noText");

/** The layers from top to bottom, experts from left to right: dots by weight, one line through the strongest. */
export function drawPath(token) {
  const { names, numExperts } = fit(token.routes);
  const row = names.length > MANY_LAYERS ? 6 : 20;
  const x = (expert) => PATH.left + PATH.pad + ((expert + 0.5) * (PATH.width - 2 * PATH.pad)) / numExperts;
  const y = (layer) => (layer + 0.5) * row;
  const largest = Math.max(...(token.weights ?? [[1]]).flat(), 1e-9);
  const dots = token.routes.flatMap((experts, layer) => experts.map((expert, place) => {
    const share = token.weights ? token.weights[layer][place] / largest : 0.4;
    return svg("circle", { cx: fixed(x(expert), 1), cy: y(layer), r: fixed(Math.max(1.2, Math.sqrt(share) * row * 0.28), 1) });
  }));
  const points = token.routes.map((_, layer) => `${fixed(x(strongest(token, layer)), 1)},${y(layer)}`);
  const isNamed = (layer) => names.length <= MANY_LAYERS || layer === 0 || layer === names.length - 1;
  const height = row * names.length;
  const lines = names.map((_, layer) => svg("line", { x1: PATH.left, x2: PATH.left + PATH.width, y1: y(layer), y2: y(layer) }));
  const labels = names.flatMap((name, layer) => (isNamed(layer) ? [svg("text", { x: 0, y: Math.max(8, Math.min(height - 1, y(layer) + 4)) }, layerName(name))] : []));
  const summary = t("path.words", { experts: token.routes.map((_, layer) => strongest(token, layer)).join(" → ") });
  const attributes = { class: "path", viewBox: `0 0 ${PATH.left + PATH.width} ${height}`, role: "img", "aria-label": summary };
  return svg("svg", attributes, ...lines, svg("polyline", { points: points.join(" ") }), ...dots, ...labels);
}

function tableOf(token, onExpert) {
  const { names } = fit(token.routes);
  const cell = (expert, layer, place) => {
    const weight = token.weights ? element("span", { class: "weight" }, fixed(token.weights[layer][place], 2)) : "";
    const label = t("light.do", { layer: layerName(names[layer]), expert: String(expert) });
    return element("button", { type: "button", class: "expert", title: label, "aria-label": label, on: { click: () => onExpert({ layer, expert }) } }, element("b", {}, String(expert)), weight);
  };
  const rows = token.routes.map((row, layer) => element("tr", {},
    element("th", { scope: "row" }, layerName(names[layer])),
    element("td", { class: "experts" }, ...row.map((expert, place) => cell(expert, layer, place)))));
  return element("table", { class: "routes" }, element("caption", {}, t(token.weights ? "routes.weighted" : "routes.plain")), ...rows);
}

function describeExperts(token, whyNot, onExpert) {
  if (!token.routes) return whyNot ? [element("p", { class: "note" }, whyNot)] : [];
  const { names, numExperts } = fit(token.routes);
  const head = element("h3", {}, t("path.title", { count: names.length, experts: numExperts }));
  const table = tableOf(token, onExpert);
  const list = names.length > MANY_LAYERS ? element("details", {}, element("summary", {}, t("routes.open")), table) : table;
  return [head, element("p", { class: "note" }, t("path.note")), drawPath(token), list];
}

function describeAlternatives({ top, id }) {
  if (!top?.length) return [];
  const rows = top.map((one) => {
    const share = Math.exp(one.logprob);
    const bar = element("span", { class: "share" });
    bar.style.setProperty("--share", String(share));
    return element("li", { class: one.id === id ? "chosen" : "" }, element("code", {}, visible({ text: one.name })), bar, element("span", { class: "figure" }, percent(share)));
  });
  return [element("h3", {}, t("token.alternatives")), element("ol", { class: "alternatives" }, ...rows)];
}

function describeChance({ logprob, rank, entropy }, vocabSize) {
  if (logprob === null || logprob === undefined) return t("token.first");
  const parts = [t("token.probability", { share: percent(Math.exp(logprob), 1) }), t("token.surprise", { bits: fixed(bits(-logprob), 1) })];
  if (rank) parts.push(t("token.rank", { rank, of: vocabSize }));
  if (entropy !== null && entropy !== undefined) parts.push(t("token.entropy", { bits: fixed(bits(entropy), 1) }));
  return parts.join(" · ");
}

export class Inspector {
  /** `onExpert` gets `{ layer, expert }` when one is clicked. */
  constructor(onExpert) {
    this.node = byId("inspector");
    this.body = byId("inspector-body");
    this.onExpert = onExpert;
    byId("close-inspector").addEventListener("click", () => this.hide());
  }

  /** Beside the text where the panel stands there, else above the composer. */
  place(isBeside) {
    const slot = byId(isBeside ? "inspector-beside" : "inspector-below");
    if (this.node.parentElement !== slot) slot.append(this.node);
  }

  show(token, { whyNot = "", vocabSize = 0 } = {}) {
    byId("inspector-token").textContent = visible(token);
    byId("inspector-id").textContent = t("token.id", { id: String(token.id) });
    byId("inspector-chance").textContent = describeChance(token, vocabSize);
    this.body.replaceChildren(...describeAlternatives(token), ...describeExperts(token, whyNot, this.onExpert));
    this.node.hidden = false;
  }

  hide() {
    this.node.hidden = true;
  }
}
