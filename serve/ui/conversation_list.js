// The list of conversations at the side.

import { h, iconButton, isInputMethods } from "./dom.js";

/** Lists conversations; an ancestor's listener gets `data-action` and `data-id`. */
export function renderList(list, conversations, currentId) {
  const items = conversations.map((conversation) => {
    const isCurrent = conversation.id === currentId;
    const title = conversation.title;
    const attributes = { type: "button", class: "title", "data-action": "open", title };
    return h(
      "li",
      { "data-id": conversation.id, class: isCurrent && "current" },
      h("button", { ...attributes, "aria-current": isCurrent && "true" }, title),
      iconButton("edit", `Rename “${title}”`, "rename"),
      iconButton("delete", `Delete “${title}”`, "delete"),
    );
  });
  list.replaceChildren(...(items.length ? items : [h("li", { class: "none" }, "None yet")]));
}

/** Turns an item into a field; `done` gets the new title, or null if it stays. */
export function renameItem(item, title, done) {
  const field = h("input", { type: "text", "aria-label": "Title", maxlength: "120" });
  let isDone = false; // leaving the field by a key takes it away, which is a blur again
  const finish = (text) => {
    if (isDone) return;
    isDone = true;
    done(text?.trim() || null);
  };
  field.value = title;
  field.addEventListener("blur", () => finish(field.value));
  field.addEventListener("keydown", (event) => {
    if ((event.key !== "Enter" && event.key !== "Escape") || isInputMethods(event)) return;
    event.preventDefault();
    event.stopPropagation();
    finish(event.key === "Enter" ? field.value : null);
  });
  item.replaceChildren(field);
  field.select();
}
