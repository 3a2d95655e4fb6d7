// Asking the model: for an answer, for the rest of one, for more of a text. What outgrows the context is left out, what
// could succeed later is asked again by itself, and one answer is written at a time.

import { fillAnswer, noteFailure } from "./answer.js";
import { ApiError, postJson } from "./api.js";
import { dropExchanges, fitMessages, fitText, promptIds } from "./context.js";
import { model } from "./model.js";
import { t } from "./strings.js";

const MOST_TRIES = 5; // against a server that is busy

export class Asker {
  /** `show`: begin(message), grow(message), end(message, failure), trimmed(message), wait(message), of the page. */
  constructor(settings, show) {
    Object.assign(this, { settings, show, running: null, waiting: null });
  }

  /** What an answer was asked with, for `promptIds`. */
  askedWith(conversation, message) {
    const parent = conversation.find(message.parent);
    if (conversation.kind === "text") return { text: parent.content, dropped: message.dropped };
    const messages = conversation.pathTo(parent).map(({ role, content }) => ({ role, content }));
    if (message.system) messages.unshift({ role: "system", content: message.system });
    return { messages: message.dropped ? dropExchanges(messages, message.dropped) : messages };
  }

  /** Answer a message, or continue the text that it holds. */
  answer(conversation, parent) {
    if (this.running) return null;
    const message = conversation.add(parent, "assistant", "");
    if (conversation.kind === "chat" && this.settings.values.system.trim()) message.system = this.settings.values.system;
    const prepare = conversation.kind === "text" ? this.prepareText : this.prepareChat;
    return this.run(conversation, message, prepare);
  }

  /** Write on where an answer was cut short. */
  extend(conversation, message) {
    if (this.running) return null;
    return this.run(conversation, message, this.prepareMore);
  }

  /** Whether what an answer holds can be written on: it was cut short, and its thoughts, if any, are told in tokens. */
  canExtend({ content, reasoning, finish, error, tokens }) {
    const isCut = finish === "length" || (!reasoning && (finish === "aborted" || Boolean(error)));
    return isCut && Boolean(content) && (!reasoning || Boolean(tokens));
  }

  /** Once more: what came to nothing goes, what came so far is written on or left beside the new answer. */
  retry(conversation, message) {
    if (this.running) return null;
    const parent = conversation.find(message.parent);
    if (!message.content && !message.reasoning) conversation.remove(message);
    return this.answer(conversation, parent);
  }

  stop() {
    this.running?.controller.abort();
  }

  async run(conversation, message, prepare) {
    this.stopWaiting();
    this.running = { conversation, message, controller: new AbortController() };
    const { signal } = this.running.controller;
    ["error", "problem", "retryIn"].forEach((name) => delete message[name]);
    conversation.updated = Date.now();
    this.show.begin(message);
    let failure = null;
    try {
      const body = await prepare.call(this, conversation, message, signal);
      failure = await fillAnswer(message, body, signal, () => this.show.grow(message));
    } catch (error) {
      failure = error;
      noteFailure(message, error);
    }
    this.running = null;
    this.plan(conversation, message, failure);
    this.show.end(message, failure);
  }

  body(asked, maxTokens) {
    const { sampling } = this.settings;
    return { ...(model.id && { model: model.id }), ...asked, stream: true, stream_options: { include_usage: true }, max_tokens: maxTokens, ...sampling };
  }

  async prepareChat(conversation, message, signal) {
    const { messages } = this.askedWith(conversation, message);
    const fitted = await fitMessages(messages, this.settings.maxTokens(), signal);
    this.noteDropped(message, fitted.dropped);
    return this.body({ messages: fitted.messages }, fitted.maxTokens);
  }

  async prepareText(conversation, message, signal) {
    const { text } = this.askedWith(conversation, message);
    const fitted = await fitText(text, this.settings.maxTokens("text"), signal);
    this.noteDropped(message, fitted.dropped);
    return this.body({ prompt: fitted.prompt }, fitted.maxTokens);
  }

  noteDropped(message, count) {
    if (!count) return;
    message.dropped = count;
    this.show.trimmed(message);
  }

  /** The prompt's ids and the answer's own: exactly what the model had before it when it was cut short. */
  async prepareMore(conversation, message, signal) {
    const ids = await promptIds(this.askedWith(conversation, message), signal);
    ids.push(...await this.ownIds(message, signal));
    const room = (model.limit ?? Infinity) - ids.length;
    if (room <= 0) throw new ApiError(t("error.full", { limit: model.limit }), "context");
    return this.body({ prompt: ids }, Math.min(this.settings.maxTokens(), room));
  }

  async ownIds(message, signal) {
    const text = message.tokens?.map((token) => token.text).join("") ?? "";
    const isWhole = message.finish === "length" && message.tokens;
    if (!isWhole && text && message.content.startsWith(text)) message.content = text; // the last token was not told
    if (isWhole || (text && message.content === text)) return message.tokens.map(({ id }) => id);
    delete message.tokens;
    return (await postJson("tokenize", { prompt: message.content, add_special_tokens: false }, signal)).tokens;
  }

  /** A server that is busy is asked again when it said; one that is gone, when it is back. */
  plan(conversation, message, failure) {
    const isBusy = failure?.kind === "busy";
    this.tries = isBusy ? (this.tries ?? 0) + 1 : 0;
    if (failure?.kind === "gone") this.wait(conversation, message, "back");
    else if (isBusy && this.tries <= MOST_TRIES) this.wait(conversation, message, failure.wait);
  }

  wait(conversation, message, left) {
    message.retryIn = left;
    const timer = left === "back" ? 0 : setInterval(() => this.countDown(), 1000);
    this.waiting = { conversation, message, timer };
  }

  countDown() {
    const { conversation, message } = this.waiting;
    message.retryIn -= 1;
    if (message.retryIn > 0) this.show.wait(message);
    else this.again(conversation, message);
  }

  /** The server answers again. */
  goOn() {
    if (this.waiting?.message.retryIn === "back") this.again(this.waiting.conversation, this.waiting.message);
  }

  again(conversation, message) {
    this.stopWaiting();
    if (!message.content && !message.reasoning && conversation.leaf === message.id) this.retry(conversation, message);
    else this.show.wait(message);
  }

  stopWaiting() {
    if (!this.waiting) return;
    const { message, timer } = this.waiting;
    clearInterval(timer);
    delete message.retryIn;
    this.waiting = null;
    this.show.wait(message);
  }
}
