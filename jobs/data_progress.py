"""Progress of downloads: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from jobs.progress import LINE_EVERY_S


class DownloadProgress:
    """Bytes of all shards together; lines for shards that are done and for failures.

    `observe` and `note` may be called by any thread.
    """

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards
        self._done: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
            self._bar = Progress(*columns, TransferSpeedColumn(), console=self._console)
            self._task = self._bar.add_task("connecting", total=None)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)

    def observe(self, name: str, done: int, total: int | None) -> None:
        with self._lock:
            self._done[name] = done
            if total is not None:
                self._totals[name] = total
            now = time.monotonic()
            if now - self._last < (0.1 if self._bar else LINE_EVERY_S):
                return
            self._last = now
            self._show()

    def _show(self) -> None:
        num_bytes = sum(self._done.values())
        whole = sum(self._totals.get(name) == done for name, done in self._done.items())
        text = f"{whole} of {self._num_shards} shards"
        if self._bar:
            known = self._totals.values()
            # The shards not begun yet are taken to be as large as the others.
            total = sum(known) * self._num_shards / len(known) if known else None
            self._bar.update(self._task, completed=num_bytes, total=total, description=text)
        else:
            self._console.print(f"{text}, {num_bytes / 1e6:,.1f} MB")
