"""One request on its way through the engine: its deadline, its usage, its record."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from fastapi import Request

from nanoray.engine import Delta, PromptScore, SamplingParams
from serve.errors import ApiError, as_api_error, model_failed, too_much, unavailable
from serve.host import Host, ServedModel
from serve.limits import route_path
from serve.schemas import PromptTokensDetails, SamplingFields, Usage

if TYPE_CHECKING:
    from serve.observe import Observer

# Serve bounds the requests, but one may ask for a thousand sequences (a batch of prompts, `n`),
# which may wait where nothing else does. For each slot:
_MAX_WAITING_PER_SLOT = 4


@dataclass(frozen=True)
class Service:
    """What the routes answer with.

    Attributes:
        request_timeout_s: most time for one answer.
        coalesce_s: after text was sent, what comes within this time is sent together.
    """

    host: Host
    observer: Observer
    request_timeout_s: float
    coalesce_s: float


class Run:
    """A context manager around all that is computed for a request; leaving it ends its record.

    Args:
        prompts: token ids; params: of each.
        prefix: of the answer's id.

    Raises:
        ApiError: a prompt is longer than the context, or too many sequences wait already.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        served: ServedModel,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        prefix: str,
    ) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.served = served
        self._service, self._request = service, request
        self._prompts, self._params = prompts, params
        self._cached = [0] * len(prompts)
        self._num_tokens = 0
        self._reason = "length"
        self._deadline = asyncio.get_running_loop().time() + service.request_timeout_s
        for prompt in prompts:
            if len(prompt) > served.engine.max_len:
                raise ApiError(
                    400,
                    f"the prompt has {len(prompt):,} tokens, but the context is "
                    f"{served.engine.max_len:,}: shorten it.",
                    code="context_length_exceeded",
                )
        stats = served.engine.stats()
        waiting = stats["waiting"] + sum(each.n for each in params)
        if stats["waiting"] and waiting > _MAX_WAITING_PER_SLOT * stats["num_slots"]:
            raise too_much()
        self._record = service.observer.request(
            route_path(request.scope),
            served.name,
            request_id=self.id,
            arrived_s=request.state.arrived_s,
        )

    def __enter__(self) -> Run:
        self._request.state.recorded = True
        self._record.prompt_tokens(self._num_prompt_tokens)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._record.finish(200, self._reason)
        elif isinstance(error, Exception):
            told = as_api_error(error)
            self._record.finish(told.status, told.code or "error")
        else:  # cancelled, or the generator around this was closed
            self._record.finish(499, "abort")

    @property
    def _num_prompt_tokens(self) -> int:
        return sum(map(len, self._prompts))

    def usage(self) -> Usage:
        """So far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_tokens,
            total_tokens=self._num_prompt_tokens + self._num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached)),
        )

    async def score(self, top_logprobs: int) -> list[PromptScore]:
        """The prompts' own log-probabilities. Raises ApiError."""
        with self._told():
            async with asyncio.timeout_at(self._deadline):
                return await self.served.engine.score_async(self._prompts, top_logprobs)

    async def batches(self, coalesce: bool = False) -> AsyncGenerator[list[Delta], None]:
        """The deltas of all samples of all prompts, in batches; closing it frees the slots.

        Raises ApiError.
        """
        engine = self.served.engine
        coalesce_s = self._service.coalesce_s if coalesce else 0.0
        async with contextlib.aclosing(
            engine.stream_batches(self._prompts, self._params, coalesce_s)
        ) as batches:
            while True:
                with self._told():
                    async with asyncio.timeout_at(self._deadline):
                        deltas = await anext(batches, None)
                if deltas is None:
                    return
                for delta in deltas:
                    self._take(delta)
                yield deltas

    def _take(self, delta: Delta) -> None:
        if delta.finish_reason == "abort":
            raise unavailable()
        if delta.finish_reason == "error":
            raise model_failed(f"the model could not answer: {delta.error}.")
        if delta.tokens and not self._num_tokens:
            self._record.queued(delta.queued_s)
        self._record.tokens(len(delta.tokens), delta.index)
        self._num_tokens += len(delta.tokens)
        num_samples = self._params[0].n
        if delta.index % num_samples == 0:  # the other samples find the first one's prompt
            self._cached[delta.index // num_samples] = delta.cached_tokens
        if delta.finish_reason is not None:
            self._reason = delta.finish_reason

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise ApiError(
                504,
                f"the answer took longer than {self._service.request_timeout_s:g} s: ask for "
                "fewer tokens, or try again when there is less to do.",
                code="timeout",
            ) from None


def sampling_params(
    fields: SamplingFields, served: ServedModel, max_tokens: int, top_logprobs: int
) -> SamplingParams:
    """The engine's parameters; without a seed each call has one of its own. Raises ApiError."""
    temperature = 1.0 if fields.temperature is None else fields.temperature
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    # The likeliest token passes every filter, so at temperature 0 they change nothing.
    filters = {"top_k": fields.top_k or 0, "top_p": fields.top_p or 1.0, "min_p": fields.min_p or 0}
    return SamplingParams(
        temperature=temperature,
        **(filters if temperature else {}),  # type: ignore[arg-type]
        seed=secrets.randbits(63) if fields.seed is None else fields.seed,
        n=fields.n or 1,
        max_tokens=max_tokens,
        stop=tuple(stop),
        logit_bias=_logit_bias(fields.logit_bias or {}, served.tokenizer.vocab_size),
        top_logprobs=top_logprobs,
    )


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    for token in bias:
        digits = token.isascii() and token.isdigit() and len(token) < 10
        if not digits or int(token) >= vocab_size:
            message = f"the keys of logit_bias must be token ids, 0 to {vocab_size - 1}."
            raise ApiError(400, message, param="logit_bias")
    return {int(token): value for token, value in bias.items()}


def check_stream_options(fields: SamplingFields) -> None:
    """Raises ApiError for stream_options without a stream."""
    if fields.stream_options is not None and not fields.stream:
        message = "stream_options are for streams: give stream, too, or leave them out."
        raise ApiError(400, message, param="stream_options")


def wants_usage(fields: SamplingFields) -> bool:
    """Whether a stream ends with the usage."""
    return fields.stream_options is not None and fields.stream_options.include_usage


def merged(deltas: Sequence[Delta]) -> list[Delta]:
    """As few deltas as can be: of each sample, those that follow each other in one part."""
    whole: list[Delta] = []
    last: dict[int, int] = {}  # sample -> its last one in `whole`
    for delta in deltas:
        at = last.get(delta.index)
        if at is None or whole[at].tool != delta.tool:
            last[delta.index] = len(whole)
            whole.append(delta)
            continue
        before = whole[at]
        whole[at] = replace(
            delta,
            text=before.text + delta.text,
            tokens=before.tokens + delta.tokens,
            logprobs=before.logprobs + delta.logprobs,
            top_logprobs=before.top_logprobs + delta.top_logprobs,
        )
    return whole
