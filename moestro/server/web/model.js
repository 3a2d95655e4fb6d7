// The model that is served: its name, its context, what it was made for, and how it likes to be sampled.

import { getJson, server } from "./api.js";

export const USUAL = { temperature: 0.8, top_p: 0.95, max_tokens: 512 };
export const TEXT_TOKENS = 128; // a text is continued in smaller steps: more is one press away // where the model's own settings say nothing
const WAIT_MS = [1000, 2000, 4000, 8000]; // between attempts to reach a server that is gone

/** `id` is null until the server has told; `limit` is the context in tokens; `chat` whether it answers or continues. */
export const model = { id: null, limit: null, chat: true, defaults: { ...USUAL } };

/** Ask the server. Throws ApiError. */
export async function readModel() {
  const { data } = await getJson("v1/models");
  const { id = null, max_model_len: limit = null, chat = true, defaults = {} } = data[0] ?? {};
  const given = Object.fromEntries(Object.entries(defaults).filter(([, value]) => value !== null));
  Object.assign(model, { id, limit, chat, defaults: { ...USUAL, ...given } });
}

/** Calls `onGone` when the server is lost, and `onBack` once it answers again, asking by itself meanwhile. */
export function watchServer(onGone, onBack) {
  let attempt = -1; // below 0: the server is there
  const ask = async () => {
    try {
      await getJson("health");
    } catch (error) {
      if (error.kind === "gone") again();
    }
  };
  const again = () => {
    setTimeout(ask, WAIT_MS[Math.min(attempt, WAIT_MS.length - 1)]);
    attempt += 1;
  };
  server.addEventListener("gone", () => {
    if (attempt >= 0) return;
    attempt = 0;
    onGone();
    again();
  });
  server.addEventListener("there", () => {
    if (attempt < 0) return;
    attempt = -1;
    onBack();
  });
}
