"""The rollout pool on Ray: the same tokens from any number of actors, whatever happens to them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import tiny
from rl_pools import World, run

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.rl import flat
from nanoray.rl import pool as rl_pool
from nanoray.rl.groups import Group
from nanoray.rl.ledger import LedgerRules
from nanoray.rl.pool import (
    PoolClient,
    close_pool,
    keep_books,
    read_scale,
    start_pool,
    write_scale,
)
from nanoray.rl.reward_worker import TaskReward
from nanoray.rl.sampler import SamplerSettings
from nanoray.rl.seat import ActorLostError
from nanoray.rl.supervisor import Supervisor
from nanoray.rl.terms import PoolSettings
from nanoray.tokenizer import ByteTokenizer

SHAPE = {"sequence_len": 256, "n_layer": 2}
RULES = {"num_steps": 50, "questions_per_step": 6, "bundle_size": 2}


def opener(folder: Path) -> Callable[[], Any]:
    """A sampler of a tiny model that waits, before each bundle, as many seconds as a file says.

    Where there is a file ``broken``, which it takes away, its GPU is not to be had.
    """
    tokenizer_dir, pace, broken = folder / "tokenizer", folder / "pace", folder / "broken"
    ByteTokenizer().save(tokenizer_dir)
    pace.write_text("0")
    settings = SamplerSettings(
        model=tiny(**SHAPE).config.to_dict(),
        tokenizer_dir=str(tokenizer_dir),
        problems=TaskReward("arithmetic", "train"),
        num_samples=3,
        max_new_tokens=10,
        temperature=1.0,
        top_k=20,
        seed=42,
        num_threads=1,
        dtype="float32",
    )

    def open_sampler() -> Any:  # nested, so that it travels by value
        from nanoray.errors import NoGpuError
        from nanoray.rl.rewards import Reward
        from nanoray.rl.sampler import Sampler

        if broken.exists():
            broken.unlink()
            raise NoGpuError("torch sees none")

        class Paced(Sampler):
            def sample(self, numbers: Sequence[int]) -> list[Group]:
                time.sleep(float(pace.read_text()))
                return super().sample(numbers)

        return Paced(settings, lambda answers: [Reward(float(len(text))) for _, text in answers])

    return open_sampler


def weights(version: int) -> Any:
    return flat.pack(tiny(seed=version, **SHAPE).state_dict())


def values(groups: Sequence[Group]) -> list[Any]:
    return [
        (group.number, sample.tokens.tolist(), sample.logprobs.tolist(), sample.reward)
        for group in groups
        for sample in group.samples
    ]


class Pool:
    """A pool in a run's folder, and what tests want to know of it."""

    def __init__(self, folder: Path, sizes: PoolSettings, **rules: Any) -> None:
        self.run_dir = str(folder / "run")
        self.pace = folder / "pace"
        self.handle = start_pool(
            opener(folder), LedgerRules(**RULES | rules), sizes, run_dir=self.run_dir, num_cpus=0.1
        )

    def begin(self, attempt: str, step: int = 0, state: Any = None) -> PoolClient:
        client = PoolClient(self.handle, attempt)
        client.begin(step, state)
        return client

    def status(self) -> dict[str, Any]:
        import ray

        status: dict[str, Any] = ray.get(self.handle.status.remote(), timeout=20)
        return status

    def pids(self, *states: str) -> list[int]:
        return [a["pid"] for a in self.status()["actors"] if a["state"] in states]

    def events(self) -> str:
        return "\n".join(event["text"] for event in self.status()["events"])

    def wait_for(self, what: Callable[[], bool], deadline_s: float = 90) -> None:
        end = time.monotonic() + deadline_s
        while not what():
            assert time.monotonic() < end, self.status()
            time.sleep(0.05)


@pytest.fixture
def pool(ray_session: None, tmp_path: Path) -> Iterator[Pool]:
    pool = Pool(tmp_path, PoolSettings(1, 4, bundle_deadline_s=60, start_deadline_s=120))
    yield pool
    close_pool(pool.handle)


def steps(pool: Pool, attempt: str, disturb: Callable[[int], None] = lambda step: None) -> list:
    client = pool.begin(attempt)
    found = []
    for step in range(3):
        client.publish(step, weights(step))
        disturb(step)
        groups = client.take(step).groups
        assert [group.version for group in groups] == [step] * 6
        client.trained(step)
        found.append(values(groups))
    assert [row[0] for step in found for row in step[::3]] == list(range(18))
    return found


