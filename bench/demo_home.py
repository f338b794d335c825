"""The demo's corpus and tokenizer in a home of the benchmarks' own, made once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = Path(tempfile.gettempdir()) / "nanoray-bench"

# Issue 2's bench shape: d4, width 256, T 512, B 16,384, vocabulary 4,096.
SHAPE = {
    "corpus": "docstrings",
    "depth": 4,
    "head-dim": 64,
    "max-seq-len": 512,
    "total-batch-size": 16384,
    "device-batch-size": 16,
    "eval-tokens": 16384,
}


def job(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def environment() -> dict[str, str]:
    return os.environ | {"NANORAY_HOME": str(HOME)}


def prepare() -> None:
    """Build corpus and tokenizer unless they are there."""
    if not (HOME / "tokenizers" / "docstrings" / "tokenizer.json").exists():
        build = job("jobs.data", "build", "--corpus", "docstrings")
        train = job("jobs.tokenizer", "train", "--config", "jobs/demo_tokenizer.yaml")
        for command in (build, train):
            subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=sys.stderr)


def flags(**changes: object) -> list[str]:
    """Flags of `jobs.pretrain` for the bench shape; underscores stand for dashes."""
    values = SHAPE | {key.replace("_", "-"): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in values.items()]
