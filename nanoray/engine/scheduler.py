"""Continuous batching: many requests, each at its own position, share every forward pass.

One step = prefill at most `prefill_chunk` tokens, admitting requests in order of arrival ->
decode one token for every running request -> sample all at once -> hand on. Prefill and
decoding alternate, so that a long prompt does not stall the streams that run (Sarathi-Serve,
arXiv 2403.02310; continuous batching: Orca, OSDI 2022).

A request is its tokens, and how many of them its slot has computed. Two or more to go: prefill;
one: decode. There is no other state: a tool's output is appended and prefilled like a prompt,
and after a change of weights nothing counts as computed. A request is admitted only when nobody
prefills, so equal prompts find the first one's cache ready and go straight into the decode batch.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nanoray.engine.cached import CachedModel, KVCache
from nanoray.engine.request import FinishReason, Request, ScoreRequest
from nanoray.engine.sampling import Drawn, likeliest, sample, uniform
from nanoray.engine.slots import Slots

_logger = logging.getLogger(__name__)
_NOT_FINITE = "the model's logits are not finite: its weights or activations have overflowed"


class Scheduler:
    """The requests, the slots and the step. Single-threaded: Engine sees to that.

    prefill_chunk: most prompt tokens computed between two decoding steps. version: of the
    weights in `model`.
    """

    def __init__(
        self, model: CachedModel, cache: KVCache, slots: Slots, prefill_chunk: int, version: int
    ) -> None:
        self.model, self.cache, self.slots = model, cache, slots
        self.prefill_chunk, self.version = prefill_chunk, version
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.counts = dict.fromkeys(
            (
                *("steps", "decode_steps", "decode_row_steps"),
                *("prompt_tokens", "cached_prompt_tokens", "computed_prefill_tokens"),
                *("generated_tokens", "requests_finished", "requests_failed"),
            ),
            0,
        )

    def step(self) -> bool:
        """One step, see above; False if there is nothing to compute.

        An exception fails the requests that were running; those that wait have their turn.
        """
        if not (self.running or self.waiting):
            return False
        self.counts["steps"] += 1
        try:
            self._advance()
        except Exception as error:
            _logger.exception("a step of the engine failed")
            for request in list(self.running):
                self.end(request, "error", f"the engine failed: {error!r}")
        return True

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request from outside, wherever it is; nothing if it has ended."""
        if not request.finished:
            request.finish(reason, error)
            self._retire(request)

    def load_weights(self, state_dict: Mapping[str, Tensor], version: int) -> None:
        """See Engine.load_weights."""
        self.model.load_weights(state_dict)
        self.version = version
        self.slots.forget()
        self.cache.clear()

    def _advance(self) -> None:
        requests, hiddens = self._prefill()
        rows = [r for r in self.running if r.pending == 1 and not isinstance(r, ScoreRequest)]
        if rows:
            rows.sort(key=self._place)
            hiddens.append(self._forward(rows, [1] * len(rows))[:, 0])
            requests += rows
            self.counts["decode_steps"] += 1
            self.counts["decode_row_steps"] += len(rows)
        if not requests:
            return
        drawn = sample(
            self.model.logits(torch.cat(hiddens)),
            [request.params for request in requests],
            [uniform(r.params.seed, r.sample, len(r.tokens)) for r in requests],
        )
        for i, request in enumerate(requests):
            self._accept(request, drawn, i)

    def _prefill(self) -> tuple[list[Request], list[Tensor]]:
        """Compute up to prefill_chunk tokens; requests now ready, and their hidden [1, D]."""
        ready, hiddens = [], []
        budget = self.prefill_chunk
        while budget > 0 and (request := self._next_prefill()) is not None:
            count = min(request.pending, budget)
            budget -= count
            scored = isinstance(request, ScoreRequest)
            hidden_1TD = self._forward([request], [count], last_only=not scored)
            self.counts["computed_prefill_tokens"] += count
            if isinstance(request, ScoreRequest):
                self._score(request, hidden_1TD[0])
            elif request.pending == 0:
                ready.append(request)
                hiddens.append(hidden_1TD[:, -1])
        return ready, hiddens

    def _next_prefill(self) -> Request | None:
        """The running request that has a prompt to compute, else the next one to come in."""
        for request in self.running:
            # What is scored never decodes, though a single token be left.
            if request.pending > (0 if isinstance(request, ScoreRequest) else 1):
                return request
        while self.waiting:
            request, scored = self.waiting[0], isinstance(self.waiting[0], ScoreRequest)
            # To be scored, all of a prompt must be computed.
            allocation = self.slots.allocate(request.tokens, reuse=not scored)
            if allocation is None:
                return None
            if allocation.source is not allocation.slot:
                self.cache.copy(allocation.source.index, allocation.slot.index, allocation.length)
            request.admit(allocation.slot, allocation.length)
            self.running.append(self.waiting.popleft())
            self.counts["prompt_tokens"] += len(request.tokens)
            self.counts["cached_prompt_tokens"] += allocation.length
            if request.pending > 1 or scored:
                return request
        return None

    def _forward(
        self, requests: Sequence[Request], counts: Sequence[int], last_only: bool = False
    ) -> Tensor:
        """Compute the next tokens of some requests, equally many: hidden [B, count or 1, D]."""
        slots = [request.placed for request in requests]
        starts = [len(slot.tokens) for slot in slots]
        chunks = [r.tokens[start : start + n] for r, start, n in zip(requests, starts, counts)]
        hidden_BTD = self.model.forward(
            self.cache,
            [slot.index for slot in slots],
            starts,
            torch.tensor(chunks),
            counts,
            [r.tokens[start - 1] if start else -1 for r, start in zip(requests, starts)],
            prefixes_B=[slot.prefix for slot in slots],
            last_only=last_only,
        )
        for slot, chunk in zip(slots, chunks):
            slot.tokens += chunk
        return hidden_BTD

    def _score(self, request: ScoreRequest, hidden_TD: Tensor) -> None:
        """Score the targets of the chunk just computed."""
        stop = len(request.placed.tokens)
        start = stop - hidden_TD.size(0)
        logits_TV = self.model.logits(hidden_TD)
        total_T = logits_TV.logsumexp(-1)
        targets_T1 = torch.tensor(request.targets[start:stop], device=hidden_TD.device)[:, None]
        # Assigned by position: after a change of weights it starts over.
        request.scores[start:] = (logits_TV.gather(1, targets_T1)[:, 0] - total_T).tolist()
        if count := request.params.top_logprobs:
            request.tops[start:] = likeliest(logits_TV, total_T, count)
        if not all(map(math.isfinite, request.scores[start:])):
            self.end(request, "error", _NOT_FINITE)
        elif request.pending == 0:
            self.end(request, "stop")

    def _accept(self, request: Request, drawn: Drawn, row: int) -> None:
        logprob, sampled_logprob = drawn.logprobs[row], drawn.sampled_logprobs[row]
        if not math.isfinite(logprob):
            self.end(request, "error", _NOT_FINITE)
            return
        self.counts["generated_tokens"] += 1
        try:
            token, tops = drawn.tokens[row], drawn.top_logprobs[row]
            request.accept(token, logprob, sampled_logprob, self.version, tops)
        except Exception as error:  # the tool or the listener: one request's trouble
            _logger.exception("a request failed")
            self.end(request, "error", f"the request failed: {error!r}")
        else:
            if request.finished:
                self._retire(request)

    def _retire(self, request: Request) -> None:
        """Take an ended request out and free its slot."""
        failed = request.completion.finish_reason == "error"
        self.counts["requests_failed" if failed else "requests_finished"] += 1
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self.slots.release(request.slot, keep=not failed)
            if failed:  # its NaNs must not reach the slot's next sequence
                self.cache.clear(request.slot.index)
        request.done.set()

    def _place(self, request: Request) -> tuple[int, int]:
        """In the order of slots; on CPUs, which read it once, rows of one prefix together."""
        slot = request.placed
        together = slot.prefix and self.model.device.type == "cpu"
        return (slot.prefix.number if slot.prefix and together else 0, slot.index)
