"""A job's progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LINE_EVERY_S = 5.0  # between plain lines


def duration(seconds: float) -> str:
    """As minutes:seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def step_text(record: dict[str, Any], num_steps: int) -> str:
    """One step's record for a person."""
    loss = record["loss"]
    waited_s = record.get("data_wait_s", record.get("wait_for_batch_s", 0.0))
    parts = [
        f"step {record['step']:,}/{num_steps:,}",
        f"loss {loss:.4f}" if loss is not None else "loss nan",
        *([f"reward {record['reward']:.3f}"] if "reward" in record else []),
        f"{record['tokens_per_s']:,.0f} tok/s",
        f"mfu {100 * record['mfu']:.0f} %",
        f"wait {100 * waited_s / record['step_s']:.1f} %",
        f"eta {duration(record['eta_s'])}",
    ]
    return " · ".join(parts)


class ProgressPrinter:
    """Shows the records of a training run. Use as a context manager, call with each record."""

    def __init__(self, num_steps: int, console: Console | None = None) -> None:
        self._num_steps = num_steps
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if self._console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("starting workers", total=num_steps)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        else:
            self._console.print("starting workers", markup=False)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        if "warning" in record:
            self._print(f"warning: {record['warning']}")
        elif "event" in record:
            self._print(f"rollouts: {record['event']}")
        elif "workers" in record:
            self._print("workers " + ", ".join(record["workers"]))
        elif "samples" in record:
            self._print(record["samples"])
        elif "val_bpb" in record:
            self._print(f"step {record['step']:,} · validation {record['val_bpb']:.4f} bits/byte")
        elif "chatcore" in record:
            self._print(f"step {record['step']:,} · ChatCORE {record['chatcore']:.4f}")
        elif "pass@1" in record:
            found = [f"{name} {value:.3f}" for name, value in record.items() if "pass@" in name]
            self._print(f"step {record['step']:,} · held out: {', '.join(found)}")
        elif "loss" in record:
            self._step(record)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _step(self, record: dict[str, Any]) -> None:
        text = step_text(record, self._num_steps)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
            return
        now = time.monotonic()
        edge = record["step"] in (1, self._num_steps)
        if edge or now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self._print(text)


class CountProgress:
    """Two counts in a sentence: beside a spinner on a terminal, else a line every few seconds."""

    def __init__(self, form: str) -> None:
        self._form = form
        self._console = Console(highlight=False)
        self._status = self._console.status("reading") if self._console.is_terminal else None
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, done: int, other: int) -> None:
        text = self._form.format(done, other)
        if self._status:
            self._status.update(text)
        elif time.monotonic() - self._last >= LINE_EVERY_S:
            self._last = time.monotonic()
            self._console.print(text)
