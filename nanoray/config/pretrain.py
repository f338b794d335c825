"""Configuration of ``python -m jobs.pretrain``, and the recipes that fill in what is not given."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from nanoray.config.train import StreamTrainConfig

# What the two recipes set where no flag does (sources: nanochat 92d63d4 and a54691b).
RECIPES: dict[str, dict[str, float]] = {
    "july": {
        "target_param_data_ratio": 12.0,
        "embedding_lr": 0.3,
        "unembedding_lr": 0.008,
        "matrix_lr": 0.02,
        "scalar_lr": 0.5,
        "weight_decay": 0.28,
        "warmup_steps": 40,
        "warmdown_ratio": 0.65,
        "final_lr_frac": 0.05,
    },
    "february": {
        "target_param_data_ratio": 10.5,
        "embedding_lr": 0.3,
        "unembedding_lr": 0.004,
        "matrix_lr": 0.02,
        "scalar_lr": 0.5,
        "weight_decay": 0.2,
        "warmup_steps": 0,
        "warmdown_ratio": 0.5,
        "final_lr_frac": 0.0,
    },
}


class PretrainConfig(StreamTrainConfig):
    """``python -m jobs.pretrain``: every flag of pretraining."""

    run: str | None = Field(None, description="run name; the same name resumes (default: d<depth>)")
    recipe: Literal["july", "february"] = Field("july", description="preset of hyperparameters")
    corpus: str = Field("climbmix", description="corpus name under NANORAY_HOME/data, or a path")
    tokenizer: str | None = Field(None, description="tokenizer name or path (default: the corpus)")

    depth: int = Field(12, ge=1, le=256, description="the dial: number of layers")
    aspect_ratio: int = Field(64, ge=1, description="width = depth * aspect ratio, rounded up")
    head_dim: int = Field(128, ge=2, multiple_of=2, description="channels of an attention head")
    num_kv_heads: int | None = Field(None, ge=1, description="key/value heads (default: all)")
    max_seq_len: int = Field(2048, ge=8, description="T, tokens of context")
    window_pattern: str = Field("SSSL", description="S short, L long attention, tiled over layers")

    num_iterations: int | None = Field(None, ge=1, description="horizon in steps")
    target_flops: float | None = Field(None, gt=0, description="horizon in FLOPs")
    target_param_data_ratio: float | None = Field(
        None, gt=0, description="horizon as tokens per parameter (default: the recipe's)"
    )

    device_batch_size: int = Field(32, ge=1, description="rows of a micro-batch on one worker")
    total_batch_size: int | None = Field(
        None, ge=1, description="B, tokens of a step over all workers (default: the law's)"
    )
    embedding_lr: float | None = Field(None, gt=0, description="AdamW, embeddings")
    unembedding_lr: float | None = Field(None, gt=0, description="AdamW, head")
    matrix_lr: float | None = Field(None, gt=0, description="Muon, matrices of the blocks")
    scalar_lr: float | None = Field(None, gt=0, description="AdamW, per-layer scalars")
    weight_decay: float | None = Field(None, ge=0, description="Muon's at depth 12; the law scales")
    warmup_steps: int | None = Field(None, ge=0, description="steps of linear warm-up")
    warmdown_ratio: float | None = Field(None, ge=0, le=1, description="part of linear decay")
    final_lr_frac: float | None = Field(None, ge=0, le=1, description="learning rate at the end")

    on_bad_shard: Literal["fail", "skip"] = Field("fail", description="what to do with bad data")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if set(self.window_pattern) - set("SL") or not self.window_pattern:
            raise ValueError(
                f"--window-pattern may hold the letters S and L only (got {self.window_pattern!r})"
            )
        if self.num_iterations and self.target_flops:
            raise ValueError("give one of --num-iterations and --target-flops, not both")
        if self.total_batch_size and self.total_batch_size % self.max_seq_len:
            raise ValueError(
                f"--total-batch-size {self.total_batch_size} is not divisible by --max-seq-len "
                f"{self.max_seq_len}: a step is made of whole rows"
            )
        return self

    def recipe_value(self, name: str) -> float:
        """A field's value, or the recipe's where it was not given."""
        value = getattr(self, name)
        return RECIPES[self.recipe][name] if value is None else value
