"""The figures of supervised fine-tuning.

    python bench/sft.py [--data DIR] [--rounds 3]

1. speed: tokens a second of SFT steps against pretraining steps, same shapes (T 512, B 16,384),
   in this process, rounds in turn. Compiled, as a user runs them.
2. padding: share of the rows at T = 2048 of DIR's conversations (``sft/train.jsonl``), GSM8K and
   the MMLU questions, all of them.
3. stream: seconds to read, render, pack and stream all of GSM8K's training problems through Ray
   Data, as `jobs.sft` does.

2 and 3 need --data, a folder with ``sft``, ``gsm8k`` and ``mmlu``. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from demo_home import HOME, environment, flags, prepare

os.environ |= environment()

import torch

from nanoray.config import PretrainConfig, SftConfig
from nanoray.data.blocks import Cursor, local_blocks, step_rows
from nanoray.data.conversations import ConversationStream, measure, pack
from nanoray.data.plan import layout
from nanoray.tasks.catalog import Sources
from nanoray.tasks.mixture import MixtureSource
from nanoray.tokenizer import load_tokenizer
from nanoray.train.plan import make_plan
from nanoray.train.run_plan import StreamRunPlan
from nanoray.train.sft_plan import make_sft_plan
from nanoray.train.stages import make_worker, run_worker
from nanoray.train.stream_worker import StreamWorker
from nanoray.train.worker import Hooks
from nanoray.train.world import World

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 12
SKIPPED = 2  # the first steps of a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    prepare()
    result: dict[str, Any] = {"bench": "sft", **speed(args.rounds)}
    if args.data:
        result |= padding(args.data) | stream(args.data)
    print(json.dumps(result))


def speed(rounds: int) -> dict[str, float]:
    base = make_plan(PretrainConfig.parse(flags(run="sft-base", num_iterations=1), "bench"))
    if not Path(base.checkpoints_dir).exists():
        run_worker(base, ALONE, local_blocks, Hooks())
    steps = rounds * STEPS
    pretrain = make_plan(PretrainConfig.parse(flags(run="speed", num_iterations=steps), "bench"))
    words = ["--from-run=sft-base", "--run=sft-speed", "--mixture=arithmetic, identity"]
    words += ["--chatcore-tasks=", f"--num-iterations={steps}", "--eval-tokens=1024"]
    sft = make_sft_plan(SftConfig.parse(words, "bench"))
    sft.prepare()
    sides = {"pretrain": Side(pretrain), "sft": Side(sft)}
    for _ in range(rounds):
        for side in sides.values():
            side.run()
    medians = {name: statistics.median(side.seconds) for name, side in sides.items()}
    for side in sides.values():
        side.worker.close()
    return {
        "pretrain_tokens_per_s": round(pretrain.total_batch_size / medians["pretrain"]),
        "sft_tokens_per_s": round(sft.total_batch_size / medians["sft"]),
        "sft_over_pretrain": round(medians["pretrain"] / medians["sft"], 3),
    }


class Side:
    """One of the two that are timed, step by step."""

    def __init__(self, plan: StreamRunPlan) -> None:
        self.worker: StreamWorker = make_worker(plan, ALONE, local_blocks, Hooks())
        stream = self.worker.stream
        blocks = local_blocks(stream, self.worker.tokenizer, Cursor())
        self._shares = step_rows(blocks, stream, 0, 1)
        self.worker.step.warm_up(plan.sequence_len)
        self.seconds: list[float] = []

    def run(self) -> None:
        for number in range(STEPS):
            start = time.perf_counter()
            rows = next(self._shares)
            targets = self.worker._num_targets(rows)
            self.worker.step(rows.ids, targets, 0.1, 0.9, 0.0, rows.trained)
            if number >= SKIPPED:
                self.seconds.append(time.perf_counter() - start)


def padding(data: Path) -> dict[str, float]:
    """At T = 2048 of the three real data sets."""
    text = f"{data / 'sft' / 'train.jsonl'}, gsm8k, mmlu"
    mixture = MixtureSource(text, "train", Sources(str(data)))
    count = len(mixture.load())
    tokenizer = load_tokenizer(HOME / "tokenizers" / "docstrings")
    measured = measure(mixture, count, tokenizer, 2048, "assistant")
    rows = pack(measured.lengths, 2049)
    share = 1 - int(measured.lengths.sum()) / (len(rows) * 2049)
    return {
        "conversations": count,
        "truncated": measured.truncated,
        "rows": len(rows),
        "padding": round(share, 5),
    }


def stream(data: Path) -> dict[str, float]:
    """GSM8K's training problems, from files to the rows of all steps of an epoch, by Ray Data."""
    import ray

    from nanoray import fleet
    from nanoray.data.stream import training_dataset, worker_blocks

    fleet.connect()
    tokenizer_dir = str(HOME / "tokenizers" / "docstrings")
    tokenizer = load_tokenizer(tokenizer_dir)
    start = time.perf_counter()
    mixture = MixtureSource("gsm8k", "train", Sources(str(data)))
    measured = measure(mixture, len(mixture.load()), tokenizer, 512, "assistant")
    steps_layout = layout(32, 512)
    num_rows = len(pack(measured.lengths, 513))
    num_steps = -(-num_rows // steps_layout.rows_per_step)
    rows = ConversationStream(mixture, measured.lengths, steps_layout, num_steps, "assistant", 42)
    dataset = training_dataset(rows, Cursor(), tokenizer_dir, 2)
    (shard,) = dataset.streaming_split(1, equal=True)
    blocks = worker_blocks(shard, rows, Cursor(), 0, 1)
    targets = sum(step.num_targets for step in step_rows(blocks, rows, 0, 1))
    seconds = time.perf_counter() - start
    ray.shutdown()
    return {"gsm8k_s": round(seconds, 1), "gsm8k_rows": num_rows, "gsm8k_targets": targets}


if __name__ == "__main__":
    sys.exit(main())
