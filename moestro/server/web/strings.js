// The page's words in the language of the browser, or the one chosen in the settings.

import { en } from "./strings-en.js";
import { ko } from "./strings-ko.js";

const TABLES = { en, ko };
const ATTRIBUTES = { label: "aria-label", title: "title", placeholder: "placeholder" };

let language = "en";

/** `choice`: auto, en or ko. */
export function setLanguage(choice) {
  const asked = choice in TABLES ? choice : navigator.languages.map((tag) => tag.slice(0, 2)).find((tag) => tag in TABLES);
  language = asked ?? "en";
  document.documentElement.lang = language;
  translate(document);
}

export const getLanguage = () => language;

/** A string with its `{values}`. "one|many" is chosen by `count`. Numbers are written as the language writes them. */
export function t(key, values = {}) {
  const text = TABLES[language][key];
  const forms = text.split("|");
  const form = forms.length > 1 && new Intl.PluralRules(language).select(values.count) !== "one" ? forms[1] : forms[0];
  return form.replace(/\{(\w+)\}/g, (_, name) => (Number.isInteger(values[name]) ? values[name].toLocaleString(language) : String(values[name])));
}

/** Fill in what the page's HTML names: data-t for text, data-t-label, data-t-title and data-t-placeholder. */
function translate(root) {
  root.querySelectorAll("[data-t]").forEach((node) => { node.textContent = t(node.dataset.t); });
  Object.entries(ATTRIBUTES).forEach(([name, attribute]) => {
    root.querySelectorAll(`[data-t-${name}]`).forEach((node) => node.setAttribute(attribute, t(node.getAttribute(`data-t-${name}`))));
  });
}
