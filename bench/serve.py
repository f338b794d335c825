"""The chat service's six figures, against the bare engine and a server of one at a time.

The service runs as `python -m jobs.serve` does; the client is this process. Prints one JSON line
last.

    python bench/serve.py [--from-run DIR] [--rounds 5] [--only streams,overload] [--minutes 10]
        [--nanochat DIR]

1. streams: tokens/s of 16 concurrent streams of 64 tokens, of the bare engine with the same
   requests (in a process like a replica), of the same requests one at a time over HTTP, and of
   nanochat's engine one after the other (all cores, no HTTP; only for a run of the bench's shape).
2. first_token: median time to the first token, idle, over HTTP and of the bare engine.
3. second_turn: time to the first token of a long conversation's second turn (some 700 tokens, two
   thirds of the context) with the same x-session-id and 2 replicas, and of its first turn.
4. disconnects: seconds until a closed connection's slot is free; slots busy after 500 connections
   closed at random moments.
5. overload: 200 requests at once: how many were refused and how soon, memory before and after.
6. soak (--minutes, else left out): mixed load with random disconnects; errors, memory growth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from serve_process import ROOT, Server, make_run, service

if TYPE_CHECKING:
    from nanoray.tokenizer import Tokenizer

NUM_STREAMS, NUM_TOKENS = 16, 64
LONG_TURN_TOKENS = 700
_FORBIDDEN: dict[str, float] = {}  # logit_bias by which no answer ends before its time
CHAT = "/v1/chat/completions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from-run", type=Path, help="a run's folder (default: a random model)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are over as many")
    parser.add_argument("--only", default="", help="some of the figures, by name")
    parser.add_argument("--nanochat", type=Path, help="a nanochat checkout to compare with")
    parser.add_argument("--minutes", type=float, default=0, help="of the soak")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    report: dict[str, Any] = {"bench": "serve", "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as folder:
        run = str(args.from_run or make_run(folder))
        forbid_stops(run)
        figures = {
            "streams": bench_streams,
            "first_token": bench_first_token,
            "disconnects": bench_disconnects,
            "overload": bench_overload,
        }
        chosen = {name: bench for name, bench in figures.items() if not only or name in only}
        if chosen:
            bare = bare_engine(run, args.rounds, args.nanochat)
            with service(run) as server:
                for name, bench in chosen.items():
                    report[name] = asyncio.run(bench(server, args.rounds, bare))
                    print(name, report[name], file=sys.stderr, flush=True)
        if not only or "second_turn" in only:
            with service(run, "--replicas=2") as server:
                report["second_turn"] = asyncio.run(bench_second_turn(server, args.rounds, run))
        if args.minutes:
            with service(run) as server:
                report["soak"] = asyncio.run(bench_soak(server, args.minutes))
    print(json.dumps(report))


def tokenizer_of(run: str) -> Tokenizer:
    from nanoray.tokenizer import load_tokenizer

    return load_tokenizer(str(max((Path(run) / "checkpoints").iterdir())))


def forbid_stops(run: str) -> None:
    specials = tokenizer_of(run).special_tokens.values()
    _FORBIDDEN.update({str(token): -100.0 for token in specials})


def question(index: int, max_tokens: int = NUM_TOKENS, **changes: Any) -> dict[str, Any]:
    """Distinct from its first word on, so that no prefix helps."""
    content = f"{index} is the number of this question about rivers and mountains. " * 2
    messages = [{"role": "user", "content": content}]
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0.8, "seed": index}
    body |= {"logit_bias": _FORBIDDEN}
    return body | {"stream": True, "stream_options": {"include_usage": True}} | changes


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


async def ask(
    http: aiohttp.ClientSession, body: dict[str, Any], session: str = ""
) -> tuple[float, int, str]:
    """Seconds to the first text, tokens of the answer, its text."""
    start = time.perf_counter()
    first, tokens, text = 0.0, 0, ""
    headers = {"x-session-id": session} if session else {}
    async with http.post(CHAT, json=body, headers=headers) as response:
        response.raise_for_status()
        async for event in events(response):
            assert "error" not in event, event
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                first = first or time.perf_counter() - start
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    return first, tokens, text


# ---- the figures


def bare_engine(run: str, rounds: int, nanochat: Path | None) -> dict[str, float]:
    """Tokens/s of the same requests, and the time to a first token, in a process of its own."""
    command = [sys.executable, __file__, "--bare", run, str(rounds)]
    command += [str(nanochat)] if nanochat else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
    values: dict[str, float] = json.loads(found.stdout)
    return values


def run_bare_engine(run: str, rounds: int, nanochat: str | None = None) -> None:
    import torch

    from nanoray.checkpoint.loading import load_model
    from nanoray.engine import Engine, SamplingParams

    torch.set_num_threads(1)
    forbid_stops(run)
    bias = {int(token): value for token, value in _FORBIDDEN.items()}
    loaded = load_model(run, dtype="float32")
    engine = Engine(loaded.model, loaded.tokenizer, num_slots=NUM_STREAMS, max_len=1024)

    def prompt(index: int) -> list[int]:
        messages = question(index)["messages"]
        return loaded.tokenizer.render_for_completion({"messages": messages})

    def params(index: int, max_tokens: int = NUM_TOKENS) -> SamplingParams:
        return SamplingParams(temperature=0.8, seed=index, max_tokens=max_tokens, logit_bias=bias)

    speeds, firsts = [], []
    for r in range(rounds + 1):
        numbers = range(r * NUM_STREAMS, (r + 1) * NUM_STREAMS)
        start = time.perf_counter()
        done = engine.generate([prompt(i) for i in numbers], [params(i) for i in numbers])
        speeds.append(sum(len(c.tokens) for c in done) / (time.perf_counter() - start))
    for r in range(20):
        start = time.perf_counter()
        engine.generate([prompt(10_000 + r)], params(r, 1))
        firsts.append(time.perf_counter() - start)
    values = {"tokens_per_s": statistics.median(speeds[1:]), "ttft_s": statistics.median(firsts)}
    if nanochat:
        from engine import load_peer  # bench/engine.py

        peer = load_peer(Path(nanochat), loaded.model)
        torch.set_num_threads(os.cpu_count() or 1)
        speeds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            for i in range(NUM_STREAMS):
                peer(prompt(i), 1, [NUM_TOKENS], False)
            speeds.append(NUM_STREAMS * NUM_TOKENS / (time.perf_counter() - start))
        values["nanochat_tokens_per_s"] = statistics.median(speeds[1:])
    print(json.dumps(values))


async def bench_streams(server: Server, rounds: int, bare: dict[str, float]) -> dict[str, float]:
    together, alone = [], []
    async with server.client() as http:
        for r in range(rounds + 1):
            numbers = range(r * NUM_STREAMS, (r + 1) * NUM_STREAMS)
            start = time.perf_counter()
            done = await asyncio.gather(*(ask(http, question(i)) for i in numbers))
            together.append(sum(tokens for _, tokens, _ in done) / (time.perf_counter() - start))
        for r in range(rounds):
            start = time.perf_counter()
            done = [await ask(http, question(5000 + r * 4 + i)) for i in range(4)]
            alone.append(sum(tokens for _, tokens, _ in done) / (time.perf_counter() - start))
    speed, single = statistics.median(together[1:]), statistics.median(alone)
    report = {
        "tokens_per_s": round(speed, 1),
        "engine_tokens_per_s": round(bare["tokens_per_s"], 1),
        "one_at_a_time_tokens_per_s": round(single, 1),
        "of_engine": round(speed / bare["tokens_per_s"], 3),
        "of_one_at_a_time": round(speed / single, 2),
    }
    if peer := bare.get("nanochat_tokens_per_s"):
        report |= {"nanochat_tokens_per_s": round(peer, 1), "of_nanochat": round(speed / peer, 2)}
    return report


async def bench_first_token(
    server: Server, rounds: int, bare: dict[str, float]
) -> dict[str, float]:
    firsts = []
    async with server.client() as http:
        for i in range(8 * rounds):
            firsts.append((await ask(http, question(20_000 + i, 4)))[0])
    p50 = statistics.median(firsts)
    return {
        "ttft_ms": round(p50 * 1e3, 1),
        "engine_ttft_ms": round(bare["ttft_s"] * 1e3, 1),
        "added_ms": round((p50 - bare["ttft_s"]) * 1e3, 1),
    }


async def bench_second_turn(server: Server, rounds: int, run: str) -> dict[str, float]:
    cold, warm = [], []
    sentence = "the river runs past the old mill and the garden. "
    length = len(tokenizer_of(run).encode(sentence))
    async with server.client() as http:
        for r in range(2 * rounds):
            said = f"{r} " + sentence * (LONG_TURN_TOKENS // length)
            messages = [{"role": "user", "content": said}]
            first, _, text = await ask(http, question(r, 16, messages=messages), f"s{r}")
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "?"}]
            cold.append(first)
            warm.append((await ask(http, question(r, 16, messages=messages), f"s{r}"))[0])
    values = {"cold_ms": statistics.median(cold[1:]), "warm_ms": statistics.median(warm[1:])}
    report = {name: round(value * 1e3, 1) for name, value in values.items()}
    return report | {"ratio": round(values["warm_ms"] / values["cold_ms"], 3)}


async def _leave(http: aiohttp.ClientSession, index: int, after_s: float) -> None:
    """Ask, and close the connection at some moment."""
    with contextlib.suppress(asyncio.TimeoutError):
        async with asyncio.timeout(after_s):
            async with http.post(CHAT, json=question(index, 400)) as response:
                await response.read()


async def bench_disconnects(server: Server, rounds: int, bare: object) -> dict[str, float]:
    rng = random.Random(0)
    freed = []
    async with server.client() as http:
        for r in range(rounds):
            await _leave(http, r, 0.5)
            start = time.perf_counter()
            while await server.busy_slots(http):
                await asyncio.sleep(0.01)
            freed.append(time.perf_counter() - start)
        for batch in range(25):  # 20 at a time: all of them have a slot or wait in the engine
            await asyncio.gather(
                *(_leave(http, 100 + batch * 20 + i, rng.uniform(0, 1.0)) for i in range(20))
            )
        await asyncio.sleep(1)
        busy = await server.busy_slots(http)
    return {"freed_s": round(statistics.median(freed), 3), "busy_after_500": busy}


async def bench_overload(server: Server, rounds: int, bare: object) -> dict[str, Any]:
    statuses: Counter[int] = Counter()
    refused: list[float] = []

    async def one(http: aiohttp.ClientSession, index: int) -> None:
        start = time.perf_counter()
        async with http.post(CHAT, json=question(index, stream=False, stream_options=None)) as r:
            await r.read()
            statuses[r.status] += 1
            if r.status in (429, 503):
                assert "retry-after" in r.headers
                refused.append(time.perf_counter() - start)

    async with server.client() as http:
        await asyncio.gather(*(one(http, i) for i in range(16)))
        statuses.clear()
        before = server.rss_mb()
        for r in range(rounds):
            await asyncio.gather(*(one(http, 200 * r + i) for i in range(200)))
        after = server.rss_mb()
    refused.sort()
    return {
        "requests": 200 * rounds,
        "statuses": dict(statuses),
        "refused_p50_s": round(refused[len(refused) // 2], 3),
        "refused_p99_s": round(refused[int(len(refused) * 0.99)], 3),
        "rss_mb": [round(before), round(after)],
    }


async def bench_soak(server: Server, minutes: float) -> dict[str, Any]:
    end = time.monotonic() + minutes * 60
    outcomes: Counter[str] = Counter()
    rng = random.Random(0)

    async def user(http: aiohttp.ClientSession, number: int) -> None:
        while time.monotonic() < end:
            if rng.random() < 0.25:
                await _leave(http, rng.randrange(10**6), rng.uniform(0, 1))
                outcomes["left"] += 1
                continue
            try:
                body = question(rng.randrange(10**6), rng.randrange(1, 200))
                await ask(http, body, rng.choice(["", f"user-{number}"]))
                outcomes["answered"] += 1
            except aiohttp.ClientResponseError as error:
                outcomes[str(error.status)] += 1
                await asyncio.sleep(1)
            except (aiohttp.ClientError, AssertionError) as error:
                outcomes[f"error {error!r}"[:200]] += 1

    async def watch() -> list[float]:
        sizes = []
        while time.monotonic() < end:
            sizes.append(server.rss_mb())
            await asyncio.sleep(min(10, minutes * 6))
        return sizes

    async with server.client() as http:
        users = [user(http, number) for number in range(24)]
        sizes, *_ = await asyncio.gather(watch(), *users)
        await asyncio.sleep(1)
        busy = await server.busy_slots(http)
    start = statistics.median(sizes[len(sizes) // 10 :][:3])  # after everything was used once
    last = statistics.median(sizes[-3:])
    growth = round(last / start - 1, 4)
    rss = [round(start), round(last)]
    return {"outcomes": dict(outcomes), "busy": busy, "rss_mb": rss, "rss_growth": growth}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        run_bare_engine(sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    else:
        main()
