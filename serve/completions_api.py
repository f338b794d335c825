"""POST /v1/completions: text or token ids are continued, or scored (`echo` with `logprobs`)."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from nanoray.engine import Delta, PromptScore
from nanoray.engine.sampling import Likeliest
from nanoray.tokenizer import Tokenizer
from serve.errors import ApiError
from serve.run import Run, Service, check_stream_options, merged, sampling_params, wants_usage
from serve.schemas import (
    MAX_PROMPTS,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)
from serve.sse import COMPONENTS, DONE, EventStream, event, streamed, unless_disconnected

_DEFAULT_MAX_TOKENS = 16
_STREAMED = streamed({"$ref": f"{COMPONENTS}{Completion.__name__}"}, done="[DONE]")


@dataclass(frozen=True)
class _Prompt:
    """What the model reads. `text` is given back by `echo`: without a BOS that we put in front."""

    tokens: list[int]
    text: str
    num_hidden: int


def completions_router(service: Service) -> APIRouter:
    """The route; see /openapi.json."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=Completion, responses=_STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or many prompts, whole or as server-sent events (text_completion)."""
        served = service.host.model(body.model)
        check_stream_options(body)
        # Long prompts are encoded aside: the event loop has streams to serve.
        prompts = await asyncio.to_thread(_prompts, served.tokenizer, body.prompt)
        num_samples = body.n or 1
        if body.best_of not in (None, num_samples):
            message = "best_of must be equal to n, or left out: there is no choosing among more."
            raise ApiError(400, message, param="best_of")
        if len(prompts) * num_samples > MAX_PROMPTS:
            message = f"there are more than {MAX_PROMPTS:,} answers asked for: send fewer at once."
            raise ApiError(400, message, param="n")
        max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = sampling_params(body, served, max(1, max_tokens), body.logprobs or 0)
        # Without a seed equal prompts get unlike answers.
        several = [
            params if body.seed is not None else replace(params, seed=(params.seed + i) % 2**63)
            for i in range(len(prompts))
        ]
        tokens = [prompt.tokens for prompt in prompts]
        run = Run(service, request, served, tokens, several, "cmpl")
        answering = _Answering(run, prompts, body, max_tokens)
        if body.stream:
            return EventStream(answering.events())
        answer = await unless_disconnected(request.receive, answering.whole())
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


def _prompts(
    tokenizer: Tokenizer, prompt: str | list[str] | list[int] | list[list[int]]
) -> list[_Prompt]:
    """Raises ApiError for ids that are not in the vocabulary."""
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    several: Sequence[Any] = [prompt] if single else prompt
    prompts = []
    for one in several:
        if isinstance(one, str):
            tokens = [tokenizer.bos_id, *tokenizer.encode(one)]
            # Decoded again: what no UTF-8 can hold has been replaced.
            prompts.append(_Prompt(tokens, tokenizer.decode(tokens[1:]), num_hidden=1))
        else:
            if max(one) >= tokenizer.vocab_size:
                message = (
                    f"token id {max(one)} is not in the vocabulary of {tokenizer.vocab_size:,}."
                )
                raise ApiError(400, message, param="prompt")
            prompts.append(_Prompt(one, tokenizer.decode(one), num_hidden=0))
    return prompts


