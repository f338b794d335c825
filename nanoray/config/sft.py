"""Configuration of ``python -m jobs.sft``, and what the recipes set for it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nanoray.config.eval import Limit
from nanoray.config.train import StreamTrainConfig

# What the two recipes set where no flag does (sources: nanochat 92d63d4 and a54691b).
SFT_RECIPES: dict[str, dict[str, Any]] = {
    "july": {
        "mixture": "smoltalk, mmlu*3, gsm8k*4",
        "train_on": "assistant",
        "init_lr_frac": 0.8,
        "warmdown_ratio": 0.5,
    },
    "february": {
        "mixture": "smoltalk, mmlu, gsm8k*2, identity*2, simple-spelling, spelling-bee",
        "train_on": "all",
        "init_lr_frac": 1.0,
        "warmdown_ratio": 0.2,
    },
}


class SftConfig(StreamTrainConfig):
    """``python -m jobs.sft``: every flag of supervised fine-tuning."""

    from_run: str | None = Field(
        None, description="base model: run name, or the folder or URI of a run or of a checkpoint"
    )
    from_step: int | None = Field(None, ge=0, description="its checkpoint (default: the last)")
    run: str | None = Field(
        None, description="run name; the same name resumes (default: <base run>-sft)"
    )

    mixture: str | None = Field(
        None,
        description="conversations: NAME*EPOCHS with commas between; a name is a task or a JSONL "
        "file (default: the recipe's)",
    )
    validation: str | None = Field(
        None, description="mixture to validate on (default: the mixture's tasks, their test split)"
    )
    data_dir: str | None = Field(
        None, description="folder of the data sets (default: the Hugging Face hub)"
    )
    words: str | None = Field(
        None,
        description="word list for the spelling tasks (default: frequent words of the base run's "
        "corpus)",
    )
    train_on: Literal["assistant", "all"] | None = Field(
        None, description="tokens that count: the assistant's, or all (default: the recipe's)"
    )

    max_seq_len: int | None = Field(None, ge=8, description="T (default: the base run's)")
    device_batch_size: int | None = Field(
        None, ge=1, description="rows of a micro-batch on one worker (default: the base run's)"
    )
    total_batch_size: int | None = Field(
        None, ge=1, description="B, tokens of a step over all workers (default: the base run's)"
    )
    num_iterations: int | None = Field(
        None, ge=1, description="horizon in steps (default: once through the mixture)"
    )
    embedding_lr: float | None = Field(None, gt=0, description="(default: the base run's)")
    unembedding_lr: float | None = Field(None, gt=0, description="(default: the base run's)")
    matrix_lr: float | None = Field(None, gt=0, description="(default: the base run's)")
    scalar_lr: float | None = Field(None, gt=0, description="(default: the base run's)")
    init_lr_frac: float | None = Field(
        None, gt=0, description="part of these rates to begin with (default: the recipe's)"
    )
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="part of linear warm-up")
    warmdown_ratio: float | None = Field(
        None, ge=0, le=1, description="part of linear decay (default: the recipe's)"
    )
    final_lr_frac: float = Field(0.0, ge=0, le=1, description="learning rate at the end")
    load_optimizer: bool = Field(True, description="go on with the base run's optimiser moments")

    chatcore_every: int = Field(
        200, ge=0, description="steps between ChatCORE evaluations (0: only at the end)"
    )
    chatcore_tasks: str = Field(
        "arc-easy,arc-challenge,mmlu,gsm8k,humaneval",
        description="its tasks, with commas between (empty: no such evaluation)",
    )
    chatcore_max_cat: Limit = Field(-1, description="questions of a multiple-choice task (-1: all)")
    chatcore_max_sample: Limit = Field(
        24, description="problems of a task with free answers (-1: all)"
    )
    chatcore_max_tokens: int = Field(512, ge=1, description="tokens of an answer at most")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.from_run:
            raise ValueError("give the base model: --from-run NAME")
        return self

    def recipe_value(self, name: str, recipe: str) -> Any:
        """A field's value, or that recipe's where it was not given."""
        value = getattr(self, name)
        return SFT_RECIPES[recipe][name] if value is None else value
