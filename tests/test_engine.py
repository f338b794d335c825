"""The engine's behaviour: prefixes, seeds, stops, tools, weights, aborts, failures, streams."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable

import pytest
import torch
from engine_models import (
    VOCAB_SIZE,
    assert_greedy,
    full_logits,
    one_thread,  # noqa: F401
    random_tokens,
    run_until_idle,
    tiny,
)

from nanoray.engine import Completion, Delta, Engine, SamplingParams
from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT
from nanoray.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = SamplingParams(temperature=0, max_tokens=8)
TOKENIZER = ByteTokenizer()
SPECIAL = TOKENIZER.special_tokens


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny()


def scripted(chain: list[int]) -> GPT:
    """A model that greedily says the token after the last one in the chain.

    Its layers do nothing, and its head maps each token's embedding to the token's successor.
    """
    pairs = set(zip(chain, chain[1:]))
    assert len({token for token, _ in pairs}) == len(pairs), "the chain is ambiguous"
    model = tiny(recipe="february", n_embd=128)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in pairs:
            model.lm_head.weight[following] += model.wte.weight[token] / 4
    return model


# ---- prefixes


def test_a_repeated_prompt_computes_one_token(model: GPT) -> None:
    engine = Engine(model, None, max_len=200, prefill_chunk=64)
    prompt = random_tokens(150, 0)
    first = engine.generate([prompt], GREEDY)[0]
    before = engine.stats()
    again = engine.generate([prompt], GREEDY)[0]
    after = engine.stats()
    assert again.tokens == first.tokens
    assert after["computed_prefill_tokens"] == before["computed_prefill_tokens"]
    assert after["decode_row_steps"] - before["decode_row_steps"] == 8
    assert after["cached_prompt_tokens"] - before["cached_prompt_tokens"] == 149


def test_a_second_turn_starts_from_the_first(model: GPT) -> None:
    engine = Engine(model, None, max_len=200)
    prompt = random_tokens(100, 0)
    first = engine.generate([prompt], GREEDY)[0]
    second = engine.generate([prompt + first.tokens + random_tokens(10, 1)], GREEDY)[0]
    # The last token of the answer was never computed.
    assert engine.stats()["cached_prompt_tokens"] == 107
    assert_greedy(model, second)


def test_identical_requests_prefill_once(model: GPT) -> None:
    engine = Engine(model, None, num_slots=16, max_len=200, prefill_chunk=64)
    prompt = random_tokens(150, 0)
    completions = engine.generate([prompt] * 16, GREEDY)
    assert engine.stats()["computed_prefill_tokens"] == 150
    assert len({tuple(completion.tokens) for completion in completions}) == 1
    engine = Engine(model, None, num_slots=16, max_len=200)
    samples = engine.generate([prompt], SamplingParams(n=16, max_tokens=6))
    assert engine.stats()["computed_prefill_tokens"] == 150
    assert len({tuple(completion.tokens) for completion in samples}) > 8
    assert engine.stats()["decode_row_steps"] <= 16 * 6


def test_conversations_keep_their_slots(model: GPT) -> None:
    """A short common beginning does not cost another conversation its cache."""
    engine = Engine(model, None, num_slots=4, max_len=200)
    system = random_tokens(20, 0)
    turns = [system + random_tokens(100, seed) for seed in (1, 2, 3)]
    for prompt in turns:
        engine.generate([prompt], GREEDY)
    before = engine.stats()["computed_prefill_tokens"]
    for prompt in turns:
        engine.generate([prompt], GREEDY)
    assert engine.stats()["computed_prefill_tokens"] == before


def test_long_prompts_do_not_stall_running_requests(model: GPT) -> None:
    engine = Engine(model, None, num_slots=2, max_len=200, prefill_chunk=16)
    short = engine._requests(random_tokens(3, 0), SamplingParams(max_tokens=50))
    engine._submit(short)
    engine.step()
    long = engine._requests(random_tokens(160, 1), GREEDY)
    engine._submit(long)
    for i in range(9):
        engine.step()
        assert len(short[0].completion.tokens) == 2 + i
        assert not long[0].completion.tokens
    engine.step()
    assert len(long[0].completion.tokens) == 1


# ---- sampling inside the engine


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(temperature=1.1, top_k=40, top_p=0.95, seed=seed, max_tokens=12)


def test_neighbours_order_and_slots_do_not_change_a_request(model: GPT) -> None:
    prompts = [random_tokens(length, length) for length in (5, 40, 90, 6, 41, 91)]
    params = [sampled(seed) for seed in range(6)]
    together = Engine(model, None, num_slots=6, max_len=128).generate(prompts, params)
    backwards = Engine(model, None, num_slots=2, max_len=128, prefill_chunk=7).generate(
        prompts[::-1], params[::-1]
    )[::-1]
    for i, (one, other) in enumerate(zip(together, backwards)):
        alone = Engine(model, None, max_len=128).generate([prompts[i]], params[i])[0]
        assert one.tokens == other.tokens == alone.tokens
        assert one.sampled_logprobs == pytest.approx(alone.sampled_logprobs, abs=1e-4)
    changed = Engine(model, None).generate([prompts[0]], sampled(99))[0]
    assert changed.tokens != together[0].tokens


def test_logprobs_are_those_of_a_full_forward(model: GPT) -> None:
    completion = Engine(model, None, max_len=150).generate([random_tokens(90, 0)], sampled(1))[0]
    whole = completion.prompt + completion.tokens
    wanted = full_logits(model, whole).log_softmax(-1)[89:-1]
    for i, token in enumerate(completion.tokens):
        assert completion.logprobs[i] == pytest.approx(wanted[i, token].item(), abs=1e-4)
        assert completion.sampled_logprobs[i] > completion.logprobs[i] - 0.5


def test_scores_are_those_of_a_full_forward(model: GPT) -> None:
    engine = Engine(model, None, num_slots=2, max_len=150, prefill_chunk=7)
    prompts = [random_tokens(length, length) for length in (1, 2, 8, 15, 150)]
    engine.generate([prompts[-1][:100]], GREEDY)
    for prompt, scores in zip(prompts, engine.score(prompts)):
        wanted = full_logits(model, prompt).log_softmax(-1)
        assert len(scores) == len(prompt) - 1
        for i, score in enumerate(scores):
            assert score == pytest.approx(wanted[i, prompt[i + 1]].item(), abs=1e-4)
    assert engine.stats()["busy_slots"] == 0


# ---- how requests end


def test_stop_tokens_are_kept_and_shown_to_nobody() -> None:
    chain = [ord(c) for c in "abcdef"]
    model = scripted([*chain, SPECIAL["<|assistant_end|>"], ord("z")])
    engine = Engine(model, TOKENIZER)
    ended = engine.generate([[ord("a")]], GREEDY)[0]
    assert ended.tokens == [*chain[1:], SPECIAL["<|assistant_end|>"]]
    assert (ended.text, ended.finish_reason) == ("bcdef", "stop")
    own = SamplingParams(temperature=0, stop_token_ids=(ord("d"),))
    ended = engine.generate([[ord("a")]], own)[0]
    assert (ended.tokens, ended.text) == ([ord(c) for c in "bcd"], "bc")
    short = SamplingParams(temperature=0, max_tokens=3)
    ended = engine.generate([[ord("a")]], short)[0]
    assert (ended.text, ended.finish_reason) == ("bcd", "length")


def test_stop_strings_are_cut_from_the_text_alone() -> None:
    model = scripted([ord(c) for c in "abcdefgh"])
    engine = Engine(model, TOKENIZER)
    params = SamplingParams(temperature=0, stop=("xx", "de", "efg"), max_tokens=50)
    ended = engine.generate([[ord("a")]], params)[0]
    assert (ended.text, ended.finish_reason) == ("bc", "stop")
    assert ended.tokens == [ord(c) for c in "bcde"]
    cut = SamplingParams(temperature=0, stop=("dez",), max_tokens=4)
    assert engine.generate([[ord("a")]], cut)[0].text == "bcde"  # held back, then not a stop


def test_a_full_context_ends_with_length(model: GPT) -> None:
    engine = Engine(model, None, max_len=20)
    for length, most in ((20, 1), (19, 2), (5, 16)):
        params = SamplingParams(temperature=0, max_tokens=500)
        completion = engine.generate([random_tokens(length, 0)], params)[0]
        assert completion.finish_reason == "length"
        assert len(completion.tokens) == most
        assert_greedy(model, completion)


def test_aborts_free_their_slots_within_a_step(model: GPT) -> None:
    engine = Engine(model, None, num_slots=4, max_len=100, prefill_chunk=16)
    rng = random.Random(0)
    alive = []
    for i in range(500):
        new = engine._requests(random_tokens(rng.randint(1, 60), i % 7), sampled(i))
        engine._submit(new)
        alive += new
        for _ in range(rng.randint(0, 2)):
            engine.step()
        victim = alive.pop(rng.randrange(len(alive)))
        engine._tell(lambda victim=victim: engine._abort([victim]))
        engine.step()
        assert victim.done.is_set()
        assert victim not in engine._scheduler.running
        busy = [slot for slot in engine._scheduler.slots.all if slot.busy]
        assert busy == sorted(
            (request.placed for request in engine._scheduler.running), key=lambda s: s.index
        )
    run_until_idle(engine)
    assert engine.stats()["busy_slots"] == 0
    assert engine.stats()["waiting"] == 0


# ---- tools


def conversation(
    script: str, tool: Callable[[str], str | None], max_tokens: int = 60, max_len: int = 60
) -> Completion:
    """Run a chain of bytes; [ and ] stand for the call's marks, ( and ) for the output's."""
    marks = {
        "[": SPECIAL["<|python_start|>"],
        "]": SPECIAL["<|python_end|>"],
        "(": SPECIAL["<|output_start|>"],
        ")": SPECIAL["<|output_end|>"],
        "$": SPECIAL["<|assistant_end|>"],
    }
    chain = [marks.get(c, ord(c)) for c in script]
    engine = Engine(scripted(chain), TOKENIZER, tool=tool, max_len=max_len, prefill_chunk=2)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    completion = engine.generate([[chain[0]]], params)[0]
    assert engine.stats()["busy_slots"] == 0
    assert_greedy(scripted(chain), completion)
    return completion


def test_a_tools_output_is_forced_and_masked() -> None:
    calls: list[str] = []

    def tool(expression: str) -> str:
        calls.append(expression)
        return "42"

    # After the forced output's end the script goes on with what follows ")".
    completion = conversation("ab[6*7])yz$", tool)
    start, end = SPECIAL["<|output_start|>"], SPECIAL["<|output_end|>"]
    called = [ord("b"), SPECIAL["<|python_start|>"], *b"6*7", SPECIAL["<|python_end|>"]]
    output = [start, *b"42", end]
    rest = [*b"yz", SPECIAL["<|assistant_end|>"]]
    assert calls == ["6*7"]
    assert completion.tokens == [*called, *output, *rest]
    assert completion.mask == [1] * len(called) + [0] * len(output) + [1] * len(rest)
    assert completion.text == "b6*742yz"
    assert completion.finish_reason == "stop"
    lists = (completion.logprobs, completion.sampled_logprobs, completion.versions)
    assert [len(values) for values in lists] == [len(completion.tokens)] * 3
    assert completion.logprobs[len(called) : len(called) + 4] == [0.0] * 4


def test_a_tool_without_an_answer_forces_nothing() -> None:
    calls: list[str] = []
    completion = conversation("a[1/0]bcd$", lambda expression: calls.append(expression))
    assert calls == ["1/0"]
    assert completion.mask == [1] * len(completion.tokens)
    assert completion.text == "1/0bcd"
    empty = conversation("a[]bcd$", lambda expression: "never asked")
    assert empty.text == "bcd"


def test_a_forced_output_stops_at_the_limits() -> None:
    called = 5  # [1+1]
    for most in (1, called - 1, called, called + 1, called + 3, called + 4, called + 9):
        completion = conversation("a[1+2]zyx", lambda expression: "345", max_tokens=most)
        assert len(completion.tokens) == min(most, 60)
        assert completion.finish_reason == "length"
    completion = conversation("a[1+2]zyx", lambda expression: "3" * 500, max_len=30)
    assert len(completion.prompt + completion.tokens) == 31
    assert completion.mask[called:] == [0] * 25


def test_a_tool_that_raises_fails_its_request_alone() -> None:
    def tool(expression: str) -> str:
        raise ValueError("broken tool")

    completion = conversation("a[1+2]zyx", tool)
    assert completion.finish_reason == "error"
    assert completion.error is not None
    assert "broken tool" in completion.error


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


def test_weights_that_do_not_fit_change_nothing(model: GPT) -> None:
    engine = Engine(model, None)
    before = engine.generate([[1, 2, 3]], GREEDY)[0].tokens
    with pytest.raises(NanorayError, match="do not fit"):
        engine.load_weights(tiny(n_embd=128).state_dict(), version=1)
    assert engine.generate([[1, 2, 3]], GREEDY)[0].tokens == before
    assert engine.stats()["version"] == 0


def test_nan_weights_fail_requests_and_leave_no_trace(model: GPT) -> None:
    engine = Engine(model, None, num_slots=2, max_len=100, prefill_chunk=16)
    broken = {name: torch.full_like(t, torch.nan) for name, t in model.state_dict().items()}
    engine.load_weights(broken, version=1)
    aborted = engine._requests(random_tokens(90, 0), GREEDY)
    engine._submit(aborted)
    engine.step()  # has written NaNs, and does not get as far as noticing
    engine._abort(aborted)
    failed = engine.generate([random_tokens(50, 1)] * 3, GREEDY)
    assert {completion.finish_reason for completion in failed} == {"error"}
    assert "not finite" in str(failed[0].error)
    with pytest.raises(NanorayError, match="not finite"):
        engine.score([[1, 2, 3]])
    engine.load_weights(model.state_dict(), version=2)
    for completion in engine.generate([random_tokens(40, 2), random_tokens(9, 3)], GREEDY):
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


# ---- bad input


def test_bad_requests_are_refused_in_one_sentence(model: GPT) -> None:
    engine = Engine(model, None, max_len=50)
    bad: list[tuple[list[int], SamplingParams, str]] = [
        ([], GREEDY, "prompt is empty"),
        ([1] * 51, GREEDY, "the prompt has 51 tokens, but the context is 50"),
        ([1, VOCAB_SIZE], GREEDY, "token id 257 in the prompt is not in the vocabulary"),
        ([-1], GREEDY, "token id -1"),
        ([1], SamplingParams(logit_bias={999: 1.0}), "token id 999 in logit_bias"),
        ([1], SamplingParams(stop_token_ids=(999,)), "token id 999 in stop_token_ids"),
        ([1], SamplingParams(stop=("x",)), "stop strings need a tokenizer"),
    ]
    for prompt, params, message in bad:
        with pytest.raises(NanorayError, match=message):
            engine.generate([[1], prompt], [GREEDY, params])
    assert engine.stats()["requests_finished"] == 0  # refused before anything ran
    with pytest.raises(NanorayError, match="prompt is empty"):
        engine.score([[]])
    with pytest.raises(NanorayError, match="2 prompts, but 1 params"):
        engine.generate([[1], [2]], [GREEDY])
    with pytest.raises(NanorayError, match="num_slots must be at least 1"):
        Engine(model, None, num_slots=0)
    with pytest.raises(NanorayError, match="the tokenizer has 257 ids and the model 300"):
        Engine(tiny(vocab_size=300), TOKENIZER)
    assert Engine(model, None, max_len=10**6).max_len == model.config.rotary_len
    assert engine.generate([], GREEDY) == []


# ---- threads and streams


async def collect(engine: Engine, prompt: list[int], params: SamplingParams) -> list[Delta]:
    return [delta async for delta in engine.stream(prompt, params)]


def test_streams_equal_generate(model: GPT) -> None:
    prompts = [random_tokens(length, length) for length in (5, 40, 60)]
    params = [sampled(seed) for seed in range(3)]
    wanted = Engine(model, TOKENIZER, stop_token_ids=()).generate(prompts, params)
    engine = Engine(model, TOKENIZER, stop_token_ids=())

    async def all_streams() -> list[list[Delta]]:
        return await asyncio.gather(*(collect(engine, *pair) for pair in zip(prompts, params)))

    for completion, deltas in zip(wanted, asyncio.run(all_streams())):
        assert "".join(delta.text for delta in deltas) == completion.text
        assert sum((delta.tokens for delta in deltas), []) == completion.tokens
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
        assert sum((delta.tokens for delta in own), []) == completion.tokens


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

    monkeypatch.setattr(engine._scheduler, "step", explode)
    deltas = asyncio.run(collect(engine, [1], GREEDY))
    assert deltas[-1].finish_reason == "error"
    assert "device is lost" in str(deltas[-1].error)
