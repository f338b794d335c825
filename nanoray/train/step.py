"""One optimiser step: micro-batches, the loss of the global step, the update."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoray.optim.sharded import MuonAdamW
from nanoray.train.world import World

IGNORED = -1  # a target that does not count

TokenLossSum = Callable[[Tensor, Tensor], Tensor]


def micro_batches(
    ids: np.ndarray,
    micro_rows: int,
    device: torch.device,
    trained: np.ndarray | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets [micro_rows, T] int64 of each micro-batch.

    The last one is filled up with rows whose targets are ignored, so that shapes never change
    and a compiled model is never built again.

    Args:
        ids: [n, T+1]; n may be 0.
        trained: [n, T+1], 0 where an id is no target; None: all are.
    """
    batches = []
    for start in range(0, len(ids), micro_rows):
        part = slice(start, start + micro_rows)
        inputs = _to_device(ids[part, :-1], device)
        wanted = ids[part, 1:].astype(np.int64)
        if trained is not None:
            wanted[trained[part, 1:] == 0] = IGNORED
        targets = _to_device(wanted, device)
        missing = micro_rows - len(inputs)
        if missing:
            inputs = torch.cat([inputs, inputs.new_zeros(missing, inputs.shape[1])])
            targets = torch.cat([targets, targets.new_full((missing, targets.shape[1]), IGNORED)])
        batches.append((inputs, targets))
    return batches


def _to_device(ids: np.ndarray, device: torch.device) -> Tensor:
    """int64 and contiguous, on the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(ids, np.int64))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step's phases; the optimiser's include waiting for communication."""

    forward_backward_s: float
    optimizer_s: float


class TrainStep:
    """Forward, backward and update of one global step.

    The loss is the mean over all target tokens of the step on all workers: each worker
    back-propagates its sum of token losses divided by that global number, and gradients are
    summed over workers. It does not matter how rows are cut into micro-batches or workers.
    """

    def __init__(
        self, loss_sum: TokenLossSum, optimizer: MuonAdamW, world: World, micro_rows: int
    ) -> None:
        self._loss_sum = loss_sum
        self._optimizer = optimizer
        self._world = world
        self._micro_rows = micro_rows

    def warm_up(self, sequence_len: int) -> None:
        """Have forward and backward compiled, by a micro-batch without targets.

        Its gradients are zeros.
        """
        ids = np.zeros((1, sequence_len + 1), np.int64)
        [(inputs, targets)] = micro_batches(ids, self._micro_rows, self._world.device)
        self._loss_sum(inputs, targets.fill_(IGNORED)).backward()

    def __call__(
        self,
        ids: np.ndarray,
        num_targets: int,
        lr_multiplier: float,
        muon_momentum: float,
        weight_decay_multiplier: float,
        trained: np.ndarray | None = None,
    ) -> tuple[float, StepTimes]:
        """Train on this worker's rows of a step.

        Args:
            ids: [n, T+1] of this worker; n may be 0.
            num_targets: target tokens of the step over all workers.
            trained: [n, T+1], 0 where an id is no target; None: all are.

        Returns:
            The mean loss of the global step (nats per token), and the times.
        """
        start = time.perf_counter()
        device = self._world.device
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        total = torch.zeros((), dtype=exact, device=device)
        batches = micro_batches(ids, self._micro_rows, device, trained)
        for i, (inputs, targets) in enumerate(batches):
            if i == len(batches) - 1:
                self._optimizer.prepare_last_backward()
            loss = self._loss_sum(inputs, targets)
            (loss / num_targets).backward()
            total += loss.detach()
        if device.type == "cuda":
            torch.cuda.synchronize()
        middle = time.perf_counter()
        self._optimizer.step(lr_multiplier, muon_momentum, weight_decay_multiplier)
        mean_loss = self._world.sum_float(total) / num_targets
        end = time.perf_counter()
        return mean_loss, StepTimes(middle - start, end - middle)
