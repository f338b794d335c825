"""One request on its way: its tokens, its text as it becomes safe to show, its tool calls."""

from __future__ import annotations

import codecs
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from nanoray.engine.sampling import Likeliest, SamplingParams
from nanoray.engine.slots import Slot
from nanoray.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "abort", "error"]
Part = Literal["none", "call", "output"]

# A part, as the tokenizer's conversations call it.
PART_TYPES: dict[Part, str] = {"none": "text", "call": "python", "output": "python_output"}
# What the text after a special token is: plain, a tool's input, a tool's output.
_PART_AFTER: dict[str, Part] = {
    "<|python_start|>": "call",
    "<|python_end|>": "none",
    "<|output_start|>": "output",
    "<|output_end|>": "none",
}


@dataclass(frozen=True)
class Delta:
    """One streamed piece of an answer. The texts joined are the completion's text."""

    index: int
    """Which of the n samples; of several prompts, prompt i's are i * n to i * n + n - 1."""
    text: str
    """May lag behind the tokens: half a character or a possible stop string is held back."""
    tokens: list[int]
    logprobs: list[float]
    """Of the raw softmax; 0 for forced tokens."""
    finish_reason: FinishReason | None = None
    """Set in the last delta of a sample."""
    tool: Part = "none"
    """Whether the text is plain, a tool call's expression, or a tool's output."""
    error: str | None = None
    top_logprobs: list[Likeliest] = field(default_factory=list)
    """Parallel to `tokens` if SamplingParams.top_logprobs asks; empty for forced tokens."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the cache."""
    queued_s: float = 0.0
    """How long the request waited for a slot."""


def extend_parts(parts: list[dict[str, str]], delta: Delta) -> None:
    """Add a delta's text to an answer in the conversation form (see tokenizer.conversation)."""
    part_type = PART_TYPES[delta.tool]
    if parts and parts[-1]["type"] == part_type:
        parts[-1]["text"] += delta.text
    elif delta.text:
        parts.append({"type": part_type, "text": delta.text})


@dataclass(frozen=True)
class PromptScore:
    """Raw log-probabilities of a prompt's tokens but the first, given those before them."""

    logprobs: list[float]
    top_logprobs: list[Likeliest]
    """Parallel to them if asked for, else empty."""


