"""What is not imported: torch and its compiler cost seconds at every start."""

from __future__ import annotations

import subprocess
import sys

import pytest


def imported(program: str) -> set[str]:
    """The modules that there are after a program, in a Python of its own."""
    program += "\nimport sys\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        *("jobs.pretrain", "jobs.sft", "jobs.rl", "jobs.serve", "jobs.status", "jobs.eval"),
        *("nanoray.train.needs", "nanoray.rl.needs", "nanoray.rl.pool", "nanoray.data.stream"),
    ],
)
def test_planning_the_preflight_and_packing_do_without_torch(module: str) -> None:
    assert "torch" not in imported(f"import {module}")


@pytest.mark.parametrize("module", ["nanoray.train.ray_glue", "nanoray.rl.ray_glue", "serve.app"])
def test_a_start_does_without_the_compiler(module: str) -> None:
    assert "torch._dynamo" not in imported(f"import {module}")


def test_a_step_that_is_not_compiled_does_without_the_compiler() -> None:
    program = """
import torch
from nanoray.model.compile import compile_model
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT

config = GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
model = compile_model(GPT(config, torch.float32).place(torch.device("cpu")), "off")
model.init_weights(0)
ids = torch.randint(0, 64, (2, 32))
model(ids, ids).sum().backward()
"""
    assert "torch._dynamo" not in imported(program)
