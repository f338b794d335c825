// The settings' dialog and the theme's button.

import { parseSetting } from "./commands.js";
import { icon } from "./dom.js";
import { LIMITS, loadApiKey, saveApiKey, saveTheme } from "./store.js";

const byId = (id) => document.getElementById(id);

/**
 * What is changed holds at once; there is nothing to save.
 *
 * @param change gets the settings that were changed
 * @param keyChanged is called after another API key was stored
 */
export function bindSettings(change, keyChanged) {
  for (const [key, [lowest, highest]] of Object.entries(LIMITS)) {
    const field = byId(key);
    field.min = lowest;
    field.max = highest;
    field.addEventListener("input", () => {
      const value = parseSetting(key, field.value);
      field.setAttribute("aria-invalid", value === null);
      if (value !== null) change({ [key]: value });
    });
  }
  byId("system").addEventListener("input", () => change({ system: byId("system").value }));
  byId("api-key").addEventListener("change", () => {
    saveApiKey(byId("api-key").value.trim());
    keyChanged();
  });
  // A click beside the dialog closes it.
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
}

export function openSettings(settings) {
  for (const key of Object.keys(LIMITS)) {
    byId(key).value = settings[key];
    byId(key).setAttribute("aria-invalid", "false");
  }
  byId("system").value = settings.system;
  byId("api-key").value = loadApiKey();
  byId("settings").showModal();
}

const NEXT_THEME = { "": "light", light: "dark", dark: "" };

/** The button goes from the system's theme to light, to dark, and back. */
export function bindTheme() {
  const button = byId("theme");
  const root = document.documentElement;
  const show = () => {
    const theme = root.dataset.theme ?? "system";
    button.replaceChildren(icon(`theme-${theme}`));
    button.setAttribute("aria-label", `Theme: ${theme}`);
    button.title = `Theme: ${theme}`;
  };
  button.addEventListener("click", () => {
    const theme = NEXT_THEME[root.dataset.theme ?? ""];
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
    saveTheme(theme);
    show();
  });
  show();
}
