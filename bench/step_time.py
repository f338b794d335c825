"""The time of a training step with 1 and 2 workers of one thread, against docs/scaling.md's model.

    python bench/step_time.py [--rounds 7]

`cluster/scaling.py` computes a step from the model's and the optimiser's sizes and three rates of
the machine. These are measured here apart from any step, by as many workers at once as the step
will have: FLOPs/s of a lone micro-batch, of a product of matrices, and bytes/s through gloo. Then
whole steps (the demo's shape, bf16, compiled). Prints one JSON line last.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
VOCAB, T, ROWS, MICRO_ROWS = 4096, 512, 32, 16
SHAPE = {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "n_embd": 256, "window_pattern": "SSSL"}
MESSAGE_BYTES = 4 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="medians are over as many")
    args = parser.parse_args()
    report: dict[str, Any] = {"bench": "step_time", "rounds": args.rounds}
    for size in (1, 2):
        found = measure(size, args.rounds)
        computed = compute(size, found)
        report[f"{size}_workers"] = {
            "rates": {name: round(found[name] / 1e9, 3) for name in RATES},
            "measured_s": round(found["step_s"], 4),
            "computed_s": {name: round(value, 4) for name, value in computed.items()},
            "ratio": round(found["step_s"] / computed["step"], 3),
        }
        print(report[f"{size}_workers"], file=sys.stderr, flush=True)
    print(json.dumps(report))


RATES = ("flops", "muon_flops", "sent_bytes")


def compute(size: int, rates: dict[str, float]) -> dict[str, float]:
    """Seconds of a step and its parts, by the model."""
    sys.path.insert(0, str(ROOT / "cluster"))
    from scaling import Dial, Estimate, Machine

    from nanoray.model.config import GPTConfig

    dial = Dial.of(GPTConfig(sequence_len=T, vocab_size=VOCAB, **SHAPE), ROWS)
    machine = Machine(**{name: rates[name] for name in RATES})
    estimate = Estimate(dial, size, machine)
    names = ("compute", "optimizer", "communication", "step")
    return {name: getattr(estimate, f"{name}_s") for name in names}


def measure(size: int, rounds: int) -> dict[str, float]:
    """Rates and the step's seconds, of the slowest worker."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", folder, str(size), str(rounds)]
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        }
        workers = [
            subprocess.Popen([*command, str(rank)], env=env, stdout=subprocess.PIPE)
            for rank in range(size)
        ]
        told = [json.loads(worker.communicate()[0]) for worker in workers]
    found = {name: min(values[name] for values in told) for name in RATES}
    return found | {"step_s": max(values["step_s"] for values in told)}


def work(folder: str, size: int, rounds: int, rank: int) -> None:
    """One worker."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
        )

    def median_s(function: Callable[[], object]) -> float:
        """Of calls that all workers make together."""
        seconds = []
        for _ in range(rounds + 1):
            if size > 1:
                dist.barrier()
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])

    step, micro_batch, flops = make_step(size, rank)
    matrices = torch.randn(8, 1024, 1024, dtype=torch.bfloat16)
    found = {
        "flops": flops / median_s(micro_batch),
        "muon_flops": 2 * matrices.numel() * 1024 / median_s(lambda: torch.bmm(matrices, matrices)),
        "sent_bytes": float("inf"),
    }
    if size > 1:
        message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        sent = MESSAGE_BYTES * (size - 1) / size
        mine = message.view(size, -1)[rank]
        found["sent_bytes"] = sent / median_s(lambda: gather(message, mine))
    found["step_s"] = median_s(step)
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()
    print(json.dumps(found))


def gather(message: torch.Tensor, mine: torch.Tensor) -> None:
    import torch.distributed as dist

    gathering = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gathering(message, mine)


def make_step(size: int, rank: int) -> tuple[Callable[[], object], Callable[[], object], float]:
    """A whole step of this worker's rows, forward and backward of a lone micro-batch, its FLOPs."""
    import numpy as np
    import torch

    from nanoray.model.compile import compile_model
    from nanoray.model.config import GPTConfig
    from nanoray.model.gpt import GPT
    from nanoray.optim.groups import REFERENCE_BATCH_TOKENS, build_groups
    from nanoray.optim.sharded import MuonAdamW
    from nanoray.train.step import TrainStep
    from nanoray.train.world import World

    config = GPTConfig(sequence_len=T, vocab_size=VOCAB, **SHAPE)
    model = GPT(config, torch.bfloat16)
    model.init_weights(seed=0)
    parameters = dict(model.named_parameters())
    groups = build_groups(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()}, "july",
        embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02, scalar_lr=0.5, weight_decay=0.1,
        width=config.n_embd, batch_tokens=REFERENCE_BATCH_TOKENS,
    )  # fmt: skip
    optimizer = MuonAdamW(
        parameters, groups, recipe="july", compute_dtype=model.compute_dtype, compile=True
    )
    compile_model(model)

    def loss_sum(idx_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        return model(idx_BT, targets_BT)

    take = TrainStep(loss_sum, optimizer, World(rank, size, torch.device("cpu")), MICRO_ROWS)
    ids = np.random.default_rng(0).integers(0, VOCAB, (ROWS, T + 1))[rank::size]
    inputs, targets = (
        torch.from_numpy(np.ascontiguousarray(ids[:MICRO_ROWS, i : T + i])) for i in (0, 1)
    )

    def step() -> None:
        take(ids, ROWS * T, 1.0, 0.9, 0.0)

    def micro_batch() -> None:
        loss_sum(inputs, targets).backward()

    return step, micro_batch, MICRO_ROWS * T * config.flops_per_token()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
