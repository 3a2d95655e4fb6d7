// What is seen of a message: the text of people as it is, the text of the model as markdown or token by token.

import { copyFrom, element, fixed, iconButton, textButton, whole } from "./dom.js";
import { Markdown } from "./markdown.js";
import { t } from "./strings.js";
import { TokenView } from "./tokens.js";

const FINISH = { length: "finish.length", aborted: "finish.aborted", content_filter: "finish.filter", tool_calls: "finish.tool" };
const SLOWDOWN = 4; // a picture of the text is drawn at most a fifth of the time

/** ‹ 2 / 3 ›, where a message has siblings. */
function branches(message, context) {
  const all = context.conversation.siblings(message);
  if (all.length < 2) return "";
  const at = all.indexOf(message);
  const go = (step) => () => context.choose(all[at + step]);
  return element("span", { class: "branches" },
    iconButton("left", t("branch.previous"), go(-1), { disabled: at === 0 }),
    element("span", {}, `${at + 1} / ${all.length}`),
    iconButton("right", t("branch.next"), go(1), { disabled: at === all.length - 1 }));
}

const formatRate = (rate) => (rate < 100 ? fixed(rate, 1) : whole(rate));

const copyButton = (text) => {
  const button = iconButton("copy", t("copy"), () => copyFrom(button, text()));
  return button;
};

const toggleButton = (label, onClick, attributes = {}) =>
  element("button", { type: "button", class: "toggle", "aria-pressed": "false", on: { click: onClick }, ...attributes }, label);

export class UserView {
  constructor(message, context) {
    this.message = message;
    this.context = context;
    this.text = element("div", { class: "said" }, message.content);
    const actions = element("div", { class: "actions" }, branches(message, context), copyButton(() => message.content),
      iconButton("edit", t("edit.do"), () => this.edit()));
    this.node = element("article", { class: "user", "aria-label": t("you") }, this.text, actions);
  }

  edit() {
    const area = element("textarea", { class: "editor", "aria-label": t("edit.label"), rows: 3 });
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
      textButton(t("cancel"), close),
      element("button", { class: "primary" }, t("edit.ask"))));
    this.text.replaceWith(form);
    area.focus();
  }

  update() { return ""; }

  light() {}
}

export class AnswerView {
  /** `isText`: the text itself stands elsewhere, as a text that is continued. */
  constructor(message, context, isText = false) {
    Object.assign(this, { message, context, isText, tokens: null, frame: 0, pause: 0 });
    this.thoughts = new Markdown();
    this.answer = new Markdown();
    this.summary = element("summary");
    this.reasoning = element("details", { class: "reasoning" }, this.summary, this.thoughts.node);
    this.waiting = element("p", { class: "waiting" }, element("span", { class: "pulse" }), t("waiting"));
    this.error = element("div", { class: "error", role: "alert" });
    this.stats = element("span", { class: "stats" });
    this.toggle = toggleButton(t("tokens"), () => this.switchView());
    this.compare = toggleButton(t("compare"), () => context.compare.choose(message), { class: "toggle-compare", title: t("compare.hint") });
    this.more = textButton(t("continue"), () => context.extend(message), { class: "plain more", title: t("continue.hint") });
    this.copy = copyButton(() => message.content);
    this.again = iconButton("again", t("again"), () => context.regenerate(message));
    this.actions = element("div", { class: "actions" }, branches(message, context), this.copy, this.again, this.toggle, this.compare, this.more, this.stats);
    this.node = element("article", { class: "answer", "aria-label": t("answer") },
      this.reasoning, this.waiting, this.answer.node, this.error, this.actions);
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
    const hasTokens = Boolean(message.tokens?.length);
    this.node.classList.toggle("live", isLive);
    this.node.setAttribute("aria-busy", String(isLive));
    this.waiting.hidden = !isLive || Boolean(message.content || message.reasoning || hasTokens);
    this.updateReasoning(isLive);
    const news = this.answer.update(message.content, !isLive);
    this.answer.node.hidden = this.isText || Boolean(this.tokens);
    if (hasTokens) this.tokens?.update(isLive);
    this.toggle.hidden = !hasTokens;
    this.compare.hidden = isLive || !message.tokens?.some(({ routes }) => routes);
    this.more.hidden = isLive || this.isText || !this.context.canExtend(message);
    this.stats.textContent = this.describe(isLive);
    this.copy.hidden = !message.content || this.isText;
    this.again.hidden = isLive || Boolean(message.error);
    this.showChosen();
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
    this.summary.textContent = isThinking ? t("thinking") : seconds >= 0.1 ? t("thoughtFor", { seconds: fixed(seconds, 1) }) : t("thoughts");
    this.thoughts.update(reasoning, !isThinking);
  }

