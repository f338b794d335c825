// The chat page: what its parts do together. One conversation is open, one answer at most is coming.

import { newAnswer, receiveAnswer } from "./answer.js";
import { fetchModels } from "./api.js";
import { COMMANDS, parseCommand, runCommand } from "./commands.js";
import { renameItem, renderList } from "./conversation_list.js";
import { copyText, h } from "./dom.js";
import {
  closeSidebar,
  followEnd,
  isSidebarOpen,
  notice,
  openSidebar,
  scrollToEnd,
  toast,
} from "./layout.js";
import {
  answerText,
  editMessage,
  fitHeight,
  isSendKey,
  messageElement,
  updateAnswer,
} from "./messages.js";
import { bindSettings, bindTheme, openSettings } from "./settings_panel.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);

let models = []; // {id, chat}, as the server lists them
let settings = store.loadSettings();
let conversation = store.newConversation(settings.system);
let answering = null; // {controller, done}: the answer that is coming

// Models

async function loadModels() {
  try {
    models = await fetchModels(store.loadApiKey());
    showModels(models.length ? "" : "No models");
  } catch (error) {
    models = [];
    showModels("No models");
    notice(error.message);
  }
}

/** The chosen model, or the first one while the chosen one is not served. */
const currentModel = () => models.find(({ id }) => id === settings.model) ?? models[0];

function showModels(placeholder) {
  const options = models.map(({ id, chat }) =>
    h("option", { value: id }, chat ? id : `${id} (continues text)`),
  );
  $("model").replaceChildren(...(placeholder ? [h("option", {}, placeholder)] : options));
  $("model").disabled = !models.length;
  const model = currentModel();
  if (model) $("model").value = model.id;
  const base = "a base model: it does not answer, it goes on with your text.";
  $("welcome-model").textContent = model ? `${model.id}${model.chat ? "" : ` is ${base}`}` : "";
  $("suggestions").hidden = !model?.chat;
}

function changeSettings(changes) {
  Object.assign(settings, changes);
  keep(() => store.updateSettings(changes));
  if ("model" in changes) showModels("");
  if ("system" in changes && !conversation.messages.length) conversation.system = settings.system;
}

// The conversation

function showConversation() {
  $("messages").replaceChildren(...conversation.messages.map(messageElement));
  $("notices").replaceChildren();
  $("welcome").hidden = conversation.messages.length > 0;
  scrollToEnd();
  showList();
}

/** Shows the list, and the open conversation in the tab's title and address: a reload finds it. */
function showList() {
  renderList($("conversations"), store.listConversations(), conversation.id);
  history.replaceState(null, "", conversation.messages.length ? `#${conversation.id}` : "#");
  document.title = conversation.title ? `${conversation.title} · nanoray` : "nanoray";
}

/** Writes to the browser's storage, and says so when there is no room. */
function keep(write) {
  try {
    write();
  } catch (error) {
    notice(`The browser does not store this: ${error.message}`);
  }
}

function saveConversation() {
  if (!conversation.messages.length) return;
  conversation.updated = Date.now();
  keep(() => store.saveConversation(conversation));
  showList();
}

async function openConversation(id) {
  await stop();
  conversation = (id && store.loadConversation(id)) || store.newConversation(settings.system);
  // The answer was still coming when the page that asked for it was closed.
  for (const message of conversation.messages) {
    if (message.role === "assistant") message.finish ??= "stopped";
  }
  showConversation();
  closeSidebar();
  $("input").focus();
}

// Asking and answering

/** Sends a user's message in place of the messages from `index` on. */
async function send(text, index = conversation.messages.length) {
  await stop();
  conversation.messages.length = index;
  conversation.messages.push({ role: "user", text });
  conversation.title ||= text.trim().split("\n")[0].slice(0, 60);
  await answer();
}

/** Asks for an answer to the last message. */
async function answer() {
  const model = currentModel();
  if (!model) return answerLater();
  const message = newAnswer(model);
  const controller = new AbortController();
  const request = {
    model,
    system: conversation.system,
    messages: conversation.messages.slice(),
    settings,
    apiKey: store.loadApiKey(),
    sessionId: conversation.sessionId,
    signal: controller.signal,
  };
  conversation.messages.push(message);
  showConversation();
  saveConversation();
  const element = $("messages").lastElementChild;
  const show = () => followEnd(() => updateAnswer(element, message));
  const changed = eachFrame(() => message.finish || show());
  answering = { controller, done: receiveAnswer(message, request, changed) };
  showSendButton();
  await answering.done;
  answering = null;
  showSendButton();
  show();
  saveConversation();
  $("announcer").textContent = message.error ? "" : answerText(message);
  // Another name may have come with another checkpoint: the next try asks a model that there is.
  if (message.code === "model_not_found") await loadModels();
}

/** For a page that was opened while the server was not there. */
async function answerLater() {
  const asking = conversation;
  showConversation();
  saveConversation();
  await loadModels(); // which tells what is wrong, if it still is
  if (currentModel() && !answering && conversation === asking) await answer();
}

/** Stops the answer that is coming and keeps what came. */
async function stop() {
  answering?.controller.abort();
  await answering?.done;
}

async function regenerate(index) {
  await stop();
  conversation.messages.length = index;
  await answer();
}

/** At most one call a frame, however fast tokens come. */
function eachFrame(callback) {
  let isWaiting = false;
  return () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      callback();
    });
  };
}

