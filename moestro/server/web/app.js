// The page: conversations on the left, the chat or a text, the experts on the right.

import { Asker } from "./asker.js";
import { Comparison } from "./compare.js";
import { Meter } from "./context.js";
import { byId, download, element, textButton } from "./dom.js";
import { Drawers } from "./drawers.js";
import { Inspector } from "./inspector.js";
import { renderList } from "./list.js";
import { AnswerView, UserView } from "./messages.js";
import { model, readModel, watchServer } from "./model.js";
import { RoutingPanel } from "./routing.js";
import { Settings } from "./settings.js";
import { Conversation, Store } from "./store.js";
import { t } from "./strings.js";
import { Writer } from "./writer.js";

const NEAR_END = 80; // pixels: closer to the end, the page follows the answer
const EXAMPLES = {
  chat: ["example.chat.1", "example.chat.2", "example.chat.3"],
  text: ["example.text.1", "example.text.2", "example.text.3"],
};

const isCoarse = matchMedia("(pointer: coarse)");

const scroller = byId("scroller");
const question = byId("question");

const notify = (text) => {
  byId("notice-text").textContent = text;
  byId("notice").hidden = !text;
};

const settings = new Settings(() => {
  panel.buildScale();
  renderAll();
  refreshModel();
}, notify);
const store = new Store();

let conversation = new Conversation();
let views = new Map();
let looked = null; // the answer whose load is shown
let follows = true;

const light = (spotlight) => {
  const target = looked && views.has(looked.id) ? looked : conversation.path.findLast(({ tokens }) => tokens);
  views.forEach((view, id) => view.light(spotlight, Boolean(spotlight) && id === target?.id));
};

const inspector = new Inspector(light);
const panel = new RoutingPanel(tokensOf, light);
const drawers = new Drawers(() => {
  inspector.place(drawers.isBeside("panel-open"));
  panel.poll();
});
const compare = new Comparison(() => {
  views.forEach((view, id) => view.update(isRunning(id)));
  notify(compare.first ? t("compare.choose") : "");
});
const meter = new Meter(() => {
  if (conversation.kind === "text") return writer.text ? { prompt: writer.text } : null;
  const messages = conversation.path.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  if (question.value.trim()) messages.push({ role: "user", content: question.value });
  if (messages.length && settings.values.system.trim()) messages.unshift({ role: "system", content: settings.values.system });
  return messages.length ? { messages } : null;
});
const asker = new Asker(settings, {
  begin(message) {
    save();
    follows = true;
    render();
    showRunning(true);
    tell(views.get(message.id)?.update(true));
  },
  grow(message) {
    showText(message);
    views.get(message.id)?.schedule(tell);
  },
  trimmed: ({ dropped }) => notify(t(conversation.kind === "text" ? "context.cut" : "context.trimmed", { count: dropped })),
  wait: (message) => views.get(message.id)?.update(false),
  end,
});
const writer = new Writer({
  write(text) {
    if (!text.trim() || asker.running) return;
    conversation.draft = "";
    asker.answer(conversation, conversation.add(conversation.path.at(-1), "user", text));
  },
  stop: () => asker.stop(),
  undo() {
    const { user, message } = lastText();
    const { draft } = conversation;
    if (!user) return;
    if (draft && draft !== user.content + message.content) { // what was typed goes first
      conversation.draft = "";
    } else {
      Object.assign(conversation, { draft: user.content, leaf: user.parent });
    }
    save();
    render();
  },
  change(text) {
    conversation.draft = text;
    byId("examples").hidden = Boolean(text);
    meter.refresh();
  },
});

const context = {
  get conversation() { return conversation; },
  settings: settings.values,
  inspector,
  compare,
  light,
  setColour: (colour) => settings.keep({ colour }),
  askKey: () => settings.open("key"),
  openSettings: () => settings.open("temperature"),
  begin: () => open(newConversation()),
  stopWaiting: () => asker.stopWaiting(),
  getAsked: (message) => asker.askedWith(conversation, message),
  canExtend: (message) => message.id === conversation.leaf && asker.canExtend(message),
  extend: (message) => asker.extend(conversation, message),
  retry: (message) => asker.retry(conversation, message),
  edit: (message, text) => { if (!asker.running) asker.answer(conversation, conversation.add(conversation.find(message.parent), "user", text)); },
  editQuestion: (message) => views.get(message.parent)?.edit(),
  regenerate: (message) => asker.answer(conversation, conversation.find(message.parent)),
  look(message) {
    looked = message;
    panel.draw();
  },
  choose(message) {
    conversation.choose(message);
    save();
    render();
  },
};

