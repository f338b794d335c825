// The OpenAI-compatible API that the page's server has beside the page: all URLs are relative to
// the page's own, so any path prefix works.

import { readEvents } from "./sse.js";

/** What went wrong, in the server's words where it had any. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status; // of HTTP; 0: no answer, or an error within the stream
    this.code = code; // OpenAI's, or null
    this.retryAfter = retryAfter; // seconds, or null
  }
}

/** The served models: {id, chat}. A model that cannot chat continues text. */
export async function fetchModels(apiKey) {
  const response = await call("v1/models", { headers: headers(apiKey) });
  const { data } = await response.json().catch(() => ({}));
  if (!Array.isArray(data)) throw new ApiError("The server's list of models cannot be read.");
  return data.map(({ id, chat }) => ({ id, chat: chat !== false }));
}

/**
 * Asks for an answer and yields what comes: {type: "text" | "python" | "python_output", text},
 * {finish: reason}, {tokens: count}; and before all {leftOut: count} if more exchanges, the oldest
 * ones, had to be left out than for the model's answers before.
 *
 * @param request {model: {id, chat}, system, messages, settings, apiKey, sessionId, signal}
 * @throws ApiError; and AbortError when `signal` aborts
 */
export async function* streamAnswer(request) {
  const before = leftOutBefore(request);
  const { response, leftOut } = await postWhatFits(request, before);
  if (leftOut > before) yield { leftOut };
  if (!response.headers.get("content-type")?.startsWith("text/event-stream")) {
    throw new ApiError("The server did not answer with a stream.", response);
  }
  yield* readAnswer(response.body, request.signal);
}

/**
 * How many exchanges the model's last answers did without. It stays so, for what was refused once
 * is refused again, and the same beginning is found in the server's cache. Another model's context
 * may be longer.
 */
function leftOutBefore({ model, messages }) {
  const cut = messages.findLast((message) => message.leftOut && message.model === model.id);
  return cut?.leftOut ?? 0;
}

/**
 * As long as the context is too short, the older half of the exchanges is left out: by halves, so
 * that few requests are refused, and the next ones fit for a while. The last message is always sent.
 */
async function postWhatFits(request, before) {
  const messages = withoutRefused(request.messages);
  const isEnd = ({ role, parts }) => role === "assistant" && parts.length > 0;
  const starts = [0, ...messages.flatMap((message, i) => (isEnd(message) ? [i + 1] : []))];
  const numExchanges = starts.length - 1;
  let leftOut = before;
  for (;;) {
    try {
      const response = await post({ ...request, messages: messages.slice(starts[leftOut]) });
      return { response, leftOut };
    } catch (error) {
      if (error.code !== "context_length_exceeded" || leftOut >= numExchanges) throw error;
      leftOut += Math.ceil((numExchanges - leftOut) / 2);
    }
  }
}

function post(request) {
  const { model, settings, signal } = request;
  const body = {
    model: model.id,
    ...(model.chat ? { messages: chatMessages(request) } : { prompt: promptText(request) }),
    temperature: settings.temperature,
    top_k: settings.topK,
    max_tokens: settings.maxTokens,
    stream: true,
    stream_options: { include_usage: true },
  };
  return call(model.chat ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: {
      ...headers(request.apiKey),
      "content-type": "application/json",
      // By this the server finds the replica that has the conversation in its cache.
      "x-session-id": request.sessionId,
    },
    body: JSON.stringify(body),
    signal,
  });
}

async function* readAnswer(body, signal) {
  try {
    for await (const { data } of readEvents(body)) {
      if (data === "[DONE]") return;
      yield* answerParts(JSON.parse(data));
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError(
      error instanceof SyntaxError
        ? "The server sent something that is not JSON."
        : "The connection to the server was lost.",
    );
  }
  throw new ApiError("The connection was closed before the answer was complete.");
}

function* answerParts(chunk) {
  const { error, choices, usage } = chunk ?? {};
  if (error) throw new ApiError(error.message ?? "The server failed.");
  const choice = choices?.[0];
  const text = choice?.delta?.content ?? choice?.text;
  if (text) yield { type: "text", text };
  if (choice?.delta?.tool) yield choice.delta.tool;
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (usage) yield { tokens: usage.completion_tokens };
}

/** What was refused (too long, say) is left out with its error: it would be refused each time. */
function withoutRefused(messages) {
  const isRefusal = (message) =>
    message?.parts?.length === 0 && (message.status === 400 || message.status === 413);
  return messages.filter((message, i) => !isRefusal(message) && !isRefusal(messages[i + 1]));
}

/**
 * The conversation as the API takes it. An answer goes back in the parts it came in, so that the
 * server sees the very tokens that are in its cache. Roles must take turns: a message that was not
 * answered (the server was busy, say) becomes one with the next.
 */
function chatMessages({ system, messages }) {
  const turns = system ? [{ role: "system", content: system }] : [];
  let asked = [];
  const ask = () => turns.push({ role: "user", content: asked.join("\n\n") });
  for (const message of messages) {
    if (message.role === "user") asked.push(message.text);
    else if (message.parts.length) {
      ask();
      turns.push({ role: "assistant", content: message.parts });
      asked = [];
    }
  }
  ask();
  return turns;
}

/** All that was written and continued so far, as one text. */
function promptText({ messages }) {
  return messages
    .map((message) => message.text ?? message.parts.map((part) => part.text).join(""))
    .join("");
}

function headers(apiKey) {
  return apiKey ? { authorization: `Bearer ${apiKey}` } : {};
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const retryAfter = Number.parseFloat(response.headers.get("retry-after"));
  const { message, code } = await serversWords(response);
  throw new ApiError(message, {
    status: response.status,
    code,
    retryAfter: Number.isFinite(retryAfter) ? retryAfter : null,
  });
}

async function serversWords(response) {
  try {
    const { message, code } = JSON.parse(await response.text()).error;
    if (typeof message === "string" && message) return { message, code };
  } catch {
    // A proxy's page, or nothing at all: the status has to do.
  }
  return { message: `The server answered ${response.status} ${response.statusText}`.trim() + "." };
}
