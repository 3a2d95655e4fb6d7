"use strict";
// Fills the page of a comparison: learning curves, dots of the seeds, colours of the tables.

const data = JSON.parse(document.getElementById("data").textContent);
const HALF = 0.5;

// One range of bits per byte for every axis, so that switching the axis moves nothing up or down.
function commonRange(charts, from) {
  let [low, high] = [Infinity, -Infinity];
  Object.values(charts).forEach(({ lines }) => {
    const start = from * Math.max(...lines.map((line) => line.x.at(-1)));
    lines.forEach((line) => line.x.forEach((x, index) => {
      if (x < start) return;
      low = Math.min(low, (line.low || line.y)[index]);
      high = Math.max(high, (line.high || line.y)[index]);
    }));
  });
  const room = (high - low) * 0.06 || 0.1;
  return [low - room, high + room];
}

// The line between its two points around x; nothing before its first and after its last.
function valueAt({ x, y }, at) {
  const next = x.findIndex((value) => value >= at);
  if (next < 0 || (next === 0 && x[0] > at)) return null;
  if (x[next] === at) return y[next];
  const share = (at - x[next - 1]) / (x[next] - x[next - 1]);
  return y[next - 1] + share * (y[next] - y[next - 1]);
}

function drawCurves(box, charts) {
  const plane = box.querySelector(".plane");
  const position = box.querySelector("output");
  const chosen = (name) => box.querySelector(`input[name="${name}"]:checked`).value;
  const bits = (value) => (Number.isFinite(value) ? value.toFixed(3) : "–");
  const { list, values } = legend(charts.tokens.lines, bits);
  const hidden = new Set();
  let plot;
  let columns;
  box.querySelector(".curve-legend").append(list);
  const reach = (index, visit) => Object.values(columns[index]).filter(Boolean).forEach(visit);
  const draw = () => {
    const chart = charts[chosen("axis")];
    const late = chosen("part") === "half";
    const joined = joinLines(chart.lines);
    columns = joined.columns;
    const table = joined.data;
    const [first, end] = [table[0][0], table[0].at(-1)];
    const start = late ? end * HALF : Math.min(first, end * 0.02);
    const limits = commonRange(charts, late ? HALF : 0);
    const locate = (at) => {
      const on = at !== null && at !== undefined;
      values.forEach(({ value }, index) => { value.textContent = on ? bits(valueAt(chart.lines[index], table[0][at])) : ""; });
      position.textContent = on ? `at ${compact(table[0][at])} ${chart.unit}` : `by ${chart.unit}`;
    };
    const size = () => ({ width: Math.max(200, plane.clientWidth), height: plane.clientWidth < 520 ? 280 : 380 });
    if (plot) plot.destroy();
    plot = new uPlot({
      ...size(),
      padding: [8, 14, 0, 0],
      legend: { show: false },
      cursor: { drag: { x: true, y: false }, points: { size: 7 }, y: false },
      focus: { alpha: 0.18 },
      scales: {
        x: { time: false, range: (own, low, high) => (low <= first && high >= end ? [start, end] : [low, high]) },
        y: { range: () => limits },
      },
      axes: axes(compact, chart.unit, "bits per byte"),
      ...seriesOf(chart.lines, columns),
      hooks: { setCursor: [(own) => locate(own.cursor.idx)] },
    }, table, plane);
    hidden.forEach((index) => reach(index, (column) => plot.setSeries(column, { show: false })));
    locate(null);
    return size;
  };
  values.forEach(({ button }, index) => {
    button.addEventListener("click", () => {
      const on = hidden.delete(index);
      if (!on) hidden.add(index);
      button.setAttribute("aria-pressed", String(on));
      reach(index, (column) => plot.setSeries(column, { show: on }));
    });
    button.addEventListener("pointerenter", () => plot.setSeries(columns[index].y, { focus: true }));
    button.addEventListener("pointerleave", () => plot.setSeries(null, { focus: false }));
  });
  box.querySelectorAll("input").forEach((input) => input.addEventListener("change", draw));
  addDownloads(box, data.files, () => `curves-${chosen("axis")}`);
  const size = draw();
  redraws.push(() => plot.redraw(false, true));
  new ResizeObserver(() => {
    if (Math.abs(plane.clientWidth - plot.width) > 1) plot.setSize(size());
  }).observe(plane);
}

const SVG = "http://www.w3.org/2000/svg";
function shape(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, String(value)));
  if (text !== undefined) node.textContent = text;
  return node;
}

// Round numbers at equal steps from `low` to `high`, at most `count`.
function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) ticks.push(+at.toPrecision(12));
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return { ticks, digits };
}

const measure = document.createElement("canvas").getContext("2d");

// One row a cell: a dot for every seed, a tick for the mean, a bar for its interval.
class DotPlot {
  constructor(box, figure) {
    this.box = box;
    this.figure = figure;
    this.limit(figure.rows.flatMap((row) => row.dots.map((dot) => dot.value)), figure.rows.flatMap((row) => row.interval || []));
    redraws.push(() => this.draw());
    new ResizeObserver(() => this.draw()).observe(box);
    this.draw();
  }

