// The conversations and the panel: beside the chat where there is room, over it where there is not.

import { byId } from "./dom.js";

const WIDE = { "list-open": matchMedia("(min-width: 82rem)"), "panel-open": matchMedia("(min-width: 62rem)") };
const NAMES = Object.keys(WIDE);

export class Drawers {
  /** `onChange` is called after a drawer was opened or closed. */
  constructor(onChange) {
    this.onChange = onChange;
  }

  /** As the width has it, now and whenever it changes. */
  start() {
    document.querySelectorAll("[data-drawer]").forEach((button) => button.addEventListener("click", () => this.toggle(button.dataset.drawer)));
    byId("scrim").addEventListener("click", () => this.closeAll());
    byId("close-list").addEventListener("click", () => this.close("list-open"));
    byId("close-panel").addEventListener("click", () => this.close("panel-open"));
    NAMES.forEach((name) => {
      WIDE[name].addEventListener("change", () => this.set(name, WIDE[name].matches));
      this.set(name, WIDE[name].matches);
    });
  }

  isOpen(name) {
    return document.body.classList.contains(name);
  }

  /** Whether it is open and covers nothing. */
  isBeside(name) {
    return this.isOpen(name) && WIDE[name].matches;
  }

  set(name, isOpen) {
    document.body.classList.toggle(name, isOpen);
    document.querySelectorAll(`[data-drawer="${name}"]`).forEach((button) => button.setAttribute("aria-expanded", String(isOpen)));
    this.onChange();
  }

  toggle(name) {
    const isOpen = !this.isOpen(name);
    if (isOpen) NAMES.filter((other) => other !== name && !WIDE[other].matches).forEach((other) => this.set(other, false));
    this.set(name, isOpen);
    if (isOpen && !WIDE[name].matches) byId(name === "list-open" ? "close-list" : "close-panel").focus();
  }

  open(name) {
    if (!this.isOpen(name)) this.toggle(name);
  }

  close(name) {
    if (!this.isOpen(name) || WIDE[name].matches) return;
    this.set(name, false);
    document.querySelector(`header [data-drawer="${name}"]`).focus();
  }

  closeAll() {
    NAMES.forEach((name) => this.close(name));
  }
}
