// From the chunks of a stream to a message: text, thoughts, tokens with their experts, counts and times.

import { streamChat } from "./api.js";

/** Ask, and let the message grow; `onGrow` after every chunk. Never throws: what went wrong is in `message.error`. */
export async function fillAnswer(message, body, signal, onGrow) {
  const clock = { start: performance.now(), first: 0 };
  const found = { routes: null };
  Object.assign(message, { reasoning: "", tokens: [] });
  try {
    for await (const chunk of streamChat(body, signal)) {
      takeChunk(message, chunk, found);
      takeTime(message, chunk, clock);
      onGrow();
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "aborted";
    else message.error = error.message;
  }
  fillRoutes(message, found.routes);
  if (!message.tokens.length) delete message.tokens;
}

function takeChunk(message, chunk, found) {
  const choice = chunk.choices?.[0];
  message.content += choice?.delta?.content ?? "";
  message.reasoning += choice?.delta?.reasoning_content ?? "";
  const tokens = chunk.moestro?.tokens ?? [];
  message.tokens.push(...tokens.map(({ id, text, logprob, routes }) => ({ id, text, logprob: logprob ?? null, routes: routes ?? null })));
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  if (choice?.routes) found.routes = choice.routes;
  if (chunk.usage) message.usage = { prompt_tokens: chunk.usage.prompt_tokens, completion_tokens: chunk.usage.completion_tokens };
}

/** Seconds to the first token, from the first to the last, and of thinking; `early`: tokens of the first chunk. */
function takeTime(message, chunk, clock) {
  const delta = chunk.choices?.[0]?.delta;
  if (!delta?.content && !delta?.reasoning_content && !chunk.moestro?.tokens?.length) return;
  const now = performance.now();
  if (!clock.first) {
    clock.first = now;
    message.timing = { first: (now - clock.start) / 1000, span: 0, early: Math.max(1, message.tokens.length) };
  }
  message.timing.span = (now - clock.first) / 1000;
  if (message.reasoning && !message.content) message.timing.thought = message.timing.span;
}

/** `routes` [tokens, layers, top_k] of prompt and completion: what the chunks left open is filled from there. */
function fillRoutes(message, routes) {
  const numPrompt = message.usage?.prompt_tokens;
  if (!routes || !Number.isInteger(numPrompt)) return;
  message.tokens.forEach((token, index) => { token.routes ??= routes[numPrompt + index] ?? null; });
}
