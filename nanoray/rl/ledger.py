"""Who samples which prompt, and what became of it. Pure Python, no clock, no Ray.

Prompts are numbered 0, 1, 2, ... without end and *minted* in this order. A minted number is waiting
(to be sampled), in flight (an actor samples it), done (its group waits for the learner), taken (the
learner trains it) or settled (trained, or filtered because it teaches nothing): always exactly one
of these, and once settled it never comes back. So no prompt is trained twice, whatever is lost.

Numbers travel in bundles, which one engine call samples; a lost bundle waits again as it was,
because what an engine samples depends, in the last bits, on what else is in the call.

Staleness: step t trains only what was sampled entirely with weights of version >= t - S. With
version v published, the steps up to v + S may be worked for, and no more is minted. With S = 0
numbers are minted in waves, a new one when the one before is done: then which numbers share a
bundle depends on neither the number of actors nor their speed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoray.errors import NanorayError


@dataclass(frozen=True)
class LedgerRules:
    """What stays the same during a run.

    Attributes:
        num_steps: optimiser steps of the run; nothing is sampled for later ones.
        questions_per_step: groups that a step trains.
        bundle_size: most numbers of a bundle.
        max_staleness: S.
        refill_budget: most numbers that a step may use up beyond its own to replace degenerate
            groups; None: these are trained like any other.
    """

    num_steps: int
    questions_per_step: int
    bundle_size: int
    max_staleness: int = 0
    refill_budget: int | None = None

    def __post_init__(self) -> None:
        assert min(self.num_steps, self.questions_per_step, self.bundle_size) >= 1
        assert self.max_staleness >= 0
        assert self.refill_budget is None or self.refill_budget >= 0


@dataclass(frozen=True)
class Bundle:
    """Prompt numbers that are sampled together; ``losses``: how often that came to nothing."""

    numbers: tuple[int, ...]
    losses: int = 0

    def __str__(self) -> str:
        return "prompts " + spans(self.numbers)


@dataclass(frozen=True)
class Flight:
    """A bundle under way; version: of the weights that its first token may come from."""

    id: int
    bundle: Bundle
    actor: int
    version: int


class Ledger:
    """The books of one timeline: from a start, or from a checkpoint, to the next restart.

    Attributes:
        step: the next one to be taken.
        version: of the weights published last; -1: none yet.
        counts: numbers dispatched, redispatched (a lost bundle), dropped (too stale), filtered,
            trained, and how many batches were short; all of the whole run.
    """

    def __init__(self, rules: LedgerRules, state: Mapping[str, Any] | None = None) -> None:
        """state: what `to_dict` gave: what was open then is sampled anew."""
        self.rules = rules
        self.step = 0
        self.version = -1
        self.counts = dict.fromkeys(
            ("dispatched", "redispatched", "dropped", "filtered", "trained", "short_batches"), 0
        )
        self.flights: dict[int, Flight] = {}
        self._next_number = self._next_flight = 0
        self._waiting: list[Bundle] = []
        self._done: dict[int, int] = {}  # number -> oldest version of its tokens; as they came in
        self._taken: set[int] = set()
        self._missing = 0  # groups that the next batch lacks: degenerate, and the budget is spent
        self._refills = 0  # numbers that may still be minted for degenerate ones
        if state is not None:
            self.step = state["step"]
            self.counts |= state["counts"]
            self._next_number = state["next_number"]
            self._waiting = [Bundle(tuple(numbers)) for numbers in state["open"]]
        self._begin_step()

    @property
    def num_waiting(self) -> int:
        return sum(len(bundle.numbers) for bundle in self._waiting)

    @property
    def num_in_flight(self) -> int:
        return sum(len(flight.bundle.numbers) for flight in self.flights.values())

    @property
    def num_done(self) -> int:
        return len(self._done)

    def publish(self, version: int) -> None:
        """Weights of that version can be had from now on."""
        assert version >= self.version
        self.version = version

    def hand_out(self, actor: int) -> Flight | None:
        """The next bundle for an idle actor, lowest numbers first; None: there is no work now."""
        if self.version < 0:
            return None
        self._mint()
        if not self._waiting:
            return None
        bundle = self._waiting.pop(0)
        flight = Flight(self._next_flight, bundle, actor, self.version)
        self._next_flight += 1
        self.flights[flight.id] = flight
        self.counts["dispatched"] += len(bundle.numbers)
        return flight

    def done(
        self, flight_id: int, versions: Mapping[int, int], degenerate: Collection[int] = ()
    ) -> list[int]:
        """A bundle came back: number -> oldest version; returns the numbers to be kept.

        Those of a flight that was given up in the meantime are not: they are sampled elsewhere.
        """
        flight = self.flights.pop(flight_id, None)
        if flight is None:
            return []
        assert sorted(versions) == sorted(flight.bundle.numbers)
        assert min(versions.values()) >= flight.version, "an actor sampled with stale weights"
        kept = list(flight.bundle.numbers)
        if self.rules.refill_budget is not None:
            kept = [number for number in kept if number not in degenerate]
            filtered = len(flight.bundle.numbers) - len(kept)
            refilled = min(filtered, self._refills)
            self._refills -= refilled
            self._missing += filtered - refilled
            self.counts["filtered"] += filtered
        self._done |= {number: versions[number] for number in kept}
        return kept

    def lost(self, flight_id: int) -> Bundle | None:
        """A bundle came to nothing and waits again; None if it had been given up before."""
        flight = self.flights.pop(flight_id, None)
        if flight is None:
            return None
        bundle = Bundle(flight.bundle.numbers, flight.bundle.losses + 1)
        self._wait(bundle)
        self.counts["redispatched"] += len(bundle.numbers)
        return bundle

    def take(self) -> list[int] | None:
        """The numbers of the next step's batch, oldest weights first; None: not all are there yet.

        With S = 0 they are in order. The batch is smaller than `questions_per_step` where the
        budget for refills did not suffice, and with S > 0 what is there for later steps neither.

        Raises:
            NanorayError: every group was degenerate, the refills too, and nothing is under way.
        """
        wanted = self.rules.questions_per_step - self._missing
        if wanted <= 0 and not (self._done or self.flights or self._waiting):
            raise NanorayError(
                f"no group of step {self.step} teaches anything: in each all samples have the same "
                f"reward, {self.rules.refill_budget} refills included; take easier or harder "
                f"problems, a higher --num-samples, or a higher --refill-factor"
            )
        assert all(version >= self._oldest for version in self._done.values())
        if len(self._done) < max(1, wanted):
            return None
        in_order = sorted(self._done) if self.rules.max_staleness == 0 else list(self._done)
        batch = sorted(in_order, key=self._done.__getitem__)  # stable
        batch = batch[: self.rules.questions_per_step]
        for number in batch:
            del self._done[number]
        self._taken.update(batch)
        self.counts["short_batches"] += len(batch) < self.rules.questions_per_step
        self.step += 1
        self._begin_step()
        return batch

    def drop_stale(self) -> list[int]:
        """Give up what the next step may not train any more, in flight or done; it waits again.

        To be called after `take`. Returns the dropped numbers that were done.
        """
        late = [flight for flight in self.flights.values() if flight.version < self._oldest]
        for flight in late:
            del self.flights[flight.id]
            self._wait(Bundle(flight.bundle.numbers, flight.bundle.losses))
        stale = sorted(number for number, version in self._done.items() if version < self._oldest)
        for number in stale:
            del self._done[number]
        for numbers in self._cut(stale):
            self._wait(Bundle(numbers))
        self.counts["dropped"] += len(stale) + sum(len(flight.bundle.numbers) for flight in late)
        return stale

    def trained(self, numbers: Iterable[int]) -> None:
        """The learner has made its step with these, which it took."""
        numbers = set(numbers)
        assert numbers <= self._taken, f"{sorted(numbers - self._taken)} were not taken"
        self._taken -= numbers
        self.counts["trained"] += len(numbers)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON. What is in flight, done or taken counts as open."""
        bundles = [bundle.numbers for bundle in self._waiting]
        bundles += [flight.bundle.numbers for flight in self.flights.values()]
        bundles += [*self._cut(sorted(self._done)), *self._cut(sorted(self._taken))]
        return {
            "step": self.step,
            "next_number": self._next_number,
            "open": [list(numbers) for numbers in sorted(bundles)],
            "counts": dict(self.counts),
        }

    @property
    def _oldest(self) -> int:
        """The oldest version that the next step may train."""
        return self.step - self.rules.max_staleness

    def _begin_step(self) -> None:
        self._missing = 0
        self._refills = self.rules.refill_budget or 0

    def _mint(self) -> None:
        """Make bundles of new numbers, as many as may be worked for."""
        rules = self.rules
        steps = min(self.version + rules.max_staleness + 1, rules.num_steps) - self.step
        live = self.num_waiting + self.num_in_flight + self.num_done
        room = steps * rules.questions_per_step - self._missing - live
        under_way = bool(self._waiting or self.flights)
        # In waves, or (asynchronous) in whole bundles, lest single refills make bundles of one.
        if room <= 0 or (under_way and (rules.max_staleness == 0 or room < rules.bundle_size)):
            return
        numbers = range(self._next_number, self._next_number + room)
        self._next_number += room
        for bundle in self._cut(numbers):
            self._wait(Bundle(bundle))

    def _cut(self, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        size = self.rules.bundle_size
        return [tuple(numbers[i : i + size]) for i in range(0, len(numbers), size)]

    def _wait(self, bundle: Bundle) -> None:
        self._waiting.append(bundle)
        self._waiting.sort(key=lambda waiting: waiting.numbers)


def spans(numbers: Iterable[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
