"""Pretraining under Ray Train: faults injected for real, results compared bit by bit."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from conftest import make_texts
from pretrain_runs import hashes, losses, run_plan, tiny_flags, tiny_plan, weights

from nanoray.checkpoint import list_steps
from nanoray.data.writer import write_shard
from nanoray.errors import NanorayError
from nanoray.lease import Lease
from nanoray.train import ray_glue
from nanoray.train.needs import with_gpus
from nanoray.train.plan import PretrainPlan
from nanoray.train.record import check_resume, record_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
STEPS = 120


def fit(plan: PretrainPlan, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    lease = Lease(plan.run_dir)
    try:
        record_config(plan)
        return ray_glue.fit(with_gpus(plan, {}), lease, watch)
    finally:
        lease.release()


@pytest.fixture(scope="module")
def undisturbed(
    ray_session: None,
    corpus: str,
    tokenizer_dir: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> PretrainPlan:
    """A run of two workers that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(tmp_path_factory.mktemp("undisturbed")))
        plan = tiny_plan(corpus, tokenizer_dir, "calm", num_iterations=STEPS, num_workers="2")
        summary = fit(plan, lambda _record: None)
    assert summary["status"] == "finished"
    assert not Path(plan.run_dir, ".ray").exists()
    return plan


def test_a_killed_worker_is_restarted_without_a_hand(
    home: Path, corpus: str, tokenizer_dir: str, undisturbed: PretrainPlan
) -> None:
    plan = tiny_plan(
        corpus, tokenizer_dir, "killed", num_iterations=STEPS, num_workers="2", save_every=10
    )
    starts: list[list[str]] = []
    steps: list[int] = []

    def watch(record: dict[str, Any]) -> None:
        if "workers" in record:
            starts.append(record["workers"])
        if "loss" in record:
            steps.append(record["step"])
            if record["step"] >= 25 and len(starts) == 1:
                starts.append(["killing"])
                os.kill(int(starts[0][1].rsplit(":", 1)[1]), signal.SIGKILL)

    summary = fit(plan, watch)
    assert summary["status"] == "finished"
    assert len(starts) == 3, "killed once, started twice"
    # No step comes twice where the last one before the kill was the one saved.
    seen, again = next(((a, b) for a, b in itertools.pairwise(steps) if b <= a), (25, 25))
    assert seen >= 25
    assert again > seen - 20, "at most the save interval (and the save under way) is lost"
    assert losses(plan) == losses(undisturbed)
    assert hashes(plan) == hashes(undisturbed)
    assert weights(plan, STEPS) == weights(undisturbed, STEPS)


