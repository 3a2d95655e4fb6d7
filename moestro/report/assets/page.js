"use strict";
// Fills the page: charts, the load map with its scrubber, experts by domain, bias trajectories.

const data = JSON.parse(document.getElementById("data").textContent);
const layerName = (name) => (/^\d+$/.test(name) ? `layer ${name}` : name);
const whole = (value) => Math.round(value).toLocaleString("en");
const times = (ratio) => `${ratio >= 10 ? ratio.toFixed(0) : ratio.toFixed(2)}× mean`;

function option(value, text) {
  const node = element("option", "", text);
  node.value = value;
  return node;
}

function drawLoads(box, loads) {
  const ratios = decode(loads.ratios, Uint16Array);
  const { layers, experts, unit, steps } = loads;
  const frames = steps.length;
  const slider = box.querySelector("input");
  const label = box.querySelector("output");
  const play = box.querySelector("button");
  let frame = frames - 1;
  const ratio = (layer, expert) => ratios[(frame * layers.length + layer) * experts + expert] / unit;
  const view = {
    title: "Load of every expert by layer, relative to the layer's mean",
    labels: layers.map(layerName),
    columns: Array.from({ length: experts }, (_, expert) => expert),
    log2: (layer, expert) => (ratio(layer, expert) > 0 ? Math.log2(ratio(layer, expert)) : null),
    describe: (layer, expert) => {
      const mean = loads.means[frame][layer];
      const load = ratio(layer, expert) * mean;
      return [`${layerName(layers[layer])}, expert ${expert}`, times(ratio(layer, expert)), `${whole(load)} assignments (mean ${whole(mean)})`];
    },
  };
  const map = new HeatMap(box.querySelector(".map"), view);
  drawScale(box.querySelector(".scale"), true);
  const show = (next) => {
    frame = next;
    slider.value = String(frame);
    const [first, last] = steps[frame];
    label.textContent = `${first === last ? `step ${whole(first)}` : `steps ${whole(first)}–${whole(last)}`} · ${compact(loads.tokens[frame])} tokens`;
    map.draw();
  };
  slider.max = String(frames - 1);
  slider.addEventListener("input", () => show(Number(slider.value)));
  let timer = 0;
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (frame === frames - 1) show(0);
    play.textContent = "Pause";
    timer = setInterval(() => { if (frame + 1 < frames) show(frame + 1); else stop(); }, Math.max(40, 8000 / frames));
  });
  show(frame);
}

function drawDomains(box, domains) {
  const { names, layers, experts } = domains;
  const log2 = decode(domains.log2, Int16Array);
  const counts = decode(domains.counts, Uint32Array);
  const [rows, order] = box.querySelectorAll("select");
  const at = (domain, layer, expert) => (domain * layers.length + layer) * experts + expert;
  const seen = (layer, expert) => names.some((_, domain) => counts[at(domain, layer, expert)] > 0);
  const byLayer = element("optgroup");
  byLayer.label = "one layer, every domain";
  layers.forEach((name, index) => byLayer.append(option(`l${index}`, layerName(name))));
  const byDomain = element("optgroup");
  byDomain.label = "one domain, every layer";
  names.forEach((name, index) => byDomain.append(option(`d${index}`, name)));
  rows.append(byLayer, byDomain);
  rows.value = `l${Math.max(0, layers.filter((name) => /^\d+$/.test(name)).length - 1)}`;
  const view = { title: "Preference of experts for domains" };
  const preferred = (layer, expert) => names.reduce((best, _, domain) => (log2[at(domain, layer, expert)] > log2[at(best, layer, expert)] ? domain : best), 0);
  const update = () => {
    const [kind, index] = [rows.value[0], Number(rows.value.slice(1))];
    const cell = kind === "l" ? (row, expert) => [row, index, expert] : (row, expert) => [index, row, expert];
    order.disabled = kind === "d";
    view.sorted = kind === "l" && order.value === "preference";
    view.labels = kind === "l" ? names : layers.map(layerName);
    view.columns = Array.from({ length: experts }, (_, expert) => expert);
    if (view.sorted) {
      const key = view.columns.map((expert) => {
        const domain = preferred(index, expert);
        return seen(index, expert) ? domain * 100 - log2[at(domain, index, expert)] / 1000 : Infinity;
      });
      view.columns.sort((a, b) => (key[a] === key[b] ? a - b : key[a] - key[b]));
    }
    view.log2 = (row, expert) => {
      const [domain, layer] = cell(row, expert);
      return seen(layer, expert) ? log2[at(domain, layer, expert)] / 1000 : null;
    };
    view.describe = (row, expert) => {
      const [domain, layer] = cell(row, expert);
      const value = log2[at(domain, layer, expert)] / 1000;
      return [`${names[domain]}: ${layerName(layers[layer])}, expert ${expert}`, `log2 ${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}, ${times(2 ** value)} share`, `${whole(counts[at(domain, layer, expert)])} assignments`];
    };
  };
  update();
  const map = new HeatMap(box.querySelector(".map"), view);
  drawScale(box.querySelector(".scale"), true);
  const change = () => { update(); map.draw(); };
  rows.addEventListener("change", change);
  order.addEventListener("change", change);
}

