"""Configuration of the evaluation job (``python -m jobs.eval …``)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from nanoray.config.base import JobConfig, WaitForNodes


def split_names(text: str) -> tuple[str, ...]:
    """The names in a text with commas between, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _check_names(text: str) -> str:
    if not split_names(text):
        raise ValueError("give at least one name, or leave the flag out")
    return text


def _check_limit(limit: int) -> int:
    if limit == 0:
        raise ValueError("take at least one, or -1 for all")
    return limit


Names = Annotated[str, AfterValidator(_check_names)]
Limit = Annotated[int, Field(ge=-1), AfterValidator(_check_limit)]


class EvalConfig(JobConfig):
    """What every suite has: the model, and the actors that the work is spread over."""

    run: str | None = Field(
        None, description="run name, or the folder or URI of a run or of a checkpoint"
    )
    step: int | None = Field(None, ge=0, description="checkpoint of that step (default: the last)")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="compute dtype")
    num_actors: int = Field(1, ge=1, description="actors, each with the whole model")
    cpus_per_actor: float = Field(1, gt=0, description="logical CPUs that an actor reserves")
    gpus_per_actor: float | None = Field(
        None, ge=0, description="GPUs of an actor (default: 1 where there are any)"
    )
    wait_for_nodes: WaitForNodes = 0
    seed: int = Field(42, ge=0, le=2**63 - 1, description="of everything that is drawn")


class _AnyModelConfig(EvalConfig):
    hf_path: str | None = Field(
        None, description="a Hugging Face causal LM instead of a run: name on the hub, or folder"
    )

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if bool(self.run) == bool(self.hf_path):
            raise ValueError("give the model: --run NAME or --hf-path NAME, one of the two")
        return self


class _RunConfig(EvalConfig):
    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if not self.run:
            raise ValueError("give the model: --run NAME")
        return self


class BpbConfig(_AnyModelConfig):
    """``python -m jobs.eval bpb``: bits per byte of training and validation text."""

    corpus: str | None = Field(
        None, description="corpus name or path (default: the one the run was trained on)"
    )
    eval_tokens: int = Field(2**21, ge=1, description="tokens of each of the two splits")
    device_batch_size: int = Field(16, ge=1, description="rows of a forward pass")
    on_bad_shard: Literal["fail", "skip"] = Field("fail", description="what to do with bad data")


class SampleConfig(_RunConfig):
    """``python -m jobs.eval sample``: seven fixed prompts, and samples without a prompt."""

    num_free: int = Field(8, ge=0, description="samples without a prompt")
    free_tokens: int = Field(128, ge=1, description="tokens of a sample without a prompt")


class CoreConfig(_AnyModelConfig):
    """``python -m jobs.eval core``: the 22 tasks of the DCLM CORE metric."""

    bundle: str | None = Field(
        None, description="folder of the eval bundle (default: downloaded to NANORAY_HOME)"
    )
    tasks: Names | None = Field(
        None, description="only these tasks, by label, with commas between (default: all 22)"
    )
    max_per_task: Limit = Field(-1, description="examples of a task, drawn by lot (-1: all)")


class ChatEvalConfig(_RunConfig):
    """``python -m jobs.eval chat``: tasks asked in conversation, and ChatCORE."""

    tasks: Names = Field(
        "arc-easy,arc-challenge,mmlu,gsm8k,humaneval,spelling-bee",
        description="task names, with commas between",
    )
    data_dir: str | None = Field(
        None, description="folder of the data sets (default: the Hugging Face hub)"
    )
    words: str | None = Field(
        None, description="list of words for the spelling tasks, one a line (path or URI)"
    )
    max_per_task: Limit = Field(-1, description="examples of a task, evenly spread (-1: all)")
    num_samples: int = Field(1, ge=1, description="answers to a generative problem, for pass@k")
    max_tokens: int = Field(512, ge=1, description="tokens of an answer at most")
    temperature: float = Field(0.0, ge=0, le=100, description="0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="sample from the k likeliest tokens (0: from all)")

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                "--num-samples above 1 needs a --temperature above 0, else all samples are the same"
            )
        return self


def _check_sizes(text: str) -> str:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) >= 1 for size in sizes):
        raise ValueError("take numbers with commas between, such as 1,4,16")
    return text


class InferConfig(_RunConfig):
    """``python -m jobs.eval infer``: latency and throughput over batch sizes."""

    batch_sizes: Annotated[str, AfterValidator(_check_sizes)] = Field(
        "1,4,16", description="requests at once, with commas between"
    )
    prompt_tokens: int = Field(128, ge=1, description="tokens of a prompt")
    new_tokens: int = Field(64, ge=2, description="tokens that are generated after it")
    repeats: int = Field(3, ge=1, description="of which the medians are told")
