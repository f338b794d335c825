"""A tiny pretraining run for tests, without Ray: one process, or gloo workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gloo import run_gloo

from nanoray.config import PretrainConfig
from nanoray.data.blocks import Cursor, local_blocks, step_rows
from nanoray.metrics import read_records
from nanoray.train.plan import PretrainPlan, make_plan
from nanoray.train.resume import choose_start
from nanoray.train.run_plan import RunPlan
from nanoray.train.stages import make_worker, run_worker
from nanoray.train.stream_worker import OpenBlocks
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


def blocks_of(rank: int = 0, world_size: int = 1) -> OpenBlocks:
    """The stream made in this process, dealt as Ray would."""
    return lambda stream, tokenizer, cursor: local_blocks(
        stream, tokenizer, cursor, rank, world_size
    )


def work(rank: int, world_size: int, made: RunPlan, stop_step: int | None = None) -> dict[str, Any]:
    """One worker of a run; returns its summary."""
    world = World(rank, world_size, torch.device("cpu"))
    hooks = Hooks(stop_reason=stop_after(stop_step) if stop_step else lambda: "")
    torch.set_num_threads(1)
    start = world.gather(choose_start(made, lambda _message: None).step)[0]
    return run_worker(made, world, blocks_of(rank, world_size), hooks, start)


def run_plan(plan: RunPlan, world_size: int = 1, stop_step: int | None = None) -> dict[str, Any]:
    """Run a plan with gloo workers, or in this process if it needs but one."""
    if world_size == 1:
        threads = torch.get_num_threads()
        try:
            return work(0, 1, plan, stop_step)
        finally:
            torch.set_num_threads(threads)
    return run_gloo(work, world_size, plan, stop_step)[0]


class GradientRecorder:
    """In the optimiser's place: sums gradients over workers and keeps them."""

    def __init__(self, named: dict[str, torch.nn.Parameter]) -> None:
        self.named = named
        self.grads: dict[str, np.ndarray] = {}

    def prepare_last_backward(self) -> None: ...

    def step(self, *_settings: float) -> None:
        for name, p in self.named.items():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            if dist.is_initialized():
                dist.all_reduce(grad)
            self.grads[name] = grad.numpy().copy()


def noisy(model: torch.nn.Module) -> None:
    """Add noise to all weights: initial values are zero in places and hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)


def first_gradients(rank: int, size: int, plan: RunPlan) -> dict[str, np.ndarray]:
    """The gradients of a run's first step, and its loss as ``"loss"``; weights made noisy."""
    torch.set_num_threads(1)
    world = World(rank, size, torch.device("cpu"))
    worker = make_worker(plan, world, blocks_of(rank, size), Hooks())
    try:
        noisy(worker.model)
        recorder = GradientRecorder(dict(worker.model.named_parameters()))
        worker.step._optimizer = recorder  # type: ignore[assignment]
        blocks = local_blocks(worker.stream, worker.tokenizer, Cursor(), rank, size)
        rows = next(step_rows(blocks, worker.stream, rank, size))
        num_targets = worker._num_targets(rows)
        loss, _times = worker.step(rows.ids, num_targets, 1.0, 0.9, 0.0, rows.trained)
    finally:
        worker.close()
    return recorder.grads | {"loss": np.array(loss)}


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
