// The model's context: how much of it a conversation fills, and what is left out when it outgrows it.

import { ApiError, postJson } from "./api.js";
import { byId } from "./dom.js";
import { model } from "./model.js";
import { t } from "./strings.js";

const FULL = 0.85; // from here on the meter warns
const ROOM_SHARE = 4; // at least a quarter of the context stays free for the answer, if it wants that much
const PAUSE_MS = 400; // without typing, before the draft is counted

const tokenize = (body, signal) => postJson("tokenize", body, signal);
const roomFor = (wanted) => Math.min(wanted, Math.floor(model.limit / ROOM_SHARE));

/** The token ids of what was asked for an answer: of messages, or of a text whose beginning may be left out. */
export async function promptIds({ messages, text, dropped = 0 }, signal) {
  const { tokens } = await tokenize(messages ? { messages } : { prompt: text }, signal);
  return messages ? tokens : cutText(text, tokens, dropped, signal);
}

/** The ids of a text without its first `dropped` ones; what begins every document stays in front. */
async function cutText(text, tokens, dropped, signal) {
  if (!dropped) return tokens;
  const head = tokens.length - (await tokenize({ prompt: text, add_special_tokens: false }, signal)).count;
  return [...tokens.slice(0, head), ...tokens.slice(head + dropped)];
}

/** Messages without the oldest `count` exchanges; the system prompt stays. */
export function dropExchanges(messages, count) {
  const head = messages.filter(({ role }) => role === "system");
  const rest = messages.filter(({ role }) => role !== "system");
  const starts = rest.flatMap(({ role }, at) => (role === "user" ? [at] : []));
  return [...head, ...rest.slice(starts[count] ?? 0)];
}

/** `{ messages, dropped, maxTokens }`: as few of the oldest exchanges left out as make room for an answer. */
export async function fitMessages(messages, wanted, signal) {
  if (!model.limit) return { messages, dropped: 0, maxTokens: wanted };
  const room = roomFor(wanted);
  const countAfter = async (dropped) => (await tokenize({ messages: dropExchanges(messages, dropped) }, signal)).count;
  const most = messages.filter(({ role }) => role === "user").length - 1;
  let [low, high, count] = [0, 0, await countAfter(0)];
  if (count + room > model.limit && most > 0) {
    [low, high] = [1, most];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (await countAfter(middle) + room > model.limit) low = middle + 1;
      else high = middle;
    }
    count = await countAfter(low);
  }
  if (count >= model.limit) throw new ApiError(t("error.tooLong", { count, limit: model.limit }), "context");
  return { messages: dropExchanges(messages, low), dropped: low, maxTokens: Math.min(wanted, model.limit - count) };
}

/** `{ prompt, dropped, maxTokens }` for a text: its end, if all of it leaves no room to continue it. */
export async function fitText(text, wanted, signal) {
  if (!model.limit) return { prompt: text, dropped: 0, maxTokens: wanted };
  const { tokens } = await tokenize({ prompt: text }, signal);
  const dropped = Math.max(0, tokens.length + roomFor(wanted) - model.limit);
  const prompt = dropped ? await cutText(text, tokens, dropped, signal) : text;
  return { prompt, dropped, maxTokens: Math.min(wanted, model.limit - tokens.length + dropped) };
}

/** How full the context is, counted a moment after `getBody` may have changed. */
export class Meter {
  constructor(getBody) {
    this.getBody = getBody;
    this.timer = 0;
    this.turn = 0;
  }

  refresh() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.count(), PAUSE_MS);
  }

  async count() {
    const turn = this.turn += 1;
    const body = this.getBody();
    let count = 0;
    try {
      if (body) ({ count } = await tokenize(body));
    } catch {
      count = null; // whatever it is, an answer will meet it, too, and say it
    }
    if (turn === this.turn) this.show(count);
  }

  show(count) {
    const { limit } = model;
    byId("meter").hidden = count === null || !limit;
    if (byId("meter").hidden) return;
    const share = Math.min(1, count / limit);
    const words = t("meter", { used: count, limit });
    byId("meter-words").textContent = words;
    const bar = byId("meter-bar");
    bar.style.setProperty("--share", String(share));
    bar.classList.toggle("full", share >= FULL);
    Object.entries({ valuemax: limit, valuenow: Math.min(count, limit), valuetext: words }).forEach(([name, value]) => bar.setAttribute(`aria-${name}`, value));
  }
}
