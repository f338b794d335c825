"""The engine's five figures, two of them against nanochat's engine in the same process.

Same model, same weights (zero-initialised ones randomised), fp32, rounds in turn so that a busy
machine slows both alike. Prints one JSON line last.

    python bench/engine.py [--nanochat DIR] [--rounds 5] [--threads 2] [--only batch,samples]

1. batch: 16 distinct prompts (64-256 tokens in, 64 out, greedy); nanochat one after the other.
2. samples: 4 prompts x 16 samples that end after 32-128 tokens; nanochat decodes the 16 samples
   of a prompt until the longest one ends. (In 1 and 2 every round has a new engine, with nothing
   cached; to construct it is not timed, as little as nanochat's model.)
3. prefix: tokens computed and time to the first token of a repeated prompt of 1,000 tokens (T
   2048); tokens computed for sixteen identical requests.
4. interference: inter-token times of 4 running streams, alone and while prompts of 1,000 tokens
   are admitted in chunks of 64.
5. aborts: 500 at random moments; slots busy after each one's next step, and at the end.

DIR is a checkout of karpathy/nanochat.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanoray.engine import Engine, SamplingParams
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT

VOCAB = 4096
SHAPE = {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "n_embd": 256, "window_pattern": "SSSL"}
TOP_K = 50
Generate = Callable[[list[int], int, list[int], bool], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanochat", type=Path, help="a nanochat checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="some of the figures, by name")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"bench": "engine", "threads": args.threads, "rounds": args.rounds}
    model = make_model(sequence_len=512)
    peer = load_peer(args.nanochat, model) if args.nanochat else None
    long_model = make_model(sequence_len=2048)
    benches: dict[str, Callable[[], dict[str, Any]]] = {
        "batch": lambda: bench_batch(model, peer, args.rounds),
        "samples": lambda: bench_samples(model, peer, args.rounds),
        "prefix": lambda: bench_prefix(long_model, args.rounds),
        "interference": lambda: bench_interference(long_model, args.rounds),
        "aborts": lambda: bench_aborts(model),
    }
    for name in args.only.split(",") if args.only else benches:
        report[name] = benches[name]()
    print(json.dumps(report))


def make_model(sequence_len: int) -> GPT:
    model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=VOCAB, **SHAPE))
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.02, generator=generator)
        model.lm_head.weight.normal_(0.0, 0.1, generator=generator)  # no ties
    return model


def load_peer(checkout: Path, model: GPT) -> Generate:
    """nanochat's Engine with our weights: (prompt, samples, lengths, greedy) -> new tokens."""
    os.environ["NANOCHAT_DTYPE"] = "float32"
    sys.path.append(str(checkout))
    from nanochat import engine as peer_engine
    from nanochat import gpt as peer_gpt

    class NoSpecialTokens:
        """Ids that are never sampled: no row ends early, and no tool is called."""

        def encode_special(self, name: str) -> int:
            return -1

        def get_bos_token_id(self) -> int:
            return -1

    config = model.config
    peer = peer_gpt.GPT(
        peer_gpt.GPTConfig(sequence_len=config.sequence_len, vocab_size=VOCAB, **SHAPE)
    )
    peer.init_weights()
    peer.load_state_dict(model.state_dict())
    engine = peer_engine.Engine(peer.eval(), NoSpecialTokens())

    def generate(prompt: list[int], num_samples: int, lengths: list[int], greedy: bool) -> list:
        sampling = {"temperature": 0.0} if greedy else {"temperature": 1.0, "top_k": TOP_K}
        rows, _ = engine.generate_batch(prompt, num_samples, max_tokens=max(lengths), **sampling)
        return [row[len(prompt) :][:length] for row, length in zip(rows, lengths)]

    return generate


def draw_prompts(rng: random.Random, count: int, low: int, high: int) -> list[list[int]]:
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(low, high))] for _ in range(count)]


def compare(
    prepare: Callable[[], None],
    ours: Callable[[], Any],
    theirs: Callable[[], Any] | None,
    rounds: int,
) -> tuple[dict[str, float], list[Any]]:
    """Median seconds of both in turn, the median of the rounds' ratios, and the last results.

    prepare: what each round begins with, not timed.
    """
    sides = {"nanoray": ours} | ({"nanochat": theirs} if theirs else {})
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    results: dict[str, Any] = {}
    for round_ in range(rounds + 1):
        prepare()
        for side, run in sides.items():
            start_s = time.perf_counter()
            results[side] = run()
            if round_:  # the first warms up
                seconds[side].append(time.perf_counter() - start_s)
    report = {f"{side}_s": statistics.median(times) for side, times in seconds.items()}
    if theirs:
        ratios = [b / a for a, b in zip(seconds["nanoray"], seconds["nanochat"])]
        report["speedup"] = statistics.median(ratios)
    return report, list(results.values())


def rounded(report: dict[str, Any]) -> dict[str, Any]:
    return {key: round(v, 4) if isinstance(v, float) else v for key, v in report.items()}


def bench_batch(model: GPT, peer: Generate | None, rounds: int) -> dict[str, Any]:
    prompts = draw_prompts(random.Random(0), 16, 64, 256)
    params = SamplingParams(temperature=0, max_tokens=64)
    engines: list[Engine] = []

    def prepare() -> None:
        engines[:] = [Engine(model, None, num_slots=16)]

    def ours() -> list[list[int]]:
        return [completion.tokens for completion in engines[0].generate(prompts, params)]

    def theirs() -> list[list[int]]:
        assert peer is not None
        return [peer(prompt, 1, [64], True)[0] for prompt in prompts]

    report, results = compare(prepare, ours, theirs if peer else None, rounds)
    for side in ("nanoray", "nanochat") if peer else ("nanoray",):
        report[f"{side}_tokens_per_s"] = 16 * 64 / report[f"{side}_s"]
    report["greedy_equal"] = sum(a == b for a, b in zip(results[0], results[-1]))
    return rounded(report)


