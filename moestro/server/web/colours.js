// Ways of colouring tokens. Each gives every token a level from 0 to 1, or a hue, and a legend with numbers.

import { fixed, layerName, percent, whole } from "./dom.js";
import { t } from "./strings.js";

const NUM_LEVELS = 5;
const RANKS = [1, 2, 5, 20, Infinity]; // a token of rank r is in the first class whose end is not below r
const MANY_HUES = 8; // experts named in the legend
const GOLDEN_ANGLE = 137.508;

export const hueOf = (expert) => (expert * GOLDEN_ANGLE) % 360;
export const bits = (nats) => nats / Math.LN2;

/** The expert with the largest weight, or the first where weights are not known. */
export function strongest(token, layer) {
  const [row, weights] = [token.routes?.[layer], token.weights?.[layer]];
  if (!row) return undefined;
  return weights ? row[weights.indexOf(Math.max(...weights))] : row[0];
}

/** Ends of classes that hold about equally many of the values; fewer where values repeat. */
function quantiles(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const ends = Array.from({ length: NUM_LEVELS - 1 }, (_, at) => sorted[Math.ceil(((at + 1) * sorted.length) / NUM_LEVELS) - 1]);
  return [...new Set(ends)].filter((end) => end < sorted.at(-1));
}

/** Levels by the class of a value; `name(low, high)` for the legend of the first `count`, undefined at the open ends. */
function classify(values, count, ends, name) {
  const known = values.slice(0, count).filter((value) => value !== null);
  const classOf = (value) => ends.filter((end) => value > end).length;
  const scale = Math.max(1, ends.length);
  const counts = Array.from({ length: ends.length + 1 }, (_, at) => known.filter((value) => classOf(value) === at).length);
  const legend = known.length ? counts.map((number, at) => ({ level: at / scale, text: name(ends[at - 1], ends[at]), count: number })) : [];
  return { marks: values.map((value) => (value === null ? {} : { level: classOf(value) / scale })), legend };
}

const likely = (surprise) => percent(Math.exp(-surprise));

function nameSurprise(low, high) {
  if (low === undefined) return high === undefined ? t("legend.all") : `≥ ${likely(high)}`;
  return high === undefined ? `< ${likely(low)}` : `${likely(high)} – ${likely(low)}`;
}

function nameEntropy(low, high) {
  const [from, to] = [low, high].map((value) => (value === undefined ? undefined : fixed(bits(value), 1)));
  if (from === undefined) return to === undefined ? t("legend.all") : `≤ ${to}`;
  return to === undefined ? `> ${from}` : `${from} – ${to}`;
}

function byRank(tokens, count) {
  const values = tokens.map(({ rank }) => rank ?? null);
  const name = (low, high) => {
    if (high === undefined) return `> ${low}`;
    return low === undefined || high - low === 1 ? whole(high) : `${low + 1} – ${high}`;
  };
  return classify(values, count, RANKS.slice(0, -1), name);
}

function byExpert(tokens, count, layer) {
  const experts = tokens.map((token) => strongest(token, layer));
  const counts = new Map();
  experts.slice(0, count).filter((expert) => expert !== undefined).forEach((expert) => counts.set(expert, (counts.get(expert) ?? 0) + 1));
  const order = [...counts].sort(([a, m], [b, n]) => n - m || a - b);
  const legend = order.slice(0, MANY_HUES).map(([expert, number]) => ({ hue: hueOf(expert), text: t("expert", { expert: String(expert) }), count: number }));
  const rest = order.slice(MANY_HUES).reduce((total, [, number]) => total + number, 0);
  if (rest) legend.push({ text: t("legend.others", { count: order.length - MANY_HUES }), count: rest });
  return { marks: experts.map((expert) => (expert === undefined ? {} : { hue: hueOf(expert) })), legend };
}

/** What can be chosen: `[value, text]`, a way for each MoE layer of `names` at the end. */
export const listWays = (names) => [
  ["surprise", t("colour.surprise")], ["rank", t("colour.rank")], ["entropy", t("colour.entropy")], ["none", t("colour.none")],
  ...names.map((name, index) => [`layer-${index}`, t("colour.layer", { layer: layerName(name) })]),
];

/**
 * `{ marks, legend, note }`: a mark `{ level }` or `{ hue }` for each token, empty where it is not known. Classes and
 * legend are those of the first `count` tokens, the answer; others are coloured by them.
 */
export function colourTokens(tokens, count, way) {
  if (way.startsWith("layer-")) return { ...byExpert(tokens, count, Number(way.slice(6))), note: t("legend.expert") };
  if (way === "rank") return { ...byRank(tokens, count), note: t("legend.rank") };
  if (way === "none") return { marks: tokens.map(() => ({})), legend: [], note: "" };
  const isSurprise = way === "surprise";
  const values = tokens.map(({ logprob, entropy }) => (isSurprise ? (logprob === null ? null : -logprob) : entropy ?? null));
  const ends = quantiles(values.slice(0, count).filter((value) => value !== null));
  return { ...classify(values, count, ends, isSurprise ? nameSurprise : nameEntropy), note: t(isSurprise ? "legend.surprise" : "legend.entropy") };
}