def test_a_checkpoint_that_breaks_between_stream_and_workers(
    home: Path,
    corpus: str,
    tokenizer_dir: str,
    undisturbed: PretrainPlan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = tiny_plan(
        corpus, tokenizer_dir, "broken", num_iterations=STEPS, num_workers="2", save_every=10
    )
    run_plan(plan, 2, stop_step=20)
    assert list_steps(plan.checkpoints_dir) == [10, 20]

    def damage_and_train(config: dict[str, Any]) -> None:
        """As the workers begin, what the stream has already taken up breaks under them."""
        latest = Path(config["plan"].run_dir, "checkpoints", "step_000020")
        if ray.train.get_context().get_world_rank() == 0 and latest.exists():
            model = latest / "model.safetensors"
            model.write_bytes(model.read_bytes()[:-7])
        ray_glue._train_loop(config)

    monkeypatch.setattr(ray_glue, "_train_loop", damage_and_train)
    records: list[dict[str, Any]] = []
    summary = fit(plan, records.append)
    assert summary["status"] == "finished"
    assert len([r for r in records if "workers" in r]) == 2, "the first start fails, for all"
    (warning,) = [r["warning"] for r in records if "warning" in r]
    assert "step_000020/model.safetensors is damaged" in warning
    assert next(r["step"] for r in records if "loss" in r) == 11
    assert hashes(plan) == hashes(undisturbed), "the stream went back with the workers"
    early = [losses(plan)[step] for step in range(1, 31)]
    assert early == pytest.approx([losses(undisturbed)[step] for step in range(1, 31)], abs=1e-4)


def test_elastic_workers_train_on_the_same_rows(
    home: Path, corpus: str, tokenizer_dir: str, undisturbed: PretrainPlan
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "elastic", num_iterations=STEPS, num_workers="1:3")
    starts: list[list[str]] = []
    summary = fit(plan, lambda r: starts.append(r["workers"]) if "workers" in r else None)
    assert summary["status"] == "finished"
    assert 1 <= len(starts[-1]) <= 3
    assert hashes(plan) == hashes(undisturbed)
    early = [losses(plan)[step] for step in range(1, 21)]
    assert early == pytest.approx([losses(undisturbed)[step] for step in range(1, 21)], abs=1e-4)


def start_job(*flags: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.pretrain", *flags],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(ready: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        if job.poll() is not None:
            pytest.fail(f"the job ended early:\n{job.stdout.read()}")  # type: ignore[union-attr]
        assert time.monotonic() < deadline, "not within two minutes"
        time.sleep(0.02)


def test_a_killed_job_goes_on_when_it_is_run_again(
    home: Path, corpus: str, tokenizer_dir: str, undisturbed: PretrainPlan
) -> None:
    flags = tiny_flags(
        corpus, tokenizer_dir, "job", num_iterations=STEPS, num_workers="2", save_every=10
    )
    plan = tiny_plan(corpus, tokenizer_dir, "job", num_iterations=STEPS, num_workers="2")
    run_dir = Path(plan.run_dir)
    job = start_job(*flags)
    wait_until((run_dir / "lease.json").exists, job)
    # While it lives (it is starting Ray), a second start is refused.
    second = start_job(*flags)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "is being written by process" in output
    assert "Traceback" not in output
    wait_until(lambda: max(losses(plan), default=0) >= 13, job)
    job.send_signal(signal.SIGKILL)
    job.wait()
    # It is stopped in order this time ...
    job = start_job(*flags)
    assert job.stdout is not None
    assert any(line.startswith("step ") for line in job.stdout), "it came to train"
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1, output
    assert "run job stopped" in output
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert list_steps(plan.checkpoints_dir)[-1] == summary["step"] >= 10
    # ... and brought to its end.
    job = start_job(*flags)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert losses(plan) == losses(undisturbed)
    assert weights(plan, STEPS) == weights(undisturbed, STEPS)
    # A finished run says so.
    job = start_job(*flags)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0
    assert "is finished" in output


def test_bad_data_found_by_a_packing_task_is_one_sentence(
    home: Path, ray_session: None, tmp_path: Path, tokenizer_dir: str
) -> None:
    shards = [str(tmp_path / "bad" / f"shard_{i:05d}.parquet") for i in range(3)]
    for i, shard in enumerate(shards):
        write_shard(shard, make_texts(100, seed=i))
    plan = tiny_plan(str(tmp_path / "bad"), tokenizer_dir, "bad", num_workers="2")
    write_shard(shards[1], [*make_texts(17), " "])  # after planning, which would meet it
    starts = []
    began = time.monotonic()
    with pytest.raises(NanorayError, match=r"^shard .*shard_00001.parquet, row group 0, row 17"):
        fit(plan, lambda record: starts.append(record) if "workers" in record else None)
    assert time.monotonic() - began < 60
    assert len(starts) <= 1, "no restart mends bad data"


def test_another_configuration_is_refused_and_shown(
    undisturbed: PretrainPlan, corpus: str, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANORAY_HOME", str(Path(undisturbed.run_dir).parents[1]))
    same = {"num_iterations": STEPS, "num_workers": "2"}
    assert check_resume(tiny_plan(corpus, tokenizer_dir, "calm", **same))
    may_differ = {"num_workers": "1:4", "device_batch_size": 2, "save_every": 3, "log_every": 2}
    assert check_resume(tiny_plan(corpus, tokenizer_dir, "calm", **same | may_differ))
    with pytest.raises(NanorayError, match=r"--depth: was 2, is 3\n.*--seed: was 7, is 8"):
        check_resume(tiny_plan(corpus, tokenizer_dir, "calm", **same, depth=3, seed=8))
