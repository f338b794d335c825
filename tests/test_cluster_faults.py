"""Nodes that die or are drained while a run is under way: nothing is lost, nothing comes twice."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from pretrain_runs import hashes, run_plan, tiny_plan, weights
from ray.cluster_utils import Cluster
from rl_runs import make_guesser, rl_plan, run_alone

from nanoray import fleet
from nanoray.lease import Lease
from nanoray.rl import ray_glue as rl_glue
from nanoray.rl.needs import with_gpus as rl_with_gpus
from nanoray.train import ray_glue
from nanoray.train.needs import with_gpus
from nanoray.train.plan import PretrainPlan
from nanoray.train.record import record_config

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
STEPS, SAVE_EVERY, KILL_AT = 120, 10, 25
RL_STEPS = 12

Watcher = Callable[[dict[str, Any]], None]


class Nodes:
    """A cluster in this process. Nodes are added and removed in the main thread only, as it is
    there that Ray sets its signal handlers: a run's watcher is called there, too."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._of_role: dict[str, list[Any]] = {}
        self.add("head", 0)
        self.address: str = self._cluster.address
        os.environ["RAY_ADDRESS"] = self.address

    def add(self, role: str, cpus: int) -> None:
        made = self._cluster.add_node(
            num_cpus=cpus, labels={"nanoray-role": role}, object_store_memory=100 * 2**20
        )
        self._of_role.setdefault(role, []).append(made)

    def kill(self, role: str) -> None:
        """SIGKILL all processes of the role's last node."""
        self._cluster.remove_node(self._of_role[role].pop(), allow_graceful=False)

    def last(self, role: str) -> str:
        node_id: str = self._of_role[role][-1].node_id
        return node_id

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()
        del os.environ["RAY_ADDRESS"]


