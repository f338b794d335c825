"""Whether reinforcement learning learns: pass@1 on held-out arithmetic, before and after.

    python bench/rl_learning.py [--seeds 3] [--algorithms reinforce,grpo]

From the demo's chat model (`python bench/demo.py` makes it), by the demo's configuration, each
algorithm with each seed, as a job. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from demo_home import ROOT, environment, job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--algorithms", default="reinforce,grpo")
    args = parser.parse_args()
    home = Path(environment()["NANORAY_HOME"] + "-demo")
    assert (home / "runs" / "demo-sft").exists(), "run bench/demo.py first"
    runs = [
        practise(home, algorithm, seed)
        for algorithm in args.algorithms.split(",")
        for seed in range(args.seeds)
    ]
    result = {
        "bench": "rl_learning",
        "smallest_rise": min(run["after"] - run["before"] for run in runs),
        "longest_s": max(run["seconds"] for run in runs),
        "runs": runs,
    }
    print(json.dumps(result))


def practise(home: Path, algorithm: str, seed: int) -> dict[str, Any]:
    run = f"learning-{algorithm}-{seed}"
    shutil.rmtree(home / "runs" / run, ignore_errors=True)
    words = ("--config", "jobs/demo_rl.yaml", "--run", run, "--algorithm", algorithm)
    start = time.monotonic()
    subprocess.run(
        job("jobs.rl", *words, "--seed", str(seed)),
        cwd=ROOT,
        env=environment() | {"NANORAY_HOME": str(home)},
        check=True,
        stdout=sys.stderr,
    )
    metrics = json.loads((home / "runs" / run / "summary.json").read_text())["metrics"]
    return {
        "algorithm": algorithm,
        "seed": seed,
        "before": round(metrics["before/pass@1"], 4),
        "after": round(metrics["after/pass@1"], 4),
        "seconds": round(time.monotonic() - start, 1),
    }


if __name__ == "__main__":
    main()
