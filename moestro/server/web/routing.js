// The load of every expert beside the conversation: of an answer, of the conversation, or of all that the server
// computed (`GET /routing`, every second while an answer is written, every ten seconds else). Figures are those of
// moestro.routing.stats, computed here from the loads so that every scope has them.

import { getJson } from "./api.js";
import { byId, fixed, layerName, prepareCanvas, resolveColor, whole } from "./dom.js";
import { shape } from "./inspector.js";
import { countLoads, measure } from "./loads.js";
import { t } from "./strings.js";

const BUSY_MS = 1000;
const IDLE_MS = 10000;
const RANGE = 2; // log2 of the ratio at both ends of the scale
const STEPS = 32;
const FEW = 10; // assignments an expert, below which chance alone makes the load uneven
const TIMES = "×";

const sum = (values) => values.reduce((total, value) => total + value, 0);
const mean = (values) => (values.length ? sum(values) / values.length : NaN);

export class RoutingPanel {
  /** `getTokens(scope)`: those of the "answer" or the "conversation" at hand; `onExpert` gets a cell that is clicked. */
  constructor(getTokens, onExpert) {
    Object.assign(this, { getTokens, onExpert, data: null, timer: 0, isBusy: false, cursor: null });
    this.canvas = byId("load");
    byId("window").addEventListener("change", () => this.draw());
    document.addEventListener("visibilitychange", () => this.poll());
    new ResizeObserver(() => this.draw()).observe(byId("load-box"));
    this.listen();
    this.buildScale();
  }

  listen() {
    const move = (event) => this.point(this.cellAt(event));
    this.canvas.addEventListener("pointermove", move);
    this.canvas.addEventListener("pointerdown", move);
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("click", () => { if (this.cursor) this.onExpert(this.cursor); });
  }

  get isShown() {
    return byId("panel").checkVisibility() && !document.hidden;
  }

  get scope() {
    return byId("window").elements.window.value;
  }

  get window() {
    if (this.scope in this.data) return this.data[this.scope];
    return countLoads(this.getTokens(this.scope), this.data.layers.length, this.data.num_experts);
  }

  setBusy(isBusy) {
    this.isBusy = isBusy;
    this.poll();
  }

  /** Ask now, and again after a while; while nobody can see it only once, for the names of the layers. */
  async poll() {
    clearTimeout(this.timer);
    const mine = this.turn = (this.turn || 0) + 1;
    if (!this.isShown && this.data) return;
    let message = "";
    try {
      this.data = await getJson("routing");
    } catch (error) {
      message = error.status === 404 ? t("load.none") : error.message;
      if (error.status) this.data = null;
    }
    if (mine !== this.turn) return; // asked again meanwhile
    this.show(message);
    if (this.isShown) this.timer = setTimeout(() => this.poll(), this.isBusy ? BUSY_MS : IDLE_MS);
  }

  show(message) {
    const hasLayers = Boolean(this.data?.layers.length);
    byId("panel-note").textContent = message || (this.data && !hasLayers ? t("load.dense") : "");
    byId("panel-note").hidden = !byId("panel-note").textContent;
    byId("panel-body").hidden = !hasLayers;
    if (!hasLayers) return;
    Object.assign(shape, { layers: this.data.layers, numExperts: this.data.num_experts });
    byId("recent-label").textContent = t("load.recent", { seconds: Math.round(this.data.recent.seconds ?? 30) });
    this.draw();
  }

  /** Draw again while an answer grows, if its own load is shown. */
  drawOwn() {
    if (this.data && !(this.scope in this.data)) this.draw();
  }

  draw() {
    if (!this.data?.layers.length || !this.isShown) return;
    const { load, tokens } = this.shown = this.window;
    this.figures = load.map(measure);
    this.writeFigures(tokens);
    this.drawMap(load);
    this.point(this.cursor);
  }

  writeFigures(tokens) {
    const { layers, num_experts: numExperts, top_k: topK } = this.data;
    const seen = this.figures.filter(({ ratio }) => Number.isFinite(ratio));
    const worst = this.figures.reduce((best, figure, at) => (figure.ratio > (this.figures[best]?.ratio ?? 0) ? at : best), -1);
    const set = (id, number, note) => {
      byId(id).querySelector(".number").textContent = number;
      byId(id).querySelector(".note").textContent = note;
    };
    byId("panel-about").textContent = `${t("load.shape", { count: layers.length, experts: numExperts, topK })} · ${t("tokens.count", { count: tokens })}`;
    set("ratio", worst < 0 ? "–" : `${fixed(this.figures[worst].ratio, 2)}${TIMES}`, worst < 0 ? t("load.noToken") : t("load.worst", { layer: layerName(layers[worst]) }));
    set("vio", fixed(mean(seen.map(({ ratio }) => ratio - 1)), 2), t("load.vioNote"));
    set("dead", seen.length ? whole(sum(seen.map(({ dead }) => dead))) : "–", t("load.deadNote", { of: layers.length * numExperts }));
    set("entropy", fixed(mean(seen.map(({ entropy }) => entropy)), 3), t("load.entropyNote"));
    const perExpert = (tokens * topK) / numExperts;
    byId("few").hidden = tokens === 0 || perExpert >= FEW;
    byId("few").textContent = t("load.few", { each: fixed(perExpert, 1) });
    const meanings = { answer: "load.ofAnswer", conversation: "load.ofConversation" };
    byId("load-what").textContent = t(meanings[this.scope] ?? "load.ofAll");
  }

