"""A conversation with a model: its tokens, its settings, and what a terminal shows of it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from nanoray.engine import Delta, SamplingParams, extend_parts
from nanoray.errors import NanorayError
from nanoray.tokenizer import Tokenizer

HELP = """\
/clear             begin anew
/temperature [X]   show or set it: 0 takes the likeliest token
/topk [N]          show or set it: 0 samples from all tokens
/system [TEXT]     begin anew with this system message, or with none
/save [FILE]       append the conversation to a JSON-lines file
/help              this list
A line that begins with a space is never a command. Ctrl-C stops an answer, Ctrl-D leaves."""

# Control characters, by which a text could move the cursor or change the terminal's title.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Streams(Protocol):
    """What a session needs of an `Engine`."""

    def stream(self, prompt: list[int], params: SamplingParams) -> AsyncGenerator[Delta, None]: ...


@dataclass(frozen=True)
class Settings:
    """What commands change. Temperature 0 leaves top_k unused, but does not forget it."""

    temperature: float = 0.6
    top_k: int = 50
    max_tokens: int = 512
    system: str = ""
    seed: int = 42

    def sampling(self, num_answers: int) -> SamplingParams:
        """For the next answer. Raises NanorayError for a value out of range."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k if self.temperature else 0,
            max_tokens=self.max_tokens,
            # Not the same draws for every answer.
            seed=(self.seed + num_answers) % 2**63,
        )


