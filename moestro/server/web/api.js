// The server: JSON by GET, answers as a stream of server-sent events. The key stays in this tab's session.

const KEY = "moestro.key";
let keyHere = ""; // where the browser keeps nothing, the key lasts as long as the page

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

/** One line for people, and the HTTP status, 0 where there was no answer. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
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
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw new ApiError(await explain(response), response.status);
  return response;
}

async function explain(response) {
  const { status, headers } = response;
  if (status === 401) return getKey() ? "The server does not accept this API key." : "This server asks for an API key.";
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = ""; // not an error object: the status has to do
  }
  const wait = Number(headers.get("Retry-After"));
  if (status === 429) return `The server is busy${wait > 0 ? `; try again in ${wait} s` : ""}.${message ? ` (${message})` : ""}`;
  return message ? `${message} (${status})` : `The server answered with status ${status}.`;
}

export async function getJson(path) {
  const response = await request(path, {});
  return response.json();
}

/** The chunks of an answer. Throws ApiError; AbortError once `signal` is aborted. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message || "The server failed over this answer.", 500);
    yield chunk;
  }
  throw new ApiError("The answer broke off: the connection was closed before its end.");
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
    throw new ApiError("The answer broke off: the connection was lost.");
  }
}
