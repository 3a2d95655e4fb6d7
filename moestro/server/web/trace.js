// What the stream of an answer does not tell: the prompt's tokens, weights of experts, ranks, alternatives. The server
// computes the text once more when somebody looks at it.

import { postJson } from "./api.js";
import { promptIds } from "./context.js";
import { t } from "./strings.js";

const MOST_TOKENS = 4096; // as the server allows
const kept = new WeakMap(); // by message, since they are too large for the browser's storage

/** `{ prompt, answer, vocabSize }`, lists of tokens. `asked`: see `promptIds`. Throws an Error that says what is wrong. */
export async function traceAnswer(message, asked) {
  const ids = message.tokens.map(({ id }) => id);
  const found = kept.get(message);
  if (found?.count === ids.length) return found.trace;
  const trace = fetchTrace(ids, asked);
  kept.set(message, { count: ids.length, trace });
  trace.catch(() => kept.delete(message)); // the next look tries again
  return trace;
}

async function fetchTrace(ids, asked) {
  const prompt = await promptIds(asked);
  if (prompt.length + ids.length > MOST_TOKENS) throw new Error(t("trace.tooLong", { most: MOST_TOKENS }));
  const { tokens, vocab_size: vocabSize } = await postJson("trace", { tokens: [...prompt, ...ids] });
  const read = tokens.map(({ experts, ...rest }) => ({ ...rest, routes: experts.length ? experts : null }));
  return { prompt: read.slice(0, prompt.length), answer: read.slice(prompt.length), vocabSize };
}
