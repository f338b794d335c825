"""Training as one worker sees it: plain torch, no Ray.

A worker builds the model, takes up the latest checkpoint, and loops: a step, and now and then
evaluations, samples, a checkpoint. What needs a cluster is handed in through `Hooks`; what differs
between the stages of training is left to subclasses.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from nanoray import storage
from nanoray.checkpoint import Checkpoint, DamagedCheckpointError, delete_incomplete
from nanoray.checkpoint.writer import CheckpointWriter, Snapshot
from nanoray.errors import NanorayError
from nanoray.metrics import MetricsLog, Record, Sink
from nanoray.model.compile import compile_model
from nanoray.model.gpt import GPT
from nanoray.model.precision import peak_flops, pick_compute_dtype
from nanoray.optim.groups import (
    REFERENCE_BATCH_TOKENS,
    ParamGroup,
    build_groups,
    scale_rates,
)
from nanoray.optim.schedule import Schedule
from nanoray.optim.sharded import MuonAdamW
from nanoray.train.record import record_samples, record_summary, summary
from nanoray.train.resume import StartLostError
from nanoray.train.run_plan import RunPlan
from nanoray.train.saving import AgreedSaves, dispensable
from nanoray.train.watch import LossWatch, Progress, TrainingHealthError
from nanoray.train.world import World

_LOGGED_COUNTS = ("tokens_cropped", "documents_skipped")
TOLD_ELSEWHERE = "another worker was told to stop"


@dataclass(frozen=True)
class StepOutcome:
    """What a step has done.

    Attributes:
        loss: of the step over all workers, nats a token.
        tokens: over all workers.
        counts: of this worker, by the name that `Progress` sums them under.
        hash: of this worker's part of the batch; the sum over workers identifies it.
        record: further numbers for the log.
    """

    loss: float
    tokens: int
    counts: dict[str, int]
    hash: int
    record: Record


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
        self.tokenizer = plan.read_tokenizer()
        self.dtype = pick_compute_dtype(world.device, self.config["dtype"])
        if len(dtypes := set(world.gather(str(self.dtype)))) > 1:
            raise NanorayError(
                f"the workers would compute in {' and '.join(sorted(dtypes))}, as their machines "
                f"differ; give --dtype float32 or bfloat16, or --num-workers 1"
            )
        if world.is_first:
            hooks.guard()  # what looks incomplete may be another writer's, under way
            delete_incomplete(plan.checkpoints_dir)
        self._build()
        self.schedule = self._make_schedule()
        self._start(start_step)
        self.loss_watch = LossWatch(
            self.config.get("spike_factor"),
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
        self._saved_step = start_step

    @abstractmethod
    def _begin(self) -> None:
        """Give model and optimiser the state that a run begins with."""

    def _rates_batch_tokens(self) -> int:
        """The batch that learning rates are scaled by. The later stages' are not (nanochat)."""
        return REFERENCE_BATCH_TOKENS

    def _make_groups(self, shapes: dict[str, tuple[int, ...]]) -> list[ParamGroup]:
        """The optimiser's settings for the parameters of these names and shapes."""
        config = self.config
        groups = build_groups(
            shapes,
            config["recipe"],
            embedding_lr=config["embedding_lr"],
            unembedding_lr=config["unembedding_lr"],
            matrix_lr=config["matrix_lr"],
            scalar_lr=config["scalar_lr"],
            weight_decay=self.plan.weight_decay,
            width=self.plan.model_config.n_embd,
            batch_tokens=self._rates_batch_tokens(),
        )
        return scale_rates(groups, config.get("init_lr_frac", 1.0))

    @abstractmethod
    def _make_schedule(self) -> Schedule:
        """What changes from step to step."""

    def _await_batch(self) -> str:
        """Wait for the next step's; why to stop instead, if so. All workers get the same."""
        return ""

    @abstractmethod
    def _step(self, lr_multiplier: float, momentum: float, decay: float) -> StepOutcome:
        """One optimiser step, on what comes next; all workers together."""

    @abstractmethod
    def _position(self) -> Record:
        """What a checkpoint says of where training goes on; all workers together."""

    @abstractmethod
    def _go_on_from(self, meta: Record) -> None:
        """Take up what `_position` said, from a checkpoint's ``meta.json``."""

    @abstractmethod
    def _whence(self, batch_hash: int) -> str:
        """Where the latest step's batch came from, for a message; all workers together."""

    @abstractmethod
    def _sample_text(self) -> str:
        """A section of ``samples.md``; the model is in eval mode."""

    @abstractmethod
    def _evaluate(self, last: bool) -> dict[str, Any]:
        """The evaluations that are due after a step; all workers call it together."""

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

    def _start(self, start_step: int) -> None:
        self.progress = Progress()
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
        self._go_on_from(meta)

    def _open_log(self) -> MetricsLog:
        uri = storage.join(self.plan.run_dir, "metrics.jsonl")
        sinks = [*self.hooks.sinks, self.hooks.post]
        return MetricsLog(uri, self.progress.step, sinks, self.hooks.guard)

    def run(self) -> dict[str, Any]:
        """Train to the horizon, or until told to stop.

        Returns:
            The run's summary (the same on all workers).

        Raises:
            NanorayError: bad data, a broken loss, a checkpoint that cannot be saved, a lost lease.
        """
        plan, progress = self.plan, self.progress
        if self.world.is_first:
            self._write_summary("running")
        stopped = ""
        while progress.step < plan.num_iterations and not stopped:
            stopped, save_failed = self._train_step()
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

    def _train_step(self) -> tuple[str, bool]:
        """One step; returns why to stop after it (or ""), and whether a worker's save failed."""
        progress = self.progress
        start = time.perf_counter()
        if why := self._await_batch():
            (save_failed,) = self.world.sum_ints([int(self.writer.failed)])
            return why, bool(save_failed)
        lr_multiplier, momentum, decay = self.schedule.at(progress.step)
        done = self._step(lr_multiplier, momentum, decay)
        reason = self.hooks.stop_reason() if self.world.is_first else ""
        flags = (int(bool(reason)), int(self.writer.failed))
        sums = self.world.sum_ints([done.hash, *flags, *done.counts.values()])
        batch_hash, stop, save_failed, *counts = sums
        step_s = time.perf_counter() - start
        progress.step += 1
        progress.tokens += done.tokens
        progress.loss = done.loss
        progress.add_step_time(step_s)
        for name, count in zip(done.counts, counts):
            setattr(progress, name, getattr(progress, name) + count)
        problem = self.loss_watch.problem(done.loss)
        progress.loss_average = self.loss_watch.average
        ends = (1, self.plan.num_iterations)
        due = progress.step % self.config["log_every"] == 0 or progress.step in ends
        if self.log and (due or problem):
            measured = {
                "lr_multiplier": lr_multiplier,
                "step_s": step_s,
                "batch_hash": f"{batch_hash % 2**64:016x}",
            }
            self._log_step(self.log, done, measured)
        if problem:
            raise self._unhealthy(problem, batch_hash)
        return reason or (TOLD_ELSEWHERE if stop else ""), bool(save_failed)

    def _log_step(self, log: MetricsLog, done: StepOutcome, measured: Record) -> None:
        progress = self.progress
        tokens_per_s = done.tokens / measured["step_s"]
        record = {
            "step": progress.step,
            "loss": progress.loss,
            "tokens": progress.tokens,
            "tokens_per_s": tokens_per_s,
            "mfu": self._mfu(tokens_per_s),
            "eta_s": progress.eta_s(self.plan.num_iterations),
            **measured,
            **done.record,
            **{name: getattr(progress, name) for name in _LOGGED_COUNTS if name in done.counts},
        }
        if self.writer.last_save_s is not None:
            record["checkpoint_s"], self.writer.last_save_s = self.writer.last_save_s, None
        log.log(record)

    def _mfu(self, tokens_per_s: float) -> float:
        peak = peak_flops(self.world.device, self.dtype) * self.world.size
        return tokens_per_s * self.plan.flops_per_token / peak

    def _unhealthy(self, problem: str, batch_hash: int) -> TrainingHealthError:
        """What to raise, on all workers, after a step with a broken loss; they meet here."""
        whence = self._whence(batch_hash)
        with contextlib.suppress(NanorayError):  # the last checkpoint may be under way
            self.writer.wait()
        self.world.gather(None)  # the first worker that ends, ends all of them
        mend = "take another --run with lower learning rates"
        if math.isfinite(self.progress.loss or 0.0):
            mend = f"run the same command with a higher --spike-factor to go on from it, or {mend}"
        return TrainingHealthError(
            f"stopped at step {self.progress.step}: {problem}; {whence}; the last checkpoint "
            f"stands; {mend}"
        )

    def _milestones(self, stopping: bool, save_failed: bool) -> None:
        step = self.progress.step
        last = step == self.plan.num_iterations

        def due(every: int) -> bool:
            return last or bool(every and step % every == 0)

        record: dict[str, Any] = {}
        if not stopping:
            record |= self._evaluate(last)
        if due(self.config["sample_every"]) and not stopping and self.world.is_first:
            self._sample()
        if save_failed:
            self.writer.give_up()
        wanted = due(self.config["save_every"]) or stopping
        if (wanted and step > self._saved_step) or save_failed:
            self.saves.settle()
            self._save()
            record["saved"] = step
        if record:
            self.hooks.report({"step": step, **record})

    def _sample(self) -> None:
        self.model.eval()
        text = self._sample_text()
        self.model.train()
        with dispensable("samples.md", self.hooks.post):
            record_samples(self.plan, self.progress.step, text)
        self.hooks.post({"samples": text})

    def _save(self) -> None:
        """Copy what the checkpoint needs, and let a thread write it."""
        position = self._position()
        first = self.world.is_first
        self._saved_step = self.progress.step
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
                meta=self._meta(position) if first else None,
                files=self.tokenizer.to_files() if first else None,
            )
        )
        if self.log:
            self.log.sync()
            with dispensable("summary.json", self.hooks.post):
                self._write_summary("running")

    def _meta(self, position: Record) -> dict[str, Any]:
        """No state of a random generator: all randomness is a function of seed and step."""
        return {
            "stage": self.plan.stage,
            "step": self.progress.step,
            "model_config": self.plan.model,
            "plan": self.plan.to_dict(),
            **position,
            "progress": self.progress.to_dict(),
            "seed": self.config["seed"],
        }

    def _summary(self, status: str) -> dict[str, Any]:
        progress = self.progress
        mfu = self._mfu(progress.tokens / progress.train_s if progress.train_s else 0.0)
        peak = self.world.peak_memory_bytes()
        return summary(self.plan, progress, status, mfu, peak, self._own_metrics())

    def _write_summary(self, status: str) -> None:
        self.hooks.guard()  # a worker that outlived its driver must not write over another's
        record_summary(self.plan, self._summary(status))

    def close(self) -> None:
        """Let a save under way finish: after an error it is what the next start goes on from."""
        with contextlib.suppress(NanorayError):
            self.writer.wait()
        if self.log:
            self.log.close()
