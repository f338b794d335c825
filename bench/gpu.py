"""What one accelerator does with our model: training steps, the optimiser, the engine, memory.

Prints one JSON line last; before it, on stderr, the kernels that a training step's time goes to.

    python bench/gpu.py [--depth 12] [--rounds 10] [--only train,engine] [--fp8]

train: whole optimiser steps of `--total-batch-size` tokens: seconds (median), tokens/s, MFU, the
    optimiser's part of it, the first step (it compiles), peak memory, the kernels' shares.
engine: greedy decoding of 1, 16, 64 and 256 rows at once after prompts of 512 tokens: tokens/s and
    milliseconds a step; prefill tokens/s; peak memory.

Neither Ray nor any data is needed, so that it runs wherever torch does; on a CPU give small sizes
(`--depth 4 --total-batch-size 4096 --device-batch-size 4 --max-seq-len 512 --rows 1,4`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from nanoray import laws
from nanoray.engine import Engine, SamplingParams
from nanoray.model.compile import COMPILE_MODES, compile_model
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT
from nanoray.model.precision import peak_flops, pick_compute_dtype, pick_device
from nanoray.optim.groups import build_groups
from nanoray.optim.sharded import MuonAdamW

HEAD_DIM, ASPECT_RATIO = 128, 64
MUON_MOMENTUM = 0.95
PROMPT_TOKENS, NEW_TOKENS = 512, 128
TOP_KERNELS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--device-batch-size", type=int, default=32, help="rows of a micro-step")
    parser.add_argument("--total-batch-size", type=int, default=2**19, help="tokens of a step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", default="1,16,64,256", help="that the engine decodes at once")
    parser.add_argument("--compile-mode", choices=COMPILE_MODES, default="default")
    parser.add_argument("--fp8", action="store_true", help="fp8 matmuls in training")
    parser.add_argument("--only", default="train,engine")
    args = parser.parse_args()
    device = pick_device()
    report: dict[str, Any] = {
        "bench": "gpu",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "depth": args.depth,
        "dtype": str(pick_compute_dtype(device)).removeprefix("torch."),
    }
    benches = {"train": bench_train, "engine": bench_engine}
    for name in args.only.split(","):
        report[name] = benches[name](args, device)
        print(json.dumps(report), flush=True)  # what is measured stays told, whatever comes next


def make_model(args: argparse.Namespace, device: torch.device) -> GPT:
    """The dial's model; what is zero at the start is made noise, so that all of it works."""
    width = laws.model_width(args.depth, ASPECT_RATIO, HEAD_DIM)
    heads = width // HEAD_DIM
    config = GPTConfig(
        args.max_seq_len, args.vocab_size, args.depth, heads, n_kv_head=heads, n_embd=width
    )
    model = GPT(config, compute_dtype=pick_compute_dtype(device))
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.place(device)


def bench_train(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model = make_model(args, device)
    if args.fp8:
        from nanoray.model.fp8 import convert_to_fp8

        convert_to_fp8(model)
    parameters = dict(model.named_parameters())
    groups = build_groups(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        "july",
        embedding_lr=0.3,
        unembedding_lr=0.008,
        matrix_lr=0.02,
        scalar_lr=0.5,
        weight_decay=0.1,
        width=model.config.n_embd,
        batch_tokens=args.total_batch_size,
    )
    optimizer = MuonAdamW(
        parameters, groups, recipe="july", compute_dtype=model.compute_dtype,
        compile=args.compile_mode != "off",
    )  # fmt: skip
    compile_model(model, args.compile_mode)
    T = args.max_seq_len
    micro_steps, rest = divmod(args.total_batch_size, args.device_batch_size * T)
    assert micro_steps, "--total-batch-size holds no micro-batch"
    assert not rest, "--total-batch-size is no multiple of the micro-batch"
    shape = (args.device_batch_size, T + 1)
    ids = torch.randint(0, args.vocab_size, shape, generator=torch.Generator().manual_seed(2))
    ids = ids.to(device)
    inputs_BT, targets_BT = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def train_step() -> tuple[float, float]:
        """One step; its seconds, and the optimiser's."""
        start_s = now(device)
        for _ in range(micro_steps):
            (model(inputs_BT, targets_BT) / args.total_batch_size).backward()
        middle_s = now(device)
        optimizer.step(1.0, MUON_MOMENTUM, 1.0)
        end_s = now(device)
        return end_s - start_s, end_s - middle_s

    reset_peak(device)
    first_s, _ = train_step()
    for _ in range(2):
        train_step()
    whole_s, optimizer_s = zip(*(train_step() for _ in range(args.rounds)))
    step_s = statistics.median(whole_s)
    tokens_per_s = args.total_batch_size / step_s
    peak = peak_flops(device, model.compute_dtype)
    return {
        "step_s": round(step_s, 4),
        "spread": round(max(whole_s) / min(whole_s), 3),
        "tokens_per_s": round(tokens_per_s),
        "mfu": round(tokens_per_s * model.config.flops_per_token() / peak, 4),
        "optimizer_s": round(statistics.median(optimizer_s), 4),
        "first_step_s": round(first_s, 1),
        "peak_memory_gib": peak_gib(device),
        "kernels": kernel_shares(device, train_step),
    }


def bench_engine(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model = make_model(args, device)
    generator = torch.Generator().manual_seed(3)
    prompt_tokens = min(PROMPT_TOKENS, args.max_seq_len - NEW_TOKENS)
    found: dict[str, Any] = {"prompt_tokens": prompt_tokens, "rows": {}}
    for rows in map(int, args.rows.split(",")):
        reset_peak(device)
        prompts = torch.randint(
            0, args.vocab_size, (rows, prompt_tokens), generator=generator
        ).tolist()

        def seconds(max_tokens: int, prompts: list[list[int]] = prompts) -> float:
            engine = Engine(model, None, num_slots=len(prompts), prefix_cache=False)
            start_s = now(device)
            engine.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
            taken_s = now(device) - start_s
            engine.close()
            return taken_s

        seconds(2)
        prefill_s, whole_s = (
            statistics.median(seconds(tokens) for _ in range(3)) for tokens in (1, 1 + NEW_TOKENS)
        )
        decode_s = whole_s - prefill_s
        found["rows"][rows] = {
            "prefill_tokens_per_s": round(rows * prompt_tokens / prefill_s),
            "decode_tokens_per_s": round(rows * NEW_TOKENS / decode_s),
            "decode_step_ms": round(decode_s / NEW_TOKENS * 1000, 3),
            "peak_memory_gib": peak_gib(device),
        }
    return found


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was asked."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)


def kernel_shares(device: torch.device, run: Callable[[], Any]) -> dict[str, float]:
    """Which kernels take how much of the device's busy time, and that time itself."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
    averages = profile.key_averages()
    on_gpu = device.type == "cuda"
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(averages.table(sort_by=key, row_limit=TOP_KERNELS), file=sys.stderr)
    # Operators have the time of the kernels that they launch, too: it counts once.
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    times = {event.key: getattr(event, key) for event in averages if event.device_type == kind}
    busy_us = sum(times.values())
    top = sorted(times, key=times.__getitem__, reverse=True)[:TOP_KERNELS]
    return {"busy_s": round(busy_us / 1e6, 4)} | {
        name[:60]: round(times[name] / busy_us, 3) for name in top
    }


if __name__ == "__main__":
    main()
