"""What the rollout pool costs, and what it gains. Prints one JSON line last.

    python bench/rollouts.py [--from-run demo-sft] [--nanochat DIR] [--rounds 5] [--threads 1]
        [--data-dir DIR]

1. actor: tokens/s of one rollout actor (weights fetched, bundles, rewards, the way back) over the
   bare engine in this process, on the same bundles of arithmetic problems, in turn.
2. peer: the same problems and samples against nanochat's loop: one problem at a time, its samples
   in batches of 8. Lengths are as they come, so tokens/s are compared.
3. broadcast: a model of some 100 MB to 4 actors, until the last one can sample with it.
4. asynchronous: S = 1 and 2 against S = 0 at equal samples; 4 actors and a learner that sleep
   instead of computing: long-tailed lengths times an injected latency of a token.

The run is a chat model's, such as `make demo` leaves. --nanochat is a checkout of
karpathy/nanochat; with --data-dir (a folder with gsm8k/) the problems of 1 and 2 are GSM8K's, and
not arithmetic.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from nanoray import fleet
from nanoray.checkpoint.loading import LoadedModel, load_model
from nanoray.engine import Engine, SamplingParams
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT
from nanoray.model.heap import keep_freed_memory
from nanoray.rl import flat
from nanoray.rl.groups import Group, Sample
from nanoray.rl.ledger import LedgerRules
from nanoray.rl.pool import PoolClient, close_pool, start_pool
from nanoray.rl.prompts import draw_seed, example_index
from nanoray.rl.reward_worker import TaskReward
from nanoray.rl.sampler import SamplerSettings
from nanoray.rl.terms import PoolSettings
from nanoray.tasks.catalog import Sources, load_task
from nanoray.tools import calculate

QUESTIONS, BUNDLE, SAMPLES, MAX_NEW, TOP_K, SEED = 16, 4, 16, 128, 50, 42
PEER_BATCH = 8  # nanochat's --device-batch-size
TOKEN_S = 0.002  # injected latency of a decoded token
TRAIN_S = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from-run", default="demo-sft", help="a chat model: run or folder")
    parser.add_argument("--nanochat", type=Path, help="a nanochat checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", help="ask GSM8K's problems of this folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fleet.connect()
    report: dict[str, Any] = {"bench": "rollouts", "threads": args.threads, "rounds": args.rounds}
    chat = load_model(args.from_run, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        chat.tokenizer.save(folder)
        settings = sampler_settings(chat.model.config, folder, args.threads, args.data_dir)
        report["actor"] = bench_actor(chat, settings, args.nanochat, args.rounds)
        report["broadcast"] = bench_broadcast(chat, folder, args.rounds)
    report["asynchronous"] = bench_asynchronous(steps=20)
    ray.shutdown()
    print(json.dumps(report))


def sampler_settings(
    config: GPTConfig, tokenizer_dir: str, threads: int = 1, data_dir: str | None = None
) -> SamplerSettings:
    name = "gsm8k" if data_dir else "arithmetic"
    return SamplerSettings(
        model=config.to_dict(),
        tokenizer_dir=tokenizer_dir,
        problems=TaskReward(name, "train", Sources(data_dir=data_dir)),
        num_samples=SAMPLES,
        max_new_tokens=MAX_NEW,
        temperature=1.0,
        top_k=TOP_K,
        seed=SEED,
        num_threads=threads,
        dtype="float32",
    )


def bench_actor(
    chat: LoadedModel, settings: SamplerSettings, nanochat: Path | None, rounds: int
) -> dict[str, Any]:
    rules = LedgerRules(rounds + 1, QUESTIONS, BUNDLE)
    pool = start_pool(settings.open, rules, PoolSettings(1, 1), run_dir=settings.tokenizer_dir)
    client = PoolClient(pool, "bench")
    client.begin(0, None)
    problems = settings.problems
    task = load_task(problems.name, problems.split, problems.sources)
    engine = Engine(chat.model, chat.tokenizer, num_slots=settings.num_slots, tool=calculate)
    peer = load_peer(nanochat, chat) if nanochat else None
    buffer = flat.pack(chat.model.state_dict())
    keep_freed_memory()  # and the collector's peace: the bare engine has what the actor's has
    gc.collect()
    gc.freeze()

    def prompts_of(numbers: Sequence[int]) -> list[list[int]]:
        indices = [example_index(number, len(task), SEED) for number in numbers]
        return [chat.tokenizer.render_for_completion(task.example(index)) for index in indices]

    def bare(numbers: Sequence[int]) -> list[list[int]]:
        tokens = []
        for first in range(0, len(numbers), BUNDLE):
            bundle = numbers[first : first + BUNDLE]
            engine.forget()
            params = [
                SamplingParams(
                    top_k=TOP_K, seed=draw_seed(SEED, number), n=SAMPLES, max_tokens=MAX_NEW
                )
                for number in bundle
            ]
            tokens += [c.tokens for c in engine.generate(prompts_of(bundle), params)]
        return tokens

    speeds: dict[str, list[float]] = {"actor": [], "bare": [], "nanochat": []}
    for step in range(rounds + 1):
        numbers = range(step * QUESTIONS, (step + 1) * QUESTIONS)

        def by_actor(step: int = step) -> list[list[int]]:
            client.publish(step, buffer)
            groups = client.take(step).groups
            client.trained(step)
            return [sample.tokens.tolist() for group in groups for sample in group.samples]

        runs = {"actor": by_actor, "bare": lambda: bare(numbers)}  # noqa: B023
        if peer:
            runs["nanochat"] = lambda: [row for p in prompts_of(numbers) for row in peer(p)]  # noqa: B023
        found = {}
        for name, run in runs.items():
            start = time.perf_counter()
            found[name] = run()
            seconds = time.perf_counter() - start
            if step:  # the first warms up
                speeds[name].append(sum(map(len, found[name])) / seconds)
        assert found["actor"] == found["bare"], "the actor samples what the engine does"
    close_pool(pool)
    report = {f"{name}_tokens_per_s": statistics.median(v) for name, v in speeds.items() if v}
    report["over_bare"] = median_ratio(speeds["actor"], speeds["bare"])
    if peer:
        report["over_nanochat"] = median_ratio(speeds["actor"], speeds["nanochat"])
    return report


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs)), 3)


def load_peer(checkout: Path, chat: LoadedModel) -> Any:
    """nanochat's engine with our weights and ids: prompt -> new tokens of SAMPLES samples."""
    os.environ["NANOCHAT_DTYPE"] = "float32"
    sys.path.append(str(checkout))
    from nanochat import engine as peer_engine
    from nanochat import gpt as peer_gpt

    class Ids:
        """Our tokenizer by the names of theirs."""

        def encode_special(self, name: str) -> int:
            return chat.tokenizer.special_id(name)

        def get_bos_token_id(self) -> int:
            return chat.tokenizer.bos_id

        def encode(self, text: str) -> list[int]:
            return chat.tokenizer.encode(text)

        def decode(self, ids: list[int]) -> str:
            return chat.tokenizer.decode(ids)

    config = chat.model.config
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    shape = {name: getattr(config, name) for name in names}
    model = peer_gpt.GPT(peer_gpt.GPTConfig(**shape, window_pattern=config.window_pattern))
    model.init_weights()
    model.load_state_dict(chat.model.state_dict())
    engine = peer_engine.Engine(model.eval(), Ids())

    def generate(prompt: list[int]) -> list[list[int]]:
        answers = []
        for batch in range(SAMPLES // PEER_BATCH):
            rows, _ = engine.generate_batch(
                prompt, PEER_BATCH, max_tokens=MAX_NEW, temperature=1.0, top_k=TOP_K, seed=batch
            )
            answers += [row[len(prompt) :] for row in rows]
        return answers

    return generate


def bench_broadcast(chat: LoadedModel, tokenizer_dir: str, rounds: int) -> dict[str, Any]:
    shape = {"n_layer": 6, "n_head": 7, "n_kv_head": 7, "n_embd": 448}
    config = GPTConfig(sequence_len=256, vocab_size=chat.tokenizer.vocab_size, **shape)
    model = GPT(config)
    model.init_weights(0)
    buffer = flat.pack(model.state_dict())
    settings = sampler_settings(config, tokenizer_dir)
    rules = LedgerRules(1, 1, 1)  # a run of one answer: then there are only versions
    pool = start_pool(settings.open, rules, PoolSettings(4, 4), run_dir=tokenizer_dir, num_cpus=0.5)
    client = PoolClient(pool, "bench")
    client.begin(0, None)

    def wait_for(key: str, value: Any) -> None:
        while any(actor[key] != value for actor in ray.get(pool.status.remote())["actors"]):
            time.sleep(0.2)

    wait_for("state", "idle")
    publish_s, total_s = [], []
    for version in range(rounds + 1):
        start = time.perf_counter()
        client.publish(version, buffer)
        publish_s.append(time.perf_counter() - start)
        time.sleep(2)  # without a word: every question would delay the answer on two cores
        wait_for("version", version)
        total_s.append(publish_s[-1] + ray.get(pool.status.remote())["weights_fetch_s"])
        wait_for("state", "idle")
    close_pool(pool)
    return {
        "mb": round(buffer.nbytes / 1e6, 1),
        "publish_call_s": round(statistics.median(publish_s[1:]), 3),
        "until_all_have_it_s": round(statistics.median(total_s[1:]), 3),
    }


def bench_asynchronous(steps: int) -> dict[str, Any]:
    """Seconds for equally many steps of equally many groups, by staleness."""

    def open_sampler() -> Any:
        class Sleeper:
            version = -1

            def load_weights(self, _buffer: Any, version: int) -> None:
                self.version = version

            def sample(self, numbers: Sequence[int]) -> list[Group]:
                version = self.version
                lengths = [
                    min(256, int(random.Random(number).lognormvariate(3.6, 0.9)) + 1)
                    for number in numbers
                ]
                time.sleep(TOKEN_S * max(lengths))
                return [self._group(*pair, version) for pair in zip(numbers, lengths)]

            def _group(self, number: int, length: int, version: int) -> Group:
                sample = Sample(
                    tokens=np.ones(length, dtype=np.int32),
                    mask=np.ones(length, dtype=np.uint8),
                    logprobs=np.zeros(length, dtype=np.float32),
                    versions=np.full(length, version, dtype=np.int32),
                    finish_reason="stop",
                    text="",
                    reward=0.0,
                )
                return Group(number, np.ones(1, dtype=np.int32), (sample,))

        return Sleeper()

    buffer = flat.pack({"w": torch.zeros(1000)})
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for staleness in (0, 1, 2):
            rules = LedgerRules(steps, 16, 1, staleness)
            pool = start_pool(open_sampler, rules, PoolSettings(4, 4), run_dir=folder, num_cpus=0.2)
            client = PoolClient(pool, "bench")
            client.begin(0, None)
            client.publish(0, buffer)
            client.take(0)  # all actors have started
            client.trained(0)
            start, idle = time.perf_counter(), []
            for step in range(1, steps):
                client.publish(step, buffer)
                taken = client.take(step)
                idle.append((taken.figures["learner_idle"], taken.figures["rollout_idle"]))
                time.sleep(TRAIN_S)
                client.trained(step)
            report[f"S={staleness}"] = {
                "s": round(time.perf_counter() - start, 2),
                "learner_idle": round(statistics.mean(share for share, _ in idle), 3),
                "rollout_idle": round(statistics.mean(share for _, share in idle), 3),
                "groups_dropped": taken.figures["groups_dropped"],
            }
            close_pool(pool)
    for staleness in (1, 2):
        ours = report[f"S={staleness}"]
        ours["speedup"] = round(report["S=0"]["s"] / ours["s"], 2)
    return report


if __name__ == "__main__":
    main()
