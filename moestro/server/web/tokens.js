// An answer token by token: coloured, with a legend, behind the tokens of its prompt; each opens in the inspector.

import { colourTokens, listWays } from "./colours.js";
import { element, layerName } from "./dom.js";
import { fit } from "./inspector.js";
import { t } from "./strings.js";
import { traceAnswer } from "./trace.js";

/** A row of tokens that the arrow keys go through. `onPick` gets the index. */
class TokenFlow {
  constructor(label, onPick) {
    this.onPick = onPick;
    this.node = element("div", { class: "token-text", role: "group", "aria-label": label });
    const tokenOf = (event) => event.target.closest(".token");
    const pick = (event) => { if (tokenOf(event)) this.pick(tokenOf(event)); };
    this.node.addEventListener("pointerover", pick);
    this.node.addEventListener("focusin", (event) => this.focus(tokenOf(event)));
    this.node.addEventListener("click", (event) => tokenOf(event)?.focus());
    this.node.addEventListener("keydown", (event) => this.key(event));
  }

  get spans() {
    return [...this.node.children];
  }

  pick(span) {
    this.onPick(this.spans.indexOf(span));
  }

  focus(span) {
    if (!span) return;
    this.node.querySelectorAll('[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
    span.tabIndex = 0;
    this.pick(span);
  }

  key(event) {
    const { spans } = this;
    const at = spans.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -at, End: spans.length - 1 - at }[event.key];
    if (step === undefined || at < 0) return;
    event.preventDefault();
    spans[Math.max(0, Math.min(spans.length - 1, at + step))].focus();
  }

  /** Add the tokens that are new. */
  grow(tokens) {
    tokens.slice(this.node.children.length).forEach((token) => {
      const text = (token.text || (token.name ?? "")).replace(/\n/g, "⏎\n") || "·";
      const kind = token.text === "" ? "token empty" : "token";
      this.node.append(element("span", { class: kind, role: "button", tabindex: this.node.children.length ? -1 : 0 }, text));
    });
  }

  paint(marks, way, lit) {
    this.node.dataset.colour = way.startsWith("layer-") ? "expert" : way === "none" ? "none" : "level";
    this.node.classList.toggle("spotlit", Boolean(lit));
    this.spans.forEach((span, index) => {
      const { level, hue } = marks[index];
      span.classList.toggle("unknown", level === undefined && hue === undefined);
      span.style.setProperty("--level", String(level ?? 0));
      span.style.setProperty("--hue", String(hue ?? 0));
      span.classList.toggle("lit", Boolean(lit?.[index]));
    });
  }
}

export class TokenView {
  /** `context`: settings, `setColour`, `inspector`, `light` and `getAsked(message)`, what the answer was asked with. */
  constructor(message, context) {
    Object.assign(this, { message, context, trace: null, isLive: false, spotlight: null });
    this.answer = new TokenFlow(t("tokens.answer"), (index) => this.show(index));
    this.prompt = new TokenFlow(t("tokens.prompt"), (index) => this.showPrompt(index));
    this.promptHead = element("summary");
    const isText = context.conversation.kind === "text"; // its beginning is read with its continuation
    this.promptBox = element("details", { class: "prompt-tokens", hidden: true, open: isText }, this.promptHead, this.prompt.node);
    this.select = element("select", { on: { change: () => this.choose() } });
    this.legend = element("ul", { class: "token-legend" });
    this.legendNote = element("p", { class: "note" });
    this.note = element("p", { class: "note", role: "status", hidden: true });
    this.lightNote = element("button", { type: "button", class: "chip", hidden: true, on: { click: () => context.light(null) } }, "✕");
    this.node = element("div", { class: "token-view" },
      element("div", { class: "token-bar" }, element("label", {}, t("colour.label"), this.select), this.legend, this.lightNote),
      this.legendNote, this.note, this.promptBox, this.answer.node);
    this.offer([]);
  }

  /** The tokens of the answer, with what the trace knows of them beside what the stream told. */
  get tokens() {
    const traced = this.trace?.answer;
    return this.message.tokens.map((token, at) => (traced?.[at] ? { ...token, ...traced[at], text: token.text } : token));
  }

