// Markdown within a line: code, emphasis, links, tool calls. Everything becomes DOM nodes; HTML is
// text. The emphasis algorithm is CommonMark's delimiter stack, so no input takes quadratic time.

import { h, icon } from "./dom.js";

const MAX_EMPHASIS_DEPTH = 8;
const PROTOCOLS = new Set(["http:", "https:", "mailto:"]);
const EMPHASIS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"] };

// Where a tool call stands in an answer's text: private-use characters around its index. An answer
// is one Markdown text with such marks, for calls stand in the middle of sentences.
const MARK = /\uE000(\d+)\uE001/;
export const toolMark = (index) => `\uE000${index}\uE001`;
export const withoutMarks = (text) => text.replace(/[\uE000\uE001]/g, "\uFFFD");

const TOKEN = new RegExp(
  [
    /\\(?<escaped>[!-/:-@[-`{-~])/, // backslash and ASCII punctuation
    /(?<code>`+)/,
    /(?<run>\*+|_+|~+)/,
    /(?<open>!?\[)/,
    /(?<close>\])/,
    /<(?<autolink>(?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/,
    /(?<bare>\bhttps?:\/\/[^\s<>[\]`*"|\\\uE000]{1,2000})/,
    /(?<newline>\n)/,
  ]
    .map((pattern) => pattern.source)
    .join("|"),
  "g",
);
const DESTINATION = /\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;

/** @param tools what the marks stand for: {expression, result, pending} */
export function parseInline(source, tools) {
  return new InlineParser(source, tools).parse();
}

/** Text in which marks become tool cards. */
export function textNodes(text, tools) {
  return text
    .split(MARK)
    .map((piece, i) => (i % 2 ? toolCard(tools[Number(piece)]) : new Text(piece)))
    .filter((node) => node.nodeType !== Node.TEXT_NODE || node.data);
}

/** The model's calculator at work. */
function toolCard({ expression, result, pending }) {
  const outcome = result ?? (pending ? "…" : "no result");
  return h(
    "span",
    { class: "tool", role: "group", "aria-label": `Calculator: ${expression} gives ${outcome}` },
    icon("calculator"),
    h("code", {}, expression),
    h("span", { class: "equals" }, "="),
    h("output", { class: result === null ? "none" : "result" }, outcome),
  );
}

/** The link's address, or null if it is none that may be opened. */
function safeAddress(text) {
  const url = URL.canParse(text) ? new URL(text) : null; // a relative one cannot be parsed
  return url && PROTOCOLS.has(url.protocol) ? url.href : null;
}

function link(address, ...children) {
  const attributes = { href: address, target: "_blank", rel: "noopener noreferrer", title: address };
  return h("a", attributes, ...children);
}

class InlineParser {
  #items = []; // {node} or {char, count, opens, closes}: a run of emphasis marks
  #brackets = []; // positions in #items of "[" that may begin a link
  #ticks = null; // where runs of backticks are

  constructor(source, tools) {
    this.source = source;
    this.tools = tools;
  }

  parse() {
    let end = 0;
    TOKEN.lastIndex = 0;
    for (let match; (match = TOKEN.exec(this.source)); ) {
      this.#text(this.source.slice(end, match.index));
      end = this.#take(match);
      TOKEN.lastIndex = end;
    }
    this.#text(this.source.slice(end));
    return h("div", {}, ...emphasize(this.#items));
  }

  #text(text) {
    for (const node of textNodes(text, this.tools)) this.#items.push({ node });
  }

  /** Takes one token and returns where the source goes on. */
  #take(match) {
    const { escaped, code, run, open, close, autolink, bare, newline } = match.groups;
    const end = match.index + match[0].length;
    if (code) return this.#code(code, end);
    if (run) return this.#run(run, match.index, end);
    if (close) return this.#closeBracket(end);
    if (bare) return this.#bareLink(bare, match.index);
    if (open) this.#brackets.push(this.#items.length);
    if (autolink) this.#link(autolink, autolink, match[0]);
    else if (newline) this.#items.push({ node: h("br") });
    else this.#text(escaped ?? open);
    return end;
  }

  #code(ticks, end) {
    const close = this.#closingTicks(ticks.length, end);
    if (close === null) {
      this.#text(ticks);
      return end;
    }
    const text = this.source.slice(end, close).replaceAll("\n", " ");
    // One space on both sides is there to keep ticks of the code from the ticks around it.
    const inner = /^ .*[^ ].* $/.test(text) ? text.slice(1, -1) : text;
    this.#items.push({ node: h("code", {}, ...textNodes(inner, this.tools)) });
    return close + ticks.length;
  }

  /** Where the next run of exactly that many ticks begins, or null. */
  #closingTicks(count, from) {
    this.#ticks ??= positionsByLength(this.source.matchAll(/`+/g));
    const positions = this.#ticks.get(count) ?? [];
    while (positions.at(-1) < from) positions.pop();
    return positions.at(-1) ?? null;
  }

  #run(run, start, end) {
    const before = this.source[start - 1] ?? " ";
    const after = this.source[end] ?? " ";
    const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
    const [punctBefore, punctAfter] = [isPunctuation(before), isPunctuation(after)];
    const left = !spaceAfter && (!punctAfter || spaceBefore || punctBefore);
    const right = !spaceBefore && (!punctBefore || spaceAfter || punctAfter);
    const inWord = run[0] === "_" && left && right; // snake_case is no emphasis
    this.#items.push({
      char: run[0],
      count: run.length,
      opens: left && (!inWord || punctBefore),
      closes: right && (!inWord || punctAfter),
    });
    return end;
  }

  #closeBracket(end) {
    const start = this.#brackets.pop();
    DESTINATION.lastIndex = end;
    const match = start === undefined ? null : DESTINATION.exec(this.source);
    const address = match && safeAddress(match[1]);
    if (!address) {
      this.#text("]");
      return end;
    }
    const [, ...label] = this.#items.splice(start).map(withoutLink); // and without the "[" itself
    this.#items.push({ node: link(address, ...emphasize(label)) });
    this.#brackets = []; // no link around a link
    return end + match[0].length;
  }

  #bareLink(address, start) {
    // Punctuation after an address belongs to the sentence; a bracket only if it was opened in it.
    let text = address.replace(/[.,;:!?'_~]+$/, "");
    while (text.endsWith(")") && text.split(")").length > text.split("(").length) {
      text = text.slice(0, -1);
    }
    this.#link(text, text, text);
    return start + text.length;
  }

  #link(address, label, literal) {
    const safe = safeAddress(address);
    if (safe) this.#items.push({ node: link(safe, label) });
    else this.#text(literal);
  }
}

