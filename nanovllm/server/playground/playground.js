// The page: tabs, composer, and what can be done with a conversation.

import { download, keep, readConversation, readKept } from "./archive.js";
import { call, stream } from "./api.js";
import { Conversation } from "./conversation.js";
import { watchEngine } from "./engine.js";
import { chatRequest, completionRequest, curlOf, messagesOf, receive } from "./requests.js";
import * as settings from "./settings.js";
import * as speech from "./speech.js";

const MODES = ["chat", "complete", "speech"];
const RETRY_MS = 1000;
const PLACEHOLDERS = { chat: "Say something", complete: "Begin a text", speech: "Say it aloud" };

const byId = (id) => document.getElementById(id);
const prompt = byId("prompt");
const conversations = {
  chat: new Conversation(byId("panel-chat")),
  complete: new Conversation(byId("panel-complete")),
  speech: new Conversation(byId("panel-speech")),
};
let mode = "chat";
const models = { text: null, speech: null }; // the names of those that the server has
let running = null; // the AbortController of the answer that is being written

// --- Asking

/** The request that would answer `exchange`, of the conversation or next in it. */
function requestFor(exchange) {
  if (mode === "speech") {
    return speech.speechRequest(models.speech, exchange.prompt, speech.readVoice());
  }
  const [model, parameters] = [models.text, settings.readParameters()];
  if (mode === "complete") return completionRequest(model, exchange.prompt, parameters);
  const said = conversations.chat.exchanges.filter((other) => other !== exchange && other.answer);
  const messages = messagesOf(settings.readSystem(), [...said, { prompt: exchange.prompt }]);
  return chatRequest(model, messages, parameters);
}

/** Have the last exchange of the conversation answered, anew if it was. */
async function ask(conversation) {
  const exchange = conversation.last;
  const request = requestFor(exchange);
  const fresh = { answer: "", thought: "", figures: null, ending: null, error: null };
  Object.assign(exchange, fresh, { running: true });
  running = new AbortController();
  showRunning();
  conversation.refreshNow();
  try {
    const refresh = () => conversation.refresh();
    if (mode === "speech") await speech.speak(exchange, request, running.signal, refresh);
    else await receive(exchange, stream(request.path, { ...request, signal: running.signal }), refresh);
  } catch (error) {
    if (error.name === "AbortError") exchange.ending = "stopped";
    else exchange.error = error.message;
    if (error.status === 401) settings.askForKey();
  }
  exchange.running = false;
  running = null;
  showRunning();
  conversation.refreshNow();
}

function stop() {
  running?.abort();
}

function showRunning() {
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
}

// --- Composer

function writePrompt(text) {
  prompt.value = text;
  fitPrompt();
  prompt.focus();
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function send() {
  if (running || !prompt.value.trim()) return;
  const text = mode === "complete" ? prompt.value : prompt.value.trim();
  writePrompt("");
  say("");
  conversations[mode].add({ prompt: text });
  ask(conversations[mode]);
}

function say(text) {
  byId("notice").textContent = text;
}

function onPromptKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
}

function onPageKey(event) {
  if (byId("request").open) return;
  if (event.key === "Escape") {
    if (running) stop();
    else if (settings.coverPage()) settings.show(false);
  }
  const isShortcut = !event.ctrlKey && !event.metaKey && !event.altKey;
  if (event.key === "/" && isShortcut && !event.target.matches("input, textarea")) {
    event.preventDefault();
    prompt.focus();
  }
}

// --- What can be done with an exchange

const ACTIONS = {
  copy: (exchange, _, button) => copy(exchange.answer, button),
  regenerate: (_, conversation) => ask(conversation),
  proceed(exchange, conversation) {
    exchange.prompt += exchange.answer;
    ask(conversation);
  },
  edit(exchange, conversation) {
    conversation.removeLast();
    writePrompt(exchange.prompt);
  },
};

function onAction(event) {
  const button = event.target.closest("[data-action]");
  const action = button?.dataset.action;
  if (!button || (running && action !== "copy")) return;
  const conversation = conversations[mode];
  ACTIONS[action](conversation.exchangeOf(button), conversation, button);
}

/** Put text on the clipboard, which browsers allow only over HTTPS or on this machine. */
async function copy(text, button) {
  button.dataset.label ??= button.textContent;
  const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  button.textContent = copied ? "Copied" : "Not allowed";
  setTimeout(() => (button.textContent = button.dataset.label), 1500);
}

// --- What can be done with the conversation

/** Show what would be sent now, or with nothing written what was sent last. */
function showRequest() {
  const { last } = conversations[mode];
  const request = requestFor(prompt.value.trim() || !last ? { prompt: prompt.value } : last);
  byId("request-curl").textContent = curlOf(request);
  byId("request-json").textContent = JSON.stringify(request.body, null, 2);
  byId("request").showModal();
}

function exportConversation() {
  const system = mode === "chat" ? settings.readSystem() : "";
  const messages = messagesOf(system, conversations[mode].exchanges);
  download("conversation.json", { model: models.text, mode, parameters: settings.readParameters(), messages });
}

