"""What the configurations of all training jobs share: cadences, workers, precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nanoray.config.base import JobConfig, WaitForNodes, WorkerRange


class TrainConfig(JobConfig):
    """Flags of every stage of training."""

    eval_every: int = Field(250, ge=0, description="steps between validations (0: only at the end)")
    sample_every: int = Field(2000, ge=0, description="steps between samples (0: only at the end)")
    save_every: int = Field(
        1000, ge=0, description="steps between checkpoints (0: only at the end)"
    )
    keep_checkpoints: int = Field(2, ge=1, description="latest checkpoints to keep")
    log_every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl")

    num_workers: WorkerRange = Field("1", description="workers, or MIN:MAX for elastic training")
    cpus_per_worker: float = Field(1, gt=0, description="logical CPUs that a worker reserves")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of a worker (default: 1 where the cluster has any)"
    )
    max_failures: int = Field(3, ge=0, description="restarts after lost workers before giving up")
    wait_for_nodes: WaitForNodes = 0
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="compute dtype")
    fp8: bool = Field(False, description="fp8 matmuls (Hopper and newer)")
    compile_mode: Literal["default", "max-autotune", "off"] = Field(
        "default", description="torch.compile mode"
    )
    seed: int = Field(42, ge=0, le=2**63 - 1, description="of weights and of the data order")
    dashboard: bool = Field(False, description="start Ray's dashboard with a local Ray")
    wandb: str | None = Field(None, description="project to log to (default: no wandb)")


class StreamTrainConfig(TrainConfig):
    """Flags of the stages that train on the rows of a stream."""

    eval_tokens: int = Field(80 * 524288, ge=1, description="tokens of a validation")
    spike_factor: float = Field(
        3.0, gt=1, description="a loss above this multiple of its average stops the run"
    )
