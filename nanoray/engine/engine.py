"""The door to the engine: what callers of any thread or event loop use."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future

from torch import Tensor

from nanoray.engine.cached import CachedModel, KVCache
from nanoray.engine.delta_inbox import DeltaInbox
from nanoray.engine.request import (
    Completion,
    Delta,
    PromptScore,
    Request,
    Rules,
    ScoreRequest,
)
from nanoray.engine.sampling import SamplingParams
from nanoray.engine.scheduler import Scheduler
from nanoray.engine.slots import Slots
from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT
from nanoray.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)
_POLL_S = 0.005  # only where one thread steps for another, or waits for resume()


class EngineClosedError(NanorayError):
    """The engine was closed; another one has to answer."""


class EngineFailedError(NanorayError):
    """The engine could not compute a request that was fine."""


class Engine:
    """Generates and scores for any number of callers at once.

    Steps run in the thread that calls generate() or score(), until stream() or start() starts
    the engine's own thread; from then on there: an event loop never runs a forward pass. Commands
    reach the scheduler through an inbox that is emptied before every step. torch uses as many
    threads as the process has set (torch.set_num_threads).

    Args:
        model: read once, see CachedModel; load_weights() brings newer ones.
        tokenizer: for text, stop strings and tools; without one there are token ids only.
        num_slots: most sequences that are decoded together.
        max_len: longest sequence in tokens; by default the model's training context, at most
            its rotary length. Memory: num_slots * max_len keys and values a layer.
        prefill_chunk: most prompt tokens computed between two decoding steps: small for even
            streams, large for throughput.
        tool: expression -> output, or None for no output; called between steps, so it must be
            bounded in time.
        stop_token_ids: ids that end every answer; by default BOS and <|assistant_end|>.
        prefix_cache: whether a request starts from what earlier ones have computed.
        version: of the model's weights, for Completion.versions.

    Raises:
        NanorayError: an argument is out of range, or the tokenizer is not the model's.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None,
        *,
        num_slots: int = 8,
        max_len: int | None = None,
        prefill_chunk: int = 256,
        tool: Callable[[str], str | None] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        prefix_cache: bool = True,
        version: int = 0,
    ) -> None:
        config = model.config
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise NanorayError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model {config.vocab_size}: "
                "give the tokenizer that the model was trained with."
            )
        self.max_len = config.sequence_len if max_len is None else min(max_len, config.rotary_len)
        sizes = {"num_slots": num_slots, "prefill_chunk": prefill_chunk, "max_len": self.max_len}
        for name, value in sizes.items():
            if value < 1:
                raise NanorayError(f"{name} must be at least 1, not {value}.")
        if stop_token_ids is None:
            names = ("<|bos|>", "<|assistant_end|>")
            stop_token_ids = [tokenizer.special_id(name) for name in names] if tokenizer else []
        self._rules = Rules(tokenizer, tool, frozenset(stop_token_ids), self.max_len)
        self._vocab_size = config.vocab_size
        cached = CachedModel(model)
        cache = KVCache(cached, num_slots, self.max_len)
        slots = Slots(num_slots, prefix_cache)
        self._scheduler = Scheduler(cached, cache, slots, prefill_chunk, version)
        self._inbox: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # whoever holds it may use the scheduler
        self._wake = threading.Event()  # something is in the inbox
        self._thread: threading.Thread | None = None
        self._paused = self._closed = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """Continue every prompt; returns n completions a prompt, in the prompts' order.

        A request that fails has finish_reason "error" and says why in `error`. Raises
        NanorayError, before anything runs, for a prompt or parameters that cannot be served.
        """
        requests = self._all_requests(prompts, params)
        self._submit(requests)
        self._await(requests)
        return [request.completion for request in requests]

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Raw log-probability of each prompt token but the first, given those before it.

        Raises NanorayError for a prompt that cannot be read, or if scoring fails.
        """
        for prompt in prompts:
            self._check_prompt(prompt)
        requests = [ScoreRequest(self._rules, prompt) for prompt in prompts]
        scored = [request for request in requests if request.targets]
        self._submit(scored)
        self._await(scored)
        for request in scored:
            _check_scored(request.completion.finish_reason, request.completion.error)
        return [request.scores for request in requests]

    async def score_async(
        self, prompts: Sequence[Sequence[int]], top_logprobs: int = 0
    ) -> list[PromptScore]:
        """As score(), without blocking the event loop; cancelling it aborts what still runs."""
        for prompt in prompts:
            self._check_prompt(prompt)
        requests = [ScoreRequest(self._rules, prompt, top_logprobs) for prompt in prompts]
        batches = self._deltas([request for request in requests if request.targets])
        async with contextlib.aclosing(batches):
            async for deltas in batches:
                for delta in deltas:
                    _check_scored(delta.finish_reason, delta.error)
        return [PromptScore(request.scores, request.tops) for request in requests]

    async def stream(
        self, prompt: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of all n samples as they come; aclose() aborts what still runs.

        Raises NanorayError at the first step for a request that cannot be served.
        """
        batches = self.stream_batches([prompt], params)
        async with contextlib.aclosing(batches):
            async for deltas in batches:
                for delta in deltas:
                    yield delta

    async def stream_batches(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        coalesce_s: float = 0.0,
    ) -> AsyncGenerator[list[Delta], None]:
        """As stream(), of several prompts: each time all deltas since the last time.

        Args:
            coalesce_s: after text, what comes until the next multiple of it on the clock (or until
                all ends) comes together.
        """
        requests = self._all_requests(prompts, params)
        for index, request in enumerate(requests):
            request.index = index
        async with contextlib.aclosing(self._deltas(requests, coalesce_s)) as batches:
            async for deltas in batches:
                yield deltas

    def load_weights(self, state_dict: Mapping[str, Tensor], version: int) -> None:
        """Go on with other weights of the same shape; returns when they are in use.

        Nothing computed with the old ones is used again: cached prefixes are dropped, and
        requests under way recompute theirs, then continue. Raises NanorayError, and keeps the
        old weights, if these do not fit.
        """
        self._do(lambda: self._scheduler.load_weights(state_dict, version))

    def forget(self) -> None:
        """Drop the cached prefixes: what comes next does not depend on what was before.

        Bitwise, that is; a cached prefix changes nothing but the rounding.
        """
        self._do(lambda: self._scheduler.slots.forget())

    def pause(self) -> None:
        """Return when the step under way is finished; then nothing runs until resume()."""
        self._do(lambda: setattr(self, "_paused", True))

    def resume(self) -> None:
        """Go on after pause()."""
        self._do(lambda: setattr(self, "_paused", False))

    def stats(self) -> dict[str, float]:
        """Counters since the start, and what there is now; a snapshot between or in a step."""
        scheduler, slots = self._scheduler, self._scheduler.slots
        return {
            **scheduler.counts,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "busy_slots": slots.num_busy,
            "num_slots": len(slots.all),
            "busy_tokens": sum(len(slot.tokens) for slot in slots.all if slot.busy),
            "cached_tokens": sum(len(slot.tokens) for slot in slots.all),
            "cache_capacity_tokens": len(slots.all) * self.max_len,
            "version": scheduler.version,
        }

    def start(self) -> None:
        """Run the engine in a thread of its own, if it does not yet."""
        self._refuse_if_closed()
        if self._thread is not None:  # without waiting for the step that it is in
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Abort all requests and end the thread; the engine is of no use afterwards."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock:
            self._take_inbox()
            self._abort([*self._scheduler.running, *self._scheduler.waiting])

    def step(self) -> bool:
        """Take what came in and do one step; False if there was nothing to compute.

        The other methods call it. For tests and benches, which step by hand.
        """
        self._take_inbox()
        return not self._paused and self._scheduler.step()

    def _check_prompt(self, prompt: Sequence[int]) -> None:
        if not len(prompt):
            raise NanorayError("the prompt is empty: give at least one token, such as BOS.")
        if len(prompt) > self.max_len:
            raise NanorayError(
                f"the prompt has {len(prompt)} tokens, but the context is {self.max_len}: "
                "shorten it."
            )
        self._check_ids(prompt, "the prompt")

    def _check_ids(self, tokens: Iterable[int], where: str) -> None:
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise NanorayError(
                    f"token id {token} in {where} is not in the vocabulary: "
                    f"it has the ids 0 to {self._vocab_size - 1}."
                )

    def _all_requests(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Request]:
        """The requests of all prompts in order, validated."""
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(params) != len(prompts):
            raise NanorayError(f"there are {len(prompts)} prompts, but {len(params)} params.")
        return [request for pair in zip(prompts, params) for request in self._requests(*pair)]

    def _requests(self, prompt: Sequence[int], params: SamplingParams) -> list[Request]:
        """A request for each of the n samples, validated."""
        self._check_prompt(prompt)
        self._check_ids(params.logit_bias, "logit_bias")
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        if params.stop and self._rules.tokenizer is None:
            raise NanorayError("stop strings need a tokenizer: give stop_token_ids instead.")
        return [Request(self._rules, prompt, params, index) for index in range(params.n)]

    async def _deltas(
        self, requests: Sequence[Request], coalesce_s: float = 0.0
    ) -> AsyncGenerator[list[Delta], None]:
        """Run the requests in the engine's thread; aclose() aborts them."""
        inbox = DeltaInbox(len(requests))
        for request in requests:
            request.on_delta = inbox.put
        self.start()
        self._submit(requests)
        try:
            still_open = len(requests)
            while still_open:
                deltas = await inbox.take()
                still_open -= sum(delta.finish_reason is not None for delta in deltas)
                yield deltas
                if coalesce_s and any(delta.text for delta in deltas):
                    # To a tick that all streams share: the loop wakes once for all of them.
                    await inbox.wait_for_all(coalesce_s - time.monotonic() % coalesce_s)
        finally:
            self._tell(lambda: self._abort(requests))

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineClosedError("this engine is closed: make a new one.")

    def _submit(self, requests: Sequence[Request]) -> None:
        def submit() -> None:
            self._scheduler.waiting.extend(requests)
            if self._closed:
                self._abort(requests)

        self._refuse_if_closed()
        self._tell(submit)

    def _abort(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._scheduler.end(request, "abort", "the engine is closed" if self._closed else None)

    def _tell(self, command: Callable[[], None]) -> None:
        """Have a command run between two steps."""
        self._inbox.append(command)
        self._wake.set()
        if self._closed:  # close() may have emptied the inbox just before
            with self._lock:
                self._take_inbox()

    def _take_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _do(self, action: Callable[[], None]) -> None:
        """Run an action between two steps, wait for it, raise what it raises."""
        future: Future[None] = Future()

        def command() -> None:
            try:
                action()
                future.set_result(None)
            except Exception as error:
                future.set_exception(error)

        self._tell(command)
        while self._thread is None and not future.done():
            # Another thread may be stepping inline: then it takes the command.
            if self._lock.acquire(timeout=_POLL_S):
                try:
                    self._take_inbox()
                finally:
                    self._lock.release()
        future.result()

    def _await(self, requests: Sequence[Request]) -> None:
        """Return when the requests are done: step for them unless the engine's thread does."""
        for request in requests:
            while not request.done.is_set():
                if self._thread is not None:
                    request.done.wait()
                elif self._lock.acquire(timeout=_POLL_S):
                    try:
                        worked = request.done.is_set() or self.step()
                    finally:
                        self._lock.release()
                    if not worked:
                        time.sleep(_POLL_S)

    def _loop(self) -> None:
        try:
            while not self._closed:
                self._wake.clear()
                if self._closed:  # since the look above, and then nobody wakes this again
                    break
                with self._lock:
                    worked = self.step()
                if not worked:
                    self._wake.wait()
        except BaseException as error:  # such as a device that is lost: nobody may wait for ever
            _logger.exception("the engine's thread ends")
            self._closed = True
            self._take_inbox()
            for request in [*self._scheduler.running, *self._scheduler.waiting]:
                request.finish("error", f"the engine failed: {error!r}")
                request.done.set()


def _check_scored(reason: str | None, error: str | None) -> None:
    if reason == "abort":
        raise EngineClosedError(f"scoring ended early: {error}.")
    if reason != "stop":
        raise EngineFailedError(f"scoring ended early: {error}.")
