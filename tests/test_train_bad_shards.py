"""Pretraining over a corpus with a shard that cannot be read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from pretrain_runs import run_plan, tiny_plan

from nanoray.errors import NanorayError


@pytest.fixture
def damaged(corpus: str, tmp_path: Path) -> Path:
    """The corpus with its second shard cut short."""
    shutil.copytree(corpus, tmp_path / "damaged")
    os.truncate(tmp_path / "damaged" / "shard_00001.parquet", 1000)
    return tmp_path / "damaged"


def test_a_damaged_shard_is_named_or_left_out(
    home: Path, damaged: Path, tokenizer_dir: str
) -> None:
    with pytest.raises(NanorayError, match=r"shard_00001.parquet is damaged.*--on-bad-shard skip"):
        tiny_plan(str(damaged), tokenizer_dir, "fail", num_iterations=2)
    skipping = tiny_plan(str(damaged), tokenizer_dir, "skip", num_iterations=2, on_bad_shard="skip")
    assert "left out   1 shard damaged of the training shards" in skipping.describe()
    assert {Path(group.shard).name for group in skipping.training_row_groups} == {
        "shard_00000.parquet",
        "shard_00002.parquet",
    }
    assert run_plan(skipping)["status"] == "finished"


def test_the_validation_shard_is_never_skipped(
    home: Path, damaged: Path, tokenizer_dir: str
) -> None:
    os.truncate(damaged / "shard_00003.parquet", 1000)
    plan = tiny_plan(str(damaged), tokenizer_dir, "skip", num_iterations=2, on_bad_shard="skip")
    with pytest.raises(NanorayError, match=r"validation shard .*shard_00003.*never skipped"):
        plan.validation_row_groups()
