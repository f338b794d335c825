"""Training steps per second against nanochat: same model, same weights, same data, one run.

Three processes each hold one model (ours in bf16; nanochat in fp32, its CPU default; nanochat
forced to bf16) and take whole optimiser steps in turn, so that a busy machine slows all alike.
Prints one JSON line last: medians over the rounds, their ratios, and the losses of each side.

    python bench/train_step.py --nanochat DIR [--rounds 9] [--without-optimizer]

DIR is a checkout of karpathy/nanochat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDES = {"nanoray_bf16": "bfloat16", "nanochat_fp32": "float32", "nanochat_bf16": "bfloat16"}
VOCAB, T, STEP_TOKENS = 4096, 512, 16384
SHAPE = {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "n_embd": 256, "window_pattern": "SSSL"}
LEARNING_RATES = {
    "embedding_lr": 0.3,
    "unembedding_lr": 0.008,
    "matrix_lr": 0.02,
    "scalar_lr": 0.5,
    "weight_decay": 0.1,
}
MUON_MOMENTUM = 0.95  # nanochat's default without a schedule


def main() -> None:
    args = parse_args()
    if args.side:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        write_weights(weights)
        sides = args.sides.split(",")
        workers = {side: start_worker(side, args, weights) for side in sides}
        rounds = {side: take_step(worker) for side, worker in workers.items()}  # compiles
        first_s = {side: reply["seconds"] for side, reply in rounds.items()}
        replies: dict[str, list[dict]] = {side: [rounds[side]] for side in sides}
        for _ in range(args.rounds + 1):
            for side, worker in workers.items():
                replies[side].append(take_step(worker))
        for worker in workers.values():
            worker.terminate()
    seconds = {side: [r["seconds"] for r in replies[side][2:]] for side in sides}
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    report: dict[str, Any] = {
        "bench": "train_step",
        "threads": args.threads,
        "device_rows": args.rows,
        "optimizer": not args.without_optimizer,
        "rounds": args.rounds,
        "step_s": {side: round(value, 4) for side, value in medians.items()},
        "best_step_s": {side: round(min(times), 4) for side, times in seconds.items()},
        "cpu_s": {
            side: round(statistics.median(r["cpu_s"] for r in replies[side][2:]), 4)
            for side in sides
        },
        "tokens_per_s": {side: round(STEP_TOKENS / value) for side, value in medians.items()},
        "first_step_s": {side: round(value, 1) for side, value in first_s.items()},
        "losses": {side: [round(r["loss"], 4) for r in replies[side]] for side in sides},
    }
    for side in sides[1:]:
        ratios = [theirs / ours for ours, theirs in zip(seconds[sides[0]], seconds[side])]
        report[f"speedup_over_{side}"] = round(statistics.median(ratios), 3)
    print(json.dumps(report))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanochat", type=Path, required=True, help="a nanochat checkout")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-step (16384/T whole)")
    parser.add_argument("--without-optimizer", action="store_true", help="forward and backward")
    parser.add_argument("--sides", default=",".join(SIDES), help="comma-separated; ours first")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def start_worker(side: str, args: argparse.Namespace, weights: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--side", side, "--weights", str(weights)]
    command += ["--nanochat", str(args.nanochat), "--rows", str(args.rows)]
    command += ["--threads", str(args.threads)]
    command += ["--without-optimizer"] if args.without_optimizer else []
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "NANOCHAT_DTYPE": SIDES[side],
        "PYTHONPATH": str(root if side.startswith("nanoray") else args.nanochat),
    }
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def take_step(worker: subprocess.Popen) -> dict[str, float]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("step\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith('{"seconds"'):
            return json.loads(line)
        print(line, end="", file=sys.stderr)
    raise SystemExit(f"a worker died: {worker.args}")


def write_weights(path: Path) -> None:
    """Our initial weights, with the zero-initialised ones randomised so that all take part."""
    import torch

    from nanoray.model.config import GPTConfig
    from nanoray.model.gpt import GPT

    model = GPT(GPTConfig(sequence_len=T, vocab_size=VOCAB, **SHAPE))
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02, generator=generator)
    torch.save(model.state_dict(), path)


def batches(rows: int) -> Callable[[int], list[tuple[Any, Any]]]:
    """Micro-batches of step s: a second-order pattern over Zipf-distributed tokens."""
    import numpy as np
    import torch

    def make(step: int) -> list[tuple[Any, Any]]:
        rng = np.random.default_rng(step)
        drawn = rng.zipf(1.3, (STEP_TOKENS // T, T + 1)) % VOCAB
        repeated = np.roll(drawn, 1, axis=1) * 7 % VOCAB
        ids = torch.from_numpy(np.where(rng.random(drawn.shape) < 0.5, repeated, drawn))
        return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in ids.split(rows)]

    return make


def work(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    build = ours if args.side.startswith("nanoray") else theirs
    train_step = build(torch.load(args.weights), args)
    make = batches(args.rows)
    for step, _ in enumerate(sys.stdin):
        data = make(step)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        loss = train_step(data)
        seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "loss": loss}), flush=True)


def ours(weights: dict, args: argparse.Namespace) -> Callable[[list], float]:
    import torch

    from nanoray.model.compile import compile_model
    from nanoray.model.config import GPTConfig
    from nanoray.model.gpt import GPT
    from nanoray.optim.groups import REFERENCE_BATCH_TOKENS, build_groups
    from nanoray.optim.sharded import MuonAdamW

    model = GPT(GPTConfig(sequence_len=T, vocab_size=VOCAB, **SHAPE), torch.bfloat16)
    model.load_state_dict(weights)
    compile_model(model)
    parameters = dict(model.named_parameters())
    groups = build_groups(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        "july",
        **LEARNING_RATES,
        width=SHAPE["n_embd"],
        batch_tokens=REFERENCE_BATCH_TOKENS,  # no scaling, as nanochat's setup_optimizer
    )
    optimizer = MuonAdamW(
        parameters, groups, recipe="july", compute_dtype=model.compute_dtype, compile=True
    )

    def train_step(data: list) -> float:
        loss_sum = 0.0
        for idx_BT, targets_BT in data:
            loss = model(idx_BT, targets_BT) / STEP_TOKENS
            loss.backward()
            loss_sum += loss.item()
        if args.without_optimizer:
            model.zero_grad(set_to_none=True)
        else:
            optimizer.step(1.0, MUON_MOMENTUM, 1.0)
        return loss_sum

    return train_step


def theirs(weights: dict, args: argparse.Namespace) -> Callable[[list], float]:
    import torch
    from nanochat.gpt import GPT, GPTConfig

    model = GPT(GPTConfig(sequence_len=T, vocab_size=VOCAB, **SHAPE))
    model.init_weights()
    model.load_state_dict(weights)
    optimizer = model.setup_optimizer(**LEARNING_RATES)
    assert optimizer.param_groups[-1]["momentum"] == MUON_MOMENTUM
    compiled = torch.compile(model, dynamic=False)

    def train_step(data: list) -> float:
        loss_sum = 0.0
        for idx_BT, targets_BT in data:
            loss = compiled(idx_BT, targets_BT) / len(data)
            loss.backward()
            loss_sum += loss.item()
        if not args.without_optimizer:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss_sum

    return train_step


if __name__ == "__main__":
    main()
