"""The engine's behaviour: prefixes, seeds, scores, stops, aborts, tools, bad input."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from engine_models import (
    GREEDY,
    VOCAB_SIZE,
    assert_greedy,
    full_logits,
    one_thread,  # noqa: F401
    random_tokens,
    run_until_idle,
    sampled,
    scripted,
    tiny,
)

from nanoray.engine import Completion, Engine, SamplingParams
from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT
from nanoray.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = ByteTokenizer()
SPECIAL = TOKENIZER.special_tokens


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny()


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


def test_samples_that_read_one_prompt_are_those_drawn_alone(model: GPT) -> None:
    prompt = random_tokens(100, 0)
    params = [SamplingParams(seed=seed, max_tokens=5 + 4 * seed, top_k=40) for seed in range(7)]
    together = Engine(model, None, num_slots=7, max_len=140).generate([prompt] * 7, params)
    for completion, alone in zip(together, params):
        engine = Engine(model, None, num_slots=1, max_len=140, prefix_cache=False)
        assert completion.tokens == engine.generate([prompt], alone)[0].tokens
    greedy = SamplingParams(temperature=0, max_tokens=30, n=3)
    engine = Engine(model, None, num_slots=5, max_len=140)
    for completion in engine.generate([prompt, prompt[:90]], greedy):
        assert_greedy(model, completion)


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
