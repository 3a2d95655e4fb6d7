// Making elements, reading colours of the style sheet, numbers in words.

import { getLanguage, t } from "./strings.js";

const SVG = "http://www.w3.org/2000/svg";

function fill(node, { on = {}, ...attributes }, children) {
  Object.entries(attributes).forEach(([name, value]) => {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined) node.setAttribute(name, String(value));
  });
  Object.entries(on).forEach(([name, listener]) => node.addEventListener(name, listener));
  node.append(...children);
  return node;
}

/** An element: `on` holds listeners, other attributes are set as they are, children are nodes or text (never HTML). */
export const element = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

export const icon = (name) => svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#i-${name}` }));

/** A quiet button of an icon whose name is read out and shown on hover. */
export const iconButton = (name, label, onClick, attributes = {}) =>
  element("button", { type: "button", class: "quiet", "aria-label": label, title: label, on: { click: onClick }, ...attributes }, icon(name));

export const textButton = (label, onClick, attributes = {}) =>
  element("button", { type: "button", class: "plain", on: { click: onClick }, ...attributes }, label);

export const byId = (id) => document.getElementById(id);
export const whole = (value) => Math.round(value).toLocaleString(getLanguage());
export const fixed = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "–");
export const layerName = (name) => (/^\d+$/.test(name) ? t("layer", { name }) : name);

/** A share as a percentage, with as many digits as say something. */
export const percent = (share, digits = share >= 0.1 || share < 0.0005 ? 0 : 1) => t("percent", { value: fixed(100 * share, digits) });

/** Also where the page is not served over TLS or from this machine, and there is no crypto.randomUUID. */
export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");

const probe = element("span", { hidden: true });
document.body.append(probe);

/** What a CSS colour comes to in the present theme, as a canvas understands it. */
export function resolveColor(css) {
  probe.style.color = css;
  return getComputedStyle(probe).color;
}

export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { class: "offscreen" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy"); // the only way on a page without TLS
  area.remove();
  if (!done) throw new Error(t("copy.refused"));
}

/** Copy, and say so on the button for a moment. */
export async function copyFrom(button, text) {
  const label = button.getAttribute("aria-label");
  const say = (word) => {
    button.setAttribute("aria-label", word);
    button.dataset.done = word;
  };
  try {
    await copyText(text);
    say(t("copy.done"));
  } catch (error) {
    say(t("copy.failed", { why: error.message }));
  }
  setTimeout(() => {
    button.setAttribute("aria-label", label);
    delete button.dataset.done;
  }, 1600);
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** A canvas of a size in CSS pixels and its context, sharp on any screen. */
export function prepareCanvas(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}