class _Answer:
    """An answer as it comes: its tokens, and its parts in the conversation form."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parts: list[dict[str, str]] = []
        self.finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.finish_reason = delta.finish_reason
        extend_parts(self.parts, delta)


class ChatSession:
    """Answers lines of a user, and obeys commands.

    The whole conversation is kept as the very tokens that the model read and wrote, so that the
    engine finds its own prefix again and computes only what is new. An answer that was stopped
    stays, as far as it came; a question that could not be answered is forgotten.

    Args:
        raw: continue every line as a document of its own, instead of a conversation.
        show_tools: whether calculator calls are printed (dimmed), too.
    """

    def __init__(
        self,
        engine: Streams,
        tokenizer: Tokenizer,
        console: Console,
        settings: Settings,
        *,
        raw: bool,
        show_tools: bool,
    ) -> None:
        settings.sampling(0)
        self.settings = settings
        self._engine, self._tokenizer, self._console = engine, tokenizer, console
        self._raw, self._show_tools = raw, show_tools
        self._num_answers = 0
        self.clear()

    def clear(self) -> None:
        """Forget the conversation, keep the settings."""
        self.tokens: list[int] = []
        self.messages: list[dict[str, Any]] = []
        self.documents: list[str] = []

    def handle(self, line: str) -> None:
        """Obey or answer one line; an empty one does nothing.

        Raises:
            NanorayError: the command or its value is wrong, or the question cannot be answered.
            KeyboardInterrupt: the user stopped the answer; what came of it is kept.
        """
        if line.startswith("/"):
            self._obey(line)
        elif line.strip():
            self.answer(line if self._raw else line.strip())

    def answer(self, text: str) -> None:
        """Print the answer to ``text`` as it comes. Raises as `handle`."""
        prompt = self._prompt(text)
        answer = _Answer()
        try:
            asyncio.run(self._stream(prompt, answer))
        finally:
            self._num_answers += 1
            if answer.tokens:
                self._keep(text, prompt, answer)

    def _prompt(self, text: str) -> list[int]:
        if self._raw:
            return [self._tokenizer.bos_id, *self._tokenizer.encode(text)]
        messages = [{"role": "user", "content": text}]
        if self.tokens:
            turn = self._tokenizer.render_for_completion({"messages": messages})
            return [*self.tokens, *turn[1:]]  # BOS only begins the whole
        if self.settings.system:
            messages.insert(0, {"role": "system", "content": self.settings.system})
        return self._tokenizer.render_for_completion({"messages": messages})

    async def _stream(self, prompt: list[int], answer: _Answer) -> None:
        """Fill ``answer`` and print it. Ctrl-C cancels this, which aborts the request."""
        stream = self._engine.stream(prompt, self.settings.sampling(self._num_answers))
        printer = _Printer(self._console, self._show_tools)
        try:
            async for delta in stream:
                answer.add(delta)
                printer.print(delta)
                if delta.error:
                    raise NanorayError(f"the answer broke off: {delta.error}")
        finally:
            await stream.aclose()
            if answer.finish_reason or answer.tokens:
                printer.end()
        if answer.finish_reason == "length":
            printer.note("(cut: the answer reached --max-tokens or the end of the context)")

    def _keep(self, text: str, prompt: list[int], answer: _Answer) -> None:
        if self._raw:
            self.documents.append(text + "".join(part["text"] for part in answer.parts))
            return
        if not self.messages and self.settings.system:
            self.messages.append({"role": "system", "content": self.settings.system})
        self.messages.append({"role": "user", "content": text})
        self.messages.append({"role": "assistant", "content": answer.parts})
        end = self._tokenizer.special_id("<|assistant_end|>")
        # However the answer ended (by BOS, by its length, by the user), the turn is over.
        if answer.tokens[-1] == self._tokenizer.bos_id:
            answer.tokens[-1] = end
        elif answer.tokens[-1] != end:
            answer.tokens.append(end)
        self.tokens = [*prompt, *answer.tokens]

    def _obey(self, line: str) -> None:
        word, _, argument = line[1:].strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "clear": lambda _argument: self.clear(),
            "temperature": self._set_temperature,
            "topk": self._set_top_k,
            "system": self._set_system,
            "save": self._save,
            "help": lambda _argument: self._console.print(HELP, markup=False),
        }
        if word not in commands:
            raise NanorayError(f"there is no command /{word}; /help lists them")
        commands[word](argument.strip())

    def _set_temperature(self, argument: str) -> None:
        self._change("temperature", float, argument)

    def _set_top_k(self, argument: str) -> None:
        self._change("top_k", int, argument)

    def _change(self, name: str, parse: Callable[[str], float], argument: str) -> None:
        if argument:
            try:
                value = parse(argument)
            except ValueError:
                raise NanorayError(f"{name} must be a number, not {argument!r}") from None
            changed = replace(self.settings, **{name: value})  # type: ignore[arg-type]
            changed.sampling(0)  # refuses what is out of range
            self.settings = changed
        self._console.print(f"{name} {getattr(self.settings, name)}", markup=False)

    def _set_system(self, argument: str) -> None:
        if self._raw:
            raise NanorayError("text that is only continued has no system message")
        self.settings = replace(self.settings, system=argument)
        self.clear()

    def _save(self, argument: str) -> None:
        """One line in the form that supervised fine-tuning reads; raw documents one line each."""
        lines: list[dict[str, Any]] = [{"messages": self.messages}] if self.messages else []
        lines += [{"text": text} for text in self.documents]
        if not lines:
            raise NanorayError("there is nothing to save yet")
        path = Path(argument or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")).expanduser()
        try:
            with path.open("a", encoding="utf-8") as file:
                for line in lines:
                    # A line of the terminal may hold what is no UTF-8 (lone surrogates).
                    text = json.dumps(line, ensure_ascii=False)
                    file.write(text.encode("utf-8", "replace").decode() + "\n")
        except OSError as error:
            raise NanorayError(
                f"{path} cannot be written ({error.strerror}); take another"
            ) from None
        self._console.print(f"saved: {path}", markup=False)


class _Printer:
    """Prints deltas: text plainly, tool calls dimmed as ``[17+25 = 42]``."""

    def __init__(self, console: Console, show_tools: bool) -> None:
        self._console, self._show_tools = console, show_tools
        self._part = "none"

    def print(self, delta: Delta) -> None:
        if delta.text:
            self._enter(delta.tool)
            self._write(delta.text, delta.tool != "none")

    def _enter(self, part: str) -> None:
        """Write what lies between two parts."""
        marks = {("none", "call"): "[", ("call", "output"): " = ", ("call", "none"): "] "}
        marks |= {("output", "none"): "] ", ("output", "call"): "] ["}
        if mark := marks.get((self._part, part)):
            self._write(mark, dim=True)
        self._part = part

    def end(self) -> None:
        """Close what is open, and the line."""
        self._enter("none")
        self._write("\n", dim=False)

    def note(self, text: str) -> None:
        if self._console.is_terminal:
            self._write(text + "\n", dim=True)

    def _write(self, text: str, dim: bool) -> None:
        if dim and not self._show_tools:
            return
        if self._console.is_terminal:
            text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
        if dim:
            self._console.out(text, end="", style="dim", highlight=False)
        else:  # not through rich, which expands tabs and strips what it takes for control codes
            self._console.file.write(text)
            self._console.file.flush()
