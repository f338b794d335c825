"""How many actors the pool has, and where their time and the learner's goes. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from rl_pools import FakeActor, World, run

from nanoray.rl.idle import StateClock, better_size, share


def test_one_three_one_and_a_new_actor_begins_with_the_newest_weights() -> None:
    async def scenario() -> None:
        world = World(questions=8)

        async def takes_time(actor: FakeActor, numbers: Sequence[int]) -> None:
            await asyncio.sleep(0.005)

        world.before_sample = takes_time  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        used = []
        for step in range(9):
            if step in (3, 6):
                world.supervisor.resize(3 if step == 3 else 1)
            before = len(world.asked)
            assert await world.step(step) == list(range(8 * step, 8 * step + 8))
            asked = world.asked[before:]
            used.append(len({actor for actor, _, _ in asked}))
            assert all(key == (1, step) for _, _, key in asked)
        assert used == [1, 1, 1, 3, 3, 3, 1, 1, 1]
        assert "from 1 to 3 rollout actors" in world.events
        assert [actor.killed.is_set() for actor in world.actors] == [False, True, True]
        assert world.supervisor.status()["counts"]["actors_lost"] == 0
        await world.supervisor.close()

    run(scenario())


def test_an_actor_whose_node_is_to_go_is_replaced_before_it_goes() -> None:
    """It finishes its bundle, or, where its node goes first, that is sampled by another."""

    async def scenario() -> None:
        world = World(questions=6, low=2)
        release = asyncio.Event()

        async def held(actor: FakeActor, numbers: Sequence[int]) -> None:
            if actor.number < 2:
                await release.wait()

        world.before_sample = held  # type: ignore[method-assign]
        supervisor = world.supervisor
        await supervisor.begin("a", 0, None)
        await supervisor.publish("a", 0, None)
        taken = asyncio.ensure_future(supervisor.take("a", 0))
        await asyncio.sleep(0.01)
        for _ in range(2):  # the second notice is the first one
            supervisor.vacate({"node-0", "node-1", "node-7"})
            await asyncio.sleep(0.01)
        actors = supervisor.status()["actors"]
        assert [(a["id"], a["state"], a["leaving"]) for a in actors] == [
            *((0, "busy", True), (1, "busy", True)),
            *((2, "idle", False), (3, "idle", False)),
        ]
        assert world.events.count("its node node-0 is to go") == 1
        world.actors[0].kill()  # its node is gone
        await asyncio.sleep(0.01)
        release.set()
        assert [group.number for group in (await taken).groups] == list(range(6))
        await asyncio.sleep(0.01)
        status = supervisor.status()
        assert [actor["id"] for actor in status["actors"]] == [2, 3]
        assert (status["counts"]["actors_lost"], status["counts"]["redispatched"]) == (1, 2)
        assert [actor for actor, _, _ in world.asked if actor < 2] == [0, 1], "no more work"
        await supervisor.close()

    run(scenario())


def test_an_actor_that_has_to_go_finishes_its_bundle() -> None:
    async def scenario() -> None:
        world = World(low=2)

        async def takes_time(actor: FakeActor, numbers: Sequence[int]) -> None:
            await asyncio.sleep(0.05)

        world.before_sample = takes_time  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        await world.supervisor.publish("a", 0, None)
        await asyncio.sleep(0.02)
        world.supervisor.resize(1)
        await world.supervisor.take("a", 0)
        await asyncio.sleep(0.01)
        assert len(world.asked) == 2
        assert len(world.supervisor.status()["actors"]) == 1
        await world.supervisor.close()

    run(scenario())


def test_the_pool_grows_when_the_learner_waits_and_shrinks_when_it_does_not() -> None:
    async def scenario() -> None:
        world = World(questions=8)
        pace = {"sample": 0.02, "train": 0.0}

        async def takes_time(actor: FakeActor, numbers: Sequence[int]) -> None:
            await asyncio.sleep(pace["sample"])

        world.before_sample = takes_time  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        sizes = []
        for step in range(60):
            if step == 20:
                pace |= {"sample": 0.001, "train": 0.03}
            await world.step(step)
            await asyncio.sleep(pace["train"])
            sizes.append(world.supervisor.status()["target"])
        assert max(sizes[:20]) >= 3
        assert sizes[-1] == 1
        assert "the learner waited" in world.events
        await world.supervisor.close()

    run(scenario())


def test_a_pool_that_finds_no_place_for_more_goes_on_with_what_it_has() -> None:
    async def scenario() -> None:
        world = World(questions=8, high=8, start_deadline_s=0.2)

        async def takes_time(actor: FakeActor, numbers: Sequence[int]) -> None:
            await asyncio.sleep(0.02)

        async def only_the_first(actor: FakeActor) -> None:
            if actor is not world.actors[0]:
                await asyncio.sleep(60)

        world.before_sample = takes_time  # type: ignore[method-assign]
        world.start = only_the_first  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        sizes = []
        for step in range(20):
            await world.step(step)
            sizes.append(world.supervisor.status()["target"])
        assert max(sizes) == 2, "it waits for one place at a time"
        await asyncio.sleep(0.4)
        assert "found no place within 0.2 s; going on with 1 rollout actors" in world.events
        world.supervisor.resize(5)
        await world.step(20)
        await asyncio.sleep(0.4)
        status = world.supervisor.status()
        assert (status["target"], status["error"], status["counts"]["actors_lost"]) == (5, "", 0)
        assert "found no place within 0.2 s; another one waits in its stead" in world.events
        await world.step(21)
        await world.supervisor.close()

    run(scenario())


def test_long_steps_and_evaluations_do_not_make_the_pool_go_to_and_fro() -> None:
    """A step of several windows, half of it sampling and half of it training, is even."""

    async def scenario() -> None:
        world = World(questions=2, low=1, high=8)
        supervisor = world.supervisor

        async def takes_time(actor: FakeActor, numbers: Sequence[int]) -> None:
            await asyncio.sleep(0.25)

        world.before_sample = takes_time  # type: ignore[method-assign]
        await supervisor.begin("a", 0, None)
        sizes = []
        for step in range(8):
            await world.step(step)
            await asyncio.sleep(0.25)
            if step in (2, 5):
                await supervisor.evaluating("a", True)
                assert supervisor.status()["learner"]["state"] == "evaluating"
                await asyncio.sleep(1.0)
                await supervisor.evaluating("a", False)
            assert supervisor.status()["learner"]["state"] == "training"
            sizes.append(supervisor.status()["target"])
        assert sizes == [1] * 8
        figures = (await supervisor.take("a", 7)).figures
        assert abs(figures["learner_idle"] - 0.5) < 0.1
        await supervisor.close()

    run(scenario())


def test_idle_and_busy_times_are_all_of_the_time() -> None:
    async def scenario() -> None:
        world = World(low=2)

        async def takes_time(actor: FakeActor, numbers: Sequence[int]) -> None:
            await asyncio.sleep(0.02)

        world.before_sample = takes_time  # type: ignore[method-assign]
        await world.supervisor.begin("a", 0, None)
        loop = asyncio.get_running_loop()
        await world.step(0)
        await asyncio.sleep(0.03)
        start = loop.time()
        before = world.supervisor.status()
        for step in range(1, 6):
            await world.step(step)
            await asyncio.sleep(0.03)
        after, wall_s = world.supervisor.status(), loop.time() - start

        def spent(now: Any, then: Any, state: str) -> float:
            return float(now.get(f"{state}_s", 0.0) - then.get(f"{state}_s", 0.0))

        for now, then in zip(after["actors"], before["actors"]):
            total = spent(now, then, "idle") + spent(now, then, "busy")
            assert abs(total / wall_s - 1) < 0.02
        learner = [after["learner"], before["learner"]]
        total = spent(*learner, "waiting") + spent(*learner, "training")
        assert abs(total / wall_s - 1) < 0.02
        figures = (await world.supervisor.take("a", 5)).figures
        assert abs(figures["rollout_idle"] + figures["rollout_busy"] - 1) < 1e-6
        assert abs(figures["learner_idle"] + figures["learner_busy"] - 1) < 1e-6
        assert figures["rollout_tokens_per_s"] > 0
        await world.supervisor.close()

    run(scenario())


def test_better_size() -> None:
    assert better_size(2, 1, 4, learner_idle=0.5, actors_idle=0.1) == 3
    assert better_size(4, 1, 4, learner_idle=0.5, actors_idle=0.1) == 4
    assert better_size(2, 1, 4, learner_idle=0.1, actors_idle=0.5) == 1
    assert better_size(2, 1, 4, learner_idle=0.3, actors_idle=0.4) == 2
    assert better_size(2, 1, 4, learner_idle=0.0, actors_idle=0.0) == 2


def test_a_state_clock_accounts_for_all_of_the_time() -> None:
    clock = StateClock("idle", 10.0)
    clock.switch("busy", 13.0)
    clock.switch("busy", 14.0)
    clock.switch("idle", 18.0)
    assert clock.seconds(20.0) == {"idle": 5.0, "busy": 5.0}
    assert share(clock.seconds(20.0), "idle", "busy") == 0.5
    assert share({}, "idle", "busy") == 0.0
