"""The pool's mind, with actors of a few lines each: batches, staleness, timelines. No Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest
from rl_pools import FakeActor, World, run

from nanoray.errors import NanorayError
from nanoray.rl.supervisor import SupersededError


def test_steps_one_after_the_other() -> None:
    async def scenario() -> None:
        world = World(low=3)
        await world.supervisor.begin("a", 0, None)
        for step in range(5):
            assert await world.step(step) == list(range(4 * step, 4 * step + 4))
        assert len(world.actors) == 3
        assert {key for _, _, key in world.asked} == {(1, version) for version in range(5)}
        json.dumps(world.supervisor.status())
        await world.supervisor.close()
        assert all(actor.killed.is_set() for actor in world.actors)

    run(scenario())


def test_every_worker_gets_the_same_batch_even_before_the_first_has_begun() -> None:
    async def scenario() -> None:
        world = World()
        others = [asyncio.ensure_future(world.supervisor.take("a", 0)) for _ in range(2)]
        await asyncio.sleep(0.01)
        await world.supervisor.begin("a", 0, None)
        await world.supervisor.publish("a", 0, None)
        taken = await world.supervisor.take("a", 0)
        assert [await other for other in others] == [taken, taken]
        assert await world.supervisor.take("a", 0) is taken
        await world.supervisor.close()

    run(scenario())


def test_a_slow_actor_never_makes_staleness_exceed_its_bound() -> None:
    async def scenario() -> None:
        world = World(low=3, max_staleness=2)

        async def uneven(actor: FakeActor, numbers: Sequence[int]) -> None:
            await asyncio.sleep(0.2 if actor.number == 0 else 0.002)

        world.before_sample = uneven  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        trained = []
        for step in range(40):
            trained += await world.step(step)
            await asyncio.sleep(0.002)
        assert len(trained) == len(set(trained)) == 160
        counts = world.supervisor.status()["counts"]
        assert counts["dropped"] >= 2, "and what was dropped was counted"
        await world.supervisor.close()

    run(scenario())


def test_degenerate_groups_are_filtered_and_all_of_them_is_an_error() -> None:
    async def scenario() -> None:
        world = World(refill_budget=8)
        world.rewards = lambda number: (1.0, 1.0) if number % 2 or number >= 16 else (0.0, 1.0)  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        assert await world.step(0) == [0, 2, 4, 6]
        assert await world.step(1) == [8, 10, 12, 14]
        with pytest.raises(NanorayError, match="no group of step 2 teaches anything"):
            await world.step(2)
        await world.supervisor.close()

    run(scenario())


def test_a_restarted_learner_goes_on_from_its_checkpoint_and_shuts_the_old_one_out() -> None:
    async def scenario() -> None:
        world = World(low=2)
        supervisor = world.supervisor
        await supervisor.begin("a", 0, None)
        await world.step(0)
        state = json.loads(json.dumps(await supervisor.ledger_state("a")))
        first = [await world.step(step) for step in (1, 2)]
        await supervisor.publish("a", 3, None)
        waiting = asyncio.ensure_future(supervisor.take("a", 3))
        release = asyncio.Event()

        async def held(actor: FakeActor, numbers: Sequence[int]) -> None:
            await release.wait()

        world.before_sample = held  # type: ignore[method-assign]
        await asyncio.sleep(0.01)
        await supervisor.begin("b", 1, state)
        with pytest.raises(SupersededError, match="another start of the learner"):
            await waiting
        with pytest.raises(SupersededError, match="another start of the learner"):
            await supervisor.publish("a", 4, None)
        release.set()  # what comes from the old timeline now is nobody's
        assert [await world.step(step, "b") for step in (1, 2)] == first
        assert "going on at step 1; sampled again: nothing" in world.events
        versions = [key for _, _, key in world.asked]
        assert versions == sorted(versions), "no actor goes back to older weights"
        await supervisor.close()

    run(scenario())


def test_a_learner_that_is_to_stop_waits_no_more() -> None:
    """All its workers get the same answer; what was there before they were told still counts."""

    async def scenario() -> None:
        world = World()

        async def hangs(actor: FakeActor, numbers: Sequence[int]) -> None:
            if numbers[0] >= 4:
                await asyncio.sleep(60)

        world.before_sample = hangs  # type: ignore[method-assign]
        supervisor = world.supervisor
        await supervisor.begin("a", 0, None)
        await world.step(0)
        state = await supervisor.ledger_state("a")
        waiting = [asyncio.ensure_future(supervisor.take("a", 1)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert len((await supervisor.take("a", 0)).groups) == 4
        await supervisor.stop("a")
        taken = [*await asyncio.gather(*waiting), await supervisor.take("a", 1)]
        assert [list(batch.groups) for batch in taken] == [[], [], []]
        assert await supervisor.ledger_state("a") == state
        await supervisor.begin("b", 1, state)  # a start again may take
        world.before_sample = World.before_sample.__get__(world)  # type: ignore[method-assign]
        assert await world.step(1, "b") == [4, 5, 6, 7]
        await supervisor.close()

    run(scenario())


def test_two_starts_of_the_learner_have_two_names() -> None:
    async def scenario() -> None:
        world = World()
        await world.supervisor.begin("a", 0, None)
        with pytest.raises(AssertionError, match="attempt a has begun before"):
            await world.supervisor.begin("a", 0, None)
        await world.supervisor.close()

    run(scenario())
