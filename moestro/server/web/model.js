// The model that is served: its name, its context, what it was made for, and how it likes to be sampled.

import { getJson, server } from "./api.js";

const WAIT_MS = [1000, 2000, 4000, 8000]; // between attempts to reach a server that is gone

/** `id` is null until the server has told; `limit` is the context in tokens; a `base` model continues texts. */
export const model = { id: null, limit: null, isBase: false, replyTokens: 512, textTokens: 128, sampling: {} };

/** Ask the server. Throws ApiError. */
export async function readModel() {
  const { data: [{ id = null, max_model_len: limit = null, base: isBase = false, usual = {} } = {}] } = await getJson("v1/models");
  const { reply_tokens: replyTokens = 512, text_tokens: textTokens = 128, ...sampling } = usual;
  Object.assign(model, { id, limit, isBase, replyTokens, textTokens, sampling });
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
