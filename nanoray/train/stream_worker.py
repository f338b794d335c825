"""Training on the rows of a stream: what pretraining and fine-tuning have in common."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from nanoray.data.blocks import Block, Cursor, StepRows, Stream, started, step_rows
from nanoray.metrics import Record
from nanoray.tokenizer import Tokenizer
from nanoray.train.run_plan import StreamRunPlan
from nanoray.train.step import TrainStep
from nanoray.train.validation import HeldOut, Validation
from nanoray.train.watch import describe_rows
from nanoray.train.worker import Hooks, StepOutcome, TrainWorker
from nanoray.train.world import World

OpenBlocks = Callable[[Stream, Tokenizer, Cursor], Iterator[Block]]


class StreamWorker(TrainWorker):
    """A `TrainWorker` whose steps are rows of a stream.

    Args:
        open_blocks: gives this worker's blocks from a cursor on.
    """

    plan: StreamRunPlan

    def __init__(
        self,
        plan: StreamRunPlan,
        world: World,
        hooks: Hooks,
        start_step: int,
        open_blocks: OpenBlocks,
    ) -> None:
        self.slab: Cursor | None = Cursor()
        self.slab_first_step = 0
        super().__init__(plan, world, hooks, start_step)
        self._open_blocks = open_blocks
        self.micro_rows = plan.micro_rows(world.size)
        self.stream = plan.stream(self.tokenizer)
        self.validation = Validation(
            self._held_out, self.tokenizer.token_bytes(), self.micro_rows, world
        )
        self.step = TrainStep(self._loss_sum, self.optimizer, world, self.micro_rows)
        self._rows: StepRows | None = None
        self._epoch = 0

    @abstractmethod
    def _held_out(self) -> HeldOut | None:
        """Rows to validate on, if there are any; called in a thread."""

    def _num_targets(self, rows: StepRows) -> int:
        """Target tokens of the step over all workers."""
        return self.plan.total_batch_size

    def _loss_sum(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.train_model(inputs, targets)
        return loss

    def run(self) -> dict[str, Any]:
        assert self.slab is not None
        blocks = started(self._open_blocks(self.stream, self.tokenizer, self.slab))
        if self.config["compile_mode"] != "off" and self.progress.step < self.plan.num_iterations:
            self.step.warm_up(self.plan.sequence_len)
        self._shares = step_rows(
            blocks,
            self.stream,
            self.world.rank,
            self.world.size,
            first_step=self.progress.step,
            slab_first_step=self.slab_first_step,
        )
        return super().run()

    def _step(self, lr_multiplier: float, momentum: float, decay: float) -> StepOutcome:
        start = time.perf_counter()
        self._rows = rows = next(self._shares)
        data_wait_s = time.perf_counter() - start
        num_targets = self._num_targets(rows)
        loss, times = self.step(rows.ids, num_targets, lr_multiplier, momentum, decay, rows.trained)
        self.slab, self.slab_first_step = rows.slab, rows.slab_first_step
        record: dict[str, Any] = {
            "data_wait_s": data_wait_s,
            "forward_backward_s": times.forward_backward_s,
            "optimizer_s": times.optimizer_s,
        }
        if len(rows.units):
            last = int(rows.units.argmax())
            self._epoch = self.stream.epoch(int(rows.units[last]), int(rows.rows[last]))
        record["epoch"] = self._epoch
        tokens = self.plan.total_batch_size
        return StepOutcome(loss, tokens, rows.counts, rows.hash(), record)

    def _whence(self, batch_hash: int) -> str:
        assert self._rows is not None
        parts = self.world.gather((self._rows.units, self._rows.rows))
        units, numbers = (np.concatenate(columns) for columns in zip(*parts))
        return (
            f"the rows of batch {batch_hash % 2**64:016x} come from "
            f"{describe_rows(units, numbers, self.stream.describe_unit)}"
        )

    def _evaluate(self, last: bool) -> dict[str, Any]:
        every = self.config["eval_every"]
        if not (last or (every and self.progress.step % every == 0)):
            return {}
        start = time.perf_counter()
        bpb = self.validation.bits_per_byte(self.train_model)
        if bpb is None:
            return {}
        self.progress.validated(bpb)
        record = {"val_bpb": bpb, "eval_s": time.perf_counter() - start}
        if self.log:
            self.log.log({"step": self.progress.step, **record})
        return record

    def _own_metrics(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "documents": progress.documents,
            "documents_skipped": progress.documents_skipped,
            "cropped_fraction": progress.tokens_cropped / max(1, progress.tokens_in),
        }

    def _position(self) -> Record:
        # Only the worker of the slab's first block knows where the slab begins.
        known = self.slab.unit * 2**32 + self.slab.row if self.slab else -1
        known = self.world.max_int(known)
        self.slab = slab = Cursor(known >> 32, known % 2**32)
        first_step = self.slab_first_step
        return {"cursor": {"unit": slab.unit, "row": slab.row, "first_step": first_step}}

    def _go_on_from(self, meta: Record) -> None:
        self.slab = Cursor(meta["cursor"]["unit"], meta["cursor"]["row"])
        self.slab_first_step = meta["cursor"]["first_step"]