const isRunning = (id) => asker.running?.message.id === id;
const preferredKind = () => settings.values.mode ?? (model.isBase ? "text" : "chat");
const newConversation = () => new Conversation({ kind: preferredKind() });

function tokensOf(scope) {
  const all = conversation.path.filter(({ tokens }) => tokens);
  if (scope === "conversation") return all.flatMap(({ tokens }) => tokens);
  return (all.includes(looked) ? looked : all.at(-1))?.tokens ?? [];
}

function save(one = conversation) {
  if (!one.messages.length) return;
  try {
    store.save(one);
  } catch (error) {
    notify(error.message);
  }
}

function end(message, failure) {
  const home = [...store.conversations.values()].find(({ messages }) => messages.includes(message)) ?? conversation;
  save(home);
  showRunning(false);
  tell(views.get(message.id)?.update(false));
  showText(message);
  meter.refresh();
  followEnd();
  byId("status").textContent = message.error ? "" : t(message.finish === "aborted" ? "status.stopped" : "status.finished");
  if (failure?.kind === "key" && home === conversation) settings.open("key", message.error);
}

/** Read settled blocks out, politely, and keep the end in sight. */
function tell(text) {
  if (text) byId("spoken").append(element("p", {}, text));
  panel.drawOwn();
  followEnd();
}

function followEnd() {
  if (follows) scroller.scrollTop = scroller.scrollHeight;
  byId("to-end").hidden = follows;
}

function showRunning(is) {
  document.body.classList.toggle("running", is);
  ["send", "write"].forEach((id) => { byId(id).hidden = is; });
  document.querySelectorAll(".stop").forEach((button) => { button.hidden = !is; });
  if (is) byId("status").textContent = t("status.answering");
  panel.setBusy(is);
}

/** The question and the continuation that a text ends with, if it was continued. */
function lastText() {
  const [user, message] = conversation.path.slice(-2);
  return message ? { user, message } : { user: null, message: null };
}

function showText(message) {
  if (conversation.kind !== "text") return;
  const last = lastText();
  const text = conversation.draft || (last.message ? last.user.content + last.message.content : "");
  if (!message || message === last.message) writer.show(text, { isLive: Boolean(last.message && isRunning(last.message.id)), canUndo: Boolean(last.message) });
}

function makeViews() {
  if (conversation.kind === "chat") return conversation.path.map((message) => [message.id, new (message.role === "user" ? UserView : AnswerView)(message, context)]);
  const { message } = lastText();
  return message && !conversation.draft ? [[message.id, new AnswerView(message, context, true)]] : [];
}

function render() {
  const opened = new Set([...views].filter(([, view]) => view.tokens).map(([id]) => id));
  inspector.hide();
  views = new Map(makeViews());
  byId("thread").replaceChildren(...[...views.values()].map(({ node }) => node));
  views.forEach((view, id) => {
    view.update(isRunning(id));
    if (opened.has(id)) view.switchView();
  });
  byId("spoken").replaceChildren();
  document.body.classList.toggle("writing", conversation.kind === "text");
  showText();
  renderEmpty();
  renderList(store, conversation, open, remove);
  panel.draw();
  meter.refresh();
  followEnd();
}

function renderEmpty() {
  const { kind, path } = conversation;
  byId("empty").hidden = path.length > 0;
  byId("examples").hidden = Boolean(conversation.draft);
  if (path.length) return;
  byId("mode").elements.mode.value = kind;
  byId("hello").textContent = t(kind === "text" ? "hello.text" : "hello.chat");
  byId("about-mode").textContent = t(kind === "text" ? "about.text" : model.isBase ? "about.base" : "about.chat");
  byId("example-list").replaceChildren(...EXAMPLES[kind].map((key) => textButton(t(key), () => tryExample(t(key)))));
}

