// What is seen of a message: the text of people as it is, the text of the model as markdown or token by token.

import { copyFrom, element, fixed, iconButton, plural, whole } from "./dom.js";
import { Markdown } from "./markdown.js";
import { hideTip } from "./tip.js";
import { TokenView } from "./tokens.js";

const FINISH = {
  length: "stopped at the length limit", aborted: "stopped by you", content_filter: "stopped by a filter", tool_calls: "asked for a tool",
};
const SLOWDOWN = 4; // a picture of the text is drawn at most a fifth of the time

/** ‹ 2 / 3 ›, where a message has siblings. */
function branches(message, context) {
  const all = context.conversation.siblings(message);
  if (all.length < 2) return "";
  const at = all.indexOf(message);
  const go = (step) => () => context.choose(all[at + step]);
  return element("span", { class: "branches" },
    iconButton("left", "Previous version", go(-1), { disabled: at === 0 }),
    element("span", {}, `${at + 1} / ${all.length}`),
    iconButton("right", "Next version", go(1), { disabled: at === all.length - 1 }));
}

const formatRate = (rate) => (rate < 100 ? fixed(rate, 1) : whole(rate));

const copyButton = (text) => {
  const button = iconButton("copy", "Copy", () => copyFrom(button, text()));
  return button;
};

export class UserView {
  constructor(message, context) {
    this.message = message;
    this.context = context;
    this.text = element("div", { class: "said" }, message.content);
    const actions = element("div", { class: "actions" }, branches(message, context), copyButton(() => message.content),
      iconButton("edit", "Edit and ask again", () => this.edit()));
    this.node = element("article", { class: "user", "aria-label": "You" }, this.text, actions);
  }

  edit() {
    const area = element("textarea", { class: "editor", "aria-label": "Edit your message", rows: 3 });
    area.value = this.message.content;
    const close = () => form.replaceWith(this.text);
    const form = element("form", {
      class: "edit",
      on: {
        submit: (event) => {
          event.preventDefault();
          if (area.value.trim()) this.context.edit(this.message, area.value);
        },
        keydown: (event) => { if (event.key === "Escape") close(); },
      },
    }, area, element("div", { class: "row" },
      element("button", { type: "button", class: "plain", on: { click: close } }, "Cancel"),
      element("button", { class: "primary" }, "Ask again")));
    this.text.replaceWith(form);
    area.focus();
  }

  update() { return ""; }
}

export class AnswerView {
  constructor(message, context) {
    this.message = message;
    this.context = context;
    this.thoughts = new Markdown();
    this.answer = new Markdown();
    this.tokens = null;
    this.summary = element("summary");
    this.reasoning = element("details", { class: "reasoning" }, this.summary, this.thoughts.node);
    this.waiting = element("p", { class: "waiting" }, element("span", { class: "pulse" }), "waiting for the first token");
    this.error = element("div", { class: "error", role: "alert" });
    this.stats = element("span", { class: "stats" });
    this.toggle = element("button", { type: "button", class: "toggle", "aria-pressed": "false", on: { click: () => this.switchView() } }, "Tokens");
    this.copy = copyButton(() => message.content);
    this.again = iconButton("again", "Answer again", () => context.regenerate(message));
    this.actions = element("div", { class: "actions" }, branches(message, context), this.copy, this.again, this.toggle, this.stats);
    this.node = element("article", { class: "answer", "aria-label": "Answer" },
      this.reasoning, this.waiting, this.answer.node, this.error, this.actions);
    this.frame = 0;
    this.pause = 0;
  }

  /** Draw soon; while the text is long, rarely enough to leave the page its time. `tell` gets text that is settled. */
  schedule(tell) {
    if (this.frame) return;
    this.frame = setTimeout(() => {
      const start = performance.now();
      tell(this.update(true));
      this.pause = (performance.now() - start) * SLOWDOWN;
      this.frame = 0;
    }, Math.max(30, this.pause));
  }

  update(isLive) {
    if (!isLive && this.frame) {
      clearTimeout(this.frame);
      this.frame = 0;
    }
    const { message } = this;
    this.node.classList.toggle("live", isLive);
    this.node.setAttribute("aria-busy", String(isLive));
    this.waiting.hidden = !isLive || Boolean(message.content || message.reasoning || message.tokens?.length);
    this.updateReasoning(isLive);
    const news = this.answer.update(message.content, !isLive);
    this.answer.node.hidden = Boolean(this.tokens);
    this.tokens?.update(isLive);
    this.toggle.hidden = !message.tokens?.length;
    this.stats.textContent = this.describe(isLive);
    this.copy.hidden = !message.content;
    this.again.hidden = isLive || Boolean(message.error);
    this.showError();
    return news;
  }

  updateReasoning(isLive) {
    const { reasoning, content, timing } = this.message;
    this.reasoning.hidden = !reasoning || Boolean(this.tokens);
    if (!reasoning) return;
    const isThinking = isLive && !content;
    const seconds = timing?.thought;
    this.reasoning.classList.toggle("thinking", isThinking);
    this.summary.textContent = isThinking ? "thinking…" : seconds >= 0.1 ? `Thought for ${fixed(seconds, 1)} s` : "Thoughts";
    this.thoughts.update(reasoning, !isThinking);
  }

  describe(isLive) {
    const { usage, tokens, timing, finish } = this.message;
    const count = usage?.completion_tokens ?? tokens?.length;
    const parts = [];
    if (count) parts.push(plural(count, "token"));
    const rest = count - (timing?.early || 1);
    if (timing?.span > 0 && rest > 0) parts.push(`${formatRate(rest / timing.span)} tokens/s`);
    if (!isLive && timing?.first >= 0) parts.push(`first after ${fixed(timing.first, 2)} s`);
    if (!isLive && finish && finish !== "stop") parts.push(FINISH[finish] || `ended: ${finish}`);
    return parts.join(" · ");
  }

  showError() {
    const { error } = this.message;
    this.error.hidden = !error;
    if (!error || this.error.dataset.shown === error) return;
    this.error.dataset.shown = error;
    const buttons = [element("button", { type: "button", class: "plain", on: { click: () => this.context.retry(this.message) } }, "Try again")];
    if (/API key/.test(error)) buttons.unshift(element("button", { type: "button", class: "plain", on: { click: this.context.askKey } }, "Enter key"));
    this.error.replaceChildren(element("span", {}, error), ...buttons);
  }

  switchView() {
    hideTip();
    if (this.tokens) {
      this.tokens.node.remove();
      this.tokens = null;
    } else {
      this.tokens = new TokenView(this.message.tokens, this.context.settings.colour);
      this.tokens.onColour = (colour) => this.context.setColour(colour);
      this.answer.node.after(this.tokens.node);
    }
    this.toggle.setAttribute("aria-pressed", String(Boolean(this.tokens)));
    this.update(this.node.classList.contains("live"));
  }
}
