"""Greedy decoding against a full forward: arrivals, aborts, chunks, slots, prefixes, windows."""

from __future__ import annotations

import itertools
import random

import pytest
from engine_models import assert_greedy, one_thread, random_tokens, run_until_idle, tiny  # noqa: F401

from nanoray.engine import Engine, SamplingParams
from nanoray.engine.request import Request

pytestmark = pytest.mark.usefixtures("one_thread")

MATRIX = list(itertools.product([1, 7, 64], [1, 3, 8], [True, False], [1, 2, 4]))


def random_prompt(rng: random.Random) -> list[int]:
    """Some are beginnings of others, and some longer than every window (64 and 128, 32)."""
    tokens = random_tokens(170, seed=rng.randint(0, 2))
    prompt = tokens[: rng.choice([1, 2, 30, 64, 65, 100, 135, 170])]
    return prompt + random_tokens(rng.choice([0, 0, 5]), seed=rng.randint(0, 99))


def drive(engine: Engine, rng: random.Random, num_requests: int) -> list[Request]:
    """Random arrivals between the steps, every fifth request aborted at some point."""
    requests: list[Request] = []
    while len(requests) < num_requests:
        for _ in range(rng.randint(0, 3)):
            params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 24))
            new = engine._requests(random_prompt(rng), params)
            engine._submit(new)
            requests += new
        for _ in range(rng.randint(0, 8)):
            engine.step()
        if rng.random() < 0.2:
            engine._abort([rng.choice(requests)] if requests else [])
    run_until_idle(engine)
    return requests


def check(
    chunk: int, slots: int, prefix_cache: bool, kv_heads: int, recipe: str, num_requests: int
) -> int:
    seed = chunk * 1000 + slots * 10 + prefix_cache
    model = tiny(seed=seed, n_kv_head=kv_heads, recipe=recipe)
    engine = Engine(
        model,
        None,
        num_slots=slots,
        max_len=180,
        prefill_chunk=chunk,
        prefix_cache=prefix_cache,
    )
    requests = drive(engine, random.Random(seed), num_requests)
    complete = 0
    for request in requests:
        completion = request.completion
        assert request.done.is_set()
        assert completion.finish_reason in ("length", "abort")
        assert completion.tokens == request.tokens[len(completion.prompt) :]
        if completion.finish_reason == "length":
            room = 181 - len(completion.prompt)
            assert len(completion.tokens) == min(room, request.params.max_tokens)
            complete += 1
        if completion.tokens:
            assert_greedy(model, completion)
    stats = engine.stats()
    assert stats["busy_slots"] == stats["running"] == stats["waiting"] == 0
    assert prefix_cache or stats["cached_prompt_tokens"] == 0
    return complete


@pytest.mark.parametrize("recipe", ["july", "february"])
@pytest.mark.parametrize(("chunk", "slots"), [(1, 3), (7, 1), (64, 8)])
def test_greedy_equals_the_full_forward(chunk: int, slots: int, recipe: str) -> None:
    assert check(chunk, slots, True, 2, recipe, num_requests=8) >= 4


@pytest.mark.slow
def test_two_hundred_requests_through_the_matrix() -> None:
    complete = sum(
        check(*case, recipe="february" if i % 3 == 2 else "july", num_requests=6)
        for i, case in enumerate(MATRIX)
    )
    assert complete >= 200
