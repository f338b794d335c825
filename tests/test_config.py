"""Flags, environment and YAML: what wins, and what is refused."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanoray.config
from nanoray.config import (
    RECIPES,
    JobConfig,
    PretrainConfig,
    TokenizerConfig,
    UsageError,
    check_environment,
    parse_worker_range,
    run_job,
)
from nanoray.errors import NanorayError

PROG = "python -m jobs.pretrain"


def parse(*argv: str) -> PretrainConfig:
    return PretrainConfig.parse(argv, PROG)


def write_yaml(folder: Path, text: str, name: str = "config.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `run_job` prints for flags that it must refuse with code 2."""

    def main(argv: Sequence[str]) -> int:
        PretrainConfig.parse(argv, PROG)
        return 0

    with pytest.raises(SystemExit) as exit_info:
        run_job(main, argv)
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_yaml(tmp_path, "depth: 5\nhead-dim: 32\nmax_seq_len: 128\n")
    monkeypatch.setenv("NANORAY_DEPTH", "6")
    monkeypatch.setenv("NANORAY_HEAD_DIM", "16")
    config = parse("--config", path, "--depth", "7")
    assert config.depth == 7  # flag > environment > YAML
    assert config.head_dim == 16  # environment > YAML
    assert config.max_seq_len == 128  # YAML > default
    assert config.aspect_ratio == 64  # default
    assert parse("--config", path).depth == 6
    assert parse().max_seq_len == 2048, "a YAML file must not outlive its call"


def test_config_file_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write_yaml(tmp_path, "depth: 3", "one.yaml")
    two = write_yaml(tmp_path, "depth: 4", "two.yaml")
    monkeypatch.setenv("NANORAY_CONFIG", one)
    assert parse().depth == 3
    assert parse(f"--config={two}").depth == 4
    assert parse("--config", one, "--config", two).depth == 4, "the last flag counts"


def test_yaml_values_mean_what_they_mean_as_flags(tmp_path: Path) -> None:
    path = write_yaml(
        tmp_path,
        "num-workers: 1:4\nrun: 1e5\nfp8: true\nmatrix-lr: 1e-3\ntotal-batch-size: 524_288\n"
        "num-kv-heads: null\nwandb:\n",
    )
    config = parse("--config", path)
    assert config.num_workers == "1:4"  # YAML 1.1 alone would read 64
    assert config.run == "1e5"
    assert config.fp8 is True
    assert config.matrix_lr == 1e-3
    assert config.total_batch_size == 524288
    assert config.num_kv_heads is None
    assert config.wandb is None
    assert parse("--config", write_yaml(tmp_path, "num_workers: 2")).num_workers == "2"
    assert parse("--config", write_yaml(tmp_path, "# nothing\n")).depth == 12


def test_demo_files_are_valid() -> None:
    jobs = Path(__file__).parents[1] / "jobs"
    assert parse("--config", str(jobs / "demo_pretrain.yaml")).run == "demo"
    tokenizer = str(jobs / "demo_tokenizer.yaml")
    assert TokenizerConfig.parse(["--config", tokenizer], PROG).corpus == "docstrings"


def test_booleans_have_a_negative_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANORAY_FP8", "1")
    assert parse().fp8
    assert not parse("--no-fp8").fp8
    assert parse("--dry-run").dry_run


@pytest.mark.parametrize(
    "argv",
    [
        ["--nope", "3"],
        ["--total_batch_size", "4096"],  # flags are in kebab-case
        ["--dep", "4"],  # and never abbreviated
        ["stray"],
    ],
)
def test_unknown_flags(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert argv[0] in failure(capsys, *argv)


def test_unknown_environment_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANORAY_DETPH", "4")
    message = failure(capsys, "--depth", "4")
    assert message.startswith("error: environment variable NANORAY_DETPH is not known")


def test_known_environment_variables() -> None:
    check_environment({"NANORAY_HOME": "/x", "NANORAY_TOTAL_BATCH_SIZE": "1", "HOME": "/x"})
    check_environment({"NANORAY_BYTE_LEVEL": "1"})  # another job's flag


def test_every_job_knows_the_variables_of_all() -> None:
    """Whatever is imported first, all modules of the room are: a job's flags are never unknown."""
    code = "import sys, nanoray.config.base; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for module in pkgutil.iter_modules(nanoray.config.__path__):
        assert f"nanoray.config.{module.name}" in ran.stdout.split()
    for job in JobConfig.registry:
        check_environment({f"NANORAY_{name.upper()}": "1" for name in job.model_fields})


def test_unknown_yaml_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "detph: 4\ndepth: 4\nrunn: x\n")
    message = failure(capsys, "--config", path)
    assert message == f"error: --config {path} has unknown keys: detph, runn\n"


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "depth: [", "\x00", "just words"])
def test_unreadable_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    path = write_yaml(tmp_path, text)
    assert failure(capsys, "--config", path).startswith(f"error: --config {path} ")


