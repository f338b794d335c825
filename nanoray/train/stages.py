"""The stages of training by name."""

from __future__ import annotations

from typing import Any

from nanoray.train.pretrain import PretrainWorker
from nanoray.train.run_plan import RunPlan
from nanoray.train.sft import SftWorker
from nanoray.train.worker import Hooks, OpenBlocks, TrainWorker
from nanoray.train.world import World

_WORKERS: dict[str, type[TrainWorker]] = {"pretrain": PretrainWorker, "sft": SftWorker}


def make_worker(plan: RunPlan, world: World, hooks: Hooks, start_step: int = 0) -> TrainWorker:
    """The worker of a plan's stage; see `TrainWorker`. Whoever made it closes it."""
    return _WORKERS[plan.stage](plan, world, hooks, start_step)


def run_worker(
    plan: RunPlan, world: World, open_blocks: OpenBlocks, hooks: Hooks, start_step: int = 0
) -> dict[str, Any]:
    """Make a plan's worker and run it; see `TrainWorker.run`."""
    worker = make_worker(plan, world, hooks, start_step)
    try:
        return worker.run(open_blocks)
    finally:
        worker.close()
