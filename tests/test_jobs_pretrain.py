"""`python -m jobs.pretrain` as its users meet it: the plan, and every mistake as one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import make_texts
from pretrain_runs import run_plan, tiny_flags, tiny_plan
from rich.console import Console

import jobs.pretrain
from jobs.progress import ProgressPrinter
from nanoray.config import UsageError
from nanoray.errors import NanorayError
from nanoray.tokenizer import train_tokenizer
from nanoray.train.record import check_resume, record_config, record_failure

ROOT = Path(__file__).parents[1]
Flags = Callable[..., list[str]]


@pytest.fixture
def flags(home: Path, corpus: str, tokenizer_dir: str) -> Flags:
    def make(**changes: Any) -> list[str]:
        places = {"corpus": corpus, "tokenizer_dir": tokenizer_dir, "run": "mine"}
        for name in ("corpus", "run"):
            places[name] = changes.pop(name, places[name])
        return [*tiny_flags(**places, **changes), "--dry-run"]

    return make


def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    flags: Flags, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs.pretrain.main(flags(weight_decay=0.28)) == 0
    printed = capsys.readouterr().out
    assert "depth 2, width 32, 2 heads of 16, vocabulary 400" in printed
    assert "20 steps of 512 tokens = 10,240 tokens" in printed
    assert "dry run: configuration, data and resources are fine" in printed
    assert not list(home.rglob("*.json*"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"corpus": "nowhere"}, NanorayError, r"no corpus at .*nowhere.*jobs\.data build"),
        ({"tokenizer": "nobody"}, NanorayError, r"no tokenizer in .*jobs\.tokenizer train"),
        ({"total_batch_size": 500}, UsageError, "500 is not divisible by --max-seq-len 32"),
        ({"window_pattern": "SLX"}, UsageError, "--window-pattern may hold .* S and L only"),
        ({"num_kv_heads": 3}, NanorayError, "must be a multiple of n_kv_head 3"),
        ({"num_workers": "4:1"}, UsageError, "--num-workers: .*MIN <= MAX"),
        ({"num_workers": "500"}, NanorayError, "500 workers .* this machine has"),
        ({"run": "../../etc"}, NanorayError, "not a usable name"),
        ({"num_iterations": None, "target_flops": 1.0}, NanorayError, "less than one step"),
        ({"depth": 0}, UsageError, "--depth"),
        (
            {"max_seq_len": 262144, "total_batch_size": 262144},
            NanorayError,
            "too little text for one row of 262144 tokens",
        ),
        ({"gpus_per_worker": 2}, NanorayError, "1 workers need 2 GPUs"),
    ],
)
def test_mistakes_are_named(
    flags: Flags, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        jobs.pretrain.main(flags(**changes))


def test_one_shard_only(flags: Flags, corpus: str, tmp_path: Path) -> None:
    shutil.copy(Path(corpus) / "shard_00000.parquet", tmp_path)
    with pytest.raises(NanorayError, match="one shard"):
        jobs.pretrain.main(flags(corpus=str(tmp_path)))


def test_a_home_that_cannot_be_written(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NANORAY_HOME", str(tmp_path / "file"))
    with pytest.raises(NanorayError, match="is not writable"):
        jobs.pretrain.main(flags())


def test_a_tokenizer_that_changed_is_refused(
    flags: Flags, home: Path, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "changing"
    train_tokenizer(make_texts(100), 300).save(folder)
    plan = tiny_plan(corpus, str(folder), "mine", num_iterations=2)
    run_plan(plan)
    record_config(plan)
    train_tokenizer(make_texts(100), 320).save(folder)
    with pytest.raises(NanorayError, match=r"another configuration[\s\S]*tokenizer has changed"):
        jobs.pretrain.main(flags(tokenizer=str(folder), num_iterations=2))
    # The other tokenizer back: the run is finished, and says so without doing anything.
    train_tokenizer(make_texts(100), 300).save(folder)
    assert jobs.pretrain.main(flags(tokenizer=str(folder), num_iterations=2)) == 0
    assert "run mine is finished" in capsys.readouterr().out


def test_git_is_not_needed(
    home: Path, corpus: str, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # as in a slim image
    plan = tiny_plan(corpus, tokenizer_dir, "mine")
    record_config(plan)
    versions = json.loads(Path(plan.run_dir, "config.json").read_text())["versions"]
    assert {"torch", "ray"} <= set(versions)
    assert "git" not in versions


def test_what_a_message_offers_is_not_refused(home: Path, corpus: str, tokenizer_dir: str) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "mine", num_iterations=2)
    run_plan(plan)
    record_config(plan)
    mended = {"num_iterations": 2, "on_bad_shard": "skip", "spike_factor": 9.0}
    skipping = tiny_plan(corpus, tokenizer_dir, "mine", **mended)
    assert check_resume(skipping)
    record_config(skipping)
    with pytest.raises(NanorayError, match=r"--on-bad-shard: was skip, is fail"):
        check_resume(plan)


def test_without_config_json_the_checkpoint_tells_the_configuration(
    home: Path, corpus: str, tokenizer_dir: str
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "mine", num_iterations=4, save_every=2)
    other = tiny_plan(corpus, tokenizer_dir, "mine", num_iterations=4, seed=8)
    assert not check_resume(other), "there is nothing yet"
    run_plan(plan)
    assert not Path(plan.run_dir, "config.json").exists()
    for damaged in (None, "step_000004"):
        if damaged:
            Path(plan.checkpoints_dir, damaged, "meta.json").write_text("{}")
        assert check_resume(plan)
        with pytest.raises(NanorayError, match=r"another configuration[\s\S]*--seed: was 7, is 8"):
            check_resume(other)


def test_a_failed_run_says_so_in_its_summary(home: Path, corpus: str, tokenizer_dir: str) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "failing", num_iterations=2)
    record_failure(plan, "the disk is full")
    summary = json.loads(Path(plan.run_dir, "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", "the disk is full")


@pytest.mark.slow
def test_the_command_line_itself(flags: Flags) -> None:
    """Exit codes and messages of the real process."""

    def start(*words: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.pretrain", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | env, stdout=pipe, stderr=pipe, text=True
        )

    bad = start("--no-such-flag", "1")
    missing = start(*flags(corpus="nowhere"))
    deaf = start(*flags(), RAY_ADDRESS="127.0.0.1:1")
    bad.communicate()
    assert bad.returncode == 2
    stdout, stderr = missing.communicate()
    assert (missing.returncode, stdout) == (1, "")
    assert stderr.startswith("error: no corpus at")
    assert len(stderr.splitlines()) == 1
    _stdout, stderr = deaf.communicate()
    assert deaf.returncode == 1
    assert "cluster at RAY_ADDRESS=127.0.0.1:1 cannot be joined" in stderr
    assert "Traceback" not in stderr


def test_progress_on_a_terminal_and_elsewhere() -> None:
    step = {
        "step": 1,
        "loss": 2.5,
        "tokens_per_s": 1234.5,
        "mfu": 0.5,
        "data_wait_s": 0.01,
        "step_s": 1.0,
        "eta_s": 3700,
    }
    plain = StringIO()
    with ProgressPrinter(10, Console(file=plain, width=200)) as printer:
        printer(step)
        printer(step | {"step": 2})  # too soon for another line
        printer({"step": 5, "val_bpb": 1.25})
        printer({"warning": "odd [bold]"})
    lines = plain.getvalue().splitlines()
    assert lines[1] == (
        "step 1/10 · loss 2.5000 · 1,234 tok/s · mfu 50 % · wait 1.0 % · eta 1:01:40"
    )
    assert lines[2:] == ["step 5 · validation 1.2500 bits/byte", "warning: odd [bold]"]
    terminal = StringIO()
    with ProgressPrinter(10, Console(file=terminal, force_terminal=True, width=100)) as printer:
        printer(step)
    assert "step 1/10" in terminal.getvalue()