class _Answering:
    """Makes the pieces of the choices, in the order in which they come."""

    def __init__(
        self, run: Run, prompts: Sequence[_Prompt], body: CompletionRequest, max_tokens: int
    ) -> None:
        self._run, self._prompts, self._body = run, prompts, body
        self._max_tokens = max_tokens
        self._num_samples = body.n or 1
        num_choices = len(prompts) * self._num_samples
        self._listings = [_Listing(run.served.tokenizer) for _ in range(num_choices)]

    async def whole(self) -> Completion:
        """The answer."""
        choices: dict[int, CompletionChoice] = {}
        with self._run:
            async with aclosing(self._pieces(coalesce=False)) as pieces:
                async for several in pieces:
                    for piece in several:
                        whole = choices.setdefault(piece.index, piece)
                        if whole is not piece:
                            _extend(whole, piece)
        return self._completion([choices[index] for index in sorted(choices)], self._run.usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events."""
        with self._run:
            async with aclosing(self._pieces(coalesce=True)) as pieces:
                async for several in pieces:
                    yield b"".join(self._event([piece]) for piece in several)
            usage = self._event([], self._run.usage()) if wants_usage(self._body) else b""
            yield usage + DONE

    def _event(self, choices: list[CompletionChoice], usage: Usage | None = None) -> bytes:
        return event(self._completion(choices, usage).model_dump_json())

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        run = self._run
        return Completion(
            id=run.id, created=run.created, model=run.served.name, choices=choices, usage=usage
        )

    async def _pieces(self, coalesce: bool) -> AsyncGenerator[list[CompletionChoice], None]:
        if self._body.echo:
            yield await self._echoed()
        if self._max_tokens == 0:
            ends = range(len(self._listings))
            yield [CompletionChoice(index=i, text="", finish_reason="length") for i in ends]
            return
        async with aclosing(self._run.batches(coalesce)) as batches:
            async for deltas in batches:
                if several := [
                    self._piece(delta) for delta in merged(deltas) if self._tells(delta)
                ]:
                    yield several

    async def _echoed(self) -> list[CompletionChoice]:
        scores: Sequence[PromptScore | None] = [None] * len(self._prompts)
        if self._body.logprobs is not None:
            scores = await self._run.score(self._body.logprobs)
        choices = []
        for i, (prompt, score) in enumerate(zip(self._prompts, scores)):
            for index in range(i * self._num_samples, (i + 1) * self._num_samples):
                listing = self._listings[index]
                logprobs = None if score is None else listing.of_prompt(prompt, score)
                piece = CompletionChoice(
                    index=index, text=prompt.text, logprobs=logprobs, finish_reason=None
                )
                choices.append(piece)
        return choices

    def _tells(self, delta: Delta) -> bool:
        listed = delta.tokens and self._body.logprobs is not None
        return bool(delta.text or listed or delta.finish_reason)

    def _piece(self, delta: Delta) -> CompletionChoice:
        listed = self._body.logprobs is not None
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._listings[delta.index].of_delta(delta) if listed else None,
            finish_reason=delta.finish_reason,  # type: ignore[arg-type]
        )


def _extend(whole: CompletionChoice, piece: CompletionChoice) -> None:
    whole.text += piece.text
    whole.finish_reason = piece.finish_reason
    if whole.logprobs is not None and piece.logprobs is not None:
        whole.logprobs.tokens += piece.logprobs.tokens
        whole.logprobs.token_logprobs += piece.logprobs.token_logprobs
        whole.logprobs.top_logprobs += piece.logprobs.top_logprobs
        whole.logprobs.text_offset += piece.logprobs.text_offset


class _Listing:
    """One choice's tokens as `logprobs` lists them, and where in the text they begin."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0
        self._specials = frozenset(tokenizer.special_tokens.values())

    def of_prompt(self, prompt: _Prompt, score: PromptScore) -> CompletionLogprobs:
        logprobs: list[float | None] = [None, *score.logprobs]
        tops: list[Likeliest] = [[], *(score.top_logprobs or [[] for _ in score.logprobs])]
        first = prompt.num_hidden
        return self._list(prompt.tokens[first:], logprobs[first:], tops[first:], marks_shown=True)

    def of_delta(self, delta: Delta) -> CompletionLogprobs:
        # What a tool put out was not drawn, and has a log-probability of 0 in its place.
        forced = delta.tool == "output"
        logprobs = [None if forced and value == 0 else value for value in delta.logprobs]
        tops = delta.top_logprobs or [[] for _ in delta.tokens]
        return self._list(delta.tokens, logprobs, tops, marks_shown=False)

    def _list(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[Likeliest],
        marks_shown: bool,
    ) -> CompletionLogprobs:
        """marks_shown: whether the text has the names of special tokens."""
        listed = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, logprob, top in zip(tokens, logprobs, tops):
            listed.tokens.append(self._name(token))
            listed.token_logprobs.append(logprob)
            named = {self._name(likely): value for likely, value in top}
            if logprob is not None:
                named.setdefault(self._name(token), logprob)
            listed.top_logprobs.append(named if logprob is not None else None)
            listed.text_offset.append(self._offset)
            if marks_shown or token not in self._specials:
                piece = self._tokenizer.decode_bytes([token])
                self._offset += len(self._decoder.decode(piece))
        return listed

    def _name(self, token: int) -> str:
        """The token's text; the bytes of a part of a character, so that no two are alike."""
        piece = self._tokenizer.decode_bytes([token])
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
