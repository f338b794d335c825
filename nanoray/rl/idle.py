"""Where the time of the learner and of the actors goes, and how many actors follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# One side must have waited twice as long as the other: an actor more or less changes both shares,
# and with a smaller factor a pool would go to and fro between two sizes.
_UNEVEN = 2.0


class StateClock:
    """The seconds spent in each state. They sum to the time since the start, by construction."""

    def __init__(self, state: str, now_s: float) -> None:
        self.state = state
        self.since_s = now_s
        self._seconds: dict[str, float] = {}

    def switch(self, state: str, now_s: float) -> None:
        """The state changes; nothing happens if it is the same."""
        if state != self.state:
            self._seconds = self.seconds(now_s)
            self.state, self.since_s = state, now_s

    def seconds(self, now_s: float) -> dict[str, float]:
        """State -> seconds so far, the present one included."""
        spent = dict(self._seconds)
        spent[self.state] = spent.get(self.state, 0.0) + now_s - self.since_s
        return spent


class Window:
    """How much each of some growing totals has grown since a moment."""

    def __init__(self, totals: Mapping[str, float]) -> None:
        self._start = dict(totals)

    def growth(self, totals: Mapping[str, float]) -> dict[str, float]:
        return {key: total - self._start.get(key, 0.0) for key, total in totals.items()}


def summed(clocks: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """State -> seconds of all together."""
    total: dict[str, float] = {}
    for seconds in clocks:
        for state, value in seconds.items():
            total[state] = total.get(state, 0.0) + value
    return total


def share(seconds: Mapping[str, float], state: str, other: str) -> float:
    """The share of one state in it and another; 0 where there was neither."""
    total = seconds.get(state, 0.0) + seconds.get(other, 0.0)
    return seconds.get(state, 0.0) / total if total else 0.0


def better_size(size: int, low: int, high: int, learner_idle: float, actors_idle: float) -> int:
    """How many actors the pool should have: one more or less, or as many as it has.

    Args:
        low, high: its range.
        learner_idle, actors_idle: the shares of a window of time in which the learner waited for
            the actors, and they (on average) for the learner.
    """
    if learner_idle > _UNEVEN * actors_idle:
        size += 1
    elif actors_idle > _UNEVEN * learner_idle:
        size -= 1
    return max(low, min(high, size))
