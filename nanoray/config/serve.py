"""Configuration of the chat service: what a replica serves, and the job that starts it here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from nanoray.config.base import JobConfig, WaitForNodes, WorkerRange


class ModelChoice(BaseModel):
    """One model of the service."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="what clients call it"
    )
    run: str = Field(
        min_length=1, description="run name, or the folder or URI of a run or of a checkpoint"
    )
    step: int | None = Field(
        default=None, ge=0, description="checkpoint of that step (default: the last there is now)"
    )


class ChatServiceConfig(BaseModel):
    """What a replica serves: the deployment's ``user_config``. Holds no secret: it is shown."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    models: tuple[ModelChoice, ...] = Field(
        min_length=1, description="served side by side; the first one is the default"
    )
    num_slots: int = Field(default=16, ge=1, description="sequences that a model decodes together")
    max_len: int | None = Field(
        default=None, ge=2, description="longest sequence in tokens (default: the training context)"
    )
    prefill_chunk: int = Field(
        default=256, ge=1, description="most prompt tokens computed between two decoding steps"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="compute dtype"
    )
    num_threads: int = Field(default=1, ge=1, description="threads of torch in a replica")
    request_timeout_s: float = Field(
        default=300.0, gt=0, description="an answer that takes longer is broken off"
    )
    max_body_bytes: int = Field(
        default=2 * 2**20, ge=1024, description="larger requests are refused unread"
    )
    coalesce_s: float = Field(
        default=0.1, ge=0, description="tokens after the first are sent together for so long"
    )
    api_keys_file: str | None = Field(
        default=None,
        description="one key a line; with none here or in NANORAY_API_KEYS all may ask",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        _check_names(self.models)
        return self


def _check_names(models: Sequence[ModelChoice]) -> None:
    names = [model.name for model in models]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two models are named {doubled[0]}: give each a name of its own")


def parse_models(text: str) -> tuple[ModelChoice, ...]:
    """``"demo-sft, demo@400"`` -> models named after their runs, with the step where two would be
    named alike. Raises ValueError.
    """
    asked = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(.+)@(\d+)", word)
        run, step = (match[1], int(match[2])) if match else (word, None)
        asked.append((re.sub(r"[^A-Za-z0-9._-]", "-", _run_name(run)).strip("-."), run, step))
    if not asked:
        raise ValueError("give a run, such as --run demo-sft")
    names = [name for name, _, _ in asked]
    choices = [
        ModelChoice(
            name=f"{name}-{step}" if step is not None and names.count(name) > 1 else name,
            run=run,
            step=step,
        )
        for name, run, step in asked
    ]
    _check_names(choices)
    return tuple(choices)


def _run_name(run: str) -> str:
    """The part of a name, path or URI that names the run: …/demo/checkpoints/step_000010 too."""
    parts = run.rstrip("/").split("/")
    return parts[-3] if len(parts) > 2 and parts[-2] == "checkpoints" else parts[-1]


def _check_models(text: str) -> str:
    parse_models(text)
    return text


class ServeConfig(JobConfig):
    """``python -m jobs.serve``: chat over HTTP, with a page."""

    run: Annotated[str, AfterValidator(_check_models)] | None = Field(
        None,
        description="run name, folder or URI; several with commas, RUN@STEP for a step "
        "(default: its last checkpoint)",
    )
    step: int | None = Field(None, ge=0, description="checkpoint of that step, of a single run")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0: everywhere")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    root_path: str = Field(
        "/", pattern=r"^/(?:[A-Za-z0-9._~-]+(?:/[A-Za-z0-9._~-]+)*)?$", description="path prefix"
    )
    replicas: WorkerRange = Field("1", description="replicas, or MIN:MAX to follow the load")
    cpus_per_replica: int = Field(1, ge=1, description="logical CPUs and torch threads of each")
    gpus_per_replica: float = Field(0, ge=0, description="GPUs of each")
    wait_for_nodes: WaitForNodes = 0
    num_slots: int = Field(16, ge=1, description="answers that a replica writes at once, a model")
    max_len: int | None = Field(
        None, ge=2, description="longest sequence in tokens (default: the training context)"
    )
    max_queue: int = Field(
        64, ge=1, description="requests that wait beyond those; further ones get a 429 at once"
    )
    request_timeout_s: float = Field(300.0, gt=0, description="an answer's deadline")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="compute dtype")
    api_keys_file: str | None = Field(
        None, description="file of API keys, one a line (or NANORAY_API_KEYS, with commas)"
    )
    export_tokenizer: str | None = Field(
        None,
        description="write the model's tokenizer to this folder in Hugging Face's form, and exit "
        "(lm_eval reads it)",
    )
    dashboard: bool = Field(False, description="start Ray's dashboard, too")

    @model_validator(mode="after")
    def _one_step(self) -> Self:
        if not self.run:
            raise ValueError("give the model: --run NAME")
        if self.step is not None:
            models = parse_models(self.run)
            if len(models) > 1 or models[0].step is not None:
                raise ValueError("--step is for a single run; write RUN@STEP for several")
        return self

    def models(self) -> tuple[ModelChoice, ...]:
        """The models asked for; steps that were not given are None."""
        assert self.run is not None
        models = parse_models(self.run)
        if self.step is not None:
            models = (models[0].model_copy(update={"step": self.step}),)
        return models