  // The axis holds every dot, and intervals as far as they leave the dots half of its width: those of two seeds are huge.
  limit(dots, ends) {
    let [low, high] = [Math.min(...dots), Math.max(...dots)];
    const reach = (high - low) / 2 || 0.05;
    low = Math.max(low - reach, Math.min(low, ...ends));
    high = Math.min(high + reach, Math.max(high, ...ends));
    if (this.figure.zero) low = Math.min(0, low);
    const room = (high - low) * 0.04 || 0.05;
    this.low = this.figure.zero && low === 0 ? 0 : low - room;
    this.high = high + room;
  }

  format(value) {
    return this.figure.percent ? `${(value * 100).toFixed(this.figure.digits)}%` : value.toFixed(this.figure.digits);
  }

  draw() {
    const { rows } = this.figure;
    const width = this.box.clientWidth;
    if (width <= 0) return;
    measure.font = "13px system-ui, sans-serif";
    const narrow = width < 460; // the label stands above its row
    const widest = Math.max(...rows.map((row) => measure.measureText(row.label).width));
    const left = narrow ? 8 : Math.min(Math.ceil(widest) + 18, Math.round(width * 0.34));
    const [right, pitch] = [62, narrow ? 50 : 30];
    const height = pitch * rows.length + 44;
    const plot = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": this.figure.title });
    const place = (value) => left + ((value - this.low) / (this.high - this.low)) * (width - left - right);
    this.drawAxis(plot, place, height, Math.max(2, Math.floor((width - left - right) / 80)));
    rows.forEach((row, index) => {
      const top = index * pitch + (narrow ? 34 : pitch / 2);
      const label = narrow ? { x: left, y: top - 20 } : { x: left - 14, y: top, "text-anchor": "end" };
      plot.append(shape("text", { ...label, class: "label" }, fitText(measure, row.label, narrow ? width - 16 : left - 16)));
      plot.append(shape("text", { x: width, y: top, class: "mean", "text-anchor": "end" }, this.format(row.mean)));
      this.drawRow(plot, row, place, top);
    });
    this.box.replaceChildren(plot);
  }

  drawAxis(plot, place, height, count) {
    const { ticks, digits } = niceTicks(this.low, this.high, count);
    ticks.forEach((value) => {
      plot.append(shape("line", { x1: place(value), x2: place(value), y1: 0, y2: height - 40, class: "rule" }));
      const text = this.figure.percent ? `${+(value * 100).toFixed(Math.max(0, digits - 2))}%` : value.toFixed(digits);
      plot.append(shape("text", { x: place(value), y: height - 26, class: "tick", "text-anchor": "middle" }, text));
    });
    const middle = place((this.low + this.high) / 2);
    plot.append(shape("text", { x: middle, y: height - 8, class: "tick", "text-anchor": "middle" }, this.figure.unit));
    const first = this.figure.rows.find((row) => row.color === 0);
    if (!first) return;
    plot.append(shape("line", { x1: place(first.mean), x2: place(first.mean), y1: 0, y2: height - 40, class: "reference" }));
  }

  drawRow(plot, row, place, top) {
    const ink = cellColor(row.color);
    if (row.interval) {
      const [x1, x2] = row.interval.map((value) => place(Math.min(this.high, Math.max(this.low, value))));
      const cut = row.interval[0] < this.low || row.interval[1] > this.high;
      plot.append(shape("line", { x1, x2, y1: top, y2: top, stroke: ink, class: cut ? "interval cut" : "interval" }));
    }
    const spread = Math.min(4, 12 / row.dots.length); // seeds one below the other, so that equal ones are all seen
    row.dots.forEach((dot, index) => {
      const cy = top + (index - (row.dots.length - 1) / 2) * spread;
      const node = shape("circle", { cx: place(dot.value), cy, r: 3.6, fill: ink, class: "dot" });
      const rows = [row.label, `seed ${dot.seed}: ${this.format(dot.value)}`, this.describe(row)];
      node.addEventListener("pointermove", (event) => showTip(event, rows));
      node.addEventListener("pointerleave", () => { tip.hidden = true; });
      plot.append(node);
    });
    if (row.dots.length > 1) plot.append(shape("line", { x1: place(row.mean), x2: place(row.mean), y1: top - 10, y2: top + 10, stroke: ink, class: "middle" }));
  }

  describe(row) {
    const interval = row.interval ? `, 95% interval ${row.interval.map((value) => this.format(value)).join(" to ")}` : "";
    return `mean ${this.format(row.mean)}${interval}`;
  }
}

function paintCell(cell) {
  const at = Number(cell.dataset.shade); // -1 … 1
  const paint = () => { cell.style.background = scaleColor(RANGE * 0.55 * at); };
  redraws.push(paint);
  paint();
}

buildScale();
redraws.push(buildScale);
document.querySelectorAll("#figure-curves").forEach((box) => drawCurves(box, data.curves));
document.querySelectorAll("[data-dots]").forEach((box) => {
  new DotPlot(box, data.dots[box.dataset.dots]);
  addDownloads(box.parentElement, data.files, () => box.dataset.dots);
});
document.querySelectorAll("[data-cell]").forEach((swatch) => paintSwatch(swatch, { role: "cell", color: Number(swatch.dataset.cell) }));
document.querySelectorAll("[data-shade]").forEach(paintCell);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((redraw) => redraw()));
document.documentElement.classList.add("drawn");
