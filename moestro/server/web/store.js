// Conversations in the browser's storage. A conversation is a tree of messages: editing and answering again add a
// sibling beside the old one, so nothing is overwritten and every branch can be gone back to.

import { newId } from "./dom.js";
import { t } from "./strings.js";

const PREFIX = "moestro.chat.";
const ROLES = ["user", "assistant"];
const KINDS = ["chat", "text"]; // questions and answers; a text and its continuations
const FORMAT = "moestro-conversations";

export class Conversation {
  constructor({ id = newId(), updated = Date.now(), kind = "chat", draft = "", messages = [], leaf = null } = {}) {
    Object.assign(this, { id, updated, kind, draft, messages, leaf }); // draft: a text that was changed and not continued
  }

  find(id) {
    return this.messages.find((message) => message.id === id);
  }

  /** From the first message to the leaf that is shown. */
  get path() {
    return this.pathTo(this.find(this.leaf));
  }

  pathTo(message) {
    const found = [];
    for (let at = message; at; at = this.find(at.parent)) found.unshift(at);
    return found;
  }

  get title() {
    const first = this.messages.find((message) => message.role === "user");
    return first ? first.content.trim().replace(/\s+/g, " ").slice(0, 80) || "…" : t("list.untitled");
  }

  siblings(message) {
    return this.messages.filter((other) => other.parent === message.parent);
  }

  add(parent, role, content) {
    const message = { id: newId(), parent: parent ? parent.id : null, role, content };
    this.messages.push(message);
    this.leaf = message.id;
    return message;
  }

  /** Take a message out that nothing follows. */
  remove(message) {
    this.messages = this.messages.filter((other) => other !== message);
    if (this.leaf === message.id) this.leaf = message.parent;
  }

  /** Show the branch of a message down to its latest end. */
  choose(message) {
    let at = message;
    for (let next = at; next; next = this.messages.findLast((other) => other.parent === at.id)) at = next;
    this.leaf = at.id;
  }
}

/** A conversation from outside; throws an Error that says what is wrong with it. */
function readConversation(tree) {
  const bad = (what) => { throw new Error(t("import.bad", { what })); };
  if (typeof tree?.id !== "string" || !/^[0-9a-f]{16}$/.test(tree.id)) bad("its id");
  if (!Array.isArray(tree.messages)) bad("no list of messages");
  const known = new Set([null]);
  const messages = tree.messages.map((message) => {
    if (typeof message?.id !== "string" || known.has(message.id)) bad("the id of a message");
    if (!known.has(message.parent ?? null)) bad("a message follows none before it");
    if (!ROLES.includes(message.role) || typeof message.content !== "string") bad("a role or a text");
    known.add(message.id);
    return readMessage(message);
  });
  const leaf = known.has(tree.leaf) ? tree.leaf : messages.at(-1)?.id ?? null;
  const kind = KINDS.includes(tree.kind) ? tree.kind : "chat";
  const draft = typeof tree.draft === "string" ? tree.draft : "";
  return new Conversation({ id: tree.id, updated: Number(tree.updated) || 0, kind, draft, messages, leaf });
}

function readMessage({ id, parent, role, content, reasoning, tokens, usage, timing, finish, error, problem, system, dropped }) {
  const number = (value) => (Number.isFinite(value) ? value : undefined);
  const list = Array.isArray(tokens) ? tokens.map(readToken).filter(Boolean) : [];
  return {
    id, parent: parent ?? null, role, content,
    ...(typeof reasoning === "string" && { reasoning }),
    ...(list.length && { tokens: list }),
    ...(usage && { usage: { prompt_tokens: number(usage.prompt_tokens), completion_tokens: number(usage.completion_tokens) } }),
    ...(timing && { timing: { first: number(timing.first), span: number(timing.span), thought: number(timing.thought), early: number(timing.early) } }),
    ...(typeof finish === "string" && { finish }),
    ...(typeof error === "string" && { error }),
    ...(typeof problem === "string" && { problem }),
    ...(typeof system === "string" && { system }),
    ...(Number.isInteger(dropped) && dropped > 0 && { dropped }),
  };
}

function readToken(token) {
  if (!Number.isInteger(token?.id) || typeof token.text !== "string") return null;
  const isRow = (row) => Array.isArray(row) && row.every(Number.isInteger);
  const routes = Array.isArray(token.routes) && token.routes.every(isRow) ? token.routes : null;
  return { id: token.id, text: token.text, logprob: Number.isFinite(token.logprob) ? token.logprob : null, routes };
}

function openStorage() {
  try {
    localStorage.setItem(`${PREFIX}test`, "");
    localStorage.removeItem(`${PREFIX}test`);
    return localStorage;
  } catch {
    return null; // switched off: `isLasting` tells
  }
}

export class Store {
  constructor() {
    this.storage = openStorage();
    this.conversations = new Map();
    this.numBroken = 0;
    Object.keys(this.storage || {}).filter((key) => key.startsWith(PREFIX)).forEach((key) => this.load(key));
  }

  get isLasting() {
    return this.storage !== null;
  }

  /** The latest first. */
  get list() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  load(key) {
    try {
      const conversation = readConversation(JSON.parse(this.storage.getItem(key)));
      this.conversations.set(conversation.id, conversation);
    } catch {
      this.numBroken += 1; // left where it is, and told on the page
    }
  }

  /** Throws an Error where there is no room, even without the tokens of older conversations. */
  save(conversation) {
    this.conversations.set(conversation.id, conversation);
    if (!this.storage) return;
    const write = (one) => this.storage.setItem(PREFIX + one.id, JSON.stringify(one));
    const withTokens = this.list.reverse().filter((one) => one.messages.some((message) => message.tokens));
    for (;;) {
      try {
        write(conversation);
        return;
      } catch {
        const oldest = withTokens.shift();
        if (!oldest) throw new Error(t("store.full"));
        oldest.messages.forEach((message) => { delete message.tokens; });
        if (oldest !== conversation) write(oldest);
      }
    }
  }

  remove(id) {
    this.conversations.delete(id);
    this.storage?.removeItem(PREFIX + id);
  }

  exportText() {
    return JSON.stringify({ format: FORMAT, version: 1, conversations: this.list });
  }

  /** Add what a file holds, in place of what has the same id; how many. Throws an Error before anything is changed. */
  importText(text) {
    let tree;
    try {
      tree = JSON.parse(text);
    } catch {
      throw new Error(t("import.notJson"));
    }
    if (tree?.format !== FORMAT || tree.version !== 1 || !Array.isArray(tree.conversations)) {
      throw new Error(t("import.none"));
    }
    const found = tree.conversations.map(readConversation);
    found.forEach((conversation) => this.save(conversation));
    return found.length;
  }
}