  describe(isLive) {
    const { usage, tokens, timing, finish, dropped } = this.message;
    const count = isLive ? tokens?.length : usage?.completion_tokens ?? tokens?.length;
    const parts = [];
    if (count) parts.push(t("tokens.count", { count }));
    const rest = count - (timing?.early || 1);
    if (timing?.span > 0 && rest > 0) parts.push(t("stats.rate", { rate: formatRate(rest / timing.span) }));
    if (!isLive && timing?.first >= 0) parts.push(t("stats.first", { seconds: fixed(timing.first, 2) }));
    if (dropped) parts.push(t(this.isText ? "stats.cut" : "stats.dropped", { count: dropped }));
    if (!isLive && finish && finish !== "stop") parts.push(t(FINISH[finish] ?? "finish.other", { reason: finish }));
    return parts.join(" · ");
  }

  /** The first answer of a comparison is marked until the second is chosen. */
  showChosen() {
    const { first } = this.context.compare;
    this.compare.setAttribute("aria-pressed", String(first === this.message));
    this.compare.textContent = first && first !== this.message ? t("compare.with") : t("compare");
  }

  /** What went wrong, and what helps. */
  showError() {
    const { error, retryIn } = this.message;
    this.error.hidden = !error;
    const state = `${error} ${retryIn}`;
    if (!error || this.error.dataset.shown === state) return;
    this.error.dataset.shown = state;
    const lines = [element("span", {}, error)];
    if (retryIn) lines.push(element("span", { class: "note" }, retryIn === "back" ? t("error.waitBack") : t("error.wait", { count: retryIn })));
    this.error.replaceChildren(...lines, ...this.remedies().map(([label, act]) => textButton(label, act)));
  }

  remedies() {
    const { message, context } = this;
    const { problem, retryIn } = message;
    const retry = [t("error.again"), () => context.retry(message)];
    const edit = [t("edit.question"), () => context.editQuestion(message)];
    if (retryIn) return [[t("error.stopWaiting"), () => context.stopWaiting()]];
    if (problem === "key") return [[t("key.enter"), context.askKey], retry];
    if (problem === "context") return [[t("new.chat"), context.begin], ...(this.isText ? [] : [edit])];
    if (problem === "request") return [...(this.isText ? [] : [edit]), [t("settings"), context.openSettings]];
    return context.canExtend(message) && !this.isText ? [[t("continue"), () => context.extend(message)]] : [retry];
  }

  switchView() {
    if (this.tokens) {
      this.tokens.node.remove();
      this.tokens = null;
      this.context.inspector.hide();
    } else {
      this.tokens = new TokenView(this.message, this.context);
      this.answer.node.after(this.tokens.node);
      this.context.look(this.message);
    }
    this.toggle.setAttribute("aria-pressed", String(Boolean(this.tokens)));
    this.update(this.node.classList.contains("live"));
  }

  /** Light up the tokens of an expert; `opens`: open the tokens for it if they are not. */
  light(spotlight, opens = false) {
    if (opens && !this.tokens && this.message.tokens?.length) this.switchView();
    this.tokens?.light(spotlight);
  }
}
