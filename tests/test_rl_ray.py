"""Reinforcement learning under Ray Train: faults injected for real, compared bit by bit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from pretrain_runs import hashes, weights
from rl_runs import LocalRollouts, make_guesser, rl_plan, run_alone

from nanoray.checkpoint import list_steps
from nanoray.lease import Lease
from nanoray.metrics import read_records
from nanoray.rl import ray_glue as rl_glue
from nanoray.rl.needs import with_gpus
from nanoray.rl.plan import RlPlan, ledger_rules, sampler_settings
from nanoray.rl.pool import PoolClient, close_pool, start_pool
from nanoray.rl.terms import PoolSettings
from nanoray.train import ray_glue
from nanoray.train.record import record_config

pytestmark = pytest.mark.slow
STEPS = 20
SHAPE = {"num_iterations": STEPS, "questions_per_call": 1}  # four bundles a step

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
        plan = rl_plan(**guesser, run="calm", **SHAPE)
    rollouts = LocalRollouts(plan)
    assert run_alone(plan, rollouts=rollouts)["status"] == "finished"
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
        values = SHAPE | {"rollout_actors": "2"} | changes
        return rl_plan(**guesser, run=run, **values)

    return make


def fit(plan: RlPlan, watch: Watcher = lambda _record: None) -> dict[str, Any]:
    lease = Lease(plan.run_dir)
    try:
        record_config(plan)
        return rl_glue.fit(with_gpus(plan, {}), lease, watch)
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


@pytest.fixture
def pooled(ray_session: None, home: Path, guesser: dict[str, Any]) -> Iterator[PooledRun]:
    run = PooledRun(guesser)
    yield run
    run.close()


class PooledRun:
    """Learners in this process, one after the other, on a pool of rollout actors."""

    def __init__(self, guesser: dict[str, Any]) -> None:
        self._guesser = guesser
        self._plan = self.plan("pool")
        self._pool = start_pool(
            sampler_settings(self._plan, num_threads=1).open,
            ledger_rules(self._plan),
            PoolSettings(1, 4),
            run_dir=self._plan.run_dir,
            num_cpus=0.5,
        )

    def plan(self, run: str) -> RlPlan:
        return rl_plan(**self._guesser, run=run, **SHAPE)

    def learn(self, actors: int) -> RlPlan:
        """A whole run with so many actors, of which each is at work."""
        ray.get(self._pool.resize.remote(actors))
        plan = self.plan(f"with-{actors}")
        client = PoolClient(self._pool, f"attempt {actors}")
        begin = client.begin

        def begin_with_all(step: int, ledger: Any) -> None:
            begin(step, ledger)
            wait_for(lambda: self.states() == ["idle"] * actors)

        client.begin = begin_with_all  # type: ignore[method-assign]
        assert run_alone(plan, rollouts=client)["status"] == "finished"
        status = ray.get(self._pool.status.remote())
        assert all(actor["tokens"] > 0 for actor in status["actors"])
        return plan

    def states(self) -> list[str]:
        return [actor["state"] for actor in ray.get(self._pool.status.remote())["actors"]]

    def close(self) -> None:
        close_pool(self._pool)


def test_one_two_and_four_actors_train_what_one_process_does(
    pooled: PooledRun, calm: RlPlan
) -> None:
    for actors in (1, 2, 4):
        plan = pooled.learn(actors)
        assert hashes(plan) == hashes(calm)
        assert weights(plan, STEPS) == weights(calm, STEPS)


def test_neither_a_killed_actor_nor_a_killed_learner_changes_anything(
    make_plan: MakePlan, calm: RlPlan
) -> None:
    """The actor dies in mid-bundle and is named; the learner goes on from its checkpoint."""
    plan = make_plan("bereft", save_every=3)
    killed: list[int] = []
    starts: list[str] = []
    told: list[str] = []

    def find(state: str, since: float, pid: int = 0) -> int:
        status = status_of(plan)
        actors = [a for a in status["actors"] if a["state"] == state and pid in (0, a["pid"])]
        return actors[0]["pid"] if actors and status["time"] > since else 0

    def watch(record: dict[str, Any]) -> None:
        if "event" in record:
            told.append(record["event"])
        if "workers" in record:
            starts.append(record["workers"][0])
        if "loss" in record and not killed:
            pid = wait_for(lambda: find("idle", 0) or find("busy", 0))
            os.kill(pid, signal.SIGSTOP)  # it will not finish the bundle that it is given
            stopped = time.time()
            wait_for(lambda: find("busy", stopped, pid))
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        elif "loss" in record and len(killed) == 1 and list_steps(plan.checkpoints_dir):
            killed.append(int(starts[0].rsplit(":", 1)[1]))
            os.kill(killed[1], signal.SIGKILL)

    summary = fit(plan, watch)
    assert (summary["status"], summary["step"]) == ("finished", STEPS)
    assert {"before/pass@1", "after/pass@1", "after/pass@2"} <= summary["metrics"].keys()
    assert len(starts) == 2
    assert_like(plan, calm)
    status = status_of(plan)
    assert status["actors"] == [], "none outlives the run"
    assert status["counts"]["actors_lost"] == 1
    (event,) = [text for text in told if "is lost" in text]
    assert f"(pid {killed[0]}) is lost" in event
    assert "sampled again: prompts" in event
    texts = [event["text"] for event in status["events"]]
    assert event in texts
    (step,) = [int(text.split()[4].rstrip(";")) for text in texts if text.startswith("going on")]
    assert 3 <= step < STEPS, "not from the beginning"


# rl.md's list, by the names that the log has.
METRICS = {
    *("reward", "reward_std", "solved_none", "solved_all", "solved_some"),
    *("response_length", "response_length_max", "response_clipped"),
    *("entropy", "kl", "clip_fraction", "grad_norm", "ratio_mean", "ratio_max", "ess"),
    *("mismatch_kl", "staleness", "staleness_max", "groups_dropped", "groups_redispatched"),
    *("rollout_tokens_per_s", "learner_tokens_per_s", "wait_for_batch_s", "wait_for_policy_s"),
    *("broadcast_s", "learner_idle", "learner_busy", "rollout_idle", "rollout_busy"),
}


def test_sampling_that_runs_ahead_stays_within_its_bound(make_plan: MakePlan) -> None:
    plan = make_plan("ahead", max_staleness=2, num_workers="2")
    assert fit(plan)["status"] == "finished"
    steps = steps_of(plan)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    staleness = [record["staleness_max"] for record in steps]
    assert 0 < max(staleness) <= 2
    for record in steps:
        assert record.keys() >= METRICS
        for who in ("learner", "rollout"):
            assert record[f"{who}_idle"] + record[f"{who}_busy"] == pytest.approx(1, abs=0.02)
    assert status_of(plan)["counts"]["trained"] == 4 * STEPS
