// What a message looks like.

import { h, icon, iconButton, isInputMethods, morph } from "./dom.js";
import { toolMark, withoutMarks } from "./inline.js";
import { renderMarkdown } from "./markdown.js";

/** The element of a message; `data-index` is its place in the conversation. */
export function messageElement(message, index) {
  const element = message.role === "user" ? userElement(message) : answerElement(message);
  element.dataset.index = index;
  return element;
}

function userElement({ text }) {
  return h(
    "article",
    { class: "message user", "aria-label": "You" },
    h("div", { class: "bubble" }, text),
    h(
      "footer",
      {},
      iconButton("edit", "Edit and resend", "edit"),
      iconButton("copy", "Copy message", "copy"),
    ),
  );
}

function answerElement(message) {
  const label = `Answer of ${message.model}`;
  const element = h("article", { class: "message assistant", "aria-label": label });
  element.append(
    h("div", { class: "left-out", role: "status" }),
    h("div", { class: "content" }),
    h("div", { class: "outcome" }),
  );
  updateAnswer(element, message);
  return element;
}

const LEFT_OUT = "The beginning of this conversation no longer fits and was left out.";

/** Shows what has come of an answer. */
export function updateAnswer(element, message) {
  const [leftOut, content, outcome] = element.children;
  const isStreaming = !message.finish;
  element.classList.toggle("streaming", isStreaming);
  element.setAttribute("aria-busy", isStreaming);
  if (message.leftOut) leftOut.textContent ||= LEFT_OUT; // once: a screen reader tells each change
  content.classList.toggle("plain", !message.chat);
  morph(content, message.chat ? renderAnswer(message) : h("div", {}, answerText(message)));
  if (!isStreaming) outcome.replaceChildren(...outcomeNodes(message));
}

/** An answer is one Markdown text, in which marks stand for the tool calls. */
function renderAnswer({ parts, finish }) {
  const tools = [];
  let text = "";
  for (const part of parts) {
    if (part.type === "text") text += withoutMarks(part.text);
    else if (part.type === "python") {
      text += toolMark(tools.length);
      tools.push({ expression: part.text, result: null, pending: !finish });
    } else if (tools.length) tools.at(-1).result = part.text;
  }
  return renderMarkdown(text, tools);
}

/** What the model said, without its tool calls. */
export function answerText({ parts }) {
  return parts
    .filter((part) => part.type === "text")
    .map((part) => part.text)
    .join("");
}

function outcomeNodes(message) {
  const footer = h("footer", {});
  if (message.parts.length) footer.append(iconButton("copy", "Copy answer", "copy"));
  if (!message.error) footer.append(iconButton("regenerate", "Regenerate", "regenerate"));
  footer.append(h("span", { class: "stats" }, statistics(message)));
  return message.error ? [errorCard(message), footer] : [footer];
}

function errorCard({ error, status, retryAfter }) {
  const wait = retryAfter ? ` Try again in ${Math.ceil(retryAfter)} s.` : "";
  const card = h(
    "div",
    { class: "error", role: "alert" },
    icon("warning"),
    h("p", {}, error + wait),
    h("button", { type: "button", "data-action": "regenerate" }, "Retry"),
  );
  if (status === 401) {
    card.append(h("button", { type: "button", "data-action": "settings" }, "Enter a key"));
  }
  return card;
}

const FINISHES = { length: "cut at the limit", stopped: "stopped" };

function statistics({ finish, tokens, tokensPerSecond, model }) {
  const speed = tokensPerSecond && `${tokensPerSecond.toFixed(tokensPerSecond < 10 ? 1 : 0)} tokens/s`;
  const count = tokens && `${tokens} ${tokens === 1 ? "token" : "tokens"}`;
  return [model, count, speed, FINISHES[finish]].filter(Boolean).join(" · ");
}

/** Turns a user's message into a field; `done` gets the new text, or null if nothing is to change. */
export function editMessage(element, done) {
  const bubble = element.querySelector(".bubble");
  const field = h("textarea", { "aria-label": "Edit the message", rows: "1" });
  const cancel = h("button", { type: "button" }, "Cancel");
  const send = h("button", { type: "submit", class: "primary" }, "Send");
  const form = h("form", { class: "editor" }, field, h("div", {}, cancel, send));
  field.value = bubble.textContent;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    done(field.value.trim() ? field.value : null);
  });
  cancel.addEventListener("click", () => done(null));
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      done(null);
    } else if (event.target === field && isSendKey(event)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  field.addEventListener("input", () => fitHeight(field));
  element.replaceChildren(form);
  fitHeight(field);
  field.focus();
}

/** Enter without Shift. */
export function isSendKey(event) {
  return event.key === "Enter" && !event.shiftKey && !isInputMethods(event);
}

/** Makes a text field as high as its text (style.css says how high it may become). */
export function fitHeight(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}
