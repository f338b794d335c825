"""A rollout actor as its supervisor sees it: what can be asked of it, and what it is doing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from nanoray.rl.groups import Group
from nanoray.rl.idle import StateClock
from nanoray.rl.ledger import Flight, Ledger, spans

Answer = TypeVar("Answer")


class ActorLostError(Exception):
    """An actor is gone or of no use; says why."""


class LateError(ActorLostError):
    """An actor did not answer in time."""


class WeightsLostError(Exception):
    """The weights went with the process that published them."""


@dataclass(frozen=True)
class Weights:
    """What the learner has published.

    Attributes:
        key: (timeline, version). A learner that goes on from a checkpoint begins a new timeline, in
            which versions come again with other weights; the higher key is the newer.
        content: opaque here: what an actor can fetch.
        since_s: when they were published, by the monotonic clock.
    """

    key: tuple[int, int]
    content: Any
    since_s: float


class Rollouts(Protocol):
    """An actor. Its methods raise ActorLostError, or NanorayError for a user's mistake."""

    async def ready(self) -> Mapping[str, Any]:
        """Wait until it has started; tells who it is (``pid``, ``node``)."""

    async def load(self, weights: Weights) -> None:
        """Take these weights, unless it has newer ones. Raises WeightsLostError."""

    async def sample(self, numbers: Sequence[int], weights: Weights) -> list[Group]:
        """The groups of a bundle, with these weights or newer ones. Raises WeightsLostError."""

    def kill(self) -> None:
        """End it at once; it may be dead already."""


@dataclass(eq=False)
class Seat:
    """An actor's place in the pool.

    Attributes:
        clock: starting, idle or busy.
        who: what `Rollouts.ready` told.
        work: the bundle that it samples, and the ledger that this is booked in.
        leaving: it gets no more work.
        loaded: key of the newest weights that it is known to have.
        fetching: it is told to fetch newer ones.
        tokens: sampled so far.
    """

    id: int
    actor: Rollouts
    clock: StateClock
    who: Mapping[str, Any] = field(default_factory=dict)
    work: tuple[Ledger, Flight] | None = None
    leaving: bool = False
    loaded: tuple[int, int] = (-1, -1)
    fetching: bool = False
    tokens: int = 0

    def __str__(self) -> str:
        pid = f" (pid {self.who['pid']})" if "pid" in self.who else ""
        return f"rollout actor {self.id}{pid}"

    def status(self, now_s: float) -> dict[str, Any]:
        """As JSON."""
        return {
            "id": self.id,
            **self.who,
            **clock_status(self.clock, now_s),
            "prompts": spans(self.work[1].bundle.numbers) if self.work else "",
            "version": self.loaded[1],
            "tokens": self.tokens,
            "leaving": self.leaving,
        }


def clock_status(clock: StateClock, now_s: float) -> dict[str, Any]:
    """The state, for how long, and the seconds in each, as JSON."""
    seconds = {f"{state}_s": round(s, 3) for state, s in clock.seconds(now_s).items()}
    return {"state": clock.state, "age_s": round(now_s - clock.since_s, 3)} | seconds


async def within(answer: Awaitable[Answer], deadline_s: float, what: str) -> Answer:
    """What an actor answers. Raises LateError: it does not do so in time."""
    try:
        return await asyncio.wait_for(answer, deadline_s)
    except TimeoutError as error:
        raise LateError(f"no {what} within {deadline_s:g} s") from error
