"""Configuration of ``python -m jobs.tokenizer``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nanoray.config.base import JobConfig


class TokenizerConfig(JobConfig):
    """``python -m jobs.tokenizer train|eval``."""

    corpus: str = Field("docstrings", description="corpus name under NANORAY_HOME/data, or a path")
    tokenizer: str | None = Field(None, description="name of the tokenizer (default: the corpus's)")
    vocab_size: int = Field(32768, ge=257, le=2**24, description="ids, special tokens included")
    max_chars: int = Field(2_000_000_000, gt=0, description="characters to train on")
    doc_cap: int = Field(10_000, gt=0, description="characters of one document at most")
    byte_level: bool = Field(False, description="257 symbols (bytes and BOS) instead of BPE")
    eval_chars: int = Field(2_000_000, gt=0, description="validation characters that eval reads")
    on_bad_shard: Literal["fail", "skip"] = Field(
        "fail", description="unusable shards and rows: stop and name them, or leave them out"
    )
    show: str | None = Field(None, description="text whose tokens eval prints in colours")