@pytest.mark.slow
def test_the_same_tokens_from_any_number_of_actors_through_kills(pool: Pool) -> None:
    alone = steps(pool, "one")
    write_scale(pool.run_dir, 3)
    pool.wait_for(lambda: len(pool.pids("idle")) == 3)
    assert steps(pool, "three") == alone

    def kill_one(step: int) -> None:
        if step == 1:
            pool.wait_for(lambda: bool(pool.pids("busy")))
            os.kill(pool.pids("busy")[0], signal.SIGKILL)

    pool.pace.write_text("0.5")
    assert steps(pool, "one is killed", kill_one) == alone
    assert "sampled again: prompts" in pool.events()
    assert pool.status()["counts"]["redispatched"] == 2

    def kill_all(step: int) -> None:
        if step == 1:
            pool.wait_for(lambda: len(pool.pids("busy")) == 3 or len(pool.pids("idle")) < 3)
            for pid in pool.pids("busy", "idle"):
                os.kill(pid, signal.SIGKILL)

    assert steps(pool, "all are killed", kill_all) == alone
    write_scale(pool.run_dir, 1)
    pool.wait_for(lambda: len(pool.status()["actors"]) == 1)
    assert steps(pool, "one again") == alone

    text = storage.read_text(f"{pool.run_dir}/rl_status.json")
    told = json.loads(text)
    assert told["counts"].keys() >= {"redispatched", "dropped", "filtered", "trained"}
    assert {"id", "pid", "state", "age_s", "prompts", "version", "idle_s"} <= told["actors"][
        0
    ].keys()


@pytest.mark.slow
def test_a_stopped_actor_does_not_delay_the_learner_and_is_replaced(
    ray_session: None, tmp_path: Path
) -> None:
    pool = Pool(tmp_path, PoolSettings(2, 2, bundle_deadline_s=6, start_deadline_s=120))
    try:
        client = pool.begin("a")
        client.publish(0, weights(0))
        first = values(client.take(0).groups)
        client.trained(0)
        pool.wait_for(lambda: len(pool.pids("idle")) == 2)
        stopped = pool.pids("idle")[0]
        os.kill(stopped, signal.SIGSTOP)
        start = time.monotonic()
        client.publish(1, weights(1))
        assert time.monotonic() - start < 2
        second = values(client.take(1).groups)
        assert "no answer within 6 s; sampled again" in pool.events()
        assert stopped not in pool.pids("idle", "busy")
        client.trained(1)
        again = pool.begin("b")
        for step, wanted in enumerate((first, second)):
            again.publish(step, weights(step))
            assert values(again.take(step).groups) == wanted
            again.trained(step)
    finally:
        close_pool(pool.handle)


@pytest.mark.slow
def test_a_killed_learner_is_followed_by_one_from_its_checkpoint(pool: Pool) -> None:
    import ray

    handle = pool.handle

    @ray.remote(num_cpus=0, max_restarts=0)
    class Learner:
        def __init__(self) -> None:
            self.client = PoolClient(handle, "first")
            self.client.begin(0, None)

        def step(self, step: int, buffer: Any) -> tuple[Any, Any]:
            self.client.publish(step, buffer)
            groups = self.client.take(step).groups
            self.client.trained(step)
            return groups, self.client.ledger()

        def publish(self, version: int, buffer: Any) -> None:
            self.client.publish(version, buffer)

    learner = Learner.remote()
    ray.get(learner.step.remote(0, weights(0)), timeout=120)
    _, state = ray.get(learner.step.remote(1, weights(1)), timeout=120)
    third, _ = ray.get(learner.step.remote(2, weights(2)), timeout=120)
    pool.pace.write_text("1")
    ray.get(learner.publish.remote(3, weights(3)), timeout=120)
    ray.kill(learner)  # with the weights of version 3
    pool.pace.write_text("0")
    client = pool.begin("second", 2, state)
    client.publish(2, weights(2))
    assert values(client.take(2).groups) == values(third)
    client.trained(2)
    client.publish(3, weights(3))
    assert [group.number for group in client.take(3).groups] == list(range(18, 24))


@pytest.mark.slow
def test_weights_come_in_mid_bundle_and_a_users_mistake_is_one_sentence(
    ray_session: None, tmp_path: Path
) -> None:
    pool = Pool(tmp_path, PoolSettings(2, 2), max_staleness=2)
    try:
        client = pool.begin("a")
        seen: list[int] = []
        for step in range(8):
            client.publish(step, weights(step))
            groups = client.take(step).groups
            assert all(step - 2 <= group.version <= step for group in groups)
            seen += [group.number for group in groups]
            client.trained(step)
        assert len(seen) == len(set(seen)) == 48

        def go_on() -> None:  # a step or two may have had all their groups by then
            for step in range(8, 12):
                client.take(step)

        client.publish(8, flat.pack({"wte": torch.zeros(3)}))
        with pytest.raises(NanorayError, match="do not fit"):
            go_on()
    finally:
        close_pool(pool.handle)