  /** Add what is new. A finished answer is traced. */
  update(isLive = false) {
    this.isLive = isLive;
    this.answer.grow(this.message.tokens);
    const routes = this.tokens.find((token) => token.routes)?.routes;
    if (routes) this.offer(fit(routes).names);
    this.paint();
    if (!isLive && this.trace?.answer.length !== this.message.tokens.length) this.fetchTrace();
  }

  async fetchTrace() {
    this.say(t("trace.running"));
    try {
      this.trace = await traceAnswer(this.message, this.context.getAsked(this.message));
    } catch (error) {
      this.say(t("trace.failed", { why: error.message }));
      return;
    }
    this.say("");
    this.prompt.node.replaceChildren();
    this.prompt.grow(this.trace.prompt);
    this.promptHead.textContent = t("tokens.promptCount", { count: this.trace.prompt.length });
    this.promptBox.hidden = false;
    this.paint();
    if (this.shown !== undefined && this.node.isConnected) this.show(this.shown);
  }

  say(text) {
    this.note.textContent = text;
    this.note.hidden = !text;
  }

  offer(names) {
    const ways = listWays(names);
    if (this.select.options.length === ways.length) return;
    this.select.replaceChildren(...ways.map(([value, text]) => element("option", { value }, text)));
    this.select.value = this.context.settings.colour;
    if (!this.select.value) this.select.value = "surprise";
  }

  choose() {
    this.context.setColour(this.select.value);
    this.paint();
  }

  paint() {
    const way = this.select.value;
    const { tokens } = this;
    const prompt = this.trace?.prompt ?? [];
    const { marks, legend, note } = colourTokens([...tokens, ...prompt], tokens.length, way);
    const lit = this.spotlight && [...tokens, ...prompt].map(({ routes }) => routes?.[this.spotlight.layer]?.includes(this.spotlight.expert));
    this.answer.paint(marks.slice(0, tokens.length), way, lit?.slice(0, tokens.length));
    if (prompt.length) this.prompt.paint(marks.slice(tokens.length), way, lit?.slice(tokens.length));
    this.legend.replaceChildren(...legend.map((entry) => this.swatch(entry)));
    this.legendNote.textContent = note;
    this.writeLight(lit, tokens.length);
  }

  swatch({ level, hue, text, count }) {
    const box = element("span", { class: level === undefined ? (hue === undefined ? "swatch" : "swatch hue") : "swatch level" });
    box.style.setProperty("--level", String(level ?? 0));
    box.style.setProperty("--hue", String(hue ?? 0));
    return element("li", {}, box, text, element("span", { class: "figure" }, ` ×${count}`));
  }

  /** Light up the tokens that went through an expert of a layer; null for none. */
  light(spotlight) {
    this.spotlight = spotlight;
    this.paint();
  }

  writeLight(lit, count) {
    this.lightNote.hidden = !lit;
    if (!lit) return;
    const { names } = fit(this.message.tokens.find((token) => token.routes)?.routes ?? []);
    const { layer, expert } = this.spotlight;
    const found = lit.slice(0, count).filter(Boolean).length;
    const words = t("light.count", { layer: layerName(names[layer] ?? String(layer)), expert: String(expert), found, of: count });
    this.lightNote.textContent = `${words} ✕`;
    this.lightNote.setAttribute("aria-label", t("light.end", { words }));
  }

  show(index) {
    if (index < 0) return;
    this.shown = index;
    const isLast = index === this.message.tokens.length - 1;
    const whyNot = this.isLive ? t("experts.notYet") : isLast ? t("experts.last") : t("experts.unknown");
    this.context.inspector.show(this.tokens[index], { whyNot, vocabSize: this.trace?.vocabSize });
  }

  showPrompt(index) {
    if (index < 0) return;
    this.shown = undefined;
    this.context.inspector.show(this.trace.prompt[index], { vocabSize: this.trace.vocabSize });
  }
}
