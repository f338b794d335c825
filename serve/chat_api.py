"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from nanoray.engine import PART_TYPES, Delta, extend_parts
from nanoray.engine.sampling import Likeliest
from nanoray.errors import NanorayError
from nanoray.tokenizer import Tokenizer
from serve.errors import ApiError
from serve.host import ServedModel
from serve.run import Run, Service, check_stream_options, merged, sampling_params, wants_usage
from serve.schemas import (
    MAX_CONVERSATION_CHARS,
    MAX_MESSAGE_CHARS,
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Message,
    SystemMessage,
    TextPart,
    TokenLogprob,
    ToolPart,
    TopLogprob,
    Usage,
)
from serve.sse import COMPONENTS, DONE, EventStream, event, streamed, unless_disconnected

_STREAMED = streamed({"$ref": f"{COMPONENTS}{ChatCompletionChunk.__name__}"}, done="[DONE]")


def chat_router(service: Service) -> APIRouter:
    """The route; see /openapi.json."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, whole or as server-sent events (chat.completion.chunk)."""
        served = service.host.model(body.model)
        check_stream_options(body)
        prompt = chat_prompt(served, [_message(message) for message in body.messages])
        params = sampling_params(body, served, _max_tokens(body, served), _top_logprobs(body))
        run = Run(service, request, served, [prompt], [params], "chatcmpl")
        if body.stream:
            return EventStream(_events(run, bool(body.logprobs), wants_usage(body)))
        answer = await unless_disconnected(request.receive, _whole(run, params.n, body))
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


def chat_prompt(served: ServedModel, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The tokens after which the assistant speaks.

    Raises:
        ApiError: the model is none for chat; too long; nobody asks anything; out of turn.
    """
    if not served.chat:
        raise ApiError(
            400,
            f"model {served.name} is a base model, which only continues text: "
            "use /v1/completions, or a model that was tuned to chat.",
            param="model",
            code="not_a_chat_model",
        )
    sizes = [_num_chars(message["content"]) for message in messages]
    # An answer may be longer, and must be taken back: its writer was the model.
    written = [0 if m["role"] == "assistant" else size for m, size in zip(messages, sizes)]
    if max(written) > MAX_MESSAGE_CHARS:
        raise ApiError(
            400,
            f"a message has {max(written):,} characters: {MAX_MESSAGE_CHARS:,} is the most.",
            param=f"messages[{written.index(max(written))}].content",
        )
    if sum(sizes) > MAX_CONVERSATION_CHARS:
        message = f"the conversation has {sum(sizes):,} characters: leave out some messages, "
        message += f"{MAX_CONVERSATION_CHARS:,} is the most."
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    if messages[-1]["role"] == "assistant":
        message = "the last message is the assistant's: end with a question of the user's."
        raise ApiError(400, message, param="messages")
    try:
        return served.tokenizer.render_for_completion({"messages": messages})
    except NanorayError as error:
        raise ApiError(400, f"{error}.", param="messages") from None


def _num_chars(content: str | list[dict[str, str]]) -> int:
    if isinstance(content, str):
        return len(content)
    return sum(len(part["text"]) for part in content)


def _message(message: Message) -> dict[str, Any]:
    """In the tokenizer's form."""
    content = message.content
    if not isinstance(message, AssistantMessage):
        text = content if isinstance(content, str) else "".join(p.text for p in content or [])
        role = "system" if isinstance(message, SystemMessage) else "user"
        return {"role": role, "content": text}
    parts = message.parts
    if content is None and parts is None:
        text = "an assistant's message has neither content nor parts: give one of them."
        raise ApiError(400, text, param="messages")
    if isinstance(content, list):
        if parts is not None:
            text = "an assistant's message has its parts twice: leave out content or parts."
            raise ApiError(400, text, param="messages")
        parts = [*content]
    elif parts is None:
        return {"role": "assistant", "content": content}
    elif content not in (None, "".join(part.text for part in parts if part.type == "text")):
        text = "an assistant's content and parts say different things: leave one of them out."
        raise ApiError(400, text, param="messages")
    return {"role": "assistant", "content": [part.model_dump() for part in parts]}


def _max_tokens(body: ChatRequest, served: ServedModel) -> int:
    given = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(given) > 1:
        message = "max_tokens and max_completion_tokens differ: give one of them."
        raise ApiError(400, message, param="max_completion_tokens")
    return next(iter(given), None) or served.engine.max_len


def _top_logprobs(body: ChatRequest) -> int:
    if body.top_logprobs and not body.logprobs:
        message = "top_logprobs come with logprobs: set logprobs, too, or leave them out."
        raise ApiError(400, message, param="top_logprobs")
    return body.top_logprobs or 0


async def _whole(run: Run, num_samples: int, body: ChatRequest) -> ChatCompletion:
    parts: list[list[dict[str, str]]] = [[] for _ in range(num_samples)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_samples)]
    reasons: dict[int, Any] = {}
    with run:
        async with aclosing(run.batches()) as batches:
            async for deltas in batches:
                for delta in deltas:
                    extend_parts(parts[delta.index], delta)
                    if body.logprobs:
                        logprobs[delta.index] += token_logprobs(run.served.tokenizer, delta)
                    if delta.finish_reason is not None:
                        reasons[delta.index] = delta.finish_reason
    choices = [
        ChatChoice(
            index=index,
            message=_answer(parts[index]),
            logprobs=ChatLogprobs(content=logprobs[index]) if body.logprobs else None,
            finish_reason=reasons[index],
        )
        for index in range(num_samples)
    ]
    return ChatCompletion(
        id=run.id,
        created=run.created,
        model=run.served.name,
        choices=choices,
        usage=run.usage(),
    )


