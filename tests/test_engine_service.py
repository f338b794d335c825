"""The engine over time: new weights, NaNs, failures; its thread, streams and callers."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from engine_models import (
    GREEDY,
    assert_greedy,
    full_logits,
    one_thread,  # noqa: F401
    random_tokens,
    run_until_idle,
    sampled,
    scripted,
    tiny,
)

from nanoray.engine import Completion, Delta, Engine, SamplingParams
from nanoray.engine.delta_inbox import DeltaInbox
from nanoray.engine.request import ScoreRequest
from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT
from nanoray.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = ByteTokenizer()
SPECIAL = TOKENIZER.special_tokens


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny()


# ---- weights


def test_new_weights_equal_a_fresh_engine(model: GPT) -> None:
    other = tiny(seed=7)
    engine = Engine(model, None, max_len=150)
    prompt = random_tokens(100, 0)
    engine.generate([prompt], GREEDY)
    engine.load_weights(other.state_dict(), version=3)
    assert engine.stats()["cached_tokens"] == 0
    completion = engine.generate([prompt], GREEDY)[0]
    assert (
        completion.tokens == Engine(other, None, max_len=150).generate([prompt], GREEDY)[0].tokens
    )
    assert completion.versions == [3] * 8
    assert_greedy(other, completion)


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_new_weights_reach_requests_under_way(model: GPT, steps: int) -> None:
    other = tiny(seed=7)
    engine = Engine(model, None, num_slots=3, max_len=150, prefill_chunk=32)
    params = SamplingParams(temperature=0, max_tokens=14)
    requests = [
        request
        for seed, length in enumerate((60, 30, 100, 50))
        for request in engine._requests(random_tokens(length, seed), params)
    ]
    engine._submit(requests)
    for _ in range(steps):
        engine.step()
    engine.load_weights(other.state_dict(), version=1)
    run_until_idle(engine)
    for request in requests:
        completion = request.completion
        switch = completion.versions.count(0)
        assert completion.versions == [0] * switch + [1] * (14 - switch)
        # Each token is greedy by the weights of its version, over the whole sequence before it.
        for version, source in ((0, model), (1, other)):
            completion.mask = [int(v == version) for v in completion.versions]
            assert_greedy(source, completion)
    assert (
        any(r.completion.versions[0] != r.completion.versions[-1] for r in requests) or steps == 1
    )


def test_scores_start_over_with_new_weights(model: GPT) -> None:
    other = tiny(seed=7)
    engine = Engine(model, None, prefill_chunk=10)
    prompt = random_tokens(50, 0)
    request = ScoreRequest(engine._rules, prompt)
    engine._submit([request])
    engine.step()
    engine.step()
    assert len(request.scores) == 20
    engine.load_weights(other.state_dict(), version=1)
    run_until_idle(engine)
    wanted = full_logits(other, prompt).log_softmax(-1)
    assert request.scores == pytest.approx(
        [wanted[i, prompt[i + 1]].item() for i in range(49)], abs=1e-4
    )


def test_weights_that_do_not_fit_change_nothing(model: GPT) -> None:
    engine = Engine(model, None)
    before = engine.generate([[1, 2, 3]], GREEDY)[0].tokens
    with pytest.raises(NanorayError, match="do not fit"):
        engine.load_weights(tiny(n_embd=128).state_dict(), version=1)
    assert engine.generate([[1, 2, 3]], GREEDY)[0].tokens == before
    assert engine.stats()["version"] == 0


def test_nan_weights_fail_requests_and_new_ones_mend_the_engine(model: GPT) -> None:
    engine = Engine(model, None)
    broken = {name: torch.full_like(t, torch.nan) for name, t in model.state_dict().items()}
    engine.load_weights(broken, version=1)
    failed = engine.generate([random_tokens(50, 1)] * 3, GREEDY)
    assert {completion.finish_reason for completion in failed} == {"error"}
    assert "not finite" in str(failed[0].error)
    with pytest.raises(NanorayError, match="not finite"):
        engine.score([[1, 2, 3]])
    engine.load_weights(model.state_dict(), version=2)
    assert_greedy(model, engine.generate([random_tokens(40, 2)], GREEDY)[0])


# Two requests of unlike lengths decode together, so that the shorter one's slot is read, masked,
# beyond its end: where an earlier sequence may have left NaNs.
UNLIKE = [random_tokens(70, 2), random_tokens(5, 3)]


def test_nans_of_an_unfinished_request_do_not_outlive_their_weights(model: GPT) -> None:
    engine = Engine(model, None, num_slots=2, max_len=100, prefill_chunk=32)
    broken = {name: torch.full_like(t, torch.nan) for name, t in model.state_dict().items()}
    engine.load_weights(broken, version=1)
    aborted = [engine._requests(random_tokens(90, seed), GREEDY) for seed in (0, 1)]
    engine._submit(aborted[0])
    engine._submit(aborted[1])
    engine.step()  # has written NaNs, and does not get as far as noticing
    engine._abort(aborted[0])
    engine.step()
    engine._abort(aborted[1])
    engine.load_weights(model.state_dict(), version=2)
    for completion in engine.generate(UNLIKE, GREEDY):
        assert completion.finish_reason == "length"
        assert_greedy(model, completion)


def test_nans_of_a_failed_request_stay_with_it(model: GPT) -> None:
    poisoned = tiny()
    poison = 251  # a token whose embedding is NaN; random_tokens gives none
    with torch.no_grad():
        poisoned.wte.weight[poison] = torch.nan
    engine = Engine(poisoned, None, num_slots=2, max_len=100)
    bad = [[*prompt, poison, *random_tokens(25, 9)] for prompt in UNLIKE]
    for completion in engine.generate(bad, GREEDY):
        assert completion.finish_reason == "error"
    for completion in engine.generate(UNLIKE, GREEDY):  # in the same slots, with their prefixes
        assert completion.finish_reason == "length"
        assert_greedy(model, completion)


def test_a_step_that_raises_fails_its_requests_and_not_the_engine(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, None)
    with monkeypatch.context() as patch:

        def explode(hidden: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no memory left")

        patch.setattr(engine._scheduler.model, "logits", explode)
        completion = engine.generate([[1, 2]], GREEDY)[0]
    assert (completion.finish_reason, completion.tokens) == ("error", [])
    assert "no memory left" in str(completion.error)
    assert engine.generate([[1, 2]], GREEDY)[0].finish_reason == "length"


# ---- threads and streams


async def collect(engine: Engine, prompt: list[int], params: SamplingParams) -> list[Delta]:
    return [delta async for delta in engine.stream(prompt, params)]


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def test_streams_equal_generate(model: GPT) -> None:
    prompts = [random_tokens(length, length) for length in (5, 40, 60)]
    params = [sampled(seed) for seed in range(3)]
    wanted = Engine(model, TOKENIZER, stop_token_ids=()).generate(prompts, params)
    engine = Engine(model, TOKENIZER, stop_token_ids=())

    async def all_streams() -> list[list[Delta]]:
        return await asyncio.gather(*(collect(engine, *pair) for pair in zip(prompts, params)))

    for completion, deltas in zip(wanted, asyncio.run(all_streams())):
        assert "".join(delta.text for delta in deltas) == completion.text
        assert tokens_of(deltas) == completion.tokens
        reasons = [delta.finish_reason for delta in deltas]
        assert reasons == [None] * (len(deltas) - 1) + ["length"]
    # generate() and score() work beside the thread.
    assert engine.generate(prompts, params)[2].tokens == wanted[2].tokens
    assert len(engine.score(prompts)[1]) == 39
    engine.close()


def test_a_stream_of_several_samples(model: GPT) -> None:
    params = SamplingParams(n=3, max_tokens=5)
    wanted = Engine(model, None).generate([[1, 2, 3]], params)
    engine = Engine(model, None)
    deltas = asyncio.run(collect(engine, [1, 2, 3], params))
    engine.close()
    for index, completion in enumerate(wanted):
        own = [delta for delta in deltas if delta.index == index]
        assert tokens_of(own) == completion.tokens


def test_closing_a_stream_aborts_its_request(model: GPT) -> None:
    engine = Engine(model, None, max_len=600)

    async def leave() -> None:
        stream = engine.stream([1, 2], SamplingParams(max_tokens=500))
        async for _ in stream:
            break
        await stream.aclose()
        for _ in range(400):
            if not engine.stats()["busy_slots"]:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the slot is still busy")

    asyncio.run(leave())
    assert engine.stats()["generated_tokens"] < 500
    engine.close()


def test_a_tools_parts_are_marked_in_the_stream() -> None:
    chain = [ord("a"), ord("b"), SPECIAL["<|python_start|>"], *b"6*7", SPECIAL["<|python_end|>"]]
    chain += [SPECIAL["<|output_end|>"], *b"yz", SPECIAL["<|assistant_end|>"]]
    engine = Engine(scripted(chain), TOKENIZER, tool=lambda expression: "42")
    params = SamplingParams(temperature=0)
    deltas = asyncio.run(collect(engine, [ord("a")], params))
    engine.close()
    parts = {
        part: "".join(delta.text for delta in deltas if delta.tool == part)
        for part in ("none", "call", "output")
    }
    assert parts == {"none": "byz", "call": "6*7", "output": "42"}


def test_pause_holds_and_resume_goes_on(model: GPT) -> None:
    engine = Engine(model, None)
    engine.start()
    engine.pause()
    results: list[Completion] = []
    caller = threading.Thread(target=lambda: results.extend(engine.generate([[1, 2]], GREEDY)))
    caller.start()
    caller.join(0.1)
    assert caller.is_alive()
    assert engine.stats()["generated_tokens"] == 0
    engine.load_weights(tiny(seed=3).state_dict(), version=5)
    engine.resume()
    caller.join(10)
    assert results[0].versions == [5] * 8
    engine.close()


def test_callers_of_many_threads_share_an_engine_without_its_own(model: GPT) -> None:
    engine = Engine(model, None, num_slots=3)
    prompts = [random_tokens(20, seed) for seed in range(6)]
    wanted = [Engine(model, None).generate([prompt], GREEDY)[0].tokens for prompt in prompts]
    results: dict[int, list[int]] = {}

    def call(i: int) -> None:
        results[i] = engine.generate([prompts[i]], GREEDY)[0].tokens

    callers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(20)
    assert [results[i] for i in range(6)] == wanted


def test_close_releases_everybody(model: GPT) -> None:
    engine = Engine(model, None, max_len=600)

    async def watch() -> list[Delta]:
        task = asyncio.create_task(collect(engine, [1], SamplingParams(max_tokens=500)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close)
        return await asyncio.wait_for(task, 10)

    deltas = asyncio.run(watch())
    assert (deltas[-1].finish_reason, deltas[-1].error) == ("abort", "the engine is closed")
    with pytest.raises(NanorayError, match="closed"):
        engine.generate([[1]], GREEDY)
    engine.close()
    engine.pause()  # harmless


def test_a_lost_thread_leaves_nobody_waiting(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, None)

    def explode() -> bool:
        raise SystemExit("the device is lost")

    engine.start()
    monkeypatch.setattr(engine._scheduler, "step", explode)
    completion = engine.generate([[1]], GREEDY)[0]
    assert completion.finish_reason == "error"
    assert "device is lost" in str(completion.error)
    with pytest.raises(NanorayError, match="closed"):
        asyncio.run(collect(engine, [1], GREEDY))
    engine.pause()  # returns


def test_a_reader_slower_than_the_engine_can_be_cancelled() -> None:
    """It never waits for a delta; a Ctrl-C, and other tasks, must get through all the same."""

    async def read_on(inbox: DeltaInbox) -> None:
        for _ in range(100_000):
            inbox.put(Delta(0, "x", [1], [0.0]))
            await inbox.take()
        pytest.fail("nobody else had a turn")

    async def interrupt() -> None:
        reader = asyncio.create_task(read_on(DeltaInbox(1)))
        await asyncio.sleep(0.01)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    asyncio.run(interrupt())