/** Of regular-expression matches: their positions by length, the last first. */
function positionsByLength(matches) {
  const positions = new Map();
  for (const { 0: text, index } of [...matches].reverse()) {
    if (!positions.has(text.length)) positions.set(text.length, []);
    positions.get(text.length).push(index);
  }
  return positions;
}

/** A link's label that is an address is not a link itself. */
function withoutLink(item) {
  return item.node?.nodeName === "A" ? { node: new Text(item.node.textContent) } : item;
}

const isPunctuation = (char) => /[\p{P}\p{S}]/u.test(char);

/** Pairs the runs of marks and returns the nodes. */
function emphasize(items) {
  const out = []; // items and, in place of paired ones, {node, depth}
  const unmatched = new Map(); // by mark: below this position no opener is left
  for (const item of items) {
    if (item.closes) closeRuns(out, { ...item }, unmatched);
    else out.push(item.char ? { ...item } : item);
  }
  return out.map(({ node, char, count }) => node ?? new Text(char.repeat(count)));
}

function closeRuns(out, closer, unmatched) {
  while (closer.count) {
    const at = findOpener(out, closer, unmatched.get(closer.char) ?? 0);
    const opener = out[at];
    const strong = at >= 0 && opener.count >= 2 && closer.count >= 2;
    const depth = at < 0 ? 0 : 1 + Math.max(0, ...out.slice(at + 1).map((item) => item.depth ?? 0));
    const tag = at < 0 ? null : EMPHASIS[closer.char][strong ? 1 : 0];
    if (!tag || depth > MAX_EMPHASIS_DEPTH) {
      if (!closer.opens) unmatched.set(closer.char, out.length);
      break;
    }
    const inner = out.splice(at + 1).map(({ node, char, count }) => node ?? char.repeat(count));
    for (const [char, lowest] of unmatched) unmatched.set(char, Math.min(lowest, at + 1));
    const used = strong ? 2 : 1;
    opener.count -= used;
    closer.count -= used;
    if (!opener.count) out.pop();
    out.push({ node: h(tag, {}, ...inner), depth });
  }
  if (closer.count) out.push(closer);
}

function findOpener(out, closer, lowest) {
  for (let i = out.length - 1; i >= lowest; i--) {
    const { char, count, opens } = out[i];
    if (opens && char === closer.char && count) return i;
  }
  return -1;
}