def test_missing_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "none.yaml")
    assert f"--config {path} cannot be read" in failure(capsys, "--config", path)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--depth", "x"),
        ("--depth", "0"),
        ("--depth", "2.5"),
        ("--head-dim", "63"),
        ("--recipe", "may"),
        ("--num-workers", "4:2"),
        ("--num-workers", "0"),
        ("--matrix-lr", "inf"),
        ("--matrix-lr", "nan"),
        ("--target-flops", "-1"),
        ("--warmdown-ratio", "1.5"),
        ("--keep-checkpoints", "0"),
        ("--seed", str(2**63)),
        ("--spike-factor", "1"),
        ("--on-bad-shard", "ignore"),
    ],
)
def test_bad_values_name_the_flag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str, value: str
) -> None:
    message = failure(capsys, flag, value)
    assert f"{flag}: " in message
    assert repr(value) in message
    monkeypatch.setenv("NANORAY_" + flag[2:].upper().replace("-", "_"), value)
    assert f"{flag}: " in failure(capsys)


def test_several_bad_values_are_all_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write_yaml(tmp_path, "depth: null\nhead-dim: 3\n")
    message = failure(capsys, "--config", path, "--save-every", "-1")
    assert all(f"--{name}: " in message for name in ("depth", "head-dim", "save-every"))


@pytest.mark.parametrize("pattern", ["SSLX", "sl", "", "S L"])
def test_window_pattern(capsys: pytest.CaptureFixture[str], pattern: str) -> None:
    message = failure(capsys, "--window-pattern", pattern)
    assert "--window-pattern may hold the letters S and L only" in message
    assert repr(pattern) in message


def test_batch_must_be_whole_rows(capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "--total-batch-size", "1000", "--max-seq-len", "512")
    assert "--total-batch-size 1000 is not divisible by --max-seq-len 512" in message
    assert parse("--total-batch-size", "1024", "--max-seq-len", "512").total_batch_size == 1024


def test_two_horizons(capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "--num-iterations", "5", "--target-flops", "1e18")
    assert "give one of --num-iterations and --target-flops" in message
    # The ratio still sets lambda and the batch when the number of steps is given.
    parse("--num-iterations", "5", "--target-param-data-ratio", "8")


@pytest.mark.parametrize(
    ("text", "workers"), [("4", (4, 4)), ("1:4", (1, 4)), (" 2:2 ", (2, 2)), ("16", (16, 16))]
)
def test_worker_ranges(text: str, workers: tuple[int, int]) -> None:
    assert parse_worker_range(text) == workers


@given(st.text(alphabet="0123456789:- x", max_size=6))
def test_wild_worker_ranges(text: str) -> None:
    numbers = [int(n) for n in text.strip().split(":") if re.fullmatch("[0-9]+", n)]
    valid = re.fullmatch("[0-9]+(:[0-9]+)?", text.strip()) and 1 <= numbers[0] <= numbers[-1]
    if valid:
        assert parse_worker_range(text) == (numbers[0], numbers[-1])
    else:
        with pytest.raises(ValueError, match="workers"):
            parse_worker_range(text)


def test_recipes() -> None:
    """recipe.md's values of July and, where they differ, of February."""
    july: dict[str, Any] = {
        "target_param_data_ratio": 12,
        "embedding_lr": 0.3,
        "unembedding_lr": 0.008,
        "matrix_lr": 0.02,
        "scalar_lr": 0.5,
        "weight_decay": 0.28,
        "warmup_steps": 40,
        "warmdown_ratio": 0.65,
        "final_lr_frac": 0.05,
    }
    february = july | {
        "target_param_data_ratio": 10.5,
        "unembedding_lr": 0.004,
        "weight_decay": 0.2,
        "warmup_steps": 0,
        "warmdown_ratio": 0.5,
        "final_lr_frac": 0,
    }
    assert {"july": july, "february": february} == RECIPES
    for recipe, values in RECIPES.items():
        config = parse("--recipe", recipe)
        assert {name: config.recipe_value(name) for name in values} == values
    config = parse("--recipe", "february", "--warmdown-ratio", "0", "--weight-decay", "0")
    assert config.recipe_value("warmdown_ratio") == 0, "a given zero is not a missing value"
    assert config.recipe_value("weight_decay") == 0


@pytest.mark.parametrize("job", [PretrainConfig, TokenizerConfig])
def test_help_lists_every_field(job: type[JobConfig], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        job.parse(["--help"], PROG)
    assert exit_info.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"usage: {PROG}" in shown
    for name, field in job.model_fields.items():
        assert field.description, f"{job.__name__}.{name} has no description"
        assert re.search(rf"--{name.replace('_', '-')}\b", shown)
        assert " ".join(field.description.split()) in shown.replace("- ", "-")


@pytest.mark.parametrize(
    ("outcome", "code", "printed"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (NanorayError("no corpus"), 1, "error: no corpus\n"),
        (UsageError("bad flag"), 2, "error: bad flag\n"),
        (KeyboardInterrupt(), 1, "interrupted\n"),
    ],
)
def test_run_job_exit_codes(
    capsys: pytest.CaptureFixture[str], outcome: Any, code: int, printed: str
) -> None:
    def main(argv: Sequence[str]) -> int | None:
        assert list(argv) == ["--x"]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as exit_info:
        run_job(main, ["--x"])
    assert exit_info.value.code == code
    assert capsys.readouterr().err == printed


def test_run_job_keeps_the_traceback_of_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(_argv: Sequence[str]) -> int:
        raise KeyError("bug")

    def mistaken(_argv: Sequence[str]) -> int:
        raise NanorayError("no corpus")

    with pytest.raises(KeyError, match="bug"):
        run_job(buggy, [])
    monkeypatch.setenv("NANORAY_DEBUG", "1")
    with pytest.raises(NanorayError, match="no corpus"):
        run_job(mistaken, [])
