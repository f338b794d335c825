// Server-sent events, read as the HTML standard says ("Interpreting an event stream"), wherever the
// network cuts the bytes.

/** Takes decoded text in any pieces and gives back the events that are complete. */
export class EventParser {
  #line = "";
  #data = [];
  #type = "";
  #afterCR = false;

  /** @returns {{type: string, data: string}[]} */
  feed(text) {
    // A line may end in CR, LF or CRLF. A CR ends it at once: waiting for the LF that may follow
    // would hold an event back until the next one.
    if (text === "") return [];
    if (this.#afterCR && text.startsWith("\n")) text = text.slice(1);
    this.#afterCR = text.endsWith("\r");
    const lines = text.split(/\r\n|\n|\r/);
    lines[0] = this.#line + lines[0];
    this.#line = lines.pop();
    return lines.map((line) => this.#take(line)).filter(Boolean);
  }

  #take(line) {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.#data.push(value);
    if (field === "event") this.#type = value;
    return null;
  }

  #dispatch() {
    const data = this.#data;
    const type = this.#type || "message";
    this.#data = [];
    this.#type = "";
    return data.length ? { type, data: data.join("\n") } : null;
  }
}

/** The events of a response body. An event that the end of the stream cuts off is dropped. */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.feed(decoder.decode(value, { stream: true }));
    }
  } finally {
    // Who stops reading closes the connection; that frees the model's slot.
    reader.cancel().catch(() => {});
  }
}
