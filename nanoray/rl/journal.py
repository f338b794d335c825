"""The rollout pool's journal: what happened, and where the time of the learner and actors went."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from nanoray.rl.groups import Group
from nanoray.rl.idle import StateClock, Window, share, summed
from nanoray.rl.ledger import Ledger
from nanoray.rl.seat import Seat

_logger = logging.getLogger(__name__)
_MAX_EVENTS = 200
_MIN_STEPS = 2  # that the pool's size is judged by


class Journal:
    """Written by the `Supervisor`.

    Attributes:
        learner: starting, waiting (for a batch), training or evaluating.
        events: the last ones, ``{"number", "time", "text"}``.
        fetch_s: from the latest publication until the last actor that answered had the weights.
        actors_lost: in this job.
    """

    def __init__(self) -> None:
        self.learner = StateClock("starting", time.monotonic())
        self.events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        self.fetch_s = 0.0
        self.actors_lost = 0
        self._num_events = self._tokens = 0
        self._problems: Counter[str] = Counter()
        self._num_taken = 0
        self._spent: dict[str, float] = {}  # seconds of the actors that are no more
        self._evaluated: dict[str, float] = {}  # totals of the times of evaluations
        self._evaluation: Window | None = None  # the one under way
        self._interrupted = ""  # what the learner was at before
        self._reported = Window(self._totals(()))
        self._watched: Window | None = None

    def begin(self) -> None:
        """The learner starts, perhaps again."""
        self._evaluation = self._watched = None
        self.learner.switch("starting", time.monotonic())

    def evaluating(self, begins: bool, seats: Iterable[Seat]) -> None:
        """The learner begins or ends an evaluation: what passes meanwhile counts nowhere."""
        totals = self._all_totals(seats)
        if begins:
            self._evaluation, self._interrupted = Window(totals), self.learner.state
            self.learner.switch("evaluating", time.monotonic())
        elif self._evaluation:
            self._evaluated = summed([self._evaluated, self._evaluation.growth(totals)])
            self._evaluation = None
            self.learner.switch(self._interrupted, time.monotonic())

    def tell(self, text: str) -> None:
        """Something that people want to know of."""
        _logger.warning("%s", text)
        self._num_events += 1
        self.events.append({"number": self._num_events, "time": time.time(), "text": text})

    def sampled(self, seat: Seat, groups: Iterable[Group]) -> None:
        """An actor has sampled these. Rewards that went wrong are told, of a kind ever fewer."""
        for group in groups:
            for sample in group.samples:
                seat.tokens += len(sample.tokens)
                self._tokens += len(sample.tokens)
                if sample.problem:
                    self._problems[sample.problem] += 1
                    count = self._problems[sample.problem]
                    if str(count).strip("0") == "1":  # 1, 10, 100, ...
                        said = f" ({sample.detail})" if sample.detail else ""
                        self.tell(
                            f"reward {sample.problem}{said}: an answer to prompt {group.number} "
                            f"gets 0; {count:,} so far in this job"
                        )

    def retire(self, seat: Seat) -> None:
        """The actor is no more; its time still counts."""
        self._spent = summed([self._spent, seat.clock.seconds(time.monotonic())])

    def figures(self, seats: Iterable[Seat], ledger: Ledger) -> dict[str, float]:
        """For the log of a batch: shares and speed since the last one, and counts of the run."""
        seats = list(seats)
        self._num_taken += 1
        totals = self._totals(seats)
        since = self._reported.growth(totals)
        self._reported = Window(totals)
        counts = ledger.counts
        return {
            "rollout_tokens_per_s": since["tokens"] / max(since["wall"], 1e-9),
            "rollout_actors": len(seats),
            "rollout_idle": share(since, "actors idle", "actors busy"),
            "rollout_busy": share(since, "actors busy", "actors idle"),
            "learner_idle": share(since, "learner waiting", "learner training"),
            "learner_busy": share(since, "learner training", "learner waiting"),
            "wait_for_policy_s": since.get("actors idle", 0.0) / max(1, len(seats)),
            "weights_fetch_s": self.fetch_s,
            "groups_done": ledger.num_done,
            **{f"groups_{key}": counts[key] for key in ("redispatched", "dropped", "filtered")},
            "short_batches": counts["short_batches"],
            "actors_lost": self.actors_lost,
        }

    def idle_shares(self, seats: Iterable[Seat], window_s: float) -> tuple[float, float] | None:
        """Of the learner and of the actors on average; None while too little was seen.

        To be asked whenever a batch was taken: in less than some whole steps one would see but one
        side at work.
        """
        totals = self._totals(seats)
        if self._watched is None:
            self._watched = Window(totals)
        window = self._watched.growth(totals)
        if window["wall"] < window_s or window["taken"] < _MIN_STEPS:
            return None
        self._watched = Window(totals)
        return (
            share(window, "learner waiting", "learner training"),
            share(window, "actors idle", "actors busy"),
        )

    def outline(self, seats: Iterable[Seat], ledger: Ledger) -> str:
        """How things are, for a message."""
        states = Counter(seat.clock.state for seat in seats)
        actors = ", ".join(f"{count} {state}" for state, count in states.items()) or "none"
        last = f"; last event: {self.events[-1]['text']}" if self.events else ""
        return (
            f"groups: {ledger.num_done} done, {ledger.num_in_flight} in flight, "
            f"{ledger.num_waiting} waiting; actors: {actors}{last}"
        )

    def _totals(self, seats: Iterable[Seat]) -> dict[str, float]:
        """As `_all_totals`, without what has passed in evaluations."""
        totals = self._all_totals(seats)
        return {key: total - self._evaluated.get(key, 0.0) for key, total in totals.items()}

    def _all_totals(self, seats: Iterable[Seat]) -> dict[str, float]:
        """Seconds since the start by who and state, wall clock, tokens, and batches taken."""
        now = time.monotonic()
        actors = summed([self._spent, *(seat.clock.seconds(now) for seat in seats)])
        return {
            "wall": now,
            "tokens": self._tokens,
            "taken": self._num_taken,
            **{f"actors {state}": seconds for state, seconds in actors.items()},
            **{f"learner {state}": s for state, s in self.learner.seconds(now).items()},
        }
