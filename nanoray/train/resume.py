"""Which checkpoint a start goes on from: chosen once, for the stream and for every worker.

Were each to look for the latest by itself, a checkpoint that breaks between two looks would have
workers train on each other's steps, or on rows that are not theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanoray.checkpoint import open_latest
from nanoray.data.blocks import Cursor
from nanoray.train.run_plan import RunPlan


class StartLostError(RuntimeError):
    """The chosen checkpoint can no longer be read. No user's mistake: start again, and choose."""


@dataclass(frozen=True)
class StartPoint:
    """The step whose checkpoint is taken up (0: the run begins), and where its stream does."""

    step: int
    slab: Cursor


def choose_start(plan: RunPlan, warn: Callable[[str], None]) -> StartPoint:
    """The newest checkpoint of which every byte is right; ``warn`` is told of damaged ones.

    Raises:
        NanorayError: there are checkpoints, and every one is damaged.
    """
    checkpoint = open_latest(plan.checkpoints_dir, warn)
    if checkpoint is None:
        return StartPoint(0, Cursor())
    with checkpoint:
        cursor = checkpoint.meta.get(
            "cursor", {"unit": 0, "row": 0}
        )  # of a stream, if there is one
        return StartPoint(checkpoint.step, Cursor(cursor["unit"], cursor["row"]))
