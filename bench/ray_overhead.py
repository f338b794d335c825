"""The training loop under Ray Train against the same loop in a bare process, one worker.

    python bench/ray_overhead.py [--rounds 3] [--steps 20]

The two take turns. Figures: median step time of each (the first steps left out), their ratio
(bare / Ray: 1 is no overhead), and the part of the step time that waits for data under Ray.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from typing import Any

from demo_home import HOME, ROOT, environment, flags, job, prepare

SKIPPED_STEPS = 4


def bare(argv: list[str]) -> None:
    """The loop of `jobs.pretrain` without Ray: what a plain script would run."""
    import torch

    from nanoray.config import PretrainConfig
    from nanoray.data.blocks import local_blocks
    from nanoray.train.plan import make_plan
    from nanoray.train.stages import run_worker
    from nanoray.train.worker import Hooks
    from nanoray.train.world import World

    plan = make_plan(PretrainConfig.parse(argv, "bench"))
    run_worker(plan, World(0, 1, torch.device("cpu")), local_blocks, Hooks())


def records(run: str) -> list[dict[str, Any]]:
    lines = (HOME / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["step"] > SKIPPED_STEPS and "loss" in r]


def run(kind: str, steps: int) -> list[dict[str, Any]]:
    name = f"overhead-{kind}"
    shutil.rmtree(HOME / "runs" / name, ignore_errors=True)
    words = flags(run=name, num_iterations=steps, eval_every=0, save_every=0)
    command = [sys.executable, __file__, "bare", *words]
    if kind == "ray":
        command = job("jobs.pretrain", *words)
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=sys.stderr)
    return records(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    prepare()
    found: dict[str, list[dict[str, Any]]] = {"bare": [], "ray": []}
    ratios = []
    for _ in range(arguments.rounds):
        medians = {}
        for kind, all_records in found.items():
            new = run(kind, arguments.steps)
            all_records += new
            medians[kind] = statistics.median(r["step_s"] for r in new)
        ratios.append(medians["bare"] / medians["ray"])
    waits = sum(r["data_wait_s"] for r in found["ray"]) / sum(r["step_s"] for r in found["ray"])
    tokens = {k: statistics.median(r["tokens_per_s"] for r in v) for k, v in found.items()}
    print(
        json.dumps(
            {
                "bench": "ray_overhead",
                "speed_ratio_ray_to_bare": round(statistics.median(ratios), 4),
                "ratios": [round(r, 4) for r in ratios],
                "tokens_per_s_bare": round(tokens["bare"]),
                "tokens_per_s_ray": round(tokens["ray"]),
                "data_wait_fraction": round(waits, 5),
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        bare(sys.argv[2:])
    else:
        main()