def _answer(parts: list[dict[str, str]]) -> ChatMessage:
    return ChatMessage(
        content="".join(part["text"] for part in parts if part["type"] == "text"),
        parts=[
            TextPart(type="text", text=part["text"])
            if part["type"] == "text"
            else ToolPart(type=part["type"], text=part["text"])  # type: ignore[arg-type]
            for part in parts
        ],
    )


async def _events(run: Run, logprobs: bool, usage: bool) -> AsyncGenerator[bytes, None]:
    """Several events at a time: all that a batch of deltas gives."""
    begun: set[int] = set()
    with run:
        async with aclosing(run.batches(coalesce=True)) as batches:
            async for deltas in batches:
                chunks = [
                    _chunk(run, [choice])
                    for delta in merged(deltas)
                    for choice in _choices(run, delta, logprobs, begun)
                ]
                if chunks:
                    yield b"".join(chunks)
        yield (_chunk(run, [], run.usage()) if usage else b"") + DONE


def _choices(run: Run, delta: Delta, logprobs: bool, begun: set[int]) -> list[ChatChunkChoice]:
    """What to send of a delta: its text, and in a chunk of its own the end."""
    choices = []
    told = token_logprobs(run.served.tokenizer, delta) if logprobs else []
    if delta.text or told:
        piece = ChatDelta(role="assistant") if delta.index not in begun else ChatDelta()
        begun.add(delta.index)
        if delta.tool == "none":
            piece.content = delta.text
        else:
            kind = PART_TYPES[delta.tool]
            piece.tool = ToolPart(type=kind, text=delta.text)  # type: ignore[arg-type]
        choices.append(
            ChatChunkChoice(
                index=delta.index,
                delta=piece,
                logprobs=ChatLogprobs(content=told) if logprobs else None,
                finish_reason=None,
            )
        )
    if delta.finish_reason is not None:
        piece = ChatDelta() if delta.index in begun else ChatDelta(role="assistant", content="")
        reason: Any = delta.finish_reason
        end = ChatChunkChoice(index=delta.index, delta=piece, logprobs=None, finish_reason=reason)
        choices.append(end)
    return choices


def _chunk(run: Run, choices: list[ChatChunkChoice], usage: Usage | None = None) -> bytes:
    chunk = ChatCompletionChunk(
        id=run.id,
        object="chat.completion.chunk",
        created=run.created,
        model=run.served.name,
        choices=choices,
    )
    if usage is not None:
        chunk.usage = usage
    return event(chunk.model_dump_json(exclude_unset=True))


def token_logprobs(tokenizer: Tokenizer, delta: Delta) -> list[TokenLogprob]:
    """Of a delta's tokens, if they are the answer's visible text."""
    if delta.tool != "none":
        return []
    specials = set(tokenizer.special_tokens.values())
    tops: list[Likeliest] = delta.top_logprobs or [[] for _ in delta.tokens]
    return [
        TokenLogprob(
            **_named(tokenizer, token, logprob).model_dump(),
            top_logprobs=[_named(tokenizer, *likely) for likely in top],
        )
        for token, logprob, top in zip(delta.tokens, delta.logprobs, tops)
        if token not in specials
    ]


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    piece = tokenizer.decode_bytes([token])
    return TopLogprob(token=piece.decode("utf-8", "replace"), logprob=logprob, bytes=list(piece))
