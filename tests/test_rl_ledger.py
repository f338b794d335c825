"""The ledger: whatever is lost, late or resumed, every prompt is trained at most once."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.errors import NanorayError
from nanoray.rl.ledger import Flight, Ledger, LedgerRules, spans


def rules(**changes: int | None) -> LedgerRules:
    base = {"num_steps": 5, "questions_per_step": 4, "bundle_size": 2}
    return LedgerRules(**{**base, **changes})  # type: ignore[arg-type]


def all_work(ledger: Ledger, actor: int = 0) -> list[Flight]:
    flights = []
    while (flight := ledger.hand_out(actor)) is not None:
        flights.append(flight)
    return flights


def land(ledger: Ledger, flight: Flight, degenerate: tuple[int, ...] = ()) -> list[int]:
    versions = dict.fromkeys(flight.bundle.numbers, flight.version)
    return ledger.done(flight.id, versions, degenerate)


def numbers_of(flights: list[Flight]) -> list[tuple[int, ...]]:
    return [flight.bundle.numbers for flight in flights]


def test_a_synchronous_step_hands_out_exactly_its_own_numbers() -> None:
    ledger = Ledger(rules(bundle_size=3))
    assert ledger.hand_out(0) is None, "there are no weights yet"
    for step in range(5):
        ledger.publish(step)
        flights = all_work(ledger)
        start = 4 * step
        assert numbers_of(flights) == [(start, start + 1, start + 2), (start + 3,)]
        assert ledger.take() is None
        for flight in reversed(flights):
            land(ledger, flight)
        batch = ledger.take()
        assert batch == list(range(start, start + 4))
        assert all_work(ledger) == [], "the next step's work needs the next weights"
        ledger.trained(batch)
    ledger.publish(5)
    assert all_work(ledger) == [], "the run has five steps"
    assert ledger.counts["trained"] == ledger.counts["dispatched"] == 20


def test_a_lost_bundle_goes_out_again_as_it_was_and_first() -> None:
    ledger = Ledger(rules(questions_per_step=6))
    ledger.publish(0)
    first, second = ledger.hand_out(0), ledger.hand_out(1)
    assert first
    assert second
    lost = ledger.lost(first.id)
    assert lost is not None
    assert (lost.numbers, lost.losses) == ((0, 1), 1)
    assert land(ledger, first) == [], "what comes from it nevertheless is not wanted"
    assert ledger.lost(first.id) is None
    assert numbers_of(all_work(ledger, actor=1)) == [(0, 1), (4, 5)]
    assert ledger.counts["redispatched"] == 2


def test_degenerate_groups_are_refilled_in_waves() -> None:
    ledger = Ledger(rules(refill_budget=8))
    ledger.publish(0)
    first, second = all_work(ledger)
    assert land(ledger, first, degenerate=(1,)) == [0]
    assert all_work(ledger) == [], "not before the wave is done: bundles must not hang on speed"
    assert land(ledger, second, degenerate=(2, 3)) == []
    (third, fourth) = all_work(ledger)
    assert numbers_of([third, fourth]) == [(4, 5), (6,)]
    land(ledger, third, degenerate=(4,))
    land(ledger, fourth)
    (fifth,) = all_work(ledger)
    assert fifth.bundle.numbers == (7,)
    land(ledger, fifth)
    assert ledger.take() == [0, 5, 6, 7]
    ledger.publish(1)
    assert numbers_of(all_work(ledger)) == [(8, 9), (10, 11)], "every number once"
    assert ledger.counts["filtered"] == 4


def test_a_spent_budget_gives_a_short_batch_and_nothing_left_an_error() -> None:
    ledger = Ledger(rules(refill_budget=2))
    ledger.publish(0)
    while flights := all_work(ledger):
        for flight in flights:
            land(ledger, flight, degenerate=tuple(n for n in flight.bundle.numbers if n))
    assert ledger.take() == [0]
    assert ledger.counts["short_batches"] == 1
    ledger.publish(1)
    while flights := all_work(ledger):
        for flight in flights:
            land(ledger, flight, degenerate=flight.bundle.numbers)
    with pytest.raises(NanorayError, match=r"no group of step 1 teaches anything.* 2 refills"):
        ledger.take()


def test_without_a_budget_degenerate_groups_are_trained() -> None:
    ledger = Ledger(rules())
    ledger.publish(0)
    for flight in all_work(ledger):
        land(ledger, flight, degenerate=flight.bundle.numbers)
    assert ledger.take() == [0, 1, 2, 3]


def test_what_is_too_stale_is_given_up_and_sampled_anew() -> None:
    ledger = Ledger(rules(max_staleness=1))
    ledger.publish(0)
    flights = all_work(ledger)
    assert numbers_of(flights) == [(0, 1), (2, 3), (4, 5), (6, 7)], "work for two steps"
    slow = flights[0]
    for flight in flights[1:]:
        land(ledger, flight)
    assert ledger.take() == [2, 3, 4, 5]
    assert ledger.drop_stale() == []
    assert ledger.hand_out(0) is None, "the steps up to 1 have their work"
    ledger.publish(1)
    later = all_work(ledger)
    assert numbers_of(later) == [(8, 9), (10, 11)]
    for flight in later:
        land(ledger, flight)
    assert ledger.take() == [6, 7, 8, 9], "oldest weights first"
    assert ledger.drop_stale() == [], "in flight, so there is no group to throw away"
    assert ledger.counts["dropped"] == 2
    again = ledger.hand_out(0)
    assert again is not None
    assert (again.bundle.numbers, again.version) == ((0, 1), 1)
    assert land(ledger, slow) == [], "it comes too late"
    assert land(ledger, again) == [0, 1]


def test_what_is_there_for_later_steps_fills_a_batch_that_lacks_some() -> None:
    ledger = Ledger(rules(max_staleness=1, refill_budget=0))
    ledger.publish(0)
    degenerate = {0: (0, 1), 2: (2, 3), 4: (4,)}
    slow, *others = all_work(ledger)[::-1]
    for flight in others:
        land(ledger, flight, degenerate.get(flight.bundle.numbers[0], ()))
    # Of the next step's four none is left, by the count; but there is one, and two are on the way.
    assert ledger.take() == [5]
    assert ledger.counts["short_batches"] == 1
    assert ledger.drop_stale() == []
    ledger.publish(1)
    for flight in [slow, *all_work(ledger)]:
        land(ledger, flight)
    assert ledger.take() == [6, 7, 8, 9], "the oldest first"
    assert ledger.counts["short_batches"] == 1


def test_a_ledger_from_a_checkpoint_samples_anew_what_was_open() -> None:
    ledger = Ledger(rules(max_staleness=1))
    ledger.publish(0)
    a, b, c, _d = all_work(ledger)
    land(ledger, a)
    land(ledger, b)
    land(ledger, c)
    batch = ledger.take()
    assert batch == [0, 1, 2, 3]
    ledger.trained(batch)
    state = json.loads(json.dumps(ledger.to_dict()))
    restored = Ledger(rules(max_staleness=1), state)
    assert restored.step == 1
    restored.publish(1)
    assert numbers_of(all_work(restored)) == [(4, 5), (6, 7), (8, 9), (10, 11)]
    assert restored.counts["trained"] == 4


def test_what_was_taken_but_not_trained_is_open() -> None:
    ledger = Ledger(rules())
    ledger.publish(0)
    for flight in all_work(ledger):
        land(ledger, flight)
    ledger.take()
    assert ledger.to_dict()["open"] == [[0, 1], [2, 3]]


def test_training_what_was_not_taken_is_a_bug() -> None:
    ledger = Ledger(rules())
    ledger.publish(0)
    with pytest.raises(AssertionError, match="not taken"):
        ledger.trained([0])


def test_spans() -> None:
    assert spans([4, 0, 1, 2, 7, 8]) == "0-2, 4, 7-8"
    assert spans([]) == ""


@given(
    st.integers(0, 10**9),
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([None, 0, 3, 50]),
)
@settings(max_examples=150, deadline=None)
def test_any_interleaving_trains_every_prompt_at_most_once(
    seed: int, staleness: int, questions: int, bundle_size: int, budget: int | None
) -> None:
    """Actors finish in any order, are lost or late; the run is killed and resumed."""
    rng = random.Random(seed)
    often = rng.choice([0.2, 0.8])  # degenerate
    run = LedgerRules(8, questions, bundle_size, staleness, budget)
    ledger = Ledger(run)
    trained: list[int] = []
    filtered: set[int] = set()
    open_: dict[int, Flight] = {}
    checkpoint = (ledger.to_dict(), list(trained), set(filtered))
    ledger.publish(0)
    for _ in range(3000):
        if ledger.step == run.num_steps:
            break
        event = rng.random()
        if event < 0.01:  # everything is lost
            state, trained = checkpoint[0], list(checkpoint[1])
            ledger, open_ = Ledger(run, json.loads(json.dumps(state))), {}
            filtered = set(checkpoint[2])
            ledger.publish(ledger.step)
        elif event < 0.45:
            if flight := ledger.hand_out(rng.randrange(3)):
                assert flight.version >= ledger.step - staleness
                assert not set(flight.bundle.numbers) & ({*trained} | filtered)
                open_[flight.id] = flight
        elif event < 0.55 and open_:
            ledger.lost(open_.pop(rng.choice(list(open_))).id)
        elif event < 0.85 and open_:
            flight = open_.pop(rng.choice(list(open_)))
            degenerate = [n for n in flight.bundle.numbers if rng.random() < often]
            newest = max(flight.version, ledger.version)
            versions = {n: rng.randint(flight.version, newest) for n in flight.bundle.numbers}
            landed = flight.id in ledger.flights
            kept = ledger.done(flight.id, versions, degenerate)
            if budget is not None and landed:
                filtered |= {*flight.bundle.numbers} - {*kept}
        else:
            try:
                batch = ledger.take()
            except NanorayError:
                assert budget is not None
                assert not ledger.num_done + ledger.num_in_flight + ledger.num_waiting
                return
            if batch is None:
                continue
            assert len(batch) == questions or (budget is not None and not ledger.num_done)
            if staleness == 0:
                assert batch == sorted(batch)
                if budget is None:
                    step = ledger.step - 1
                    assert batch == [*range(step * questions, (step + 1) * questions)]
            ledger.drop_stale()
            ledger.trained(batch)
            trained += batch
            if rng.random() < 0.5:
                checkpoint = (ledger.to_dict(), list(trained), set(filtered))
            ledger.publish(ledger.step)
    assert len(trained) == len(set(trained)), "trained twice"
    assert not filtered & set(trained)
    assert ledger.step == run.num_steps, "the run came to a standstill"
    assert ledger.counts["trained"] == len(trained)
    state = ledger.to_dict()
    unsettled = {number for numbers in state["open"] for number in numbers}
    assert not unsettled & ({*trained} | filtered)
    assert unsettled | filtered | {*trained} == {*range(state["next_number"])}, "none is left out"


@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_synchronous_bundles_hang_on_nothing_but_the_rewards(
    seed: int, questions: int, bundle_size: int
) -> None:
    """Two runs with different actors, speeds and losses sample the same bundles."""

    def bundles(rng: random.Random) -> list[tuple[int, ...]]:
        ledger = Ledger(LedgerRules(4, questions, bundle_size, 0, refill_budget=100))
        ledger.publish(0)
        landed: list[tuple[int, ...]] = []
        out: list[Flight] = []
        while ledger.step < 4:
            if rng.random() < 0.5 and (flight := ledger.hand_out(0)):
                out.append(flight)
            elif out:
                flight = out.pop(rng.randrange(len(out)))
                if rng.random() < 0.2:
                    ledger.lost(flight.id)
                else:
                    degenerate = [n for n in flight.bundle.numbers if (n * 7 + seed) % 3 == 0]
                    land(ledger, flight, tuple(degenerate))
                    landed.append(flight.bundle.numbers)
            elif batch := ledger.take():
                ledger.trained(batch)
                ledger.publish(ledger.step)
        return sorted(landed)

    assert bundles(random.Random(seed)) == bundles(random.Random(seed + 1))
