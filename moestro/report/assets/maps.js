"use strict";
// Heat maps on a canvas: rows x experts, coloured by log2 of a ratio, from a quarter to four times the mean.

const RANGE = 2; // log2 at the ends of the colour scale

function decode(text, ArrayType) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let index = 0; index < raw.length; index += 1) bytes[index] = raw.charCodeAt(index);
  return new ArrayType(bytes.buffer);
}

// Colours are mixed in OKLab, so that equal steps of the value look like equal steps.
function toLab(hex) {
  const [r, g, b] = [1, 3, 5].map((at) => {
    const c = parseInt(hex.slice(at, at + 2), 16) / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

function toCss([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const channel = (c) => {
    const x = c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055;
    return Math.round(255 * Math.min(1, Math.max(0, x)));
  };
  const r = channel(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s);
  const g = channel(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s);
  const blue = channel(-0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s);
  return `rgb(${r},${g},${blue})`;
}

let scale = [];
function buildScale() {
  const [low, middle, high] = ["scale-low", "scale-middle", "scale-high"].map((name) => toLab(color(name)));
  scale = Array.from({ length: 129 }, (_, index) => {
    const at = (index - 64) / 64;
    const end = at < 0 ? low : high;
    return toCss(middle.map((value, axis) => value + (end[axis] - value) * Math.abs(at)));
  });
}
const scaleColor = (log2) => scale[Math.round(64 + 64 * Math.max(-1, Math.min(1, log2 / RANGE)))];

function drawScale(box, withDead) {
  const canvas = element("canvas");
  const paint = () => {
    canvas.width = scale.length;
    canvas.height = 1;
    const context = canvas.getContext("2d");
    scale.forEach((css, index) => { context.fillStyle = css; context.fillRect(index, 0, 1, 1); });
  };
  redraws.push(paint);
  paint();
  const ticks = element("div", "ticks");
  ["¼×", "½×", "mean", "2×", "4×"].forEach((text) => ticks.append(element("span", "", text)));
  const bar = element("div", "bar");
  bar.append(canvas, ticks);
  box.append(bar);
  if (!withDead) return;
  const dead = element("span", "dead", "no token");
  box.append(dead);
}

const tip = document.body.appendChild(element("div", "tip"));
tip.hidden = true;
function showTip(event, rows) {
  tip.replaceChildren(...rows.map((text, index) => element("div", index ? "" : "head", text)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - width - 8);
  const top = event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18;
  tip.style.transform = `translate(${Math.max(8, left)}px, ${top}px)`;
}

// view: { labels, columns (expert numbers in drawing order), log2(row, expert) or null for no token, describe(row, expert) }
class HeatMap {
  constructor(box, view) {
    this.view = view;
    this.canvas = element("canvas", "cells");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", view.title);
    box.append(this.canvas);
    this.box = box;
    redraws.push(() => this.draw());
    new ResizeObserver(() => this.draw()).observe(box);
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerdown", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  layout() {
    const { labels, columns } = this.view;
    const width = this.box.clientWidth;
    const context = this.canvas.getContext("2d");
    context.font = "11px system-ui, sans-serif";
    const widest = Math.max(...labels.map((text) => context.measureText(text).width));
    const left = Math.min(Math.ceil(widest) + 10, Math.round(width * 0.28));
    const cell = (width - left) / columns.length;
    const row = labels.length > 24 ? 11 : labels.length > 12 ? 17 : Math.max(22, Math.min(30, cell));
    return { width, left, cell, row, height: row * labels.length + 38 };
  }

  draw() {
    const { labels, columns, log2 } = this.view;
    const { width, left, cell, row, height } = this.layout();
    if (width <= 0) return;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    const gap = cell > 6 ? 1 : 0;
    const [muted, dead] = [color("muted"), color("dead")];
    labels.forEach((text, index) => {
      const top = index * row;
      if (row >= 11 && (row > 11 || index % 2 === 0)) {
        context.fillStyle = muted;
        context.textAlign = "right";
        context.fillText(fitText(context, text, left - 10), left - 8, top + row / 2);
      }
      columns.forEach((expert, at) => {
        const value = log2(index, expert);
        context.fillStyle = value === null ? dead : scaleColor(value);
        context.fillRect(left + at * cell, top, cell - gap + (gap ? 0 : 0.4), row - 1);
      });
    });
    this.drawTicks(context, left, cell, height);
  }

  drawTicks(context, left, cell, height) {
    const { columns, sorted } = this.view;
    context.fillStyle = color("muted");
    context.textAlign = "center";
    if (sorted && cell < 16) {
      context.textAlign = "left";
      context.fillText("experts, grouped by the domain they prefer", left, height - 26);
      return;
    }
    const stride = sorted ? 1 : [1, 2, 4, 8, 16, 32, 64, 128].find((step) => step * cell >= 22) || 256;
    columns.forEach((expert, at) => {
      if (at % stride === 0) context.fillText(String(expert), left + (at + 0.5) * cell, height - 26);
    });
    context.fillText("number of the expert", left + (columns.length * cell) / 2, height - 8);
  }

  hover(event) {
    const { labels, columns, describe } = this.view;
    const { left, cell, row } = this.layout();
    const frame = this.canvas.getBoundingClientRect();
    const at = Math.floor((event.clientX - frame.left - left) / cell);
    const index = Math.floor((event.clientY - frame.top) / row);
    if (at < 0 || at >= columns.length || index < 0 || index >= labels.length) {
      tip.hidden = true;
      return;
    }
    showTip(event, describe(index, columns[at]));
  }
}

function fitText(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let short = Array.from(text);
  while (short.length > 1 && context.measureText(`${short.join("")}…`).width > room) short = short.slice(0, -1);
  return `${short.join("")}…`;
}
