// Slash commands: the same as in `python -m jobs.chat`, as far as they make sense on a page.

import { LIMITS } from "./store.js";

/** [command, what it takes, what it does] for the help and the hints. */
export const COMMANDS = [
  ["/temperature", "X", "show or set it; 0 takes the likeliest token"],
  ["/topk", "N", "show or set it; 0 samples from all tokens"],
  ["/model", "NAME", "show the models or choose one"],
  ["/system", "TEXT", "begin anew with this system message, or with none"],
  ["/clear", "", "begin anew"],
  ["/help", "", "this list and the shortcuts"],
];

/** {name, argument}, or null if the text is a message. */
export function parseCommand(text) {
  const match = /^(\/[a-z]+)(?:\s+([\s\S]*))?$/i.exec(text);
  return match && { name: match[1].toLowerCase(), argument: (match[2] ?? "").trim() };
}

/**
 * Runs a command and gives a sentence about it, or null if what it does is seen.
 *
 * @param page {settings, models, change(settings), clear(), help()}
 */
export async function runCommand({ name, argument }, page) {
  switch (name) {
    case "/temperature":
      return setNumber("temperature", "Temperature", argument, page);
    case "/topk":
      return setNumber("topK", "Top-k", argument, page);
    case "/model":
      return setModel(argument, page);
    case "/system":
      page.change({ system: argument });
      await page.clear();
      return argument ? `System message: ${argument}` : "No system message.";
    case "/clear":
      return page.clear();
    case "/help":
      return page.help();
    default:
      return `There is no command ${name}; /help lists them. A space before it sends it as a message.`;
  }
}

function setNumber(key, label, argument, page) {
  if (!argument) return `${label} is ${page.settings[key]}.`;
  const value = parseSetting(key, argument);
  if (value === null) {
    const [lowest, highest] = LIMITS[key];
    return `${label} goes from ${lowest} to ${highest}${key === "topK" ? " in whole numbers" : ""}.`;
  }
  page.change({ [key]: value });
  return `${label} is now ${value}.`;
}

function setModel(argument, page) {
  const names = page.models.map((model) => model.id);
  if (names.includes(argument)) {
    page.change({ model: argument });
    return `Talking to ${argument}.`;
  }
  const known = names.length ? `Models: ${names.join(", ")}.` : "No model is known.";
  return argument ? `There is no model ${argument}. ${known}` : known;
}

/** The number that a text says, or null if it is none or beyond the limits. */
export function parseSetting(key, text) {
  const value = Number(text);
  const [lowest, highest] = LIMITS[key];
  const isWhole = key === "temperature" || Number.isInteger(value);
  return text.trim() && isWhole && value >= lowest && value <= highest ? value : null;
}
