"""What is watched while training: the loss's health, and how fast it goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nanoray.errors import NanorayError


class TrainingHealthError(NanorayError):
    """The loss is not a number, or has jumped."""


def describe_rows(
    units: np.ndarray, rows: np.ndarray, describe_unit: Callable[[int, np.ndarray], str]
) -> str:
    """Where the rows of a batch come from, for a person: by unit, neighbours as a range.

    Args:
        units, rows: [n] of each row, in any order.
    """
    places = []
    for unit in np.unique(units):
        numbers = np.unique(rows[units == unit])
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
        ranges = [f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs]
        what = describe_unit(int(unit), numbers)
        places.append(f"unit {unit} ({what}) rows {', '.join(ranges)}")
    return "; ".join(places)


# Nats. A model that knows its conversations by heart has losses near zero, whose ratios say nothing
# (3 and more between steps of a fine-tuning on 24 conversations).
MIN_JUMP = 0.5


@dataclass
class LossWatch:
    """Stops a run whose loss is NaN, infinite, or far above its running average.

    Args:
        spike_factor: a loss above this multiple of the average is a spike, if it is also above
            `MIN_JUMP`; None: none is.
        patience_steps: steps before a spike can be told from the beginning's noise.
    """

    spike_factor: float | None
    patience_steps: int = 20
    average: float = 0.0
    steps: int = 0

    def problem(self, loss: float) -> str:
        """Take in the next loss; what is wrong with it, or an empty string."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        watched = self.spike_factor is not None and self.steps >= self.patience_steps
        if watched and loss > max(MIN_JUMP, (self.spike_factor or 0.0) * self.average):
            return f"the loss jumped to {loss:.3f}, its average being {self.average:.3f}"
        weight = max(0.05, 1 / (self.steps + 1))
        self.average += weight * (loss - self.average)
        self.steps += 1
        return ""


@dataclass
class Progress:
    """What a run has done so far; part of its checkpoint."""

    step: int = 0  # optimiser steps done
    tokens: int = 0  # trained on
    train_s: float = 0.0  # time in steps, without evaluation and saving
    min_val_bpb: float | None = None
    val_bpb: float | None = None
    loss: float | None = None
    loss_average: float = 0.0
    documents: int = 0
    tokens_in: int = 0
    tokens_cropped: int = 0
    documents_skipped: int = 0
    recent_step_s: list[float] = field(default_factory=list)
    evals: dict[str, float] = field(default_factory=dict)  # the latest of the stage's own

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def add_step_time(self, step_s: float) -> None:
        self.train_s += step_s
        self.recent_step_s = [*self.recent_step_s[-19:], step_s]

    def eta_s(self, num_steps: int) -> float:
        """Seconds to the horizon by the median of the last 20 steps."""
        recent = sorted(self.recent_step_s)
        return recent[len(recent) // 2] * (num_steps - self.step) if recent else 0.0

    def validated(self, bpb: float) -> None:
        self.val_bpb = bpb
        self.min_val_bpb = min(bpb, self.min_val_bpb or math.inf)
