"""Pretraining: a model from nothing, on the rows of a corpus."""

from __future__ import annotations

from nanoray.data.plan import validation_rows
from nanoray.evals.sample import naive_generate, sample_report
from nanoray.optim.schedule import Schedule
from nanoray.train.plan import PretrainPlan
from nanoray.train.stream_worker import StreamWorker
from nanoray.train.validation import HeldOut


class PretrainWorker(StreamWorker):
    """See `StreamWorker`."""

    plan: PretrainPlan

    def _begin(self) -> None:
        self.model.init_weights(self.config["seed"])

    def _rates_batch_tokens(self) -> int:
        return self.plan.total_batch_size

    def _make_schedule(self) -> Schedule:
        return Schedule(
            num_iterations=self.plan.num_iterations,
            warmup_steps=int(self.config["warmup_steps"]),
            warmdown_ratio=self.config["warmdown_ratio"],
            final_lr_frac=self.config["final_lr_frac"],
            recipe=self.config["recipe"],
        )

    def _whence(self, batch_hash: int) -> str:
        look = "look at these documents with `python -m jobs.data inspect`"
        return f"{super()._whence(batch_hash)} ({look})"

    def _held_out(self) -> HeldOut:
        rows = validation_rows(
            self.plan.validation_row_groups(),
            self.tokenizer,
            sequence_len=self.plan.sequence_len,
            num_tokens=self.config["eval_tokens"],
            on_bad=self.config["on_bad_shard"],
        )
        return rows, None

    def _sample_text(self) -> str:
        generate = naive_generate(
            self.model, self.tokenizer, self.config["seed"], self.world.device
        )
        return sample_report(generate, self.tokenizer, step=self.progress.step)
