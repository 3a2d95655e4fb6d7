// The server: JSON, and answers as a stream of server-sent events. The key stays in this tab's session.

import { t } from "./strings.js";

const KEY = "moestro.key";
const CLOSING = 503; // the server is shutting down, or not ready yet
let keyHere = ""; // where the browser keeps nothing, the key lasts as long as the page

/** Tells of the server: "gone" when it cannot be reached, "there" when it answers, whatever it says. */
export const server = new EventTarget();

export function getKey() {
  try {
    return sessionStorage.getItem(KEY) || "";
  } catch {
    return keyHere; // storage is switched off, and whoever did so knows
  }
}

export function setKey(key) {
  keyHere = key;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    return; // see getKey
  }
}

/**
 * One line for people, and what kind of failure it is, which decides what helps:
 * gone (not reached), broken (cut off), key, busy (`wait` seconds), context (too long), request (refused), server.
 */
export class ApiError extends Error {
  constructor(message, kind, { status = 0, wait = 0 } = {}) {
    super(message);
    Object.assign(this, { kind, status, wait });
  }
}

async function request(path, options) {
  const headers = { ...options.headers };
  if (getKey()) headers.Authorization = `Bearer ${getKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    server.dispatchEvent(new Event("gone"));
    throw new ApiError(t("error.gone"), "gone");
  }
  server.dispatchEvent(new Event(response.status === CLOSING ? "gone" : "there"));
  if (!response.ok) throw await explain(response);
  return response;
}

async function explain(response) {
  const { status, headers } = response;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    error = {}; // not an error object: the status has to do
  }
  const wait = Math.max(1, Number(headers.get("Retry-After")) || 0);
  const said = error.message ? t("error.said", { message: error.message, status }) : t("error.status", { status });
  if (status === 401) return new ApiError(t(getKey() ? "error.wrongKey" : "error.noKey"), "key", { status });
  if (status === 429) return new ApiError(error.message ? t("error.busyBecause", { why: error.message }) : t("error.busy"), "busy", { status, wait });
  if (status === CLOSING) return new ApiError(t("error.closing"), "gone", { status, wait });
  if (error.code === "context_length_exceeded") return new ApiError(said, "context", { status });
  return new ApiError(said, status >= 500 ? "server" : "request", { status });
}

export async function getJson(path) {
  const response = await request(path, {});
  return response.json();
}

const post = (path, body, signal) => request(path, {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
});

export async function postJson(path, body, signal) {
  const response = await post(path, body, signal);
  return response.json();
}

/** The chunks of an answer to a body with messages, or with a prompt. Throws ApiError; AbortError on `signal`. */
export async function* streamAnswer(body, signal) {
  const response = await post(body.messages ? "v1/chat/completions" : "v1/completions", body, signal);
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message || t("error.failed"), "server", { status: 500 });
    yield chunk;
  }
  throw new ApiError(t("error.brokeOff"), "broken");
}

async function* readEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) return;
    text += value;
    const events = text.split(/\r?\n\r?\n/);
    text = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (data.length) yield data.join("\n"); // other lines are comments that keep the connection open
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(t("error.lost"), "broken");
  }
}
