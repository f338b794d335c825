"""From the engine's thread to an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from nanoray.engine.request import Delta


class DeltaInbox:
    """Deltas on their way from the engine's thread to an event loop.

    The loop is woken only if it waits: between two steps that would cost the engine more than the
    deltas do, as the two share Python's lock.
    """

    def __init__(self, num_requests: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._came: deque[Delta] = deque()
        self._some, self._all = asyncio.Event(), asyncio.Event()
        self._awaited = False
        self._num_open = num_requests

    def put(self, delta: Delta) -> None:
        """Called by the engine's thread."""
        self._came.append(delta)
        self._num_open -= delta.finish_reason is not None
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody listens
            if self._awaited:
                self._loop.call_soon_threadsafe(self._some.set)
            if not self._num_open:
                self._loop.call_soon_threadsafe(self._all.set)

    async def take(self) -> list[Delta]:
        """All that have come; waits for one."""
        self._awaited = True  # before the look: what comes after it wakes
        if self._came:
            # A reader that is slower than the engine never waits; but the loop must have its turn,
            # for others, and to cancel the reader.
            await asyncio.sleep(0)
        while not self._came:
            self._some.clear()
            await self._some.wait()
        self._awaited = False
        return [self._came.popleft() for _ in range(len(self._came))]

    async def wait_for_all(self, seconds: float) -> None:
        """Return when all requests have ended, or after so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._all.wait()
