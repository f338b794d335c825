"""What the engine has for servers: likeliest tokens, scores without blocking, batches of deltas."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from engine_models import full_logits, one_thread, random_tokens, tiny  # noqa: F401

from nanoray.engine import Delta, Engine, SamplingParams, extend_parts
from nanoray.engine.engine import EngineClosedError
from nanoray.engine.sampling import sample
from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny()


async def collect(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, pause_s: float = 0
) -> list[list[Delta]]:
    batches = []
    async for deltas in engine.stream_batches(prompts, params):
        batches.append(deltas)
        await asyncio.sleep(pause_s)
    return batches


def test_the_likeliest_tokens_are_the_softmaxs() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(top_logprobs=k, temperature=0.3) for k in (0, 2, 50)]
    drawn = sample(logits, params, [0.1, 0.5, 0.9])
    wanted = logits.log_softmax(-1)
    assert [len(top) for top in drawn.top_logprobs] == [0, 2, 40]
    for row in (1, 2):
        tokens, values = zip(*drawn.top_logprobs[row])
        assert list(values) == sorted(values, reverse=True)
        assert values == pytest.approx(wanted[row, list(tokens)].tolist(), abs=1e-5)
        assert values[0] == pytest.approx(wanted[row].max().item(), abs=1e-5)
    token, logprob = drawn.tokens[2], drawn.logprobs[2]
    assert dict(drawn.top_logprobs[2])[token] == logprob  # the very same number


@pytest.mark.parametrize("chunk", [7, 256])
def test_scores_with_alternatives_equal_a_full_forward(model: GPT, chunk: int) -> None:
    engine = Engine(model, None, max_len=100, prefill_chunk=chunk)
    prompts = [random_tokens(length, length) for length in (40, 1, 12)]
    scores = asyncio.run(engine.score_async(prompts, top_logprobs=3))
    plain = engine.score(prompts)
    for prompt, score, logprobs in zip(prompts, scores, plain):
        assert score.logprobs == logprobs
        wanted = full_logits(model, prompt).log_softmax(-1)
        assert len(score.top_logprobs) == len(prompt) - 1
        for i, top in enumerate(score.top_logprobs):
            best = wanted[i].topk(3)
            assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert asyncio.run(engine.score_async(prompts))[0].top_logprobs == []
    with pytest.raises(NanorayError, match="vocabulary"):
        asyncio.run(engine.score_async([[1000]]))
    engine.close()
    with pytest.raises(EngineClosedError):
        asyncio.run(engine.score_async(prompts))


def test_cancelled_scoring_frees_its_slots(model: GPT) -> None:
    engine = Engine(model, None, max_len=600, num_slots=2, prefill_chunk=4)

    async def leave() -> None:
        prompts = [random_tokens(500, seed) for seed in range(8)]
        task = asyncio.create_task(engine.score_async(prompts))
        while not engine.stats()["busy_slots"]:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        deadline = time.monotonic() + 1
        while engine.stats()["busy_slots"] or engine.stats()["waiting"]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)

    asyncio.run(leave())
    engine.close()


def test_batches_of_several_prompts_equal_generate(model: GPT) -> None:
    prompts = [random_tokens(length, length) for length in (5, 30)]
    params = SamplingParams(n=2, max_tokens=15, seed=3)
    wanted = Engine(model, None).generate(prompts, params)
    engine = Engine(model, None)
    for pause_s in (0, 0.02):
        batches = asyncio.run(collect(engine, prompts, params, pause_s))
        for index, completion in enumerate(wanted):
            own = [delta for deltas in batches for delta in deltas if delta.index == index]
            assert [token for delta in own for token in delta.tokens] == completion.tokens
            assert [d.finish_reason for d in own][-1] == completion.finish_reason
    assert len(batches) < 15  # a caller that pauses gets several steps at once
    engine.close()


def test_deltas_tell_what_was_cached_and_how_long_they_queued(model: GPT) -> None:
    engine = Engine(model, None, num_slots=1)
    prompt = random_tokens(30, 0)
    first = asyncio.run(collect(engine, [prompt], SamplingParams(max_tokens=2)))
    second = asyncio.run(collect(engine, [prompt, prompt], SamplingParams(max_tokens=9)))
    engine.close()
    assert first[0][0].cached_tokens == 0
    deltas = [delta for batch in second for delta in batch]
    assert {delta.cached_tokens for delta in deltas} == {29}
    waits = {index: d.queued_s for index in (0, 1) for d in deltas if d.index == index}
    assert 0 <= waits[0] < waits[1]


def test_a_stream_begins_without_waiting_for_the_step_under_way(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, None)
    engine.start()
    hold, held = threading.Event(), threading.Event()

    def slow() -> None:
        held.set()
        hold.wait(5)

    engine._tell(slow)
    assert held.wait(5)
    begun = time.monotonic()

    async def begin() -> None:
        stream = engine.stream([1], SamplingParams(max_tokens=1))
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.01)
        assert time.monotonic() - begun < 1  # the event loop is free
        hold.set()
        await task
        await stream.aclose()

    asyncio.run(begin())
    engine.close()


def test_parts_of_an_answer_are_joined() -> None:
    parts: list[dict[str, str]] = []
    pieces = [("none", "a"), ("none", ""), ("none", "b"), ("call", "1+"), ("call", "1")]
    for tool, text in [*pieces, ("output", "2"), ("none", "")]:
        extend_parts(parts, Delta(0, text, [], [], None, tool))  # type: ignore[arg-type]
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "ab"),
        ("python", "1+1"),
        ("python_output", "2"),
    ]