@pytest.mark.slow
def test_a_node_without_the_gpu_it_offers_and_a_stop_in_a_wait(
    ray_session: None, tmp_path: Path
) -> None:
    """Another actor does what one cannot; a learner that waits hears that it is to stop."""
    (tmp_path / "broken").touch()
    pool = Pool(tmp_path, PoolSettings(1, 1))
    try:
        client = pool.begin("a")
        client.publish(0, weights(0))
        assert len(client.take(0, lambda: "").groups) == 6
        client.trained(0)
        assert "is lost: torch sees none" in pool.events()
        pool.pace.write_text("60")
        client.publish(1, weights(1))
        start = time.monotonic()
        assert not client.take(1, lambda: "SIGTERM").groups
        assert not client.take(1).groups, "another worker's"
        assert time.monotonic() - start < 20
    finally:
        close_pool(pool.handle)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl_pool, "_LOCAL_PERIOD_S", 0.01)


def books_kept(
    tmp_path: Path, disturb: Callable[[Supervisor], Coroutine[Any, Any, None]]
) -> dict[str, Any]:
    """The last status of a pool whose books are kept while it is disturbed."""

    async def scenario() -> None:
        world = World()
        over = asyncio.Event()
        keeper = asyncio.create_task(keep_books(world.supervisor, str(tmp_path), over))
        await world.supervisor.begin("a", 0, None)
        await disturb(world.supervisor)
        await world.supervisor.close()
        over.set()
        await keeper

    run(scenario())
    status: dict[str, Any] = json.loads(Path(tmp_path, "rl_status.json").read_text())
    return status


def test_a_full_disk_is_told_once_and_the_books_go_on(
    hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    def full(_status: Any, _run_dir: str) -> None:
        nonlocal failures
        failures += 1
        raise OSError(28, "No space left on device")

    async def fill(supervisor: Supervisor) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(rl_pool, "write_status", full)
            while failures < 5:
                await asyncio.sleep(0.01)

    status = books_kept(tmp_path, fill)
    (event,) = status["events"]
    assert event["text"] == f"{tmp_path} cannot be used: [Errno 28] No space left on device"
    assert status["error"] == "the rollout pool is closed"


def test_notices_that_nodes_are_given_are_heeded(hasty: None, tmp_path: Path) -> None:
    async def scenario() -> None:
        world, over = World(low=2), asyncio.Event()
        books = keep_books(world.supervisor, str(tmp_path), over, leaving_nodes=lambda: {"node-1"})
        keeper = asyncio.create_task(books)
        await world.supervisor.begin("a", 0, None)
        while [seat["id"] for seat in world.supervisor.status()["actors"]] != [0, 2]:
            await asyncio.sleep(0.01)
        await world.supervisor.close()
        over.set()
        await keeper

    run(scenario())


def test_a_slow_write_does_not_come_after_the_last_status(
    hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, under_way = rl_pool.write_status, threading.Event()

    def slow(status: Any, run_dir: str) -> None:
        if not status["error"]:
            under_way.set()
            time.sleep(0.2)
        write(status, run_dir)

    async def end_in_mid_write(_supervisor: Supervisor) -> None:
        assert await asyncio.to_thread(under_way.wait, 10)

    monkeypatch.setattr(rl_pool, "write_status", slow)
    status = books_kept(tmp_path, end_in_mid_write)
    time.sleep(0.3)
    assert status["error"] == "the rollout pool is closed"
    assert json.loads(Path(tmp_path, "rl_status.json").read_text()) == status


def test_an_old_scale_file_is_no_command_and_a_new_one_is(hasty: None, tmp_path: Path) -> None:
    write_scale(str(tmp_path), 4)

    async def command(supervisor: Supervisor) -> None:
        await asyncio.sleep(0.1)
        assert supervisor.status()["target"] == 1
        write_scale(str(tmp_path), 13)
        while supervisor.status()["target"] != 13:
            await asyncio.sleep(0.01)

    assert books_kept(tmp_path, command)["pinned"]


def test_an_answer_that_is_lost_with_its_node_loses_the_actor_and_not_the_run() -> None:
    """Large answers wait in the object store of the node that made them."""
    import ray

    async def lost() -> Any:
        raise ray.exceptions.ObjectLostError("00", None, "")

    async def scenario() -> None:
        with pytest.raises(ActorLostError, match="its answer is lost"):
            await rl_pool._RayRollouts(None)._answer(lost())

    asyncio.run(scenario())


def test_scale_files(tmp_path: Path) -> None:
    write_scale(str(tmp_path), 3)
    assert read_scale(str(tmp_path)) == 3
    file = tmp_path / "rl_scale.json"
    file.write_text('{"actors": null}')
    assert read_scale(str(tmp_path)) is None
    for text in ("", "{", "[]", "3", '{"actors": 0}', '{"actors": "3"}', '{"actors": true}'):
        file.write_text(text)
        with pytest.raises(NanorayError, match=r"rl_scale\.json is not obeyed"):
            read_scale(str(tmp_path))


def test_a_buffer_is_what_the_object_store_takes_whole() -> None:
    buffer = weights(0)
    assert buffer.dtype == np.uint8
    assert buffer.flags.c_contiguous