async function importConversation() {
  const [file] = byId("import-file").files;
  try {
    showPage(await readConversation(file));
    say("");
  } catch (error) {
    say(`${file.name} cannot be imported: ${error.message}.`);
  }
  byId("import-file").value = ""; // or the same file would be no change the next time
}

function showPage({ mode: name, system, parameters, exchanges }) {
  stop();
  showMode(name);
  for (const [each, kept] of Object.entries(exchanges)) {
    conversations[each].clear();
    kept.forEach((exchange) => conversations[each].add(exchange));
  }
  settings.writeSystem(system);
  if (parameters) settings.writeParameters(parameters);
}

function clearConversation() {
  stop();
  conversations[mode].clear();
  writePrompt("");
}

function keepPage() {
  const { chat, complete } = conversations;
  const exchanges = { chat: chat.exchanges, complete: complete.exchanges };
  const [system, parameters] = [settings.readSystem(), settings.readParameters()];
  keep({ mode, system, parameters, exchanges });
}

// --- The frame: tabs, model, and the first look

function showMode(name) {
  mode = name;
  for (const each of MODES) {
    const tab = byId(`tab-${each}`);
    tab.setAttribute("aria-selected", each === name);
    tab.tabIndex = each === name ? 0 : -1;
    byId(`panel-${each}`).hidden = each !== name;
  }
  const speaks = name === "speech";
  byId("composer").hidden = speaks && !models.speech;
  byId("system-section").hidden = name !== "chat";
  byId("sampling-section").hidden = speaks;
  byId("voice-section").hidden = !speaks || !models.speech;
  for (const id of ["import", "export"]) byId(id).hidden = speaks;
  prompt.placeholder = PLACEHOLDERS[name];
  showToLatest();
}

function onTabKey(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  const shown = MODES.filter((name) => !byId(`tab-${name}`).hidden);
  showMode(shown.at((shown.indexOf(mode) + step) % shown.length));
  byId(`tab-${mode}`).focus();
}

function showToLatest() {
  byId("to-latest").hidden = conversations[mode]?.followsEnd ?? true;
}

/** Show the model if `news` is that the server answers, or else why it does not. */
async function showServer(news) {
  const label = byId("model");
  try {
    if (news instanceof Error) throw news;
    await showModels(await (await call("info")).json());
    label.textContent = [models.text, models.speech].filter(Boolean).join(" · ");
    label.className = "online";
  } catch (error) {
    label.textContent = { 401: "key needed", 503: "not ready" }[error.status] ?? "not reachable";
    label.className = "offline";
    if (error.status === 401) settings.askForKey();
    else if (news === "online") setTimeout(showServer, RETRY_MS, news);
  }
}

/** Show what the models of the server can do, and nothing else. */
async function showModels({ model, speech: speaker }) {
  const writes = model.kind === "text";
  models.text = writes ? model.served_model_names[0] : null;
  models.speech = speaker?.served_model_names[0] ?? null;
  if (writes) settings.limitTokens(model.max_model_len);
  for (const name of ["chat", "complete"]) byId(`tab-${name}`).hidden = !writes;
  document.querySelector("#panel-speech .openers").hidden = !speaker;
  if (!speaker) {
    byId("speech-hint").textContent = "This server has no model that speaks: start it with one.";
  } else {
    await speech.loadVoices();
  }
  showMode(writes ? mode : "speech");
}

function wireTabs() {
  MODES.forEach((name) => byId(`tab-${name}`).addEventListener("click", () => showMode(name)));
  document.querySelector("[role=tablist]").addEventListener("keydown", onTabKey);
}

function wireComposer() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", stop);
  prompt.addEventListener("input", fitPrompt);
  prompt.addEventListener("keydown", onPromptKey);
  document.addEventListener("keydown", onPageKey);
}

function wireConversations() {
  for (const { panel } of Object.values(conversations)) {
    panel.addEventListener("click", onAction);
    panel.addEventListener("follow", showToLatest);
    for (const opener of panel.querySelectorAll(".openers button")) {
      opener.addEventListener("click", () => {
        prompt.value = opener.textContent;
        send();
      });
    }
  }
  byId("to-latest").addEventListener("click", () => conversations[mode].scrollToEnd());
}

function wireTools() {
  byId("show-request").addEventListener("click", showRequest);
  document.querySelector("[data-close]").addEventListener("click", () => byId("request").close());
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => copy(byId(button.dataset.copy).textContent, button));
  }
  byId("export").addEventListener("click", exportConversation);
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", importConversation);
  byId("clear").addEventListener("click", clearConversation);
}

function start() {
  const refreshEngine = watchEngine(byId("engine"), showServer);
  settings.start(refreshEngine);
  speech.start(say);
  wireTabs();
  wireComposer();
  wireConversations();
  wireTools();
  showMode(mode);
  const kept = readKept();
  if (kept) showPage(kept);
  addEventListener("pagehide", keepPage);
  prompt.focus();
}

start();
