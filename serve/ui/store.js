// Conversations and settings, kept in the browser.

import { randomId } from "./dom.js";

// Pages under different prefixes of one host do not see each other's.
const SCOPE = `nanoray:${new URL(".", document.baseURI).pathname}:`;
const CONVERSATION = `${SCOPE}conversation:`;
const SETTINGS = `${SCOPE}settings`;
const API_KEY = `${SCOPE}api-key`;

/** [lowest, highest, default] of what can be set; the server's limits. */
export const LIMITS = {
  temperature: [0, 2, 0.6],
  topK: [0, 200, 50],
  maxTokens: [1, 4096, 512],
};

const local = openStorage("localStorage");
const session = openStorage("sessionStorage");

/** The browser's storage, or where it is switched off one that lasts as long as the page. */
function openStorage(name) {
  try {
    window[name].getItem(SCOPE);
    return window[name];
  } catch {
    const items = new Map();
    return {
      getItem: (key) => items.get(key) ?? null,
      setItem: (key, value) => void items.set(key, value),
      removeItem: (key) => void items.delete(key),
      key: (i) => [...items.keys()][i] ?? null,
      get length() {
        return items.size;
      },
    };
  }
}

function read(key) {
  try {
    return JSON.parse(local.getItem(key));
  } catch {
    return null;
  }
}

// Conversations. Each has a key of its own, so that tabs which write different ones never meet.

export function newConversation(system) {
  return {
    id: randomId(),
    sessionId: randomId(), // the server's affinity
    title: "",
    system,
    updated: Date.now(),
    revision: 0, // counts its writes; 0: never written
    messages: [], // {role: "user", text} and {role: "assistant", parts, finish, …}
  };
}

/** All that are stored, the latest first. */
export function listConversations() {
  const keys = Array.from({ length: local.length }, (_, i) => local.key(i));
  return keys
    .filter((key) => key.startsWith(CONVERSATION))
    .map((key) => loadConversation(key.slice(CONVERSATION.length)))
    .filter(Boolean)
    .sort((a, b) => b.updated - a.updated);
}

/** The conversation, or null if there is none or what is stored is none. */
export function loadConversation(id) {
  const stored = read(CONVERSATION + id);
  return isConversation(stored) && stored.id === id ? stored : null;
}

function isConversation(value) {
  const isPart = (part) => typeof part?.type === "string" && typeof part.text === "string";
  const isMessage = (message) =>
    message?.role === "user"
      ? typeof message.text === "string"
      : message?.role === "assistant" &&
        Array.isArray(message.parts) &&
        message.parts.every(isPart);
  return (
    ["id", "sessionId", "title", "system"].every((name) => typeof value?.[name] === "string") &&
    ["updated", "revision"].every((name) => typeof value[name] === "number") &&
    Array.isArray(value.messages) &&
    value.messages.every(isMessage)
  );
}

/**
 * Writes a conversation. If another tab wrote it meanwhile, both are kept: this one becomes a copy
 * with a new id. If another tab deleted it, it stays deleted.
 *
 * @throws DOMException when the storage is full
 */
export function saveConversation(conversation) {
  const stored = loadConversation(conversation.id);
  if (!stored && conversation.revision > 0) return;
  if (stored && stored.revision !== conversation.revision) {
    conversation.id = randomId();
    conversation.title += " (copy)";
  }
  write(conversation, conversation.revision + 1);
}

/** Writes a deleted one again. */
export function restoreConversation(conversation) {
  write(conversation, conversation.revision);
}

function write(conversation, revision) {
  local.setItem(CONVERSATION + conversation.id, JSON.stringify({ ...conversation, revision }));
  conversation.revision = revision;
}

export function deleteConversation(id) {
  local.removeItem(CONVERSATION + id);
}

/** Calls back with a conversation's id when another tab wrote or deleted it. */
export function onForeignChange(callback) {
  window.addEventListener("storage", ({ key }) => {
    if (key?.startsWith(CONVERSATION)) callback(key.slice(CONVERSATION.length));
  });
}

// Settings

/** {model, system, temperature, topK, maxTokens}; what is stored and out of range is the default. */
export function loadSettings() {
  const stored = read(SETTINGS) ?? {};
  const text = (name) => (typeof stored[name] === "string" ? stored[name] : "");
  const settings = { model: text("model"), system: text("system") };
  for (const [name, [lowest, highest, initial]] of Object.entries(LIMITS)) {
    const value = stored[name];
    const isValid = typeof value === "number" && value >= lowest && value <= highest;
    settings[name] = isValid ? value : initial;
  }
  return settings;
}

/** Changes some and leaves the others as another tab may have set them. */
export function updateSettings(changes) {
  local.setItem(SETTINGS, JSON.stringify({ ...read(SETTINGS), ...changes }));
}

/** The API key is a secret: it goes when the tab is closed. */
export function loadApiKey() {
  return session.getItem(API_KEY) ?? "";
}

export function saveApiKey(apiKey) {
  if (apiKey) session.setItem(API_KEY, apiKey);
  else session.removeItem(API_KEY);
}

/** "light", "dark" or "" for the system's; theme.js reads it before the page is painted. */
export function saveTheme(theme) {
  if (theme) local.setItem("nanoray:theme", theme);
  else local.removeItem("nanoray:theme");
}
