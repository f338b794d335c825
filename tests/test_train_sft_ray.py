"""Fine-tuning under Ray Train: a killed worker, compared bit by bit with a calm run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pretrain_runs import hashes, losses, run_plan, weights
from sft_runs import make_base, sft_flags, sft_plan, write_conversations

from nanoray.errors import NanorayError
from nanoray.lease import Lease
from nanoray.train import ray_glue
from nanoray.train.needs import with_gpus
from nanoray.train.record import record_config
from nanoray.train.sft_plan import SftPlan

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
STEPS = 40


def fit(plan: SftPlan, watch: Any = lambda _record: None) -> dict[str, Any]:
    lease = Lease(plan.run_dir)
    try:
        record_config(plan)
        return ray_glue.fit(with_gpus(plan, {}), lease, watch)
    finally:
        lease.release()


@pytest.fixture
def base(home: Path, corpus: str, tokenizer_dir: str) -> str:
    return make_base(corpus, tokenizer_dir, "base")


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return write_conversations(tmp_path / "chats.jsonl", 300, (1, 12))


def test_a_killed_worker_is_restarted_bitwise(ray_session: None, base: str, chats: str) -> None:
    calm = sft_plan(base, chats, "calm", num_iterations=STEPS, num_workers="2")
    assert run_plan(calm, 2)["status"] == "finished"
    plan = sft_plan(base, chats, "killed", num_iterations=STEPS, num_workers="2", save_every=10)
    starts: list[list[str]] = []

    def watch(record: dict[str, Any]) -> None:
        if "workers" in record:
            starts.append(record["workers"])
        if record.get("step", 0) >= 15 and "loss" in record and len(starts) == 1:
            starts.append(["killing"])
            os.kill(int(starts[0][1].rsplit(":", 1)[1]), signal.SIGKILL)

    assert fit(plan, watch)["status"] == "finished"
    assert len(starts) == 3, "killed once, started twice"
    assert hashes(plan) == hashes(calm), "and Ray's stream is the one made in a process"
    assert losses(plan) == losses(calm)
    assert weights(plan, STEPS) == weights(calm, STEPS)


def test_the_job_from_start_to_end(base: str, chats: str) -> None:
    flags = sft_flags("base", chats, "job", num_iterations=6, chatcore_tasks="arithmetic",
                      chatcore_max_sample=4, chatcore_max_tokens=8)  # fmt: skip
    command = [sys.executable, "-m", "jobs.sft", *flags]
    for expected in ("run job finished", "run job is finished: nothing to do"):
        job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
        assert job.returncode == 0, job.stdout + job.stderr
        assert expected in job.stdout
        assert "300 conversations in" in job.stdout
        assert "Traceback" not in job.stderr
    summary = json.loads(Path(base).with_name("job").joinpath("summary.json").read_text())
    assert (summary["stage"], summary["status"], summary["step"]) == ("sft", "finished", 6)
    assert "chat/arithmetic" in summary["metrics"]


def test_data_that_changes_under_a_run_is_one_sentence(
    ray_session: None, base: str, chats: str
) -> None:
    plan = sft_plan(base, chats, "changed", num_iterations=STEPS)
    text = Path(chats).read_text()
    Path(chats).write_text(text.replace("cat", "mouse and cat"))
    with pytest.raises(NanorayError, match=r"^conversation \d+ of the mixture has .* has changed"):
        fit(plan)
