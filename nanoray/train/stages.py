"""The stages whose steps are rows of a stream, by name."""

from __future__ import annotations

from typing import Any

from nanoray.train.pretrain import PretrainWorker
from nanoray.train.run_plan import StreamRunPlan
from nanoray.train.sft import SftWorker
from nanoray.train.stream_worker import OpenBlocks, StreamWorker
from nanoray.train.worker import Hooks
from nanoray.train.world import World

_WORKERS: dict[str, type[StreamWorker]] = {"pretrain": PretrainWorker, "sft": SftWorker}


def make_worker(
    plan: StreamRunPlan, world: World, open_blocks: OpenBlocks, hooks: Hooks, start_step: int = 0
) -> StreamWorker:
    """The worker of a plan's stage; see `StreamWorker`. Whoever made it closes it."""
    return _WORKERS[plan.stage](plan, world, hooks, start_step, open_blocks)


def run_worker(
    plan: StreamRunPlan, world: World, open_blocks: OpenBlocks, hooks: Hooks, start_step: int = 0
) -> dict[str, Any]:
    """Make a plan's worker and run it; see `TrainWorker.run`."""
    worker = make_worker(plan, world, open_blocks, hooks, start_step)
    try:
        return worker.run()
    finally:
        worker.close()
