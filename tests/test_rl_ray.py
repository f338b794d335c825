"""Reinforcement learning under Ray Train: faults injected for real, compared bit by bit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_runs import hashes, weights
from rl_runs import LocalRollouts, make_guesser, rl_plan

from nanoray.checkpoint import list_steps
from nanoray.lease import Lease
from nanoray.metrics import read_records
from nanoray.rl import ray_glue as rl_glue
from nanoray.rl.plan import RlPlan
from nanoray.rl.worker import RlWorker
from nanoray.train import ray_glue
from nanoray.train.record import record_config
from nanoray.train.worker import Hooks
from nanoray.train.world import World

pytestmark = pytest.mark.slow
STEPS = 40

Watcher = Callable[[dict[str, Any]], None]
MakePlan = Callable[..., RlPlan]


@pytest.fixture(scope="module")
def guesser(
    corpus: str, tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("guesser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(folder / "home"))
        return make_guesser(corpus, tokenizer_dir, folder)


@pytest.fixture(scope="module")
def calm(guesser: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RlPlan:
    """A run in this process, with one sampler and without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(tmp_path_factory.mktemp("calm")))
        plan = rl_plan(**guesser, run="calm", num_iterations=STEPS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rollouts = LocalRollouts(plan)
    worker = RlWorker(plan, World(0, 1, torch.device("cpu")), Hooks(), 0, rollouts)
    try:
        assert worker.run()["status"] == "finished"
    finally:
        worker.close()
        torch.set_num_threads(threads)
    trained = [group.number for step in rollouts.steps for group in step]
    assert trained == list(range(4 * STEPS)), "each problem once, in order"
    assert any(0 < record["reward"] < 1 for record in steps_of(plan)), "there is a gradient"
    return plan


@pytest.fixture
def make_plan(
    ray_session: None, home: Path, guesser: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> MakePlan:
    """Plans of runs that compute with one thread a process: sums are the same everywhere."""

    def one_thread(config: dict[str, Any]) -> None:
        os.cpu_count = lambda: 1  # type: ignore[assignment]
        ray_glue._train_loop(config)

    monkeypatch.setattr(ray_glue, "_train_loop", one_thread)

    def make(run: str, **changes: Any) -> RlPlan:
        values = {"num_iterations": STEPS, "rollout_actors": "2"} | changes
        return rl_plan(**guesser, run=run, **values)

    return make


def fit(plan: RlPlan, watch: Watcher = lambda _record: None) -> dict[str, Any]:
    lease = Lease(plan.run_dir)
    try:
        record_config(plan)
        return rl_glue.fit(rl_glue.with_gpus(plan, {}), lease, watch)
    finally:
        lease.release()


def steps_of(plan: RlPlan) -> list[dict[str, Any]]:
    """The records of the run's steps."""
    records = read_records(os.path.join(plan.run_dir, "metrics.jsonl"))
    return [record for record in records if "loss" in record]


def status_of(plan: RlPlan) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(Path(plan.run_dir, "rl_status.json").read_text())
    return status


def wait_for(what: Callable[[], Any], deadline_s: float = 60) -> Any:
    """The first true answer."""
    end = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < end, f"not within {deadline_s:.0f} s"
        time.sleep(0.05)
    return found


def assert_like(plan: RlPlan, calm: RlPlan) -> None:
    """Each step once, of the same answers, and the same weights in the end."""
    assert [record["step"] for record in steps_of(plan)] == list(range(1, STEPS + 1))
    assert hashes(plan) == hashes(calm)
    assert weights(plan, STEPS) == weights(calm, STEPS)
    assert status_of(plan)["counts"]["trained"] == 4 * STEPS


def test_two_actors_train_what_one_process_does(make_plan: MakePlan, calm: RlPlan) -> None:
    plan = make_plan("two")
    summary = fit(plan)
    assert (summary["status"], summary["step"]) == ("finished", STEPS)
    assert {"before/pass@1", "after/pass@1", "after/pass@2"} <= summary["metrics"].keys()
    assert_like(plan, calm)
    assert status_of(plan)["actors"] == [], "none outlives the run"


def test_an_actor_killed_in_mid_bundle_is_named_and_changes_nothing(
    make_plan: MakePlan, calm: RlPlan
) -> None:
    plan = make_plan("bereft")
    killed: list[int] = []
    told: list[str] = []

    def find(state: str, since: float, pid: int = 0) -> int:
        status = status_of(plan)
        actors = [a for a in status["actors"] if a["state"] == state and pid in (0, a["pid"])]
        return actors[0]["pid"] if actors and status["time"] > since else 0

    def watch(record: dict[str, Any]) -> None:
        if "event" in record:
            told.append(record["event"])
        if "loss" in record and not killed:
            pid = wait_for(lambda: find("idle", 0) or find("busy", 0))
            os.kill(pid, signal.SIGSTOP)  # it will not finish the bundle that it is given
            stopped = time.time()
            wait_for(lambda: find("busy", stopped, pid))
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    assert fit(plan, watch)["status"] == "finished"
    assert_like(plan, calm)
    status = status_of(plan)
    assert status["counts"]["actors_lost"] == 1
    assert status["counts"]["redispatched"] == 2, "one bundle"
    (event,) = [text for text in told if "is lost" in text]
    assert f"(pid {killed[0]}) is lost" in event
    assert "sampled again: prompts" in event
    assert event in [event["text"] for event in status["events"]]


def test_a_killed_learner_goes_on_from_its_checkpoint(make_plan: MakePlan, calm: RlPlan) -> None:
    plan = make_plan("orphaned", save_every=3)
    starts: list[list[str]] = []

    def watch(record: dict[str, Any]) -> None:
        if "workers" in record:
            starts.append(record["workers"])
        if "loss" in record and len(starts) == 1 and list_steps(plan.checkpoints_dir):
            starts.append(["killing"])
            os.kill(int(starts[0][0].rsplit(":", 1)[1]), signal.SIGKILL)

    assert fit(plan, watch)["status"] == "finished"
    assert len(starts) == 3, "killed once, started twice"
    texts = [event["text"] for event in status_of(plan)["events"]]
    (step,) = [int(text.split()[4].rstrip(";")) for text in texts if text.startswith("going on")]
    assert 3 <= step < STEPS, "not from the beginning"
    assert_like(plan, calm)


def test_sampling_that_runs_ahead_stays_within_its_bound(make_plan: MakePlan) -> None:
    plan = make_plan("ahead", max_staleness=2, num_workers="2")
    assert fit(plan)["status"] == "finished"
    steps = steps_of(plan)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    staleness = [record["staleness_max"] for record in steps]
    assert 0 < max(staleness) <= 2
    for record in steps:
        for who in ("learner", "rollout"):
            assert record[f"{who}_idle"] + record[f"{who}_busy"] == pytest.approx(1, abs=0.02)
    assert status_of(plan)["counts"]["trained"] == 4 * STEPS
