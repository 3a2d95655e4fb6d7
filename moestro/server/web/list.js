// The conversations that the browser keeps, found by their words.

import { byId, element, iconButton } from "./dom.js";
import { t } from "./strings.js";

export function renderList(store, current, onOpen, onRemove) {
  const words = byId("search").value.trim().toLowerCase();
  const matches = (one) => !words || one.messages.some(({ content }) => content.toLowerCase().includes(words));
  const items = store.list.filter(matches).map((one) => element("li", { class: one.id === current.id ? "current" : "" },
    element("button", { type: "button", class: "open", "aria-current": String(one.id === current.id), on: { click: () => onOpen(one) } }, one.title),
    iconButton("delete", t("list.delete", { title: one.title }), () => onRemove(one))));
  byId("conversations").replaceChildren(...items);
  byId("no-conversations").hidden = items.length > 0;
  byId("no-conversations").textContent = t(words ? "list.notFound" : "list.empty");
}