@dataclass
class Completion:
    """An answer, whole. The lists run parallel to `tokens`."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    """Every new token, the stop token included (so that RL can train it)."""
    mask: list[int] = field(default_factory=list)
    """1 sampled, 0 forced (a tool's output with its marks)."""
    logprobs: list[float] = field(default_factory=list)
    """Of the raw softmax: temperature 1, no bias, no truncation. 0 for forced tokens."""
    sampled_logprobs: list[float] = field(default_factory=list)
    """Of the distribution really drawn from; 0 at temperature 0 and for forced tokens."""
    versions: list[int] = field(default_factory=list)
    """Of the weights that gave each token."""
    text: str = ""
    """Without special tokens, the stop token and the stop string; tool calls and outputs are in."""
    finish_reason: FinishReason = "abort"
    error: str | None = None


@dataclass(frozen=True)
class Rules:
    """What all requests of an engine share."""

    tokenizer: Tokenizer | None
    tool: Callable[[str], str | None] | None
    stop_token_ids: frozenset[int]
    max_len: int

    @cached_property
    def call_end(self) -> int | None:
        """The id of <|python_end|>, which asks for the tool."""
        return self.tokenizer.special_id("<|python_end|>") if self.tokenizer else None

    @cached_property
    def part_after(self) -> dict[int, Part | None]:
        """Every special token's id -> the part that it begins (None: it changes nothing)."""
        if self.tokenizer is None:
            return {}
        names = self.tokenizer.special_tokens
        return {token: _PART_AFTER.get(name) for name, token in names.items()}


class TextStream:
    """Bytes in, text out as early as it is certain: UTF-8 by whole characters, stops cut."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """The text that is certain now; ends before a stop string and sets `stopped`."""
        self._held += self._decoder.decode(data)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        return self._release(len(self._held) - self._possible_stop())

    def flush(self) -> str:
        """All that was held back; half a character becomes U+FFFD. The next part starts anew."""
        self._held += self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that could begin a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        for count in range(longest, 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0


class Request:
    """A sequence that is being continued, or scored.

    Invariant: `tokens` begins with what its slot has computed; `pending` tokens are left to
    compute before the next one can be sampled.
    """

    def __init__(
        self,
        rules: Rules,
        prompt: Sequence[int],
        params: SamplingParams,
        sample: int = 0,
    ) -> None:
        self.params, self.sample = params, sample
        self.index = sample  # for the deltas
        self.on_delta: Callable[[Delta], None] | None = None
        self.cached_tokens = 0
        self.queued_s = 0.0
        self._created = time.monotonic()
        self.tokens = list(prompt)
        self.completion = Completion(prompt=list(prompt))
        self.slot: Slot | None = None
        self.finished = False
        self.done = threading.Event()  # finished, and its slot free again
        self._rules = rules
        self._stop_ids = rules.stop_token_ids.union(params.stop_token_ids)
        self._text = TextStream(params.stop)
        self._part: Part = "none"
        self._expression: list[int] = []

    @property
    def placed(self) -> Slot:
        """The slot of a running request."""
        assert self.slot is not None
        return self.slot

    @property
    def pending(self) -> int:
        return len(self.tokens) - len(self.placed.tokens)

    @property
    def room(self) -> int:
        """New tokens that may still be added. The very last needs no place in the cache."""
        new = len(self.completion.tokens)
        return min(self.params.max_tokens - new, self._rules.max_len + 1 - len(self.tokens))

    def admit(self, slot: Slot, cached_tokens: int) -> None:
        """Give the request its slot, which has computed so many of its tokens."""
        self.slot, self.cached_tokens = slot, cached_tokens
        self.queued_s = time.monotonic() - self._created

    def accept(
        self,
        token: int,
        logprob: float,
        sampled_logprob: float,
        version: int,
        top_logprobs: Likeliest,
    ) -> None:
        """Add a sampled token; stop, or call the tool and force its output, if it asks for it."""
        self._append([token], 1, [logprob], [sampled_logprob], version)
        part = self._part
        reason: FinishReason | None = None
        text = self._advance_text(token)
        if token in self._stop_ids or self._text.stopped:
            reason = "stop"
        elif self.room == 0:
            reason = "length"
            text += self._text.flush()
        self._emit(text, [token], [logprob], part, reason, top_logprobs=[top_logprobs])
        if part == "call" and token == self._rules.call_end and reason is None:
            self._call_tool(version)

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the request from outside: abort or error. What was held back is shown."""
        if not self.finished:
            self._emit(self._text.flush(), [], [], self._part, reason, error)

    def _append(
        self,
        tokens: list[int],
        mask: int,
        logprobs: list[float],
        sampled_logprobs: list[float],
        version: int,
    ) -> None:
        self.tokens += tokens
        self.completion.tokens += tokens
        self.completion.mask += [mask] * len(tokens)
        self.completion.logprobs += logprobs
        self.completion.sampled_logprobs += sampled_logprobs
        self.completion.versions += [version] * len(tokens)

    def _advance_text(self, token: int) -> str:
        """The text that a token completes; marks switch between text, call and output."""
        if token in self._rules.part_after:
            # A stop string does not reach over a mark, nor half a character.
            text = self._text.flush()
            self._part = self._rules.part_after[token] or self._part
            if self._part == "call":
                self._expression = []
            return text
        if token in self._stop_ids:
            return self._text.flush()
        if self._part == "call":
            self._expression.append(token)
        tokenizer = self._rules.tokenizer
        return "" if tokenizer is None else self._text.feed(tokenizer.decode_bytes([token]))

    def _call_tool(self, version: int) -> None:
        tokenizer, tool = self._rules.tokenizer, self._rules.tool
        if tool is None or tokenizer is None or not self._expression:
            return
        output = tool(tokenizer.decode(self._expression))
        if output is None:
            return
        start, end = map(tokenizer.special_id, ("<|output_start|>", "<|output_end|>"))
        whole = [start, *tokenizer.encode(output), end]
        forced = whole[: self.room]
        zeros = [0.0] * len(forced)
        self._append(forced, 0, zeros, zeros, version)
        # Not through the text stream: a tool's output contains no stop strings.
        text = tokenizer.decode([token for token in forced if token not in (start, end)])
        reason: FinishReason | None = "length" if self.room == 0 else None
        self._emit(text, forced, zeros, "output", reason, top_logprobs=[[] for _ in forced])

    def _emit(
        self,
        text: str,
        tokens: list[int],
        logprobs: list[float],
        part: Part,
        reason: FinishReason | None,
        error: str | None = None,
        top_logprobs: Sequence[Likeliest] = (),
    ) -> None:
        self.completion.text += text
        if reason is not None:
            self.finished = True
            self.completion.finish_reason, self.completion.error = reason, error
        if self.on_delta is not None:
            tops = list(top_logprobs) if self.params.top_logprobs else []
            self.on_delta(
                Delta(
                    *(self.index, text, tokens, logprobs, reason, part, error, tops),
                    cached_tokens=self.cached_tokens,
                    queued_s=self.queued_s,
                )
            )


class ScoreRequest(Request):
    """A prompt whose tokens are scored and which is not continued."""

    def __init__(self, rules: Rules, prompt: Sequence[int], top_logprobs: int = 0) -> None:
        super().__init__(rules, prompt[:-1], SamplingParams(top_logprobs=top_logprobs))
        self.targets = list(prompt[1:])
        self.scores: list[float] = []
        self.tops: list[Likeliest] = []
