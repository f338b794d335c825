"""``python -m jobs.chat``: talk to a model in the terminal; with -p one answer, for pipes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from nanoray.config import ChatConfig, run_job
from nanoray.errors import NanorayError

if TYPE_CHECKING:
    from jobs.chat_session import ChatSession


def main(argv: Sequence[str]) -> int:
    config = ChatConfig.parse(argv, "python -m jobs.chat")
    # torch takes seconds to import, and --help does without it.
    from jobs.chat_session import ChatSession, Settings
    from nanoray.checkpoint.loading import load_model
    from nanoray.engine import Engine
    from nanoray.tools.calculator import calculate

    assert config.run is not None
    loaded = load_model(config.run, config.step, dtype=config.dtype)
    raw = config.raw or loaded.meta.get("stage") not in ("sft", "rl")
    if raw and config.system:
        raise NanorayError("--system needs a model that was tuned to chat, and no --raw")
    what = "continues text (base model)" if raw else "answers"
    if config.dry_run:
        print(f"dry run: {loaded.path} is fine, it {what}")
        return 0
    console = Console(highlight=False, soft_wrap=True)
    settings = Settings(
        config.temperature, config.top_k, config.max_tokens, config.system, config.seed
    )
    engine = Engine(loaded.model, loaded.tokenizer, num_slots=1, tool=calculate)
    session = ChatSession(
        engine,
        loaded.tokenizer,
        console,
        settings,
        raw=raw,
        show_tools=console.is_terminal,
    )
    try:
        if config.prompt is not None:
            session.answer(config.prompt)
            return 0
        if sys.stdin.isatty():
            console.print(f"{loaded.path} {what}. /help lists the commands.", markup=False)
            converse(session, ask, console)
            return 0
        return answer_lines(session)
    except BrokenPipeError:  # whoever read the answers has left, and needs no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        engine.close()


def ask() -> str:
    """A line of the user at the terminal, with editing and history. Raises EOFError."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401
    return input("> ")


def converse(session: ChatSession, read: Callable[[], str], console: Console) -> None:
    """Answer lines until Ctrl-D. A mistake is told, and the conversation goes on."""
    while True:
        try:
            line = read()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n(Ctrl-D leaves)", style="dim")
            continue
        try:
            session.handle(line)
        except KeyboardInterrupt:
            console.print("(stopped)", style="dim")
        except NanorayError as error:
            console.print(f"error: {error}", style="red", markup=False)


def answer_lines(session: ChatSession) -> int:
    """Answer what is piped in, line by line; 1 if any line could not be."""
    failed = 0
    for line in _piped():
        try:
            session.handle(line)
        except NanorayError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed = 1
    return failed


def _piped() -> Iterator[str]:
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="replace").rstrip("\r\n")


if __name__ == "__main__":
    run_job(main)
