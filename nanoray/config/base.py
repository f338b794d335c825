"""How a job is configured and run: flags, environment and YAML in, exit code out."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from nanoray.errors import NanorayError

ENV_PREFIX = "NANORAY_"
# Read elsewhere than by a job's fields.
RESERVED_ENV = {"NANORAY_HOME", "NANORAY_DEBUG", "NANORAY_API_KEYS"}


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
WaitForNodes = Annotated[
    float,
    Field(
        ge=0,
        description="seconds to wait at the start for room that a cluster lacks, such as nodes "
        "that an autoscaler adds (0: refuse at once)",
    ),
]


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
