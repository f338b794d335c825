"""The pool's mind when actors die, hang, err or hear nothing, and when weights are lost. No Ray."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from rl_pools import FakeActor, World, run

from nanoray.errors import NanorayError
from nanoray.rl.seat import WeightsLostError


def test_a_killed_actors_bundle_is_sampled_by_another_and_named() -> None:
    async def scenario() -> None:
        world = World(low=2)

        killed: list[int] = []

        async def die_once(actor: FakeActor, numbers: Sequence[int]) -> None:
            if not killed and 4 in numbers:
                killed.append(actor.number)
                actor.kill()
            await asyncio.sleep(0.001)

        world.before_sample = die_once  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        trained = [await world.step(step) for step in range(3)]
        assert trained == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        (event,) = world.events.splitlines()
        assert re.fullmatch(
            r"rollout actor (\d) \(pid 100\1\) is lost: SIGKILL; sampled again: prompts 4-5", event
        )
        assert [numbers for _, numbers, _ in world.asked].count((4, 5)) == 2
        assert world.supervisor.status()["counts"]["redispatched"] == 2
        assert len(world.supervisor.status()["actors"]) == 2
        await world.supervisor.close()

    run(scenario())


def test_all_actors_killed_the_pool_comes_back() -> None:
    async def scenario() -> None:
        world = World(low=4, questions=8)

        async def all_die(actor: FakeActor, numbers: Sequence[int]) -> None:
            if actor.number < 4:
                actor.kill()
            await asyncio.sleep(0.001)

        world.before_sample = all_die  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        assert await world.step(0) == list(range(8))
        assert world.supervisor.status()["counts"]["actors_lost"] == 4
        await world.supervisor.close()

    run(scenario())


@pytest.mark.parametrize("where", ["start", "before_sample"])
def test_actors_that_always_die_end_the_run_with_a_sentence(where: str) -> None:
    async def scenario() -> None:
        world = World(low=2)

        async def dies(actor: FakeActor, *_: Any) -> None:
            actor.kill()

        setattr(world, where, dies)
        await world.supervisor.begin("a", 0, None)
        with pytest.raises(NanorayError, match=r"(in a row|were lost \d times).*SIGKILL"):
            await world.step(0)
        assert len(world.actors) < 12
        await world.supervisor.close()

    run(scenario())


def test_a_bundle_that_kills_whoever_samples_it_is_named() -> None:
    async def scenario() -> None:
        world = World(low=2)

        async def poison(actor: FakeActor, numbers: Sequence[int]) -> None:
            if 2 in numbers:
                actor.kill()
            await asyncio.sleep(0.001)

        world.before_sample = poison  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        with pytest.raises(NanorayError, match="prompts 2-3 were lost 5 times"):
            await world.step(0)
        await world.supervisor.close()

    run(scenario())


def test_a_users_mistake_is_told_at_once() -> None:
    async def scenario() -> None:
        world = World()

        async def mistaken(actor: FakeActor) -> None:
            raise NanorayError("there is no task 'x'")

        world.start = mistaken  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        with pytest.raises(NanorayError, match="there is no task"):
            await world.step(0)
        assert len(world.actors) == 1
        await world.supervisor.close()

    run(scenario())


def test_a_hung_actor_is_replaced() -> None:
    async def scenario() -> None:
        world = World(bundle_deadline_s=0.1)

        async def hangs(actor: FakeActor, numbers: Sequence[int]) -> None:
            await asyncio.sleep(60 if actor.number == 0 else 0)

        world.before_sample = hangs  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        assert await world.step(0) == [0, 1, 2, 3]
        assert "no answer within 0.1 s; sampled again: prompts 0-1" in world.events
        assert world.actors[0].killed.is_set()
        await world.supervisor.close()

    run(scenario())


def test_a_wait_in_vain_ends_with_what_was_waited_for() -> None:
    async def scenario() -> None:
        world = World(bundle_deadline_s=0.05, start_deadline_s=0.1)
        await world.supervisor.begin("a", 0, None)
        with pytest.raises(NanorayError, match=r"nothing was sampled.*actors: 1 idle"):
            await world.supervisor.take("a", 0)  # nobody has published any weights
        await world.supervisor.close()

    run(scenario())


def test_actors_without_a_place_are_waited_for() -> None:
    """Spot nodes may be gone for a while, which is no loss of actors."""

    async def scenario() -> None:
        world = World(low=2, high=2, start_deadline_s=0.02, bundle_deadline_s=0.01)
        there = asyncio.Event()

        async def finds_a_place(actor: FakeActor) -> None:
            await there.wait()

        world.start = finds_a_place  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        step = asyncio.ensure_future(world.step(0))
        await asyncio.sleep(0.5)
        assert len(world.actors) > 12, "one start after the other was late"
        assert not step.done()
        there.set()
        assert await step == [0, 1, 2, 3]
        status = world.supervisor.status()
        assert (status["target"], status["counts"]["actors_lost"]) == (2, 0)
        await world.supervisor.close()

    run(scenario())


def test_places_that_never_come_end_the_run_with_a_sentence() -> None:
    async def scenario() -> None:
        world = World(start_deadline_s=0.02, place_deadline_s=0.2)

        async def waits(actor: FakeActor) -> None:
            await asyncio.sleep(60)

        world.start = waits  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        with pytest.raises(NanorayError, match=r"nothing was sampled.*found no place within 0.02"):
            await world.step(0)
        await world.supervisor.close()

    run(scenario())


def test_dead_receivers_do_not_delay_the_learner() -> None:
    async def scenario() -> None:
        world = World(low=3)

        async def deaf(actor: FakeActor) -> None:
            await asyncio.sleep(60)

        world.before_load = deaf  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        await asyncio.sleep(0.01)
        start = asyncio.get_running_loop().time()
        await world.supervisor.publish("a", 0, None)
        assert asyncio.get_running_loop().time() - start < 0.05
        assert len((await world.supervisor.take("a", 0)).groups) == 4
        await world.supervisor.close()

    run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_chaos_trains_every_prompt_at_most_once(seed: int) -> None:
    async def scenario() -> None:
        rng = random.Random(seed)
        staleness = seed % 3
        budget = 40 if seed >= 3 else None
        world = World(low=2, max_staleness=staleness, refill_budget=budget)
        world.rewards = lambda number: (1.0, number % 3 / 2)  # type: ignore[method-assign]

        async def trouble(actor: FakeActor, numbers: Sequence[int]) -> None:
            await asyncio.sleep(rng.choice([0, 0, 0.001, 0.004]))
            if rng.random() < 0.1:
                actor.kill()
                await asyncio.sleep(0)

        world.before_sample = trouble  # type: ignore[method-assign]
        await world.supervisor.begin("0", 0, None)
        trained: list[int] = []
        saved: tuple[int, list[int], Any] = (0, [], None)
        step = 0
        for attempt in range(3):
            for _ in range(15):
                world.supervisor.resize(rng.randint(1, 4))
                trained += await world.step(step, str(attempt))
                step += 1
                assert len(trained) == len(set(trained)) == 4 * step
                if rng.random() < 0.3:
                    state = await world.supervisor.ledger_state(str(attempt))
                    saved = (step, list(trained), json.loads(json.dumps(state)))
            step, trained, state = saved[0], list(saved[1]), saved[2]
            await world.supervisor.begin(str(attempt + 1), step, state)
        if budget is not None:
            assert all(number % 3 != 2 for number in trained)
        elif staleness == 0:
            assert trained == list(range(4 * step))
        await world.supervisor.close()

    run(scenario())


def test_weights_that_are_lost_with_their_learner_wait_for_new_ones() -> None:
    async def scenario() -> None:
        world = World()
        lost = True

        async def fetch(actor: FakeActor, numbers: Sequence[int]) -> None:
            if lost:
                raise WeightsLostError

        world.before_sample = fetch  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        await world.supervisor.publish("a", 0, None)
        await asyncio.sleep(0.02)
        assert len(world.asked) == 1
        assert "weights of version 0 are lost" in world.events
        lost = False
        await world.supervisor.begin("b", 0, None)
        assert await world.step(0, "b") == [0, 1, 2, 3]
        assert world.supervisor.status()["counts"]["actors_lost"] == 0
        await world.supervisor.close()

    run(scenario())


def test_an_actor_that_hangs_holds_one_version_of_the_weights() -> None:
    async def scenario() -> None:
        world = World(low=2, max_staleness=1)
        told: list[int] = []

        async def deaf(actor: FakeActor) -> None:
            told.append(actor.number)
            await asyncio.sleep(60 if actor.number == 0 else 0)

        async def hangs(actor: FakeActor, numbers: Sequence[int]) -> None:
            await asyncio.sleep(60 if actor.number == 0 else 0)

        world.before_load = deaf  # type: ignore[method-assign]
        world.before_sample = hangs  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        await asyncio.sleep(0.01)
        for step in range(6):
            await world.step(step)
        await asyncio.sleep(0.01)
        assert told.count(0) == 1
        assert world.actors[1].key == (1, 5)
        await world.supervisor.close()

    run(scenario())
