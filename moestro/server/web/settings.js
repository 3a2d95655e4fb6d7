// What is asked of the server and how the page looks: kept in the browser, but for the key.

import { getKey, setKey } from "./api.js";
import { byId } from "./dom.js";
import { model } from "./model.js";
import { setLanguage, t } from "./strings.js";

const KEY = "moestro.settings";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const DEFAULTS = { system: "", temperature: null, top_p: null, max_tokens: null, seed: null, details: true, theme: "system", colour: "surprise", language: "auto", mode: null };

export class Settings {
  /** `onChange` is called after every change, `onFail` with a line where the browser cannot keep it. */
  constructor(onChange, onFail) {
    Object.assign(this, { onChange, onFail, values: { ...DEFAULTS } });
    this.dialog = byId("settings");
    this.form = byId("settings-form");
    this.load();
    this.form.addEventListener("submit", () => this.take());
    byId("open-settings").addEventListener("click", () => this.open());
    byId("theme").addEventListener("click", () => this.turnTheme());
    byId("cancel-settings").addEventListener("click", () => this.dialog.close());
    setLanguage(this.values.language);
    this.showTheme();
  }

  load() {
    try {
      const kept = JSON.parse(localStorage.getItem(KEY) || "{}");
      Object.keys(DEFAULTS).forEach((name) => { if (name in kept) this.values[name] = kept[name]; });
    } catch (error) {
      this.onFail(t("settings.unread", { why: error.message }));
    }
  }

  set(changes) {
    this.keep(changes);
    if ("language" in changes) setLanguage(this.values.language);
    this.showTheme();
    this.onChange();
  }

  /** Remember what changes nothing on the page by itself. */
  keep(changes) {
    Object.assign(this.values, changes);
    try {
      localStorage.setItem(KEY, JSON.stringify(this.values));
    } catch (error) {
      this.onFail(t("settings.unkept", { why: error.message }));
    }
  }

  /** `why`: what to say about the key. */
  open(field = "system", why = "") {
    const { elements } = this.form;
    NUMBERS.forEach((name) => {
      elements[name].value = this.values[name] ?? "";
      elements[name].placeholder = { seed: t("settings.random"), max_tokens: this.usualLength }[name] ?? model.sampling[name] ?? "";
    });
    elements.language.value = this.values.language;
    elements.system.value = this.values.system;
    elements.details.checked = this.values.details;
    elements.key.value = getKey();
    byId("key-note").textContent = why;
    byId("key-note").hidden = !why;
    if (!this.dialog.open) this.dialog.showModal();
    elements[field].focus();
  }

  /** The form's own checks have passed; an empty number stands for the model's own. */
  take() {
    const { elements } = this.form;
    const changes = { system: elements.system.value, details: elements.details.checked, language: elements.language.value };
    NUMBERS.forEach((name) => { changes[name] = elements[name].value === "" ? null : elements[name].valueAsNumber; });
    setKey(elements.key.value.trim());
    this.set(changes);
  }

  get usualLength() {
    return t("settings.lengths", { reply: model.replyTokens, text: model.textTokens });
  }

  turnTheme() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const order = dark ? ["system", "light", "dark"] : ["system", "dark", "light"];
    this.set({ theme: order[(order.indexOf(this.values.theme) + 1) % order.length] });
  }

  showTheme() {
    const { theme } = this.values;
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const label = t({ system: "theme.system", light: "theme.light", dark: "theme.dark" }[theme]);
    byId("theme").setAttribute("aria-label", label);
    byId("theme").title = label;
    byId("theme").querySelector("use").setAttribute("href", `#i-${theme}`);
  }

  /** The most tokens of an answer, or of one step of a text. */
  maxTokens(kind = "chat") {
    return this.values.max_tokens ?? (kind === "text" ? model.textTokens : model.replyTokens);
  }

  /** How to draw tokens, as a part of a request: what is set here, else what is usual for the model. */
  get sampling() {
    const given = NUMBERS.filter((name) => name !== "max_tokens" && this.values[name] !== null).map((name) => [name, this.values[name]]);
    return { ...model.sampling, ...Object.fromEntries(given), ...(this.values.details && { token_details: true, return_routes: true }) };
  }
}