  buildScale() {
    const color = (at) => resolveColor(`color-mix(in oklab, var(--scale-${at < 0 ? "low" : "high"}) ${Math.abs(at) * 100}%, var(--scale-middle))`);
    this.scale = Array.from({ length: 2 * STEPS + 1 }, (_, index) => color((index - STEPS) / STEPS));
    [this.muted, this.none] = [resolveColor("var(--muted)"), resolveColor("var(--dead)")];
    const bar = byId("scale");
    const context = prepareCanvas(bar, this.scale.length * 3, 8);
    this.scale.forEach((css, index) => {
      context.fillStyle = css;
      context.fillRect(index * 3, 0, 3, 8);
    });
    this.draw();
  }

  colorOf(load, average) {
    if (!average) return this.scale[STEPS];
    if (!load) return this.none;
    const at = Math.max(-1, Math.min(1, Math.log2(load / average) / RANGE));
    return this.scale[Math.round(STEPS + STEPS * at)];
  }

  layout() {
    const { layers, num_experts: numExperts } = this.data;
    const width = byId("load-box").clientWidth;
    const left = Math.min(64, 14 + 6 * Math.max(...layers.map((name) => name.length)));
    const row = layers.length > 24 ? 9 : layers.length > 12 ? 14 : 20;
    return { width, left, row, cell: (width - left) / numExperts, height: row * layers.length + 18 };
  }

  drawMap(load) {
    const { width, left, row, cell, height } = this.layout();
    if (width <= left) return;
    const { layers, num_experts: numExperts } = this.data;
    const context = prepareCanvas(this.canvas, width, height);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const gap = cell > 5 ? 1 : 0;
    layers.forEach((name, layer) => {
      context.fillStyle = this.muted;
      if (row > 9 || layer % 2 === 0) context.fillText(name, left - 8, (layer + 0.5) * row, left - 8);
      load[layer].forEach((count, expert) => {
        context.fillStyle = this.colorOf(count, this.figures[layer].mean);
        context.fillRect(left + expert * cell, layer * row, cell - gap + (gap ? 0 : 0.4), row - 1);
      });
    });
    context.fillStyle = this.muted;
    context.textAlign = "center";
    const stride = [1, 2, 4, 8, 16, 32, 64].find((step) => step * cell >= 22) || 128;
    for (let expert = 0; expert < numExperts; expert += stride) context.fillText(String(expert), left + (expert + 0.5) * cell, height - 7);
    this.canvas.setAttribute("aria-label", t("load.map", { count: layers.length, experts: numExperts }));
  }

  cellAt(event) {
    if (!this.data?.layers.length) return null;
    const { left, cell, row } = this.layout();
    const frame = this.canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - frame.left - left) / cell);
    const layer = Math.floor((event.clientY - frame.top) / row);
    const isIn = expert >= 0 && expert < this.data.num_experts && layer >= 0 && layer < this.data.layers.length;
    return isIn ? { layer, expert } : null;
  }

  key(event) {
    const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] || [];
    if (event.key === "Escape") this.point(null);
    if ((event.key === "Enter" || event.key === " ") && this.cursor) {
      event.preventDefault();
      this.onExpert(this.cursor);
    }
    if (down === undefined || !this.data?.layers.length) return;
    event.preventDefault();
    const { layers, num_experts: numExperts } = this.data;
    const at = this.cursor || { layer: down ? -1 : 0, expert: right ? -1 : 0 };
    const within = (value, end) => Math.max(0, Math.min(end - 1, value));
    this.point({ layer: within(at.layer + down, layers.length), expert: within(at.expert + right, numExperts) });
  }

  /** The words of a cell stand below the map, so that nothing is covered. */
  point(cell) {
    this.cursor = cell;
    byId("load-words").textContent = cell ? this.describe(cell) : t("load.hint");
  }

  describe({ layer, expert }) {
    const figure = this.figures[layer];
    const count = this.shown.load[layer][expert];
    const name = t("load.cell", { layer: layerName(this.data.layers[layer]), expert: String(expert) });
    if (!figure.mean) return `${name}: ${t("load.emptyLayer")}`;
    const own = t("load.cellCount", { ratio: fixed(count / figure.mean, 2), count, mean: fixed(figure.mean, 1) });
    return `${name}: ${own}. ${t("load.cellLayer", { ratio: fixed(figure.ratio, 2), dead: figure.dead, entropy: fixed(figure.entropy, 3) })}`;
  }
}
