// Loads of experts from the routes of tokens, their figures, and how the routes of two answers differ.

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** `{ ratio, dead, entropy, mean }` of one layer's loads; ratio and entropy are NaN where no token came. */
export function measure(loads) {
  const total = sum(loads);
  const shares = loads.map((load) => load / total);
  const entropy = -sum(shares.map((share) => (share > 0 ? share * Math.log(share) : 0))) / Math.log(loads.length);
  return {
    mean: total / loads.length,
    ratio: total ? (Math.max(...loads) * loads.length) / total : NaN,
    entropy: total ? (loads.length === 1 ? 1 : entropy) : NaN,
    dead: loads.filter((load) => load === 0).length,
  };
}

/** `{ tokens, load [layers][experts] }` of the tokens whose experts are known; others do not count. */
export function countLoads(tokens, numLayers, numExperts) {
  const load = Array.from({ length: numLayers }, () => new Array(numExperts).fill(0));
  const known = tokens.filter(({ routes }) => routes?.length === numLayers);
  known.forEach(({ routes }) => routes.forEach((row, layer) => row.forEach((expert) => { load[layer][expert] += 1; })));
  return { tokens: known.length, load };
}

const shareOf = (load) => load.map((row) => row.map((count) => count / Math.max(1, sum(row))));

/**
 * Two answers by layer. `same`: the share of experts that are equal at the same place, over the `places` that both have;
 * `overlap`: the share of the load that both put on the same experts, wherever; `difference` [layers][experts]: the
 * share of the first answer's choices less that of the second's. `chance`: what `same` is for choices at random.
 */
export function compareRoutes(one, other, numLayers, numExperts) {
  const fits = ({ routes }) => routes?.length === numLayers;
  const pairs = one.slice(0, other.length).map((token, at) => [token, other[at]]).filter((pair) => pair.every(fits));
  const equal = (a, b) => a.filter((expert) => b.includes(expert)).length / a.length;
  const [mine, yours] = [one, other].map((tokens) => shareOf(countLoads(tokens, numLayers, numExperts).load));
  const layers = mine.map((row, layer) => ({
    same: pairs.length ? sum(pairs.map(([a, b]) => equal(a.routes[layer], b.routes[layer]))) / pairs.length : NaN,
    overlap: sum(row.map((share, expert) => Math.min(share, yours[layer][expert]))),
  }));
  const difference = mine.map((row, layer) => row.map((share, expert) => share - yours[layer][expert]));
  const topK = [...one, ...other].find(fits)?.routes[0].length ?? 0;
  return { layers, difference, places: pairs.length, equalTokens: pairs.filter(([a, b]) => a.id === b.id).length, chance: topK / numExperts };
}
