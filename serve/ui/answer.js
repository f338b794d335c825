// One answer, from the request to its end, whichever end that is.

import { ApiError, streamAnswer } from "./api.js";

/** An answer of which nothing has come yet; it has come to an end when `finish` is set. */
export function newAnswer(model) {
  return { role: "assistant", model: model.id, chat: model.chat, parts: [], finish: null };
}

/**
 * Fills `message` with the answer to `request` (see `streamAnswer`) and calls `changed` after every
 * piece. It never throws for what server and network do: `message.error` has the words, and what
 * came before stays. `finish` becomes the server's reason, "stopped" or "error".
 */
export async function receiveAnswer(message, request, changed) {
  let finish = null;
  let first = 0; // when the first token came, ms
  let last = 0;
  try {
    for await (const piece of streamAnswer(request)) {
      if (piece.text) {
        last = performance.now();
        first ||= last;
        addPart(message.parts, piece);
        changed();
      }
      if (piece.leftOut) {
        message.leftOut = piece.leftOut;
        changed();
      }
      finish = piece.finish ?? finish;
      message.tokens = piece.tokens ?? message.tokens;
    }
    // The first token's time is the prompt's; the speed is that of those after it. Over less than
    // a tenth of a second there is none to tell.
    if (message.tokens > 1 && last > first + 100) {
      message.tokensPerSecond = ((message.tokens - 1) / (last - first)) * 1000;
    }
    message.finish = finish ?? "stop";
  } catch (error) {
    message.finish = request.signal.aborted ? "stopped" : "error";
    if (!request.signal.aborted) describe(message, error);
  }
}

function addPart(parts, { type, text }) {
  if (parts.at(-1)?.type === type) parts.at(-1).text += text;
  else parts.push({ type, text });
}

function describe(message, error) {
  if (!(error instanceof ApiError)) console.error(error); // a mistake of the page's own
  message.error = error.message;
  message.status = error.status;
  message.code = error.code;
  message.retryAfter = error.retryAfter;
}
