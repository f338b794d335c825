"""Configuration of ``python -m jobs.rl``; the defaults are nanochat's for GSM8K (February)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from nanoray.config.base import JobConfig, WorkerRange
from nanoray.config.train import TrainConfig

MAX_ACTORS = 1000  # of a rollout pool


class RlConfig(TrainConfig):
    """``python -m jobs.rl``: every flag of reinforcement learning."""

    from_run: str | None = Field(
        None, description="chat model: run name, or the folder or URI of a run or of a checkpoint"
    )
    from_step: int | None = Field(None, ge=0, description="its checkpoint (default: the last)")
    run: str | None = Field(
        None, description="run name; the same name resumes (default: <chat run>-rl)"
    )
    task: str = Field("gsm8k", description="the task whose training problems are practised")
    data_dir: str | None = Field(
        None, description="folder of the data sets (default: the Hugging Face hub)"
    )
    words: str | None = Field(
        None, description="word list for the spelling tasks (default: the chat run's)"
    )

    algorithm: Literal["reinforce", "grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo"] = Field(
        "reinforce", description="advantage and loss"
    )
    questions_per_step: int = Field(16, ge=1, description="problems of an optimiser step")
    num_samples: int = Field(16, ge=2, description="answers to a problem")
    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer at most")
    temperature: float = Field(1.0, gt=0, le=100, description="of sampling")
    top_k: int = Field(50, ge=0, description="sample from the k likeliest tokens (0: from all)")
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL term to the chat model")
    num_epochs: float = Field(1.0, gt=0, description="times through the problems")
    num_iterations: int | None = Field(
        None, ge=1, description="horizon in steps (default: the epochs')"
    )
    device_batch_size: int = Field(8, ge=1, description="answers of a micro-batch on one worker")
    refill_factor: float = Field(
        4.0, ge=1, description="problems tried, as a multiple of a step's, to fill a step whose "
        "groups are all right or all wrong (dapo)",
    )  # fmt: skip

    embedding_lr: float = Field(0.2, gt=0, description="AdamW, embeddings")
    unembedding_lr: float = Field(0.004, gt=0, description="AdamW, head")
    matrix_lr: float = Field(0.02, gt=0, description="Muon, matrices of the blocks")
    scalar_lr: float = Field(0.5, gt=0, description="AdamW, per-layer scalars")
    init_lr_frac: float = Field(0.05, gt=0, description="part of these rates to begin with")

    rollout_actors: WorkerRange = Field(
        "1", description="actors that sample, or MIN:MAX for a pool that grows and shrinks"
    )
    rollout_cpus: float = Field(
        1, gt=0, description="logical CPUs that a rollout actor reserves, and its threads"
    )
    rollout_gpus: float | None = Field(
        None, ge=0, description="GPUs of a rollout actor, fractions too (default: 1 where any are)"
    )
    questions_per_call: int = Field(4, ge=1, description="problems sampled together by an actor")
    max_staleness: int = Field(
        0, ge=0, description="optimiser steps that sampling may be behind (0: synchronous)"
    )
    rollout_deadline_s: float = Field(
        600, gt=0, description="an actor that takes longer to sample its problems is replaced"
    )
    reward_deadline_s: float = Field(10, gt=0, description="for judging one answer")

    eval_every: int = Field(60, ge=0, description="steps between pass@k on held-out problems")
    eval_examples: int = Field(400, ge=1, description="held-out problems")
    eval_samples: int = Field(8, ge=1, description="answers to each, so k = 1 to this")
    save_every: int = Field(60, ge=0, description="steps between checkpoints (0: only at the end)")
    sample_every: int = Field(0, ge=0, description="steps between samples (0: only at the end)")
    compile_mode: Literal["default", "max-autotune", "off"] = Field(
        "off",
        description="torch.compile mode of the optimiser on GPUs (the model runs eagerly: "
        "answers are of many lengths)",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.from_run:
            raise ValueError("give the chat model: --from-run NAME")
        return self


class RlStatusConfig(JobConfig):
    """``python -m jobs.rl status [RUN]``."""

    run: str | None = Field(None, description="run name (default: <chat run>-rl)")
    from_run: str | None = Field(None, description="the chat model, as the run was given it")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.run or self.from_run):
            raise ValueError("give the run: --run NAME, or --from-run NAME of its chat model")
        return self


def _auto_is_none(actors: Any) -> Any:
    return None if actors == "auto" else actors


class RlScaleConfig(RlStatusConfig):
    """``python -m jobs.rl scale [RUN ACTORS]``."""

    actors: Annotated[int | None, BeforeValidator(_auto_is_none)] = Field(
        ge=1,
        le=MAX_ACTORS,
        description="rollout actors from now on; auto: the pool grows and shrinks by itself",
    )
