// From the chunks of a stream to a message: text, thoughts, tokens with their experts, counts and times.

import { streamAnswer } from "./api.js";

/**
 * Ask, and let the message grow behind what it has; `onGrow` after every chunk. Returns the error that ended it, if any:
 * its line is in `message.error`, what it was in `message.problem`.
 */
export async function fillAnswer(message, body, signal, onGrow) {
  const clock = { start: performance.now(), first: 0 };
  const part = { routes: null, usage: null, before: message.tokens?.length ?? 0 };
  Object.assign(message, { reasoning: message.reasoning ?? "", tokens: message.tokens ?? [] });
  ["error", "problem", "finish"].forEach((name) => delete message[name]);
  let failure = null;
  try {
    for await (const chunk of streamAnswer(body, signal)) {
      takeChunk(message, chunk, part);
      takeTime(message, chunk, clock, part.before);
      onGrow();
    }
  } catch (error) {
    failure = error;
    noteFailure(message, error);
  }
  fillRoutes(message, part);
  countTokens(message, part);
  if (!message.tokens.length) delete message.tokens;
  return failure;
}

/** What went wrong, for the page to show; stopping an answer is no failure. */
export function noteFailure(message, error) {
  if (error.name === "AbortError") message.finish = "aborted";
  else Object.assign(message, { error: error.message, problem: error.kind ?? "server" });
}

function takeChunk(message, chunk, part) {
  const choice = chunk.choices?.[0];
  message.content += choice?.delta?.content ?? choice?.text ?? "";
  message.reasoning += choice?.delta?.reasoning_content ?? "";
  const tokens = chunk.moestro?.tokens ?? [];
  message.tokens.push(...tokens.map(({ id, text, logprob, routes }) => ({ id, text, logprob: logprob ?? null, routes: routes ?? null })));
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  if (choice?.routes) part.routes = choice.routes;
  if (chunk.usage) part.usage = chunk.usage;
}

/** Seconds to the first token, from the first to the last, and of thinking; `early`: tokens up to the first chunk. */
function takeTime(message, chunk, clock, before) {
  const choice = chunk.choices?.[0];
  if (!choice?.delta?.content && !choice?.delta?.reasoning_content && !choice?.text && !chunk.moestro?.tokens?.length) return;
  const now = performance.now();
  if (!clock.first) {
    clock.first = now;
    const thought = message.timing?.thought;
    message.timing = { first: (now - clock.start) / 1000, span: 0, early: Math.max(before + 1, message.tokens.length), thought };
  }
  message.timing.span = (now - clock.first) / 1000;
  if (message.reasoning && !message.content) message.timing.thought = message.timing.span;
}

/** `routes` [tokens, layers, top_k] of prompt and completion: what the chunks left open is filled from there. */
function fillRoutes(message, { routes, usage, before }) {
  const numPrompt = usage?.prompt_tokens;
  if (!routes || !Number.isInteger(numPrompt)) return;
  message.tokens.forEach((token, index) => { token.routes ??= routes[numPrompt + index - before] ?? null; });
}

/** A continued answer keeps the count of its first prompt. */
function countTokens(message, { usage, before }) {
  if (!usage) return;
  const prompt = before ? message.usage?.prompt_tokens ?? usage.prompt_tokens - before : usage.prompt_tokens;
  message.usage = { prompt_tokens: prompt, completion_tokens: before + usage.completion_tokens };
}
