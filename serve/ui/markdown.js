// Markdown to DOM nodes: headings, paragraphs, lists, quotes, fenced code, tables, rules; what is
// within a line is inline.js's. Safe for any text: no HTML is ever parsed, and nesting is bounded.

import { h } from "./dom.js";
import { parseInline, textNodes } from "./inline.js";

const MAX_DEPTH = 8; // of lists and quotes; beyond it their marks are text

const FENCE = /^ {0,3}(?<ticks>`{3,}|~{3,})(?<info>[^`]*)$/;
const HEADING = /^ {0,3}(?<marks>#{1,6})(?:\s(?<text>.*))?$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(?<indent> {0,3})(?<mark>[-*+]|(?<number>\d{1,9})[.)])(?<gap> {1,4}|$)/;
const TABLE_RULE = /^ {0,3}\|?(?:\s*:?-+:?\s*\|)+\s*(?::?-+:?\s*)?$/;

/** @returns an element whose children are the text's blocks */
export function renderMarkdown(text, tools = []) {
  const root = h("div");
  root.append(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), tools, 0));
  return root;
}

function blocks(lines, tools, depth) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [node, next] = block(lines, at, tools, depth);
    nodes.push(node);
    at = next;
  }
  return nodes;
}

/** The block that begins at a line, and the line after it. */
function block(lines, at, tools, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return fence(lines, at, tools);
  const heading = HEADING.exec(line);
  if (heading) {
    const { marks, text = "" } = heading.groups;
    const title = text.trim().replace(/ #+$/, "");
    return [h(`h${marks.length}`, {}, ...inline(title, tools)), at + 1];
  }
  if (RULE.test(line)) return [h("hr"), at + 1];
  if (isTable(lines, at)) return table(lines, at, tools);
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quote(lines, at, tools, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return list(lines, at, tools, depth);
  return paragraph(lines, at, tools, depth);
}

const inline = (text, tools) => parseInline(text, tools).childNodes;

/** A fence that is not closed goes on to the end, as it does while an answer is coming. */
function fence(lines, at, tools) {
  const { ticks, info } = FENCE.exec(lines[at]).groups;
  const language = info.trim().split(/\s/)[0];
  const isClose = (line) => line.trim().startsWith(ticks) && !line.trim().replaceAll(ticks[0], "");
  let end = at + 1;
  while (end < lines.length && !isClose(lines[end])) end++;
  const code = h("code", {}, ...textNodes(lines.slice(at + 1, end).join("\n"), tools));
  const copy = h("button", { type: "button", "data-action": "copy-code" }, "Copy");
  copy.setAttribute("aria-label", "Copy code");
  const caption = h("figcaption", {}, h("span", {}, ...textNodes(language || "code", tools)), copy);
  // The keyboard must reach what is to be scrolled.
  const pre = h("pre", { tabindex: "0", role: "group", "aria-label": "Code" }, code);
  return [h("figure", { class: "code" }, caption, pre), end + 1];
}

function quote(lines, at, tools, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [h("blockquote", {}, ...blocks(inner, tools, depth + 1)), end];
}

function list(lines, at, tools, depth) {
  const { number } = ITEM.exec(lines[at]).groups;
  const isOrdered = number !== undefined;
  const isItem = (line) =>
    ITEM.test(line) &&
    !RULE.test(line) &&
    (ITEM.exec(line).groups.number !== undefined) === isOrdered;
  const element = h(isOrdered ? "ol" : "ul", { start: isOrdered && number !== "1" && number });
  let isLoose = false; // blank lines between items or paragraphs set them apart
  while (at < lines.length && isItem(lines[at])) {
    const [inner, end] = itemLines(lines, at);
    element.append(h("li", {}, ...itemNodes(inner, tools, depth + 1)));
    const next = skipBlank(lines, end);
    const goesOn = next < lines.length && isItem(lines[next]);
    isLoose ||= inner.includes("") || (goesOn && next > end);
    at = goesOn ? next : end;
  }
  element.setAttribute("class", isLoose ? "loose" : "tight");
  return [element, at];
}

/** An item's lines without their indentation, and the line after them. */
function itemLines(lines, at) {
  const [marker] = ITEM.exec(lines[at]);
  // Two columns are enough to belong to an item: models are not strict about them.
  const least = marker.search(/\S/) + 2;
  const belongs = (line) => line.search(/\S/) >= least;
  const inner = [lines[at].slice(marker.length)];
  let next = at + 1;
  while (next < lines.length) {
    const line = lines[next];
    if (!line.trim()) {
      const following = skipBlank(lines, next);
      if (following === lines.length || !belongs(lines[following])) break;
      inner.push("");
      next = following;
      continue;
    }
    // A paragraph may go on without indentation.
    if (!belongs(line) && (!inner.at(-1).trim() || ITEM.test(line) || startsBlock(line))) break;
    inner.push(line.slice(Math.min(line.search(/\S/), marker.length)));
    next++;
  }
  return [inner, next];
}

function skipBlank(lines, at) {
  while (at < lines.length && !lines[at].trim()) at++;
  return at;
}

/** A single paragraph stands in its item as it is; more, and other blocks, are blocks. */
function itemNodes(inner, tools, depth) {
  const nodes = blocks(inner, tools, depth);
  return nodes[0]?.nodeName === "P" ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
}

const cells = (line) =>
  line
    .trim()
    .replace(/^\||(?<!\\)\|$/g, "")
    .split(/(?<!\\)\|/)
    .map((cell) => cell.trim().replaceAll("\\|", "|"));

function isTable(lines, at) {
  const rule = lines[at + 1] ?? "";
  return (
    lines[at].includes("|") &&
    TABLE_RULE.test(rule) &&
    cells(rule).length === cells(lines[at]).length
  );
}

function table(lines, at, tools) {
  const head = cells(lines[at]);
  const alignments = cells(lines[at + 1]).map(alignment);
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const row = (tag, texts) =>
    h(
      "tr",
      {},
      ...head.map((_, i) => h(tag, { class: alignments[i] }, ...inline(texts[i] ?? "", tools))),
    );
  const body = lines.slice(at + 2, end).map((line) => row("td", cells(line)));
  const grid = h("table", {}, h("thead", {}, row("th", head)), h("tbody", {}, ...body));
  return [h("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, grid), end];
}

function alignment(cell) {
  if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
  return null;
}

/** Whether a line ends the paragraph before it. "1990. …" at a line's start is not a list. */
function startsBlock(line) {
  const number = ITEM.exec(line)?.groups.number;
  if (number !== undefined) return number === "1";
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

function paragraph(lines, at, tools, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !isTable(lines, end)) {
    // Marks nested too deep are text, and must not end the paragraph they are in.
    if (depth < MAX_DEPTH && startsBlock(lines[end])) break;
    end++;
  }
  const text = lines.slice(at, end).map((line) => line.trim()).join("\n");
  return [h("p", {}, ...inline(text, tools)), end];
}
