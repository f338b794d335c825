"""Supervised fine-tuning: a base model goes on, on conversations."""

from __future__ import annotations

from typing import Any

from nanoray.checkpoint import Checkpoint
from nanoray.data.blocks import StepRows
from nanoray.data.conversations import held_out_rows
from nanoray.optim.schedule import Schedule
from nanoray.train.chat_evals import ask_together, chat_samples
from nanoray.train.sft_plan import SftPlan
from nanoray.train.stream_worker import StreamWorker
from nanoray.train.validation import HeldOut


class SftWorker(StreamWorker):
    """See `StreamWorker`."""

    plan: SftPlan

    def _begin(self) -> None:
        with Checkpoint.at(self.plan.base) as base:
            self.model.load_state_dict(base.model_state())
            if self.config["load_optimizer"]:
                self.optimizer.load_state(base.optimizer_rows)

    def _make_schedule(self) -> Schedule:
        steps = self.plan.num_iterations
        return Schedule(
            num_iterations=steps,
            warmup_steps=round(self.config["warmup_ratio"] * steps),
            warmdown_ratio=self.config["warmdown_ratio"],
            final_lr_frac=self.config["final_lr_frac"],
            recipe="february",  # whose momentum, .85 to .95, both recipes fine-tune with
        )

    def _held_out(self) -> HeldOut | None:
        mixture = self.plan.held_out
        if mixture is None:
            return None
        return held_out_rows(
            mixture,
            len(mixture.load()),
            self.tokenizer,
            sequence_len=self.plan.sequence_len,
            num_tokens=self.config["eval_tokens"],
            train_on=self.config["train_on"],
        )

    def _num_targets(self, rows: StepRows) -> int:
        (num_targets,) = self.world.sum_ints([rows.num_targets])
        return num_targets

    def _evaluate(self, last: bool) -> dict[str, Any]:
        """Bits per byte, and ChatCORE, for which the workers share the questions."""
        record = super()._evaluate(last)
        suite, every = self.plan.chat_suite, self.config["chatcore_every"]
        if suite is None or not (last or (every and self.progress.step % every == 0)):
            return record
        metrics = ask_together(suite, self.model, self.tokenizer, self.world).metrics
        self.progress.evals = metrics
        if self.log:
            self.log.log({"step": self.progress.step, **metrics})
        return record | {"chatcore": metrics["chatcore"]}

    def _sample_text(self) -> str:
        return chat_samples(self.model, self.tokenizer, self.progress.step)

    def _own_metrics(self) -> dict[str, Any]:
        plan = self.plan
        return {
            **super()._own_metrics(),
            "conversations_truncated": plan.truncated,
            "conversations_left_out": plan.left_out,
            "padding_fraction": plan.padding,
            **self.progress.evals,
        }
