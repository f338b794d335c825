"""A tiny base run and fine-tunings of it for tests, without Ray."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pretrain_runs import run_plan, tiny_plan

from nanoray.config import SftConfig
from nanoray.train.sft_plan import SftPlan, make_sft_plan

BASE = {"num_iterations": 3, "total_batch_size": 512, "eval_tokens": 512}
TINY_SFT = {
    "max_seq_len": 64,
    "total_batch_size": 1024,
    "device_batch_size": 8,
    "eval_every": 0,
    "eval_tokens": 1024,
    "sample_every": 0,
    "save_every": 0,
    "chatcore_tasks": "",
    "dtype": "float32",
    "compile_mode": "off",
    "seed": 7,
}


def write_conversations(path: Path, count: int, words: tuple[int, int], seed: int = 0) -> str:
    """A JSONL file of conversations, questions and answers of so many words; its path."""
    rng = random.Random(seed)
    lines = []
    for number in range(count):
        question = " ".join(rng.choices("what why who is the red blue cat dog".split(), k=5))
        answer = " ".join(
            rng.choices("the cat sat on a mat and saw one dog".split(), k=rng.randint(*words))
        )
        messages = [
            {"role": "user", "content": f"{number} {question}?"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def make_base(corpus: str, tokenizer_dir: str, run: str, **changes: Any) -> str:
    """Train the base run to its end; its folder."""
    plan = tiny_plan(corpus, tokenizer_dir, run, **BASE | changes)
    assert run_plan(plan)["status"] == "finished"
    return plan.run_dir


def sft_flags(base: str, mixture: str, run: str, **changes: Any) -> list[str]:
    """Command-line flags of a tiny fine-tuning."""
    values = TINY_SFT | {"from_run": base, "mixture": mixture, "run": run} | changes
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags.append(f"--{flag}={value}")
    return flags


def sft_plan(base: str, mixture: str, run: str, **changes: Any) -> SftPlan:
    """The plan of a tiny fine-tuning, ready to run; ``changes`` are flags by field name."""
    plan = make_sft_plan(SftConfig.parse(sft_flags(base, mixture, run, **changes), "test"))
    plan.prepare()
    return plan