def bench_samples(model: GPT, peer: Generate | None, rounds: int) -> dict[str, Any]:
    rng = random.Random(1)
    prompts = draw_prompts(rng, 4, 64, 256)
    lengths = [[rng.randint(32, 128) for _ in range(16)] for _ in prompts]
    flat_prompts = [prompt for prompt in prompts for _ in range(16)]
    params = [
        SamplingParams(top_k=TOP_K, seed=seed, max_tokens=length)
        for seed, length in enumerate(length for group in lengths for length in group)
    ]
    engines: list[Engine] = []

    def prepare() -> None:
        engines[:] = [Engine(model, None, num_slots=64)]

    def ours() -> None:
        engines[0].generate(flat_prompts, params)

    def theirs() -> None:
        assert peer is not None
        for prompt, group in zip(prompts, lengths):
            peer(prompt, 16, group, False)

    report, _ = compare(prepare, ours, theirs if peer else None, rounds)
    stats = engines[0].stats()
    emitted = sum(sum(group) for group in lengths)
    for side in ("nanoray", "nanochat") if peer else ("nanoray",):
        report[f"{side}_tokens_per_s"] = emitted / report[f"{side}_s"]
    report["row_steps_per_token"] = stats["decode_row_steps"] / emitted
    report["prefill_tokens_per_prompt_token"] = stats["computed_prefill_tokens"] / sum(
        map(len, prompts)
    )
    return rounded(report)


def bench_prefix(model: GPT, rounds: int) -> dict[str, Any]:
    rng = random.Random(2)
    one = SamplingParams(temperature=0, max_tokens=1)
    engine = Engine(model, None, num_slots=16)
    engine.generate(draw_prompts(rng, 1, 1000, 1000), one)
    cold_s, warm_s, computed = [], [], 0.0
    for _ in range(max(rounds, 5)):
        (prompt,) = draw_prompts(rng, 1, 1000, 1000)
        for times in (cold_s, warm_s):
            before, start_s = engine.stats(), time.perf_counter()
            engine.generate([prompt], one)
            times.append(time.perf_counter() - start_s)
        computed = computed_tokens(engine) - computed_tokens(before)
    engine = Engine(model, None, num_slots=16)
    engine.generate([prompt] * 16, one)
    cold, warm = statistics.median(cold_s), statistics.median(warm_s)
    return rounded(
        {
            "cold_ttft_s": cold,
            "repeated_ttft_s": warm,
            "ttft_ratio": warm / cold,
            "repeated_computed_tokens": computed,
            "sixteen_identical_prefilled_tokens": engine.stats()["computed_prefill_tokens"],
        }
    )


def computed_tokens(source: Engine | dict[str, float]) -> float:
    stats = source if isinstance(source, dict) else source.stats()
    return stats["computed_prefill_tokens"] + stats["decode_row_steps"]


def bench_interference(model: GPT, rounds: int) -> dict[str, Any]:
    """Steps are timed: each gives every running stream its next token."""
    rng = random.Random(3)
    engine = Engine(model, None, num_slots=8, prefill_chunk=64)
    streams = SamplingParams(top_k=TOP_K, max_tokens=1_000_000)

    def run_steps(count: int, busy: Callable[[], bool] | None = None) -> list[float]:
        times = []
        while len(times) < count and (busy is None or busy()):
            start_s = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start_s)
        return times

    alone_s: list[float] = []
    admitting_s: list[float] = []
    for _ in range(max(rounds, 5)):
        running = [
            request
            for prompt in draw_prompts(rng, 4, 64, 256)
            for request in engine._requests(prompt, streams)
        ]
        engine._submit(running)
        run_steps(30)
        alone_s += run_steps(60)
        (prompt,) = draw_prompts(rng, 1, 1000, 1000)
        arriving = engine._requests(prompt, SamplingParams(temperature=0, max_tokens=1))
        engine._submit(arriving)
        admitting_s += run_steps(1000, lambda: not arriving[0].done.is_set())  # noqa: B023
        engine._abort(running)
    baseline, loaded = (statistics.quantiles(s, n=100)[98] for s in (alone_s, admitting_s))
    return rounded(
        {
            "alone_p50_s": statistics.median(alone_s),
            "alone_p99_s": baseline,
            "admitting_p50_s": statistics.median(admitting_s),
            "admitting_p99_s": loaded,
            "p99_ratio": loaded / baseline,
            "median_ratio": statistics.median(admitting_s) / statistics.median(alone_s),
        }
    )


def bench_aborts(model: GPT) -> dict[str, Any]:
    rng = random.Random(4)
    engine = Engine(model, None, num_slots=8, prefill_chunk=64)
    alive = []
    late = 0
    for seed in range(500):
        (prompt,) = draw_prompts(rng, 1, 1, 200)
        new = engine._requests(prompt, SamplingParams(seed=seed, max_tokens=200))
        engine._submit(new)
        alive += new
        for _ in range(rng.randint(0, 2)):
            engine.step()
        victim = alive.pop(rng.randrange(len(alive)))
        engine._tell(lambda victim=victim: engine._abort([victim]))
        engine.step()
        late += not victim.done.is_set()
    busy = engine.stats()["busy_slots"] - engine.stats()["running"]
    return {"aborts": 500, "not_freed_within_a_step": late, "slots_busy_for_nobody": busy}


if __name__ == "__main__":
    main()