function drawBiases(box, biases) {
  const { layers, experts, low, high, tokens } = biases;
  const values = decode(biases.values, Uint16Array);
  const points = tokens.length;
  const select = box.querySelector("select");
  const label = box.querySelector("output");
  const plane = box.querySelector(".plane");
  layers.forEach((name, index) => select.append(option(String(index), layerName(name))));
  const table = (layer) => [tokens, ...Array.from({ length: experts }, (_, expert) => {
    const start = (layer * experts + expert) * points;
    return Array.from(values.subarray(start, start + points), (q) => low[layer] + (q / 65535) * (high[layer] - low[layer]));
  })];
  const alpha = experts > 64 ? "55" : "99";
  const line = (expert) => ({
    stroke: () => color(expert % 2 ? "line-0" : "line-5") + alpha,
    width: experts > 64 ? 0.75 : 1.25,
    points: { show: false },
  });
  const plot = new uPlot({
    width: Math.max(200, plane.clientWidth),
    height: 300,
    padding: [8, 10, 0, 0],
    legend: { show: false },
    cursor: { sync: { key: "tokens", setSeries: false }, focus: { prox: 24 }, points: { show: false }, drag: { x: true, y: false }, y: false },
    focus: { alpha: 0.25 },
    scales: { x: { time: false } },
    axes: axes(compact, "tokens trained", "bias added to the score"),
    series: [{}, ...Array.from({ length: experts }, (_, expert) => line(expert))],
    hooks: { setSeries: [(plot, index) => describe(index)] },
  }, table(0), plane);
  function describe(index) {
    const layer = Number(select.value);
    const final = index ? plot.data[index][points - 1] : null;
    label.textContent = index ? `expert ${index - 1}: ${final.toFixed(4)} at the end` : `from ${low[layer].toFixed(4)} to ${high[layer].toFixed(4)} over the run`;
  }
  select.addEventListener("change", () => { plot.setData(table(Number(select.value))); describe(null); });
  describe(null);
  redraws.push(() => plot.redraw(false, true));
  new ResizeObserver(() => {
    if (Math.abs(plane.clientWidth - plot.width) > 1) plot.setSize({ width: plane.clientWidth, height: 300 });
  }).observe(plane);
}

buildScale();
redraws.push(buildScale);
document.querySelectorAll("[data-chart]").forEach((box) => {
  drawChart(box, data.charts[box.dataset.chart]);
  addDownloads(box, data.files, () => box.dataset.chart);
});
for (const [name, draw] of [["loads", drawLoads], ["domains", drawDomains], ["biases", drawBiases]]) {
  if (!data[name]) continue;
  const box = document.getElementById(`figure-${name}`);
  draw(box, data[name]);
  addDownloads(box, data.files, () => name);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((redraw) => redraw()));
document.documentElement.classList.add("drawn");
