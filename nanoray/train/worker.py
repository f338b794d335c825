"""Training as one worker sees it: plain torch, no Ray.

A worker builds the model, takes up the latest checkpoint, and loops: rows, step, and now and then
validation, samples, a checkpoint. What needs a cluster is handed in through `Hooks`; what differs
between the stages of training is left to subclasses.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from nanoray import storage
from nanoray.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    DamagedCheckpointError,
    Snapshot,
    delete_incomplete,
)
from nanoray.data.blocks import Block, Cursor, StepRows, Stream, started, step_rows
from nanoray.errors import NanorayError
from nanoray.metrics import MetricsLog, Record, Sink
from nanoray.model.compile import compile_model
from nanoray.model.gpt import GPT
from nanoray.model.precision import peak_flops, pick_compute_dtype
from nanoray.optim.groups import ParamGroup
from nanoray.optim.schedule import Schedule
from nanoray.optim.sharded import MuonAdamW
from nanoray.tokenizer import Tokenizer, load_tokenizer
from nanoray.train.record import record_samples, record_summary, summary
from nanoray.train.resume import StartLostError
from nanoray.train.run_plan import RunPlan
from nanoray.train.saving import AgreedSaves
from nanoray.train.step import StepTimes, TrainStep
from nanoray.train.validation import HeldOut, Validation
from nanoray.train.watch import LossWatch, Progress, TrainingHealthError, describe_rows
from nanoray.train.world import World

OpenBlocks = Callable[[Stream, Tokenizer, Cursor], Iterator[Block]]


@dataclass
class Hooks:
    """What the surroundings give a worker.

    Attributes:
        post: the first worker's records, for whoever watches.
        report: called by all workers together at validations and checkpoints.
        stop_reason: why to stop, or an empty string (asked of the first worker only).
        guard: raises when this run is no longer ours to write.
        sinks: further receivers of the first worker's metrics.
        attempt: a name shared by the workers of this start.
    """

    post: Sink = lambda _record: None
    report: Callable[[Record], None] = lambda _record: None
    stop_reason: Callable[[], str] = lambda: ""
    guard: Callable[[], None] = lambda: None
    sinks: list[Sink] = field(default_factory=list)
    attempt: str = "local"


class TrainWorker(ABC):
    """The state of one worker: model, optimiser, progress, and where numbers go.

    Args:
        start_step: of the checkpoint to go on from (0: from the beginning); the same on all
            workers, chosen by `choose_start`.

    Raises:
        NanorayError: bad data.
        StartLostError: the checkpoint has been damaged since it was chosen.
    """

    def __init__(self, plan: RunPlan, world: World, hooks: Hooks, start_step: int = 0) -> None:
        self.plan, self.world, self.hooks = plan, world, hooks
        self.config = plan.config
        self.tokenizer = load_tokenizer(plan.tokenizer_dir)
        self.stream = plan.stream(self.tokenizer)
        self.dtype = pick_compute_dtype(world.device, self.config["dtype"])
        self.micro_rows = plan.micro_rows(world.size)
        if world.is_first:
            delete_incomplete(plan.checkpoints_dir)
        self.validation = Validation(
            self._held_out, self.tokenizer.token_bytes(), self.micro_rows, world
        )
        self._build()
        self.schedule = self._make_schedule()
        self._start(start_step)
        self.step = TrainStep(self._loss_sum, self.optimizer, world, self.micro_rows)
        self.loss_watch = LossWatch(
            self.config["spike_factor"],
            average=self.progress.loss_average,
            steps=self.progress.step,
        )
        self.log = self._open_log() if world.is_first else None
        self.writer = CheckpointWriter(
            plan.checkpoints_dir,
            rank=world.rank,
            world_size=world.size,
            attempt=hooks.attempt,
            keep=self.config["keep_checkpoints"],
            guard=hooks.guard,
        )
        self.saves = AgreedSaves(self.writer, world, hooks.post)

    @abstractmethod
    def _begin(self) -> None:
        """Give model and optimiser the state that a run begins with."""

    @abstractmethod
    def _make_groups(self, shapes: dict[str, tuple[int, ...]]) -> list[ParamGroup]:
        """The optimiser's settings for the parameters of these names and shapes."""

    @abstractmethod
    def _make_schedule(self) -> Schedule:
        """What changes from step to step."""

    @abstractmethod
    def _held_out(self) -> HeldOut | None:
        """Rows to validate on, if there are any; called in a thread."""

    @abstractmethod
    def _sample_text(self) -> str:
        """A section of ``samples.md``; the model is in eval mode."""

    def _num_targets(self, rows: StepRows) -> int:
        """Target tokens of the step over all workers."""
        return self.plan.total_batch_size

    def _evaluate(self, _last: bool) -> Record:
        """Further evaluations that are due after a step; all workers call it together."""
        return {}

    def _own_metrics(self) -> dict[str, Any]:
        """What the summary's ``metrics`` tell beside the counts of every stage."""
        return {}

    def _build(self) -> None:
        config = self.config
        self.model = GPT(self.plan.model_config, compute_dtype=self.dtype)
        self.model.place(self.world.device)
        if config["fp8"]:
            from nanoray.model.fp8 import convert_to_fp8

            convert_to_fp8(self.model)
        named = dict(self.model.named_parameters())
        self.optimizer = MuonAdamW(
            named,
            self._make_groups({name: tuple(p.shape) for name, p in named.items()}),
            recipe=config["recipe"],
            compute_dtype=self.dtype,
            compile=config["compile_mode"] != "off",
        )
        self.train_model = compile_model(self.model, config["compile_mode"])

    def _loss_sum(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.train_model(inputs, targets)
        return loss

    def _start(self, start_step: int) -> None:
        self.progress, self.slab_first_step = Progress(), 0
        self.slab: Cursor | None = Cursor()
        self.epoch = 0
        if not start_step:
            self._begin()
            return
        try:
            with Checkpoint(self.plan.checkpoints_dir, start_step) as checkpoint:
                self._load(checkpoint)
        except DamagedCheckpointError as error:  # it was whole when it was chosen
            raise StartLostError(str(error)) from error

    def _load(self, checkpoint: Checkpoint) -> None:
        meta = checkpoint.meta
        self.model.load_state_dict(checkpoint.model_state())
        self.optimizer.load_state(checkpoint.optimizer_rows)
        self.progress = Progress.from_dict(meta["progress"])
        self.slab = Cursor(meta["cursor"]["unit"], meta["cursor"]["row"])
        self.slab_first_step = meta["cursor"]["first_step"]

    def _open_log(self) -> MetricsLog:
        uri = storage.join(self.plan.run_dir, "metrics.jsonl")
        return MetricsLog(uri, self.progress.step, [*self.hooks.sinks, self.hooks.post])

    def run(self, open_blocks: OpenBlocks) -> dict[str, Any]:
        """Train to the horizon, or until told to stop.

        Returns:
            The run's summary (the same on all workers).

        Raises:
            NanorayError: bad data, a broken loss, a checkpoint that cannot be saved, a lost lease.
        """
        plan, progress = self.plan, self.progress
        if self.world.is_first:
            self._write_summary("running")
        assert self.slab is not None
        blocks = started(open_blocks(self.stream, self.tokenizer, self.slab))
        if self.config["compile_mode"] != "off" and progress.step < plan.num_iterations:
            self.step.warm_up(plan.sequence_len)
        world = self.world
        shares = step_rows(
            blocks,
            self.stream,
            world.rank,
            world.size,
            first_step=progress.step,
            slab_first_step=self.slab_first_step,
        )
        stopped = ""
        while progress.step < plan.num_iterations and not stopped:
            stopped, save_failed = self._train_step(shares)
            # Told to stop in its last step, a run is finished all the same.
            stopping = bool(stopped) and progress.step < plan.num_iterations
            self._milestones(stopping, save_failed)
        if self.saves.settle():
            self._save()
            self.saves.settle()
        status = "stopped" if progress.step < plan.num_iterations else "finished"
        summary = self._summary(status)
        if self.world.is_first:
            self._write_summary(status)
        self.hooks.report({"step": progress.step, "status": status})
        return summary | {"stop_reason": stopped}

    def _train_step(self, shares: Iterator[StepRows]) -> tuple[str, bool]:
        """One step; returns why to stop after it (or ""), and whether a worker's save failed."""
        progress = self.progress
        start = time.perf_counter()
        rows = next(shares)
        data_wait_s = time.perf_counter() - start
        lr_multiplier, momentum, decay = self.schedule.at(progress.step)
        num_targets = self._num_targets(rows)
        loss, times = self.step(rows.ids, num_targets, lr_multiplier, momentum, decay, rows.trained)
        reason = self.hooks.stop_reason() if self.world.is_first else ""
        flags = (int(bool(reason)), int(self.writer.failed))
        sums = self.world.sum_ints([rows.hash(), *flags, *rows.counts.values()])
        batch_hash, stop, save_failed, *counts = sums
        step_s = time.perf_counter() - start
        self.slab, self.slab_first_step = rows.slab, rows.slab_first_step
        if len(rows.units):
            self.epoch = self.stream.epoch(int(rows.units.max()))
        progress.step += 1
        progress.loss = loss
        progress.add_step_time(step_s)
        for name, count in zip(rows.counts, counts):
            setattr(progress, name, getattr(progress, name) + count)
        problem = self.loss_watch.problem(loss)
        progress.loss_average = self.loss_watch.average
        due = progress.step % self.config["log_every"] == 0 or progress.step == 1
        if self.log and (due or problem):
            measured = {
                "lr_multiplier": lr_multiplier,
                "step_s": step_s,
                "data_wait_s": data_wait_s,
                "batch_hash": f"{batch_hash % 2**64:016x}",
            }
            self._log_step(self.log, measured, times)
        if problem:
            raise self._unhealthy(problem, rows, batch_hash)
        return reason or ("another worker was told to stop" if stop else ""), bool(save_failed)

    def _log_step(self, log: MetricsLog, measured: dict[str, Any], times: StepTimes) -> None:
        plan, progress = self.plan, self.progress
        tokens_per_s = plan.total_batch_size / measured["step_s"]
        record = {
            "step": progress.step,
            "loss": progress.loss,
            "tokens": progress.step * plan.total_batch_size,
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
            "forward_backward_s": times.forward_backward_s,
            "optimizer_s": times.optimizer_s,
            "epoch": self.epoch,
            "tokens_cropped": progress.tokens_cropped,
            "documents_skipped": progress.documents_skipped,
            "eta_s": progress.eta_s(plan.num_iterations),
            **measured,
        }
        if self.writer.last_save_s is not None:
            record["checkpoint_s"], self.writer.last_save_s = self.writer.last_save_s, None
        log.log(record)

    def _mfu(self, tokens_per_s: float) -> float:
        peak = peak_flops(self.world.device, self.dtype) * self.world.size
        return tokens_per_s * self.plan.flops_per_token / peak

    def _unhealthy(self, problem: str, rows: StepRows, batch_hash: int) -> TrainingHealthError:
        """What to raise, on all workers, after a step with a broken loss; they meet here."""
        parts = self.world.gather((rows.units, rows.rows))
        units, numbers = (np.concatenate(columns) for columns in zip(*parts))
        mend = "take another --run with lower learning rates"
        if math.isfinite(self.progress.loss or 0.0):
            mend = f"run the same command with a higher --spike-factor to go on from it, or {mend}"
        return TrainingHealthError(
            f"stopped at step {self.progress.step}: {problem}; the rows of batch "
            f"{batch_hash % 2**64:016x} come from "
            f"{describe_rows(units, numbers, self.stream.describe_unit)}; the last checkpoint "
            f"stands - look at these documents with `python -m jobs.data inspect`; {mend}"
        )

    def _milestones(self, stopping: bool, save_failed: bool) -> None:
        step = self.progress.step
        last = step == self.plan.num_iterations

        def due(every: int) -> bool:
            return last or bool(every and step % every == 0)

        record: dict[str, Any] = {}
        if due(self.config["eval_every"]) and not stopping:
            record |= self._validate()
        if not stopping:
            record |= self._evaluate(last)
        if due(self.config["sample_every"]) and not stopping and self.world.is_first:
            self._sample()
        if save_failed:
            self.writer.give_up()
        if due(self.config["save_every"]) or stopping or save_failed:
            self.saves.settle()
            self._save()
            record["saved"] = step
        if record:
            self.hooks.report({"step": step, **record})

    def _validate(self) -> dict[str, float]:
        start = time.perf_counter()
        bpb = self.validation.bits_per_byte(self.train_model)
        if bpb is None:
            return {}
        self.progress.validated(bpb)
        record = {"val_bpb": bpb, "eval_s": time.perf_counter() - start}
        if self.log:
            self.log.log({"step": self.progress.step, **record})
        return record

    def _sample(self) -> None:
        self.model.eval()
        text = self._sample_text()
        self.model.train()
        record_samples(self.plan, self.progress.step, text)
        self.hooks.post({"samples": text})

    def _save(self) -> None:
        """Copy what the checkpoint needs, and let a thread write it."""
        # Only the worker of the slab's first block knows where the slab begins.
        known = self.slab.unit * 2**32 + self.slab.row if self.slab else -1
        known = self.world.max_int(known)
        self.slab = slab = Cursor(known >> 32, known % 2**32)
        first = self.world.is_first
        shards = [
            replace(shard, tensor=shard.tensor.detach().to("cpu", copy=True))
            for shard in self.optimizer.state_shards()
        ]
        model = None
        if first:
            self.hooks.guard()
            state = self.model.state_dict()
            model = {k: v.detach().to("cpu", copy=True) for k, v in state.items()}
        self.writer.save(
            Snapshot(
                step=self.progress.step,
                optimizer=shards,
                model=model,
                meta=self._meta(slab) if first else None,
                files=self.tokenizer.to_files() if first else None,
            )
        )
        if self.log:
            self.log.sync()
            self._write_summary("running")

    def _meta(self, slab: Cursor) -> dict[str, Any]:
        """No state of a random generator: all randomness is a function of seed and step."""
        return {
            "stage": self.plan.stage,
            "step": self.progress.step,
            "model_config": self.plan.model,
            "plan": self.plan.to_dict(),
            "cursor": {
                "unit": slab.unit,
                "row": slab.row,
                "first_step": self.slab_first_step,
            },
            "progress": self.progress.to_dict(),
            "seed": self.config["seed"],
        }

    def _summary(self, status: str) -> dict[str, Any]:
        progress = self.progress
        tokens = progress.step * self.plan.total_batch_size
        mfu = self._mfu(tokens / progress.train_s if progress.train_s else 0.0)
        return summary(self.plan, progress, status, mfu, self.world.device, self._own_metrics())

    def _write_summary(self, status: str) -> None:
        self.hooks.guard()  # a worker that outlived its driver must not write over another's
        record_summary(self.plan, self._summary(status))

    def close(self) -> None:
        """Let a save under way finish: after an error it is what the next start goes on from."""
        with contextlib.suppress(NanorayError):
            self.writer.wait()
        if self.log:
            self.log.close()
