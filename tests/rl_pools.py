"""A rollout pool's world in a few lines: actors that follow a script, and no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import numpy as np

from nanoray.rl.groups import Group, Sample
from nanoray.rl.ledger import LedgerRules
from nanoray.rl.seat import ActorLostError, Weights
from nanoray.rl.supervisor import Supervisor
from nanoray.rl.terms import PoolSettings


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
        return {"pid": 1000 + self.number, "node": f"node-{self.number}"}

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
        sizes = {
            "low": 1, "high": 4,
            "bundle_deadline_s": 5.0, "start_deadline_s": 5.0, "place_deadline_s": 5.0,
        }  # fmt: skip
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