@pytest.fixture
def nodes(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    ray.shutdown()  # the session of other test files
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    made = Nodes()
    made.add("data", 2)
    yield made
    made.close()


class Disturbed:
    """A watcher that does something once, at a step, and keeps what it is told."""

    def __init__(self, at_step: int, disturb: Callable[[], None]) -> None:
        self._at_step, self._disturb = at_step, disturb
        self.done = False
        self.steps: list[int] = []
        self.group_sizes: list[int] = []
        self.events: list[str] = []

    def __call__(self, record: dict[str, Any]) -> None:
        if "event" in record:
            self.events.append(record["event"])
        if "workers" in record:
            self.group_sizes.append(len(record["workers"]))
        if "loss" in record:
            self.steps.append(record["step"])
            if record["step"] >= self._at_step and not self.done:
                self.done = True
                self._disturb()


def fit(plan: PretrainPlan, watch: Watcher) -> dict[str, Any]:
    fleet.connect()
    lease = Lease(plan.run_dir)
    try:
        record_config(plan)
        return ray_glue.fit(with_gpus(plan, {}), lease, watch)
    finally:
        lease.release()


def assert_little_is_lost(watch: Disturbed) -> None:
    again = [(a, b) for a, b in itertools.pairwise(watch.steps) if b <= a]
    assert len(again) <= 1, "one loss, one start again"
    for seen, first in again:
        assert seen >= KILL_AT
        assert first > seen - 2 * SAVE_EVERY, "the save interval, and the save under way"


@pytest.mark.parametrize("workers", ["1:2", "2"])
def test_a_trainer_node_dies(nodes: Nodes, corpus: str, tokenizer_dir: str, workers: str) -> None:
    """Elastic training goes on with what is left; a fixed number waits for the node's return."""
    calm = tiny_plan(corpus, tokenizer_dir, "calm", num_iterations=STEPS)
    run_plan(calm)
    for _ in range(2):
        nodes.add("trainer", 1)
    plan = tiny_plan(
        corpus, tokenizer_dir, "bereft", num_iterations=STEPS, num_workers=workers,
        save_every=SAVE_EVERY,
    )  # fmt: skip

    def lose_a_node() -> None:
        nodes.kill("trainer")
        if workers == "2":
            nodes.add("trainer", 1)

    watch = Disturbed(KILL_AT, lose_a_node)
    assert fit(plan, watch)["status"] == "finished"
    assert watch.group_sizes == ([2, 1] if workers == "1:2" else [2, 2])
    assert_little_is_lost(watch)
    assert hashes(plan) == hashes(calm)


def test_a_data_node_dies(nodes: Nodes, corpus: str, tokenizer_dir: str) -> None:
    calm = tiny_plan(corpus, tokenizer_dir, "calm", num_iterations=STEPS)
    run_plan(calm)
    nodes.add("trainer", 1)
    nodes.add("data", 2)
    plan = tiny_plan(corpus, tokenizer_dir, "bereft", num_iterations=STEPS, save_every=SAVE_EVERY)
    watch = Disturbed(KILL_AT, lambda: nodes.kill("data"))
    assert fit(plan, watch)["status"] == "finished"
    assert_little_is_lost(watch)
    assert hashes(plan) == hashes(calm)


@pytest.mark.parametrize("notice", [False, True], ids=["killed", "drained"])
def test_a_rollout_node_goes(
    nodes: Nodes,
    corpus: str,
    tokenizer_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    notice: bool,
) -> None:
    """Its groups are sampled again on the node that is left: each problem once, equal weights."""
    original = ray_glue._train_loop

    def one_thread(config: dict[str, Any]) -> None:
        os.cpu_count = lambda: 1  # type: ignore[assignment]
        original(config)

    monkeypatch.setattr(ray_glue, "_train_loop", one_thread)
    guesser = make_guesser(corpus, tokenizer_dir, tmp_path)
    shape = {"num_iterations": RL_STEPS, "questions_per_call": 1}
    calm = rl_plan(**guesser, run="calm", **shape)
    assert run_alone(calm)["status"] == "finished"
    nodes.add("trainer", 2)
    for _ in range(2):
        nodes.add("rollout", 1)
    plan = rl_plan(**guesser, run="bereft", rollout_actors="2", save_every=3, **shape)

    def lose_a_node() -> None:
        hold_a_bundle(plan.run_dir, nodes.last("rollout"))
        if notice:
            drain(nodes.address, nodes.last("rollout"))
        nodes.kill("rollout")

    watch = Disturbed(3, lose_a_node)
    fleet.connect()
    lease = Lease(plan.run_dir)
    try:
        record_config(plan)
        summary = rl_glue.fit(rl_with_gpus(plan, {}), lease, watch)
    finally:
        lease.release()
    assert (summary["status"], summary["step"]) == ("finished", RL_STEPS)
    assert watch.group_sizes == [1], "the learner is not disturbed"
    assert watch.steps == list(range(1, RL_STEPS + 1))
    status = json.loads(Path(plan.run_dir, "rl_status.json").read_text())
    assert status["counts"]["trained"] == 4 * RL_STEPS
    assert status["counts"]["actors_lost"] == 1
    assert status["counts"]["redispatched"] >= 1
    assert hashes(plan) == hashes(calm)
    assert weights(plan, RL_STEPS) == weights(calm, RL_STEPS)


def hold_a_bundle(run_dir: str, node_id: str) -> None:
    """Stop the node's actor and wait until it has been given work, which it will not finish."""
    status_file = Path(run_dir, "rl_status.json")
    stopped_at = 0.0
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline, "no actor of the node was given work"
        status = json.loads(status_file.read_text()) if status_file.exists() else {"actors": []}
        own = [actor for actor in status["actors"] if actor.get("node") == node_id[:8]]
        if own and not stopped_at:
            os.kill(own[0]["pid"], signal.SIGSTOP)
            stopped_at = time.time()
        elif own and own[0]["state"] == "busy" and status["time"] > stopped_at:
            return
        time.sleep(0.2)


def drain(address: str, node_id: str) -> None:
    """What a cloud's notice of preemption makes of a node: nothing new is placed on it."""
    told = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address),
            *("--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
            *("--reason-message", "spot", "--deadline-remaining-seconds", "30"),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
