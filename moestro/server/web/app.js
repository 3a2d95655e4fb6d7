// The page: conversations on the left, the chat, the experts on the right.

import { fillAnswer } from "./answer.js";
import { getJson } from "./api.js";
import { byId, download, element, iconButton, plural } from "./dom.js";
import { AnswerView, UserView } from "./messages.js";
import { RoutingPanel } from "./routing.js";
import { Settings } from "./settings.js";
import { Conversation, Store } from "./store.js";
import { hideTip } from "./tip.js";

const NEAR_END = 80; // pixels: closer to the end, the page follows the answer
const WIDE = { "list-open": matchMedia("(min-width: 82rem)"), "panel-open": matchMedia("(min-width: 62rem)") };

const isCoarse = matchMedia("(pointer: coarse)");

const scroller = byId("scroller");
const composer = byId("composer");
const question = byId("question");

const notify = (text) => {
  byId("notice-text").textContent = text;
  byId("notice").hidden = !text;
};

const store = new Store();
const panel = new RoutingPanel();
const settings = new Settings(() => {
  panel.buildScale();
  refreshModel();
}, notify);

let conversation = new Conversation();
let running = null; // { conversation, message, controller }
let model = null;
let views = new Map();
let follows = true;

const context = {
  get conversation() { return conversation; },
  settings: settings.values,
  setColour: (colour) => settings.set({ colour }),
  askKey: () => settings.open("key"),
  choose(message) {
    conversation.choose(message);
    save(conversation);
    render();
  },
  edit: (message, text) => ask(conversation.find(message.parent), text),
  regenerate: (message) => answer(conversation.find(message.parent)),
  retry(message) {
    const parent = conversation.find(message.parent);
    if (!message.content && !message.reasoning && !running) conversation.remove(message);
    answer(parent);
  },
};

function save(one) {
  if (!one.messages.length) return;
  try {
    store.save(one);
  } catch (error) {
    notify(error.message);
  }
}

function ask(parent, text) {
  if (running) return;
  answer(conversation.add(parent, "user", text));
}

async function answer(parent) {
  if (running) return;
  const home = conversation;
  const message = home.add(parent, "assistant", "");
  const messages = home.path.slice(0, -1).map(({ role, content }) => ({ role, content }));
  if (settings.values.system.trim()) messages.unshift({ role: "system", content: settings.values.system });
  const body = { ...(model && { model }), messages, stream: true, stream_options: { include_usage: true }, ...settings.sampling };
  running = { conversation: home, message, controller: new AbortController() };
  home.updated = Date.now();
  save(home);
  follows = true;
  render();
  showRunning(true);
  await fillAnswer(message, body, running.controller.signal, () => views.get(message.id)?.schedule(tell));
  running = null;
  save(home);
  showRunning(false);
  tell(views.get(message.id)?.update(false));
  followEnd();
  byId("status").textContent = message.error ? "" : message.finish === "aborted" ? "Answer stopped." : "Answer finished.";
  if (/API key/.test(message.error) && home === conversation) settings.open("key", message.error);
}

/** Read settled blocks out, politely, and keep the end in sight. */
function tell(text) {
  if (text) byId("spoken").append(element("p", {}, text));
  followEnd();
}

function followEnd() {
  if (follows) scroller.scrollTop = scroller.scrollHeight;
  byId("to-end").hidden = follows;
}

function showRunning(is) {
  document.body.classList.toggle("running", is);
  byId("send").hidden = is;
  byId("stop").hidden = !is;
  if (is) byId("status").textContent = "Answering.";
  panel.setBusy(is);
}

function render() {
  hideTip();
  byId("spoken").replaceChildren();
  const path = conversation.path;
  views = new Map(path.map((message) => [message.id, new (message.role === "user" ? UserView : AnswerView)(message, context)]));
  byId("thread").replaceChildren(...[...views.values()].map(({ node }) => node));
  views.forEach((view, id) => view.update(running?.message.id === id));
  byId("spoken").replaceChildren();
  byId("empty").hidden = path.length > 0;
  renderList();
  followEnd();
}

function renderList() {
  const words = byId("search").value.trim().toLowerCase();
  const matches = (one) => !words || one.messages.some(({ content }) => content.toLowerCase().includes(words));
  const items = store.list.filter(matches).map((one) => element("li", { class: one.id === conversation.id ? "current" : "" },
    element("button", { type: "button", class: "open", "aria-current": String(one.id === conversation.id), on: { click: () => open(one) } }, one.title),
    iconButton("delete", `Delete “${one.title}”`, () => remove(one))));
  byId("conversations").replaceChildren(...items);
  byId("no-conversations").hidden = items.length > 0;
  byId("no-conversations").textContent = words ? "None holds these words." : "Conversations are kept in this browser.";
}

