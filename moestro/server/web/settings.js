// What is asked of the server and how the page looks: kept in the browser, but for the key.

import { getKey, setKey } from "./api.js";
import { byId } from "./dom.js";

const KEY = "moestro.settings";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const DEFAULTS = { system: "", temperature: null, top_p: null, max_tokens: null, seed: null, details: true, theme: "system", colour: "likely" };

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
    this.showTheme();
  }

  load() {
    try {
      const kept = JSON.parse(localStorage.getItem(KEY) || "{}");
      Object.keys(DEFAULTS).forEach((name) => { if (name in kept) this.values[name] = kept[name]; });
    } catch (error) {
      this.onFail(`Settings could not be read: ${error.message}`);
    }
  }

  set(changes) {
    Object.assign(this.values, changes);
    try {
      localStorage.setItem(KEY, JSON.stringify(this.values));
    } catch (error) {
      this.onFail(`Settings last as long as this page: ${error.message}`);
    }
    this.showTheme();
    this.onChange();
  }

  /** `why`: what to say about the key. */
  open(field = "system", why = "") {
    const { elements } = this.form;
    NUMBERS.forEach((name) => { elements[name].value = this.values[name] ?? ""; });
    elements.system.value = this.values.system;
    elements.details.checked = this.values.details;
    elements.key.value = getKey();
    byId("key-note").textContent = why;
    byId("key-note").hidden = !why;
    if (!this.dialog.open) this.dialog.showModal();
    elements[field].focus();
  }

  /** The form's own checks have passed; an empty number leaves the choice to the server. */
  take() {
    const { elements } = this.form;
    const changes = { system: elements.system.value, details: elements.details.checked };
    NUMBERS.forEach((name) => { changes[name] = elements[name].value === "" ? null : elements[name].valueAsNumber; });
    setKey(elements.key.value.trim());
    this.set(changes);
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
    const label = `Theme: ${theme}`;
    byId("theme").setAttribute("aria-label", label);
    byId("theme").title = label;
    byId("theme").querySelector("use").setAttribute("href", `#i-${theme}`);
  }

  /** The part of a request that comes from here. */
  get sampling() {
    const given = NUMBERS.filter((name) => this.values[name] !== null).map((name) => [name, this.values[name]]);
    return { ...Object.fromEntries(given), ...(this.values.details && { token_details: true, return_routes: true }) };
  }
}
