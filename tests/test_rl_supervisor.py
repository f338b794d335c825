"""The pool's mind, with actors of a few lines each: losses, waits, sizes, timelines. No Ray."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from nanoray.errors import NanorayError
from nanoray.rl.groups import Group, Sample
from nanoray.rl.idle import StateClock, better_size, share
from nanoray.rl.ledger import LedgerRules
from nanoray.rl.seat import ActorLostError, Weights, WeightsLostError
from nanoray.rl.supervisor import PoolSettings, Supervisor

Script = Callable[["FakeActor", Sequence[int]], Coroutine[Any, Any, None]]


def make_group(number: int, version: int, rewards: Sequence[float] = (0.0, 1.0)) -> Group:
    samples = tuple(
        Sample(
            tokens=np.array([number, version, i], dtype=np.int32),
            mask=np.ones(3, dtype=np.uint8),
            logprobs=np.zeros(3, dtype=np.float32),
            versions=np.full(3, version, dtype=np.int32),
            finish_reason="stop",
            text="",
            reward=reward,
        )
        for i, reward in enumerate(rewards)
    )
    return Group(number, np.array([1], dtype=np.int32), samples)


class FakeActor:
    """Samples at once, unless the world's script for `sample` does something first."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.killed = asyncio.Event()
        self.key = (-1, -1)

    async def ready(self) -> Mapping[str, Any]:
        await self._unless_killed(self.world.start(self))
        return {"pid": 1000 + self.number}

    async def load(self, weights: Weights) -> None:
        await self._unless_killed(self.world.before_load(self))
        self.key = max(self.key, weights.key)

    async def sample(self, numbers: Sequence[int], weights: Weights) -> list[Group]:
        self.world.asked.append((self.number, tuple(numbers), weights.key))
        self.key = max(self.key, weights.key)
        version = self.key[1]
        await self._unless_killed(self.world.before_sample(self, numbers))
        version = min(version, self.key[1])  # lower after a change of timelines
        return [make_group(n, version, self.world.rewards(n)) for n in numbers]

    def kill(self) -> None:
        self.killed.set()

    async def _unless_killed(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        killed = asyncio.ensure_future(self.killed.wait())
        await asyncio.wait({task, killed}, return_when=asyncio.FIRST_COMPLETED)
        killed.cancel()
        if self.killed.is_set():
            task.cancel()
            raise ActorLostError("SIGKILL")
        task.result()


class World:
    """What the actors do, and what was asked of them."""

    def __init__(self, questions: int = 4, **changes: Any) -> None:
        rules = {"num_steps": 100, "questions_per_step": questions, "bundle_size": 2}
        sizes = {"low": 1, "high": 4, "bundle_deadline_s": 5.0, "start_deadline_s": 5.0}
        self.rules = LedgerRules(**rules | {k: v for k, v in changes.items() if k not in sizes})  # type: ignore[arg-type]
        self.settings = PoolSettings(
            **sizes | {k: v for k, v in changes.items() if k in sizes},  # type: ignore[arg-type]
            window_s=0.1,
        )
        self.actors: list[FakeActor] = []
        self.asked: list[tuple[int, tuple[int, ...], tuple[int, int]]] = []
        self.supervisor = Supervisor(self._launch, self.rules, self.settings)

    def _launch(self, number: int) -> FakeActor:
        self.actors.append(FakeActor(self, number))
        return self.actors[-1]

    async def start(self, actor: FakeActor) -> None:
        pass

    async def before_load(self, actor: FakeActor) -> None:
        pass

    async def before_sample(self, actor: FakeActor, numbers: Sequence[int]) -> None:
        await asyncio.sleep(0)

    def rewards(self, number: int) -> Sequence[float]:
        return (0.0, 1.0)

    @property
    def events(self) -> str:
        return "\n".join(event["text"] for event in self.supervisor.status()["events"])

    async def step(self, step: int, attempt: str = "a") -> list[int]:
        await self.supervisor.publish(attempt, step, None)
        taken = await self.supervisor.take(attempt, step)
        await self.supervisor.trained(attempt, step)
        assert all(step - group.version <= self.rules.max_staleness for group in taken.groups)
        return [group.number for group in taken.groups]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 20))


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
            world.supervisor.autoscale()
            sizes.append(world.supervisor.status()["target"])
        assert max(sizes[:20]) >= 3
        assert sizes[-1] == 1
        assert "the learner waited" in world.events
        await world.supervisor.close()

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
        with pytest.raises(NanorayError, match="another start of the learner"):
            await waiting
        with pytest.raises(NanorayError, match="another start of the learner"):
            await supervisor.publish("a", 4, None)
        release.set()  # what comes from the old timeline now is nobody's
        assert [await world.step(step, "b") for step in (1, 2)] == first
        assert "going on at step 1; sampled again: nothing" in world.events
        versions = [key for _, _, key in world.asked]
        assert versions == sorted(versions), "no actor goes back to older weights"
        await supervisor.close()

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
