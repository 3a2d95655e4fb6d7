// Two answers side by side in their routing: where they use the same experts, and how their loads differ.

import { byId, element, fixed, layerName, percent, prepareCanvas, resolveColor } from "./dom.js";
import { shape } from "./inspector.js";
import { compareRoutes } from "./loads.js";
import { t } from "./strings.js";

const MAP = { left: 64, width: 620, row: 14 };
const QUOTE = 90; // characters of an answer in the head of the comparison

const quote = (text) => {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > QUOTE ? `${line.slice(0, QUOTE)}…` : line;
};

export class Comparison {
  /** `onChange` is called when the first answer has been chosen, or given up. */
  constructor(onChange) {
    Object.assign(this, { onChange, first: null, dialog: byId("compare") });
    byId("close-compare").addEventListener("click", () => this.dialog.close());
  }

  /** The first answer waits for a second one; the same one again gives it up. */
  choose(message) {
    if (this.first && this.first !== message) {
      this.show(this.first, message);
      this.first = null;
    } else {
      this.first = this.first ? null : message;
    }
    this.onChange();
  }

  show(one, other) {
    const numExperts = Math.max(shape.numExperts, 1 + Math.max(...[one, other].flatMap(({ tokens }) => tokens.flatMap(({ routes }) => routes?.flat() ?? []))));
    const numLayers = [...one.tokens, ...other.tokens].find(({ routes }) => routes)?.routes.length ?? 0;
    const found = compareRoutes(one.tokens, other.tokens, numLayers, numExperts);
    const names = shape.layers.length === numLayers ? shape.layers : found.layers.map((_, at) => String(at + 1));
    const side = (letter, { content, tokens }) => element("p", { class: "side" }, element("b", {}, letter), ` ${quote(content)} `, element("span", { class: "note" }, t("tokens.count", { count: tokens.length })));
    byId("compare-body").replaceChildren(
      side("A", one), side("B", other),
      element("p", {}, this.summarise(found)),
      this.table(found.layers, names, found.chance),
      element("h3", {}, t("compare.difference")),
      element("p", { class: "note" }, t("compare.differenceNote")),
      this.map(found.difference, names, numExperts));
    this.dialog.showModal();
  }

  summarise({ layers, places, equalTokens, chance }) {
    if (!places) return t("compare.nothing");
    const same = layers.reduce((total, layer) => total + layer.same, 0) / layers.length;
    return t("compare.summary", { count: places, equal: equalTokens, same: percent(same), chance: percent(chance) });
  }

  table(layers, names, chance) {
    const cell = (share) => {
      const bar = element("span", { class: "share" });
      bar.style.setProperty("--share", String(share || 0));
      return element("td", {}, bar, element("span", { class: "figure" }, Number.isNaN(share) ? "–" : percent(share)));
    };
    const head = ["compare.layer", "compare.same", "compare.overlap"].map((key) => element("th", { scope: "col" }, t(key)));
    const rows = layers.map(({ same, overlap }, at) => element("tr", {}, element("th", { scope: "row" }, layerName(names[at])), cell(same), cell(overlap)));
    return element("table", { class: "comparison" }, element("caption", { class: "note" }, t("compare.tableNote", { chance: percent(chance) })), element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  }

  /** Orange where A sends more of its choices, blue where B does. */
  map(difference, names, numExperts) {
    const largest = Math.max(1e-9, ...difference.flat().map(Math.abs));
    const canvas = element("canvas", { role: "img", "aria-label": t("compare.map", { largest: percent(largest) }) });
    const cell = (MAP.width - MAP.left) / numExperts;
    const context = prepareCanvas(canvas, MAP.width, MAP.row * names.length);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    const muted = resolveColor("var(--muted)");
    difference.forEach((row, layer) => {
      context.fillStyle = muted;
      context.fillText(layerName(names[layer]), 0, (layer + 0.5) * MAP.row);
      row.forEach((value, expert) => {
        const strength = fixed((100 * Math.abs(value)) / largest, 0);
        context.fillStyle = resolveColor(`color-mix(in oklab, var(--scale-${value > 0 ? "high" : "low"}) ${strength}%, var(--scale-middle))`);
        context.fillRect(MAP.left + expert * cell, layer * MAP.row, Math.max(1, cell - 1), MAP.row - 1);
      });
    });
    return element("div", { class: "map-frame" }, canvas, element("p", { class: "note" }, t("compare.map", { largest: percent(largest) })));
  }
}