function open(one) {
  conversation = one;
  follows = true;
  closeDrawer("list-open");
  render();
  if (!isCoarse.matches) question.focus(); // on a phone it would bring up the keyboard
}

function remove(one) {
  if (!confirm(`Delete “${one.title}”? There is no way back.`)) return;
  if (running?.conversation === one) running.controller.abort();
  store.remove(one.id);
  if (one === conversation) conversation = new Conversation();
  render();
}

async function refreshModel() {
  try {
    const { data } = await getJson("v1/models");
    model = data[0]?.id ?? null;
    byId("model").textContent = model ?? "no model";
    byId("model").title = model ?? "";
    document.title = model ? `${model} · Moestro` : "Moestro";
  } catch (error) {
    byId("model").textContent = error.status === 401 ? "API key needed" : error.message;
    if (error.status === 401 && !byId("settings").open) settings.open("key", error.message);
  }
  panel.poll();
}

function setDrawer(name, isOpen) {
  document.body.classList.toggle(name, isOpen);
  document.querySelectorAll(`[data-drawer="${name}"]`).forEach((button) => button.setAttribute("aria-expanded", String(isOpen)));
  panel.poll();
}

function toggleDrawer(name) {
  const isOpen = !document.body.classList.contains(name);
  if (isOpen) Object.keys(WIDE).filter((other) => other !== name && !WIDE[other].matches).forEach((other) => setDrawer(other, false));
  setDrawer(name, isOpen);
  if (isOpen && !WIDE[name].matches) byId(name === "list-open" ? "close-list" : "close-panel").focus();
}

function closeDrawer(name) {
  if (!document.body.classList.contains(name) || WIDE[name].matches) return;
  setDrawer(name, false);
  document.querySelector(`header [data-drawer="${name}"]`).focus();
}

async function importFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    notify(`${plural(store.importText(await file.text()), "conversation")} imported.`);
  } catch (error) {
    notify(error.message);
  }
  conversation = store.conversations.get(conversation.id) ?? conversation;
  render();
}

function send(event) {
  event.preventDefault();
  const text = question.value;
  if (!text.trim() || running) return;
  question.value = "";
  grow();
  ask(conversation.path.at(-1), text);
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function listenToComposer() {
  composer.addEventListener("submit", send);
  question.addEventListener("input", grow);
  question.addEventListener("keydown", (event) => {
    const isPlainEnter = event.key === "Enter" && !event.shiftKey && !event.isComposing; // an input method's Enter is its own
    if (isPlainEnter && !isCoarse.matches) send(event); // on a phone, Enter begins a line
    if (event.key === "Escape") running?.controller.abort();
  });
  byId("settings").addEventListener("close", () => {
    if (document.activeElement !== question) return;
    question.blur(); // Chromium gives a field the focus back without letting text in
    question.focus();
  });
  byId("stop").addEventListener("click", () => {
    running?.controller.abort();
    question.focus();
  });
}

function listenToPage() {
  scroller.addEventListener("scroll", () => {
    follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;
    byId("to-end").hidden = follows;
    hideTip();
  });
  byId("to-end").addEventListener("click", () => {
    follows = true;
    followEnd();
  });
  document.querySelectorAll("[data-drawer]").forEach((button) => button.addEventListener("click", () => toggleDrawer(button.dataset.drawer)));
  byId("scrim").addEventListener("click", () => Object.keys(WIDE).forEach(closeDrawer));
  byId("close-list").addEventListener("click", () => closeDrawer("list-open"));
  byId("close-panel").addEventListener("click", () => closeDrawer("panel-open"));
  byId("dismiss").addEventListener("click", () => notify(""));
  document.querySelectorAll(".new-chat").forEach((button) => button.addEventListener("click", () => open(new Conversation())));
  byId("search").addEventListener("input", renderList);
  byId("export").addEventListener("click", () => download("moestro-conversations.json", store.exportText()));
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", importFile);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("settings").open) Object.keys(WIDE).forEach(closeDrawer);
    if (event.key !== "k" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    if (!document.body.classList.contains("list-open")) toggleDrawer("list-open");
    byId("search").focus();
  });
  addEventListener("pagehide", () => { if (running) save(running.conversation); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => panel.buildScale());
  Object.entries(WIDE).forEach(([name, query]) => {
    query.addEventListener("change", () => setDrawer(name, query.matches));
    setDrawer(name, query.matches);
  });
}

listenToComposer();
listenToPage();
render();
if (!store.isLasting) notify("This browser keeps nothing for this page: conversations end with it.");
if (store.numBroken) notify(`${plural(store.numBroken, "conversation")} in this browser could not be read, and ${store.numBroken === 1 ? "was" : "were"} left alone.`);
if (!isCoarse.matches) question.focus();
refreshModel();
document.documentElement.classList.add("ready");
