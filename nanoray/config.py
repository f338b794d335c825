"""Typed configuration of the jobs: flags, environment, YAML, and the recipe's presets.

A value is taken from the first of: a flag (``--total-batch-size``), an environment variable
(``NANORAY_TOTAL_BATCH_SIZE``), the YAML file given by ``--config``, the default. Unknown keys
are errors in all of them. A field whose default is ``None`` follows from the dial or from the
recipe; `resolve` turns it into a number.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from nanoray.errors import NanorayError

ENV_PREFIX = "NANORAY_"
# Read elsewhere than by a job's fields.
RESERVED_ENV = {"NANORAY_HOME", "NANORAY_DEBUG"}


class UsageError(NanorayError):
    """Flags, environment or YAML that cannot be understood. Exit code 2."""


def parse_worker_range(text: str) -> tuple[int, int]:
    """``"4"`` → (4, 4), ``"1:4"`` → (1, 4). Raises ValueError."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
    if not match:
        raise ValueError("take a number of workers such as 4, or a range such as 1:4")
    low = int(match[1])
    high = int(match[2] or low)
    if not 1 <= low <= high:
        raise ValueError(f"a range of workers needs 1 <= MIN <= MAX, this is {text}")
    return low, high


def _check_workers(text: str) -> str:
    parse_worker_range(text)
    return text


WorkerRange = Annotated[str, AfterValidator(_check_workers)]


class JobConfig(BaseSettings):
    """What every job has: ``--config``, ``--dry-run`` and strict parsing."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        nested_model_default_partial_update=True,
        allow_inf_nan=False,
    )
    _yaml_values: ClassVar[dict[str, Any]] = {}
    registry: ClassVar[list[type[JobConfig]]] = []

    config: Path | None = Field(None, description="YAML file with values for these flags")
    dry_run: bool = Field(False, description="validate everything, print the plan, exit")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        JobConfig.registry.append(cls)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, InitSettingsSource(settings_cls, cls._yaml_values)

    @classmethod
    def parse(cls, argv: Sequence[str], prog: str) -> Self:
        """The configuration that flags, environment and YAML give together.

        Raises:
            UsageError: an unknown key or a value out of its range; the message names the flag.
            SystemExit: ``--help``, or flags that argparse itself refuses (code 2).
        """
        check_environment()
        cls._yaml_values = _read_yaml(_config_file(argv), cls)
        try:
            return cls(_cli_parse_args=list(argv), _cli_prog_name=prog)  # type: ignore[call-arg]
        except ValidationError as error:
            raise UsageError(_explain(error)) from error
        finally:
            cls._yaml_values = {}


def check_environment(environ: Mapping[str, str] | None = None) -> None:
    """Refuse ``NANORAY_…`` variables that no job knows: a typo must not pass silently."""
    importlib.import_module("nanoray.config_data")  # registers the other jobs' fields
    known = set(RESERVED_ENV)
    for config in JobConfig.registry:
        known |= {ENV_PREFIX + name.upper() for name in config.model_fields}
    for name in environ if environ is not None else os.environ:
        if name.startswith(ENV_PREFIX) and name not in known:
            raise UsageError(
                f"environment variable {name} is not known to any job; remove it, or see "
                f"`python -m jobs.<name> --help` for the flags (a flag --some-flag is "
                f"{ENV_PREFIX}SOME_FLAG)"
            )


def _config_file(argv: Sequence[str]) -> str | None:
    path = os.environ.get("NANORAY_CONFIG")
    for i, word in enumerate(argv):  # of a flag given twice the last counts, as for all flags
        if word == "--config" and i + 1 < len(argv):
            path = argv[i + 1]
        elif word.startswith("--config="):
            path = word.split("=", 1)[1]
    return path


class _PlainLoader(yaml.SafeLoader):
    """Leaves scalars as the text they are, so that a value means what it means as a flag.

    YAML 1.1 would read the worker range 1:4 as 64, and 2 as a number where a text is wanted.
    """


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(path: str | None, cls: type[JobConfig]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _PlainLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold `key: value` lines")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(values) - set(cls.model_fields))
    if unknown:
        raise UsageError(f"--config {path} has unknown keys: {', '.join(unknown)}")
    return values


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        flag = "--" + "-".join(str(p) for p in item["loc"]).replace("_", "-")
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            parts.append(f"{flag} is not a flag of this job")
        elif not item["loc"]:
            parts.append(message)
        else:
            parts.append(f"{flag}: {message} (got {item['input']!r})")
    return "; ".join(parts)


def run_job(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Run a job's ``main`` and exit with 0 (ok), 1 (failed) or 2 (bad usage).

    A user's mistake is printed as one sentence; anything else keeps its traceback.
    """
    try:
        code = main(sys.argv[1:] if argv is None else argv)
    except NanorayError as error:
        if os.environ.get("NANORAY_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(code or 0)


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


class TokenizerConfig(JobConfig):
    """``python -m jobs.tokenizer train|eval``."""

    corpus: str = Field("docstrings", description="corpus name under NANORAY_HOME/data, or a path")
    tokenizer: str | None = Field(None, description="name of the tokenizer (default: the corpus's)")
    vocab_size: int = Field(32768, ge=257, le=2**24, description="ids, special tokens included")
    max_chars: int = Field(2_000_000_000, gt=0, description="characters to train on")
    doc_cap: int = Field(10_000, gt=0, description="characters of one document at most")
    byte_level: bool = Field(False, description="257 symbols (bytes and BOS) instead of BPE")
    eval_chars: int = Field(2_000_000, gt=0, description="validation characters that eval reads")
    show: str | None = Field(None, description="text whose tokens eval prints in colours")


class PretrainConfig(JobConfig):
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

    eval_every: int = Field(250, ge=0, description="steps between validations (0: only at the end)")
    eval_tokens: int = Field(80 * 524288, ge=1, description="tokens of a validation")
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
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="compute dtype")
    fp8: bool = Field(False, description="fp8 matmuls (Hopper and newer)")
    compile_mode: Literal["default", "max-autotune", "off"] = Field(
        "default", description="torch.compile mode"
    )
    seed: int = Field(42, ge=0, le=2**63 - 1, description="of weights and of the data order")
    on_bad_shard: Literal["fail", "skip"] = Field("fail", description="what to do with bad data")
    spike_factor: float = Field(
        3.0, gt=1, description="a loss above this multiple of its average stops the run"
    )
    dashboard: bool = Field(False, description="start Ray's dashboard with a local Ray")
    wandb: str | None = Field(None, description="project to log to (default: no wandb)")

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
