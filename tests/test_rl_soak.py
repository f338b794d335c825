"""Long runs: no memory is lost over hundreds of steps, and the demo's model learns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
from rl_runs import make_guesser, rl_plan

from nanoray.lease import Lease
from nanoray.rl import ray_glue
from nanoray.rl.needs import with_gpus
from nanoray.train.record import record_config

pytestmark = pytest.mark.soak
WARM_UP_STEPS, MEASURED_STEPS, AROUND = 60, 200, 15
BENCH = Path(__file__).parents[1] / "bench"


def test_memory_of_the_driver_and_of_the_pools_supervisor_does_not_grow(
    ray_session: None, home: Path, corpus: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    steps = WARM_UP_STEPS + MEASURED_STEPS
    guesser = make_guesser(corpus, tokenizer_dir, tmp_path)
    plan = rl_plan(**guesser, run="long", num_iterations=steps, max_staleness=1, save_every=20)
    used: dict[str, dict[int, int]] = {"driver": {}, "supervisor": {}}
    driver = psutil.Process()

    def watch(record: dict[str, Any]) -> None:
        if "loss" in record:
            used["driver"][record["step"]] = driver.memory_info().rss
            used["supervisor"][record["step"]] = supervisor_of(driver).memory_info().rss

    lease = Lease(plan.run_dir)
    try:
        record_config(plan)
        assert ray_glue.fit(with_gpus(plan, {}), lease, watch)["status"] == "finished"
    finally:
        lease.release()
    for who, at in used.items():
        before, after = (
            median(at[step] for step in range(last - AROUND, last + 1))
            for last in (WARM_UP_STEPS, steps)
        )
        print(f"{who}: {before / 2**20:.1f} MiB, {after / 2**20:.1f} MiB 200 steps later")
        assert after < 1.05 * before, who


def supervisor_of(driver: psutil.Process) -> psutil.Process:
    (found,) = (
        process
        for process in driver.children(recursive=True)
        if process.name().startswith("ray::_PoolActor") or "_PoolActor" in cmdline(process)
    )
    return found


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_the_demos_model_learns_arithmetic() -> None:
    """At least 15 points of pass@1 within 5 minutes: both algorithms, three seeds."""

    def bench(name: str) -> Any:
        words = [sys.executable, str(BENCH / f"{name}.py")]
        run = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(run.stdout.splitlines()[-1])

    try:
        found = bench("rl_learning")
    except subprocess.CalledProcessError:  # it wants the demo's chat model
        bench("demo")
        found = bench("rl_learning")
    assert len(found["runs"]) == 6
    assert found["smallest_rise"] >= 0.15, found
    assert found["longest_s"] <= 300, found
