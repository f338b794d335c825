"""The rollout pool's mind: who works on what, who is lost, who is one too many. asyncio, no Ray.

One event loop runs everything here, so nothing is locked. Every actor has a task of its own
(`_serve`) that lives as long as it: start, then bundle after bundle from the ledger. A lost actor
ends its task, its bundle waits again, and another actor takes its place. Waits have deadlines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

from nanoray.errors import NanorayError
from nanoray.rl.groups import Group
from nanoray.rl.idle import StateClock, better_size
from nanoray.rl.journal import Journal
from nanoray.rl.ledger import Flight, Ledger, LedgerRules, spans
from nanoray.rl.seat import (
    ActorLostError,
    LateError,
    Rollouts,
    Seat,
    Weights,
    WeightsLostError,
    clock_status,
    within,
)
from nanoray.rl.terms import PoolSettings, Taken

# A bundle that so many actors were lost over is itself the likeliest cause.
_MAX_LOSSES_OF_A_BUNDLE = 5
# Losses in a row, for each wanted actor, that cannot be bad luck any more.
_MAX_LOSSES_PER_ACTOR = 3


class SupersededError(Exception):
    """A later start of the learner has taken the rollout pool over; the run itself goes on."""


class Supervisor:
    """Owns the actors, the ledger and the groups that wait for the learner.

    A learner's life: `begin`, then for every step `publish` (the weights it starts from), `take`
    (by each of its workers), and `trained`. An *attempt* names one start of the learner: after the
    next one's `begin` it is refused. All of it within one running event loop.

    Args:
        launch: starts the actor of an id; returns at once.
    """

    def __init__(
        self, launch: Callable[[int], Rollouts], rules: LedgerRules, settings: PoolSettings
    ) -> None:
        assert 1 <= settings.low <= settings.high
        self._launch, self._rules, self._settings = launch, rules, settings
        self.journal = Journal()
        self._attempts: list[str] = []  # each begins a timeline; the last one counts
        self._ledger = Ledger(rules)
        self._state: dict[str, Any] = {}  # the ledger's, as the last trained step left it
        self._weights: Weights | None = None
        self._groups: dict[int, Group] = {}
        self._taken: dict[int, Taken] = {}  # step -> its batch; the last one only
        self._seats: dict[int, Seat] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_id = self._losses_in_a_row = 0
        self._target, self._pinned = settings.low, False
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._last_sign_s = time.monotonic()  # an actor has come, or answered
        self._stopped = ""  # the attempt that is to stop

    # What the learner calls.

    async def begin(self, attempt: str, step: int, state: Mapping[str, Any] | None) -> None:
        """Start, or start again after a loss, with `step` as the next one.

        Args:
            state: what `ledger_state` gave for that step; None: the run begins.
        """
        assert attempt not in self._attempts, f"attempt {attempt} has begun before"
        ledger = Ledger(self._rules, state)
        assert ledger.step == step, f"the ledger is at step {ledger.step}, the learner at {step}"
        if state is not None:
            again = [number for numbers in state["open"] for number in numbers]
            self.journal.tell(
                f"going on at step {step}; sampled again: {spans(again) or 'nothing'}"
            )
        self._attempts.append(attempt)
        self._ledger, self._state = ledger, ledger.to_dict()
        self._weights, self._groups, self._taken = None, {}, {}
        self.journal.begin()
        self._fill()
        self._wake()

    async def publish(self, attempt: str, version: int, content: Any) -> None:
        """New weights. Returns at once: the actors fetch them by themselves."""
        self._check(attempt)
        self._weights = Weights((len(self._attempts), version), content, time.monotonic())
        self._ledger.publish(version)
        for seat in self._seats.values():
            if seat.clock.state != "starting" and not seat.fetching:
                seat.fetching = True
                self._start_task(self._keep_fresh(seat))
        self._wake()

    async def take(self, attempt: str, step: int) -> Taken:
        """The groups of a step; waits for them. Every worker may ask, and gets the same answer.

        Raises:
            NanorayError: they cannot come.
            SupersededError: a later attempt has taken over, here as in the other methods.
        """
        start = time.monotonic()
        while not (attempt in self._attempts and step in self._taken):
            if attempt in self._attempts:
                self._check(attempt)
                if attempt == self._stopped:
                    return Taken((), {})
                if self._take(step):
                    break
            if self._error:
                raise self._error
            patience_s = self._patience_s()
            late_s = max(start, self._last_sign_s) + patience_s
            try:
                await asyncio.wait_for(self._news.wait(), max(0.0, late_s - time.monotonic()))
            except TimeoutError as error:
                outline = self.journal.outline(self._seats.values(), self._ledger)
                mend = "see that rollout actors can start"
                if patience_s != self._settings.place_deadline_s:
                    mend += ", or raise --rollout-deadline-s"
                raise NanorayError(
                    f"nothing was sampled for {patience_s:.0f} s, step {step} waits ({outline}); "
                    f"{mend}"
                ) from error
        self._check(attempt)
        return self._taken[step]

    def _patience_s(self) -> float:
        """How long it may take until the next actor comes or answers."""
        settings = self._settings
        if all(seat.clock.state == "starting" for seat in self._seats.values()):
            return settings.place_deadline_s  # spot nodes may be gone for a while
        return settings.start_deadline_s + 2 * settings.bundle_deadline_s

    async def stop(self, attempt: str) -> None:
        """The learner is to stop: if it waits for a batch, it does so no more."""
        self._check(attempt)
        self._stopped = attempt
        self._wake()

    async def evaluating(self, attempt: str, begins: bool) -> None:
        """The learner begins, or ends, an evaluation, which says nothing of the pool's size."""
        self._check(attempt)
        self.journal.evaluating(begins, self._seats.values())

    def _take(self, step: int) -> bool:
        """Make up the batch of the step, if all of it is there."""
        ledger = self._ledger
        assert step == ledger.step, f"the learner asks for step {step}, the next is {ledger.step}"
        self.journal.learner.switch("waiting", time.monotonic())
        batch = ledger.take()
        if batch is None:
            return False
        groups = [self._groups.pop(number) for number in batch]
        for number in ledger.drop_stale():
            del self._groups[number]
        self.journal.learner.switch("training", time.monotonic())
        self._taken = {step: Taken(groups, self.journal.figures(self._seats.values(), ledger))}
        self._autoscale()
        self._wake()
        return True

    async def trained(self, attempt: str, step: int) -> None:
        """The groups of the step are in the weights."""
        self._check(attempt)
        self._ledger.trained(group.number for group in self._taken[step].groups)
        self._state = self._ledger.to_dict()

    async def ledger_state(self, attempt: str) -> dict[str, Any]:
        """For a checkpoint: the ledger right after the last trained step, as JSON.

        Not as it is now: from the state between two steps, a synchronous run that goes on makes
        the same bundles.
        """
        self._check(attempt)
        return self._state

    def _check(self, attempt: str) -> None:
        if attempt != self._attempts[-1]:
            raise SupersededError("another start of the learner has taken the rollout pool over")

    # What the pool's owner calls.

    def resize(self, size: int | None) -> None:
        """Have so many actors from now on, whatever the range; None: scale by idle times again."""
        self._pinned = size is not None
        low, high = self._settings.low, self._settings.high
        self._scale(max(low, min(high, self._target)) if size is None else size)

    def _autoscale(self) -> None:
        """After a batch was taken: look at the idle times of the last steps, if they are enough."""
        shares = self.journal.idle_shares(self._seats.values(), self._settings.window_s)
        if shares is None or self._pinned:
            return
        size = better_size(self._target, self._settings.low, self._settings.high, *shares)
        if size > self._target and any(s.clock.state == "starting" for s in self._seats.values()):
            return  # where one waits for its place, there is none for another
        waited, idle = shares
        self._scale(size, f": the learner waited {waited:.0%} of the time, the actors {idle:.0%}")

    def vacate(self, nodes: Collection[str]) -> None:
        """Have others for the actors on these nodes (`Seat.who`), which may finish their bundle."""
        for seat in list(self._seats.values()):
            if seat.who.get("node") in nodes and not seat.leaving:
                seat.leaving = True
                self.journal.tell(f"{seat} is replaced: its node {seat.who['node']} is to go")
                self._fill()
                self._wake()

    def status(self) -> dict[str, Any]:
        """What everybody does now, as JSON."""
        now, ledger = time.monotonic(), self._ledger
        return {
            "time": time.time(),
            "version": ledger.version,
            "step": ledger.step,
            "learner": clock_status(self.journal.learner, now),
            "queue": {
                "waiting": ledger.num_waiting,
                "in_flight": ledger.num_in_flight,
                "done": ledger.num_done,
            },
            "counts": ledger.counts | {"actors_lost": self.journal.actors_lost},
            "target": self._target,
            "range": [self._settings.low, self._settings.high],
            "pinned": self._pinned,
            "actors": [seat.status(now) for seat in self._seats.values()],
            "weights_fetch_s": self.journal.fetch_s,
            "events": list(self.journal.events),
            "error": str(self._error or ""),
        }

    async def close(self) -> None:
        """Kill the actors; a learner that waits gets an error."""
        self._error = self._error or NanorayError("the rollout pool is closed")
        for seat in self._seats.values():
            seat.leaving = True
            seat.actor.kill()
        self._wake()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What an actor goes through.

    async def _serve(self, seat: Seat) -> None:
        try:
            deadline_s = self._settings.start_deadline_s
            seat.who = await within(seat.actor.ready(), deadline_s, "start")
            self._last_sign_s = time.monotonic()
            seat.clock.switch("idle", self._last_sign_s)
            while not (seat.leaving or self._error):
                if not await self._work(seat):
                    await self._news.wait()
        except LateError as error:
            if seat.clock.state == "starting":
                self._give_up_place(seat)
            else:
                self._lose(seat, str(error))
        except ActorLostError as error:
            self._lose(seat, str(error))
        except Exception as error:  # a user's mistake, or a bug: the learner shall have it
            self._error = self._error or error
        finally:
            seat.actor.kill()
            self.journal.retire(seat)
            del self._seats[seat.id]
            self._fill()
            self._wake()

    async def _work(self, seat: Seat) -> bool:
        """Sample a bundle, if there is one; False if not."""
        ledger, weights = self._ledger, self._weights
        flight = ledger.hand_out(seat.id) if weights else None
        if flight is None or weights is None:
            return False
        seat.work = (ledger, flight)
        seat.clock.switch("busy", time.monotonic())
        try:
            sampling = seat.actor.sample(flight.bundle.numbers, weights)
            groups = await within(sampling, self._settings.bundle_deadline_s, "answer")
        except WeightsLostError:
            ledger.lost(flight.id)
            if weights is self._weights:  # nothing can be sampled until there are others
                self._weights = None
                self.journal.tell(
                    f"the weights of version {weights.key[1]} are lost with their learner"
                )
        else:
            self.journal.sampled(seat, groups)
            seat.loaded = max(seat.loaded, weights.key)
            self._land(ledger, flight, groups)
        seat.work = None
        seat.clock.switch("idle", time.monotonic())
        self._wake()
        return True

    def _land(self, ledger: Ledger, flight: Flight, groups: list[Group]) -> None:
        """A bundle has come back."""
        self._losses_in_a_row, self._last_sign_s = 0, time.monotonic()
        if ledger is not self._ledger:  # of a timeline that is over
            return
        kept = ledger.done(
            flight.id,
            {group.number: group.version for group in groups},
            {group.number for group in groups if group.degenerate},
        )
        self._groups |= {group.number: group for group in groups if group.number in kept}

    def _give_up_place(self, seat: Seat) -> None:
        """An actor has found no place in time: that is no loss. One that nobody asked for, beyond
        the least number, is done without.
        """
        if seat.leaving:
            return
        then = "another one waits in its stead"
        if self._target > self._settings.low and not self._pinned:
            self._target -= 1
            then = f"going on with {self._target} rollout actors"
        deadline_s = self._settings.start_deadline_s
        self.journal.tell(f"{seat} has found no place within {deadline_s:g} s; {then}")

    def _lose(self, seat: Seat, reason: str) -> None:
        """An actor is lost; what it was sampling waits again."""
        if seat.leaving and not seat.work:
            return
        self.journal.actors_lost += 1
        self._losses_in_a_row += 1
        again = None
        if seat.work and seat.work[0] is self._ledger:
            again = self._ledger.lost(seat.work[1].id)
        self.journal.tell(
            f"{seat} is lost: {reason}" + (f"; sampled again: {again}" if again else "")
        )
        if again and again.losses >= _MAX_LOSSES_OF_A_BUNDLE:
            self._error = self._error or NanorayError(
                f"{again} were lost {again.losses} times, with the last actor because: {reason}"
            )
        elif self._losses_in_a_row > _MAX_LOSSES_PER_ACTOR * self._target:
            self._error = self._error or NanorayError(
                f"{self._losses_in_a_row} rollout actors were lost in a row, and nothing sampled, "
                f"the last one because: {reason}"
            )

    async def _keep_fresh(self, seat: Seat) -> None:
        """Have an actor fetch the newest weights; nobody waits for this.

        One version at a time: what waits at an actor that hangs would stay in the object store.
        """
        try:
            while (weights := self._weights) and seat.loaded < weights.key:
                await within(seat.actor.load(weights), self._settings.bundle_deadline_s, "answer")
                seat.loaded = max(seat.loaded, weights.key)
                self.journal.fetch_s = time.monotonic() - weights.since_s
        except Exception:  # its next bundle will bring it to light
            return
        finally:
            seat.fetching = False

    # Housekeeping.

    def _fill(self) -> None:
        """Launch actors until there are as many as wanted; before `begin` there are none."""
        if self._error or not self._attempts:
            return
        staying = sum(not seat.leaving for seat in self._seats.values())
        for _ in range(self._target - staying):
            clock = StateClock("starting", time.monotonic())
            seat = Seat(self._next_id, self._launch(self._next_id), clock)
            self._next_id += 1
            self._seats[seat.id] = seat
            self._start_task(self._serve(seat))

    def _scale(self, size: int, why: str = "") -> None:
        if size == self._target:
            return
        self.journal.tell(f"from {self._target} to {size} rollout actors{why}")
        self._target = size
        staying = [seat for seat in self._seats.values() if not seat.leaving]
        # Those without work first, and of these the youngest. The others finish their bundle.
        staying.sort(key=lambda seat: (seat.clock.state == "busy", -seat.id))
        for seat in staying[: max(0, len(staying) - size)]:
            seat.leaving = True
            if seat.clock.state == "starting":  # nothing else would end its wait
                seat.actor.kill()
        self._fill()
        self._wake()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)

    def _wake(self) -> None:
        """Something has changed: whoever waits looks again."""
        self._news.set()
        self._news = asyncio.Event()
