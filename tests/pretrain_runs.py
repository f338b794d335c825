"""A tiny pretraining run for tests, without Ray: one process, or gloo workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gloo import run_gloo

from nanoray.config import PretrainConfig
from nanoray.data.blocks import local_blocks
from nanoray.metrics import read_records
from nanoray.train.plan import PretrainPlan, make_plan
from nanoray.train.resume import choose_start
from nanoray.train.run_plan import RunPlan
from nanoray.train.stages import run_worker
from nanoray.train.worker import Hooks
from nanoray.train.world import World

TINY = {
    "depth": 2,
    "aspect_ratio": 16,
    "head_dim": 16,
    "max_seq_len": 32,
    "total_batch_size": 512,
    "device_batch_size": 8,
    "num_iterations": 20,
    "warmup_steps": 5,
    "eval_every": 0,
    "eval_tokens": 2048,
    "sample_every": 0,
    "save_every": 0,
    "dtype": "float32",
    "compile_mode": "off",
    "seed": 7,
}


def tiny_flags(corpus: str, tokenizer_dir: str, run: str, **changes: Any) -> list[str]:
    """Command-line flags of a tiny run."""
    values = TINY | {"corpus": corpus, "tokenizer": tokenizer_dir, "run": run} | changes
    return [f"--{k.replace('_', '-')}={v}" for k, v in values.items() if v is not None]


def tiny_plan(corpus: str, tokenizer_dir: str, run: str, **changes: Any) -> PretrainPlan:
    """The plan of a tiny run; ``changes`` are flags by field name. Under NANORAY_HOME."""
    flags = tiny_flags(corpus, tokenizer_dir, run, **changes)
    return make_plan(PretrainConfig.parse(flags, "test"))


def stop_after(step: int) -> Callable[[], str]:
    """A stop reason from the ``step``-th question on (it is asked once a step)."""
    asked = 0

    def reason() -> str:
        nonlocal asked
        asked += 1
        return "told to" if asked >= step else ""

    return reason


def work(
    rank: int, world_size: int, made: RunPlan, stop_step: int | None = None
) -> dict[str, Any]:
    """One worker of a run; returns its summary."""
    world = World(rank, world_size, torch.device("cpu"))
    hooks = Hooks(stop_reason=stop_after(stop_step) if stop_step else lambda: "")
    torch.set_num_threads(1)
    start = world.gather(choose_start(made, lambda _message: None).step)[0]
    return run_worker(
        made,
        world,
        lambda stream, tokenizer, cursor: local_blocks(stream, tokenizer, cursor, rank, world_size),
        hooks,
        start,
    )


def run_plan(
    plan: RunPlan, world_size: int = 1, stop_step: int | None = None
) -> dict[str, Any]:
    """Run a plan with gloo workers, or in this process if it needs but one."""
    if world_size == 1:
        threads = torch.get_num_threads()
        try:
            return work(0, 1, plan, stop_step)
        finally:
            torch.set_num_threads(threads)
    return run_gloo(work, world_size, plan, stop_step)[0]


def losses(plan: RunPlan) -> dict[int, float]:
    """Step → loss of a run's log."""
    records = read_records(os.path.join(plan.run_dir, "metrics.jsonl"))
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def hashes(plan: RunPlan) -> dict[int, str]:
    """Step → batch hash of a run's log."""
    records = read_records(os.path.join(plan.run_dir, "metrics.jsonl"))
    return {r["step"]: r["batch_hash"] for r in records if "batch_hash" in r}


def weights(plan: RunPlan, step: int) -> bytes:
    """The bytes of a checkpoint's weights."""
    return Path(plan.checkpoints_dir, f"step_{step:06d}", "model.safetensors").read_bytes()
