// Around the conversation: the sidebar on a phone, scrolling, what the page itself has to say.

import { h } from "./dom.js";

const $ = (id) => document.getElementById(id);

// The sidebar, which slides over the page on a phone, and else is always there

const phone = matchMedia("(max-width: 760px)"); // as in style.css
phone.addEventListener("change", closeSidebar);

export const isSidebarOpen = () => document.body.classList.contains("list-open");

/** Brings the reader to the list. */
export function openSidebar() {
  if (phone.matches) showSidebar(true);
  $("new").focus();
}

export function closeSidebar() {
  if (!isSidebarOpen()) return;
  showSidebar(false);
  $("open-list").focus();
}

function showSidebar(isOpen) {
  document.body.classList.toggle("list-open", isOpen);
  $("open-list").setAttribute("aria-expanded", isOpen);
  $("backdrop").hidden = !isOpen;
  $("main").inert = isOpen;
}

// Scrolling

const isAtEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 48;

export function scrollToEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

/** Stays at the end while the page grows, if the reader is there. */
export function followEnd(grow) {
  const follows = isAtEnd();
  grow();
  if (follows) scrollToEnd();
}

$("scroll").addEventListener("scroll", () => ($("to-end").hidden = isAtEnd()), { passive: true });

// What the page has to say

/** A sentence below the messages, which goes with the next one. */
export function notice(text) {
  $("notices").append(h("p", {}, text));
  scrollToEnd();
}

let toastTimer = 0;

/** A few words for a moment, with a button perhaps. */
export function toast(text, action, callback) {
  clearTimeout(toastTimer);
  const hide = () => $("toast").replaceChildren();
  const button = action ? [h("button", { type: "button" }, action)] : [];
  button[0]?.addEventListener("click", () => (hide(), callback()));
  $("toast").replaceChildren(h("span", {}, text), ...button);
  toastTimer = setTimeout(hide, action ? 8000 : 2000);
}
