"""Configuration of the terminal chat (``python -m jobs.chat``)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from nanoray.config.base import JobConfig


class ChatConfig(JobConfig):
    """``python -m jobs.chat``: talk to a model in the terminal."""

    model_config = SettingsConfigDict(cli_shortcuts={"prompt": "p"})

    run: str | None = Field(
        None, description="run name, or the folder or URI of a run or of a checkpoint"
    )
    step: int | None = Field(None, ge=0, description="checkpoint of that step (default: the last)")
    prompt: str | None = Field(None, description="answer this once, on stdout, and exit")
    system: str = Field("", description="system message: how the model is to behave")
    temperature: float = Field(0.6, ge=0, le=100, description="0 takes the likeliest token")
    top_k: int = Field(50, ge=0, description="sample from the k likeliest tokens (0: from all)")
    max_tokens: int = Field(512, ge=1, description="tokens of an answer at most")
    seed: int = Field(42, ge=0, le=2**63 - 1, description="the same words give the same answers")
    raw: bool = Field(
        False, description="continue the text instead of answering it (base models always do)"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="compute dtype")

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if not self.run:
            raise ValueError("give the model: --run NAME")
        return self
