"""Seconds from the command to the first optimiser step, and those of a dry run.

    python bench/startup.py [--rounds 3]

Warm: compile caches are there. Cold: they were deleted. The cluster of the second dry run is
started here, on this machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time

from demo_home import HOME, ROOT, environment, flags, job, prepare


def first_step_s(cold: bool) -> float:
    shutil.rmtree(HOME / "runs" / "startup", ignore_errors=True)
    if cold:
        shutil.rmtree(HOME / "cache", ignore_errors=True)
    log = HOME / "runs" / "startup" / "metrics.jsonl"
    words = flags(run="startup", num_iterations=2, eval_every=0, save_every=0)
    start = time.monotonic()
    process = subprocess.Popen(
        job("jobs.pretrain", *words), cwd=ROOT, env=environment(), stdout=sys.stderr
    )
    while not (log.exists() and '"step": 1,' in log.read_text()):
        assert process.poll() is None, "the job ended before its first step"
        time.sleep(0.05)
    seconds = time.monotonic() - start
    process.wait()
    return seconds


def dry_run_s(address: str | None) -> float:
    words = flags(run="startup-dry", num_iterations=2)
    env = environment() | ({"RAY_ADDRESS": address} if address else {})
    start = time.monotonic()
    subprocess.run(
        job("jobs.pretrain", "--dry-run", *words), cwd=ROOT, env=env, check=True, stdout=sys.stderr
    )
    return time.monotonic() - start


def cluster_dry_run_s(rounds: int) -> float:
    """Dry runs against a Ray that this process starts."""
    import ray

    from nanoray import fleet

    fleet.connect()
    try:
        return statistics.median(
            dry_run_s(ray.get_runtime_context().gcs_address) for _ in range(rounds)
        )
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    prepare()
    cold = first_step_s(cold=True)
    result = {
        "bench": "startup",
        "first_step_cold_s": round(cold, 1),
        "first_step_warm_s": round(
            statistics.median(first_step_s(cold=False) for _ in range(rounds)), 1
        ),
        "dry_run_local_s": round(statistics.median(dry_run_s(None) for _ in range(rounds)), 1),
        "dry_run_cluster_s": round(cluster_dry_run_s(rounds), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
