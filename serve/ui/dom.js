// Small helpers around the DOM. Nothing here or elsewhere sets innerHTML.

/** An element with attributes (`false` and `null` leave one out) and children (nodes, strings). */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** An icon out of index.html's symbols. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon only; `action` is what listeners of an ancestor go by. */
export function iconButton(name, label, action) {
  const attributes = { type: "button", class: "icon-button", "aria-label": label, title: label };
  return h("button", { ...attributes, "data-action": action }, icon(name));
}

/**
 * Makes the children of `current` equal to those of `wanted` and keeps every node that can stay, so
 * that a growing answer neither flickers nor loses the reader's selection, focus and scroll.
 */
export function morph(current, wanted) {
  const olds = [...current.childNodes];
  const news = [...wanted.childNodes];
  news.forEach((node, i) => {
    const old = olds[i];
    if (!old) current.append(node);
    else if (old.nodeName !== node.nodeName) old.replaceWith(node);
    else if (node.nodeType === Node.TEXT_NODE) morphText(old, node.data);
    else {
      morphAttributes(old, node);
      morph(old, node);
    }
  });
  for (const old of olds.slice(news.length)) old.remove();
}

function morphText(old, data) {
  if (data.startsWith(old.data)) {
    if (data.length > old.data.length) old.appendData(data.slice(old.data.length));
  } else old.data = data;
}

function morphAttributes(old, node) {
  for (const { name } of [...old.attributes]) {
    if (!node.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of node.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
}

/**
 * Whether a key goes to an input method, as the Enter does that ends a Chinese or Japanese word.
 * Safari ends the composition before that key's event: only the code 229 tells it there.
 */
export function isInputMethods(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Writes text to the clipboard, also where a page without TLS is not given the modern way. */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = h("textarea", { class: "visually-hidden" });
  const focused = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
  focused?.focus();
}

/** A random identifier of 128 bits (crypto.randomUUID needs TLS or localhost). */
export function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