function tryExample(text) {
  if (asker.running) return;
  if (conversation.kind === "text") writer.act.write(text);
  else asker.answer(conversation, conversation.add(null, "user", text));
}

/** Also what was written in another language. */
function renderAll() {
  render();
  showModel();
  grow();
}

function open(one) {
  conversation = one;
  follows = true;
  drawers.close("list-open");
  render();
  if (isCoarse.matches) return; // on a phone it would bring up the keyboard
  if (one.kind === "text") writer.focus();
  else question.focus();
}

function remove(one) {
  if (!confirm(t("list.confirm", { title: one.title }))) return;
  if (asker.running?.conversation === one) asker.stop();
  store.remove(one.id);
  if (one === conversation) conversation = newConversation();
  render();
}

function showModel(problem = "") {
  byId("model").textContent = problem || (model.id ?? t("model.none"));
  byId("model").title = model.id ?? "";
  document.title = model.id ? `${model.id} · Moestro` : "Moestro";
}

async function refreshModel() {
  try {
    await readModel();
    showModel();
    const isFresh = !conversation.messages.length && !conversation.draft && !question.value;
    if (isFresh && conversation.kind !== preferredKind()) open(newConversation());
    else meter.refresh();
  } catch (error) {
    showModel(error.kind === "key" ? t("model.keyNeeded") : error.message);
    if (error.kind === "key" && !byId("settings").open) settings.open("key", error.message);
  }
  panel.poll();
}

async function importFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    notify(t("import.done", { count: store.importText(await file.text()) }));
  } catch (error) {
    notify(error.message);
  }
  conversation = store.conversations.get(conversation.id) ?? conversation;
  render();
}

function send(event) {
  event.preventDefault();
  const text = question.value;
  if (!text.trim() || asker.running) return;
  question.value = "";
  grow();
  asker.answer(conversation, conversation.add(conversation.path.at(-1), "user", text));
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function listenToComposer() {
  byId("composer").addEventListener("submit", send);
  question.addEventListener("input", () => {
    grow();
    meter.refresh();
  });
  question.addEventListener("keydown", (event) => {
    const isPlainEnter = event.key === "Enter" && !event.shiftKey && !event.isComposing; // an input method's Enter is its own
    if (isPlainEnter && !isCoarse.matches) send(event); // on a phone, Enter begins a line
    if (event.key === "Escape") asker.stop();
  });
  byId("settings").addEventListener("close", () => {
    if (document.activeElement !== question) return;
    question.blur(); // Chromium gives a field the focus back without letting text in
    question.focus();
  });
  document.querySelectorAll(".stop").forEach((button) => button.addEventListener("click", () => {
    asker.stop();
    question.focus();
  }));
  byId("mode").addEventListener("change", () => {
    settings.keep({ mode: byId("mode").elements.mode.value });
    open(newConversation());
  });
}

function listenToPage() {
  scroller.addEventListener("scroll", () => {
    follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
    byId("to-end").hidden = follows;
  });
  byId("to-end").addEventListener("click", () => {
    follows = true;
    followEnd();
  });
  byId("dismiss").addEventListener("click", () => notify(""));
  document.querySelectorAll(".new-chat").forEach((button) => button.addEventListener("click", context.begin));
  byId("search").addEventListener("input", () => renderList(store, conversation, open, remove));
  byId("export").addEventListener("click", () => download("moestro-conversations.json", store.exportText()));
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", importFile);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      light(null);
      drawers.closeAll();
    }
    if (event.key !== "k" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    drawers.open("list-open");
    byId("search").focus();
  });
  addEventListener("pagehide", () => {
    if (conversation.draft) save();
    if (asker.running) save(asker.running.conversation);
  });
  addEventListener("languagechange", () => settings.set({ language: settings.values.language }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => panel.buildScale());
  watchServer(() => showModel(t("model.gone")), () => {
    refreshModel();
    asker.goOn();
  });
}

listenToComposer();
listenToPage();
drawers.start();
renderAll();
if (!store.isLasting) notify(t("store.none"));
if (store.numBroken) notify(t("store.broken", { count: store.numBroken }));
if (!isCoarse.matches) question.focus();
byId("model").textContent = "…";
refreshModel();
document.documentElement.classList.add("ready");
