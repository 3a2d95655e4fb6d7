"use strict";
// Line charts: uPlot for the plane, own legend with values under the cursor. Colours come from the style sheet.

const redraws = [];

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const element = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

function compact(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
    if (size >= limit) return `${+(value / limit).toPrecision(3)}${letter}`;
  }
  if (size > 0 && size < 0.001) return value.toExponential(1).replace("e-", "e−");
  return String(+value.toPrecision(3));
}

// Cells of a comparison: the first in ink, then eight colours solid, dashed and dotted.
const cellColor = (index) => color(index ? `line-${(index - 1) % 8}` : "ink");
const cellDash = (index) => [undefined, [7, 4], [2, 3]][index ? Math.floor((index - 1) / 8) % 3 : 0];

function lineColor(line) {
  if (line.role === "cell") return cellColor(line.color);
  if (line.role === "total" || line.role === "final") return color("ink");
  if (line.role === "train") return color("faint");
  return color(`line-${line.color % 8}`);
}

// One aligned table for lines that have their own x: [x, y...], and the columns of each line.
function joinLines(lines) {
  const tables = lines.map((line) => (line.low ? [line.x, line.y, line.low, line.high] : [line.x, line.y]));
  let next = 1;
  const columns = tables.map((table) => {
    const first = next;
    next += table.length - 1;
    return { y: first, low: table.length > 2 ? first + 1 : 0, high: table.length > 2 ? first + 2 : 0 };
  });
  return { data: tables.length > 1 ? uPlot.join(tables) : tables[0], columns };
}

function seriesOf(lines, columns) {
  const series = [{}];
  const bands = [];
  lines.forEach((line, index) => {
    const stroke = () => lineColor(line);
    const dash = line.role === "cell" ? cellDash(line.color) : line.role === "domain" && line.color >= 8 ? [6, 4] : undefined;
    const marked = line.role === "plain" || line.role === "train" ? line.x.length < 2 : line.x.length < 40;
    series.push({
      label: line.label,
      stroke,
      width: { total: 2.5, final: 0, cell: 2, domain: 1.75, train: 1.25, plain: 1.75 }[line.role],
      dash,
      spanGaps: true,
      points: { show: marked, size: line.role === "final" ? 11 : 5, width: line.role === "final" ? 2.5 : 1, fill: line.role === "final" ? () => color("paper") : stroke },
    });
    if (!columns[index].low) return;
    series.push({ width: 0, points: { show: false } }, { width: 0, points: { show: false } });
    bands.push({ series: [columns[index].high, columns[index].low], fill: () => `${lineColor(line)}2e` });
  });
  return { series, bands };
}

function axes(format, x, y) {
  const base = {
    stroke: () => color("muted"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: () => color("rule"), width: 1 },
    ticks: { show: false },
  };
  const title = { labelFont: "11px system-ui, sans-serif", labelSize: 18, labelGap: 2 };
  const size = (plot, values) => 14 + Math.max(2, ...(values || []).map((text) => text.length)) * 6.5;
  return [
    { ...base, ...title, label: x, grid: { show: false }, values: (plot, ticks) => ticks.map(compact), space: 70, size: 28 },
    { ...base, ...title, label: y, values: (plot, ticks) => ticks.map(format), size, space: 36 },
  ];
}

function paintSwatch(swatch, line) {
  const dash = line.role === "cell" && cellDash(line.color);
  const paint = () => {
    const ink = lineColor(line);
    swatch.style.background = dash ? `repeating-linear-gradient(90deg, ${ink} 0 ${dash[0]}px, transparent ${dash[0]}px ${dash[0] + dash[1]}px)` : ink;
  };
  redraws.push(paint);
  paint();
}

function legend(lines, format) {
  const list = element("ul", "legend");
  const values = lines.map((line) => {
    const item = element("li");
    const button = element("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const swatch = element("span", `swatch ${line.role}`);
    paintSwatch(swatch, line);
    const value = element("span", "value");
    button.append(swatch, element("bdi", "", line.label), value);
    item.append(button);
    list.append(item);
    return { button, value };
  });
  const show = (table, columns, at) => lines.forEach((line, index) => {
    const own = table[columns[index].y];
    let row = at ?? own.length - 1;
    while (row > 0 && (own[row] === null || own[row] === undefined)) row -= 1;
    values[index].value.textContent = format(own[row]);
  });
  return { list, values, show };
}

function drawChart(box, chart) {
  const format = chart.percent ? (value) => (value === null || value === undefined ? "–" : `${+(value * 100).toPrecision(3)}%`) : compact;
  const { data, columns } = joinLines(chart.lines);
  const { series, bands } = seriesOf(chart.lines, columns);
  const { list, values, show } = legend(chart.lines, format);
  const title = element("h3", "", chart.title);
  const position = element("span", "position");
  title.append(position);
  const plane = element("div", "plane");
  const alone = chart.lines.length === 1; // the title is its legend
  box.append(title, ...(alone ? [] : [list]), plane);
  const locate = (at) => {
    const on = at !== null && at !== undefined;
    show(data, columns, on ? at : null);
    const own = alone ? values[0].value.textContent : "";
    position.textContent = [own, on ? `at ${compact(data[0][at])} tokens` : ""].filter(Boolean).join(" ");
  };
  const height = box.classList.contains("large") ? 320 : 210;
  const plot = new uPlot({
    width: Math.max(200, plane.clientWidth),
    height,
    padding: [8, 10, 0, 0],
    legend: { show: false },
    cursor: { sync: { key: "tokens", setSeries: false }, drag: { x: true, y: false }, points: { size: 7 }, y: false },
    scales: { x: { time: false }, y: { range: (plot, low, high) => rangeOf(low, high) } },
    axes: axes(format, chart.x || "tokens trained", chart.unit),
    series,
    bands,
    hooks: { setCursor: [(plot) => locate(plot.cursor.idx)] },
  }, data, plane);
  locate(null);
  values.forEach(({ button }, index) => button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    Object.values(columns[index]).filter(Boolean).forEach((column) => plot.setSeries(column, { show: on }));
  }));
  redraws.push(() => plot.redraw(false, true));
  new ResizeObserver(() => {
    if (Math.abs(plane.clientWidth - plot.width) > 1) plot.setSize({ width: plane.clientWidth, height });
  }).observe(plane);
}

function rangeOf(low, high) {
  if (low === null || high === null) return [0, 1];
  if (low === high) return low >= 0 ? [0, high * 1.25 || 1] : [low * 1.25, 0];
  const room = (high - low) * 0.06;
  return [low >= 0 && low - room < (high - low) * 0.15 ? 0 : low - room, high + room];
}
