// A text that the model continues in place: one field for what people and the model wrote.

import { byId } from "./dom.js";

const LEAST_ROWS = 7;

export class Writer {
  /** `act`: write(text), stop(), undo(), change() when somebody types. */
  constructor(act) {
    this.field = byId("text");
    this.act = act;
    byId("writer-form").addEventListener("submit", (event) => {
      event.preventDefault();
      act.write(this.text);
    });
    byId("undo").addEventListener("click", act.undo);
    this.field.addEventListener("input", () => {
      this.grow();
      act.change(this.text);
    });
    this.field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
        event.preventDefault();
        act.write(this.text);
      }
      if (event.key === "Escape") act.stop();
    });
  }

  get text() {
    return this.field.value;
  }

  /** While the model writes, nobody else does. */
  show(text, { isLive, canUndo }) {
    if (this.field.value !== text) this.field.value = text;
    this.field.readOnly = isLive;
    byId("undo").disabled = isLive || !canUndo;
    this.grow();
  }

  grow() {
    const line = parseFloat(getComputedStyle(this.field).lineHeight);
    this.field.style.height = "auto";
    this.field.style.height = `${Math.max(this.field.scrollHeight + 2, LEAST_ROWS * line)}px`;
  }

  focus() {
    this.field.focus();
    this.field.setSelectionRange(this.text.length, this.text.length);
  }
}