function showSendButton() {
  const [name, label] = answering ? ["stop", "Stop"] : ["send", "Send"];
  const button = $("send");
  button.querySelector("use").setAttribute("href", `#icon-${name}`);
  button.setAttribute("aria-label", label);
  button.title = answering ? "Stop (Esc)" : "Send (Enter)";
  button.classList.toggle("stop", Boolean(answering));
}

// Messages

$("messages").addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  const element = button?.closest(".message");
  if (!element) return;
  const index = Number(element.dataset.index);
  const message = conversation.messages[index];
  const actions = {
    copy: () => copy(button, message.text ?? answerText(message)),
    "copy-code": () => copy(button, button.closest("figure").querySelector("code").textContent),
    edit: () => edit(element, index),
    regenerate: () => {
      // The button goes, and with it a keyboard's place on the page. Not so for a click: on a phone
      // the field would bring up the keyboard.
      if (event.detail === 0) $("input").focus();
      regenerate(index);
    },
    settings: () => openSettings(settings),
  };
  actions[button.dataset.action]();
});

async function copy(button, text) {
  await copyText(text);
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1500);
  toast("Copied");
}

function edit(element, index) {
  const message = conversation.messages[index];
  editMessage(element, (text) => {
    const shown = messageElement(message, index);
    element.replaceWith(shown);
    if (text === null) shown.querySelector("[data-action=edit]").focus();
    else {
      $("input").focus();
      send(text, index);
    }
  });
}

// The composer

$("composer").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (answering) return void stop();
  const text = $("input").value;
  if (!text.trim()) return;
  $("input").value = "";
  showComposer();
  const command = parseCommand(text);
  if (!command) return void send(currentModel()?.chat === false ? text : text.trim());
  const page = { settings, models, change: changeSettings, clear, help: openHelp };
  const sentence = await runCommand(command, page);
  if (sentence) notice(sentence);
});

const clear = () => openConversation(null);

function openHelp() {
  $("help").showModal();
}

$("input").addEventListener("input", showComposer);
$("input").addEventListener("keydown", (event) => {
  if (isSendKey(event)) {
    event.preventDefault();
    // While an answer is coming Enter does not stop it: the button and Escape do.
    if (!answering) $("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !$("input").value && !answering) {
    const own = [...document.querySelectorAll(".message.user")].at(-1);
    if (own) edit(own, Number(own.dataset.index));
    event.preventDefault();
  }
});

function showComposer() {
  const text = $("input").value;
  fitHeight($("input"));
  const hints = COMMANDS.filter(([name]) => text.startsWith("/") && name.startsWith(text.trim()));
  $("command-hints").hidden = !hints.length;
  $("command-hints").replaceChildren(
    ...hints.map(([name, takes, does]) => h("li", {}, h("code", {}, `${name} ${takes}`), does)),
  );
}

$("suggestions").addEventListener("click", ({ target }) => {
  if (target.closest("button")) send(target.textContent);
  $("input").focus();
});

// The conversation list

$("conversations").addEventListener("click", (event) => {
  const item = event.target.closest("li");
  const action = event.target.closest("[data-action]")?.dataset.action;
  if (action === "open") openConversation(item.dataset.id);
  if (action === "rename") rename(item);
  if (action === "delete") remove(item.dataset.id);
});

function rename(item) {
  const id = item.dataset.id;
  const named = id === conversation.id ? conversation : store.loadConversation(id);
  if (!named) return showList();
  renameItem(item, named.title, (title) => {
    if (title) named.title = title;
    if (title) keep(() => store.saveConversation(named));
    showList();
    document.querySelector(`[data-id="${named.id}"] .title`)?.focus();
  });
}

function remove(id) {
  const removed = store.loadConversation(id);
  if (!removed) return showList();
  store.deleteConversation(id);
  if (id === conversation.id) openConversation(null);
  else showList();
  $("new").focus();
  toast(`Deleted “${removed.title}”`, "Undo", () => {
    keep(() => store.restoreConversation(removed));
    openConversation(id);
  });
}

store.onForeignChange((id) => {
  showList();
  if (id !== conversation.id || answering) return;
  openConversation(id);
});

// Keeps what has come of an answer when the page goes while it is coming.
addEventListener("pagehide", () => {
  if (!answering) return;
  answering.controller.abort(); // else the cut connection would be told as an error
  saveConversation();
});

// Buttons and keys

const BUTTONS = {
  new: clear,
  "open-list": openSidebar,
  "close-list": closeSidebar,
  backdrop: closeSidebar,
  "open-help": openHelp,
  "open-settings": () => openSettings(settings),
  "to-end": scrollToEnd,
};
for (const [id, action] of Object.entries(BUTTONS)) {
  $(id).addEventListener("click", action);
}
$("model").addEventListener("change", () => changeSettings({ model: $("model").value }));

// By position, for Alt and a letter is a character of its own on some keyboards.
const SHORTCUTS = { KeyN: clear, KeyL: openSidebar, KeyS: () => openSettings(settings) };

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (isSidebarOpen()) closeSidebar();
    else stop();
  }
  if (event.altKey && !event.ctrlKey && !event.metaKey && SHORTCUTS[event.code]) {
    event.preventDefault();
    SHORTCUTS[event.code]();
  }
});

$("help-commands").append(
  ...COMMANDS.map(([name, takes, does]) =>
    h("div", {}, h("dt", {}, h("code", {}, `${name} ${takes}`)), h("dd", {}, does)),
  ),
);
bindTheme();
bindSettings(changeSettings, loadModels);
openConversation(location.hash.slice(1));
loadModels();
