"""A Ray cluster in the test's own process whose nodes can be lost, and runs that lose them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from nanoray import fleet
from nanoray.checkpoint import list_steps
from nanoray.lease import Lease
from nanoray.train import ray_glue
from nanoray.train.record import record_config
from nanoray.train.run_plan import RunPlan


class Nodes:
    """The cluster, which this process and its children use while it stands.

    Nodes are added and removed in the main thread only, as it is there that Ray sets its signal
    handlers: a run's watcher is called there, too.
    """

    def __init__(self) -> None:
        ray.shutdown()  # the session of other test files
        self._cluster = Cluster()
        self.add("head", 0)
        self.address: str = self._cluster.address

    def add(self, role: str, cpus: int) -> Any:
        """One more node, when it has joined."""
        return self._cluster.add_node(
            num_cpus=cpus, labels={"nanoray-role": role}, object_store_memory=100 * 2**20
        )

    def kill(self, node: Any) -> None:
        """SIGKILL all processes of a node."""
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, deadline_s: int = 60) -> None:
        """What a cloud's notice of preemption makes of a node: nothing new is placed on it."""
        told = subprocess.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
                *("--address", self.address, "--node-id", node.node_id),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
                *("--deadline-remaining-seconds", str(deadline_s)),
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert told.returncode == 0, told.stdout + told.stderr

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


@contextmanager
def open_nodes() -> Iterator[Nodes]:
    """A cluster of a head alone, where learners compute with one thread: equal in every bit
    wherever they run. A place that is lost counts as lost after 10 s.
    """
    loop = ray_glue._train_loop

    def one_thread(config: dict[str, Any]) -> None:
        os.cpu_count = lambda: 1  # type: ignore[assignment]
        loop(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else whatever else runs here goes first
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
        patch.setattr(ray_glue, "_train_loop", one_thread)
        made = Nodes()
        patch.setenv("RAY_ADDRESS", made.address)
        try:
            yield made
        finally:
            made.close()


class Disturbed:
    """A watcher of a run that does something once, at a step, and keeps what it is told."""

    def __init__(self, plan: RunPlan, at_step: int, disturb: Callable[[], None]) -> None:
        self._plan, self._at_step, self._disturb = plan, at_step, disturb
        self.disturbed = False
        self.saved_before = 0
        self.steps: list[int] = []
        self.group_sizes: list[int] = []
        self.events: list[str] = []
        self.warnings: list[str] = []

    def __call__(self, record: dict[str, Any]) -> None:
        if "event" in record:
            self.events.append(record["event"])
        if "warning" in record:
            self.warnings.append(record["warning"])
        if "workers" in record:
            self.group_sizes.append(len(record["workers"]))
        if "loss" in record:
            self.steps.append(record["step"])
            if record["step"] >= self._at_step and not self.disturbed:
                self.disturbed = True
                self.saved_before = max(list_steps(self._plan.checkpoints_dir), default=0)
                self._disturb()

    def assert_one_start_again(self) -> None:
        """From the last checkpoint, and nothing else is lost; no start where nothing is done
        again, as the last step before was the one saved.

        At most an interval between saves is done again; and one more where the last save was still
        under way.
        """
        assert self.disturbed
        again = [(a, b) for a, b in itertools.pairwise(self.steps) if b != a + 1]
        assert len(again) <= 1
        for seen, first in again:
            assert self.saved_before < first <= seen
            every = self._plan.config["save_every"]
            saved = first - 1
            assert saved % every == 0
            assert saved >= (seen // every - 1) * every


Fit = Callable[[Any, Lease, Callable[[dict[str, Any]], None]], dict[str, Any]]


def run_on(plan: RunPlan, watch: Disturbed, fit: Fit = ray_glue.fit) -> dict[str, Any]:
    """The summary of a run on the cluster that stands."""
    fleet.connect()
    lease = Lease(plan.run_dir)
    try:
        record_config(plan)
        return fit(plan.with_config(gpus_per_worker=0.0), lease, watch)
    finally:
        lease.release()
