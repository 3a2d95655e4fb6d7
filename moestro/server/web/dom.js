// Making elements, reading colours of the style sheet, numbers in words.

const SVG = "http://www.w3.org/2000/svg";

/** An element: `on` holds listeners, other attributes are set as they are, children are nodes or text (never HTML). */
export function element(tag, { on = {}, ...attributes } = {}, ...children) {
  const node = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined) node.setAttribute(name, String(value));
  });
  Object.entries(on).forEach(([name, listener]) => node.addEventListener(name, listener));
  node.append(...children);
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A quiet button of an icon whose name is read out and shown on hover. */
export const iconButton = (name, label, onClick, attributes = {}) =>
  element("button", { type: "button", class: "quiet", "aria-label": label, title: label, on: { click: onClick }, ...attributes }, icon(name));

export const byId = (id) => document.getElementById(id);
export const whole = (value) => Math.round(value).toLocaleString("en");
export const fixed = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "–");
export const layerName = (name) => (/^\d+$/.test(name) ? `layer ${name}` : name);
export const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;

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
  if (!done) throw new Error("the browser does not allow copying here");
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
    say("Copied");
  } catch (error) {
    say(`Not copied: ${error.message}`);
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
