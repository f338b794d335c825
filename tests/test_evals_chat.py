"""Chat evaluation: statistics against brute force; results that no split and no order changes."""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_models import full_logits, one_thread, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanoray.checkpoint.loading import LoadedModel
from nanoray.engine import CachedModel, Completion, Engine
from nanoray.errors import NanorayError
from nanoray.evals.chat import (
    GROUP_SIZE,
    ExampleResult,
    LetterLogits,
    answer_text,
    chatcore,
    evaluate_categorical,
    evaluate_generative,
    task_score,
)
from nanoray.evals.chat_suite import ChatSuite
from nanoray.evals.stats import centered, pass_at_k, wilson_interval
from nanoray.evals.suites import Subject
from nanoray.model.gpt import GPT
from nanoray.tasks.arithmetic import Arithmetic
from nanoray.tasks.base import Task, reference_answer
from nanoray.tasks.catalog import Sources
from nanoray.tasks.multiple_choice import MultipleChoiceTask, multiple_choice
from nanoray.tokenizer import ByteTokenizer, Conversation
from nanoray.tools.calculator import calculate

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = ByteTokenizer()


class Colours(MultipleChoiceTask):
    """Questions of two to four choices, prompts of unlike lengths."""

    baseline = 0.25

    def __init__(self, num_examples: int = 40) -> None:
        super().__init__("colours", num_examples)

    def _example(self, number: int) -> Conversation:
        choices = ["red", "green", "blue", "black"][: 2 + number % 3]
        return multiple_choice(f"Number {number}?" + "!" * (7 * number % 20), choices, number % 2)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_by_counting(num_samples: int, data: st.DataObject) -> None:
    num_correct = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    samples = [True] * num_correct + [False] * (num_samples - num_correct)
    drawn = list(itertools.combinations(samples, k))
    wanted = sum(map(any, drawn)) / len(drawn)
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(wanted, abs=1e-12)


@given(st.integers(1, 5000), st.data())
def test_wilson_interval_solves_its_equation(num_examples: int, data: st.DataObject) -> None:
    """Its ends are where the share lies 1.96 standard errors away from the assumed truth."""
    share = data.draw(st.integers(0, num_examples)) / num_examples
    low, high = wilson_interval(share, num_examples)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        error = math.sqrt(end * (1 - end) / num_examples)
        # At 0 and at 1 the end itself is the share.
        assert abs(share - end) == pytest.approx(1.959964 * error, abs=1e-7)


def test_known_values() -> None:
    low, high = wilson_interval(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(1, 10)[1] == 1
    assert (centered(0.25, 0.25), centered(1, 0.25), centered(0.1, 0)) == (0, 1, 0.1)


def letters_by_full_forward(model: GPT, task: Task) -> list[str]:
    chosen = []
    for index in range(len(task)):
        conversation = task.example(index)
        logits_V = full_logits(model, TOKENIZER.render_for_completion(conversation))[-1]
        chosen.append(max(conversation["letters"], key=lambda x: float(logits_V[ord(x)])))
    return chosen


@pytest.mark.parametrize("recipe", ["july", "february"])
def test_letters_are_those_of_a_full_forward(recipe: str) -> None:
    class OtherLetters(Colours):
        """A random model ends nearly every prompt with the same letter: ask for others."""

        def _example(self, number: int) -> Conversation:
            letters = [chr(ord("a") + (number * 5 + i * 7) % 26) for i in range(2 + number % 3)]
            return {**super()._example(number), "letters": letters}

    model = tiny(sequence_len=512, recipe=recipe)
    task, scorer = OtherLetters(), LetterLogits(CachedModel(model))
    results = evaluate_categorical(scorer, TOKENIZER, task, range(len(task)), max_len=512)
    wanted = letters_by_full_forward(model, task)
    assert [result.completions for result in results] == [(letter,) for letter in wanted]
    assert len(set(wanted)) > 5
    for result in results:
        right = reference_answer(task.example(result.index)) == wanted[result.index]
        assert result.num_correct == right


def test_letter_logits_by_full_forward() -> None:
    model = tiny(sequence_len=512)
    scorer = LetterLogits(CachedModel(model))
    for lengths in ([3], [40, 2, 17], [130] * 5, [1, 512]):
        prompts = [[(7 * i + n) % 240 for i in range(n)] for n in lengths]
        got = scorer(prompts, [65, 3, 256])
        wanted = torch.stack([full_logits(model, p)[-1, [65, 3, 256]] for p in prompts])
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


class Recorder:
    """`LastLogits` that prefers letters by the prompt's own hash, and keeps what was asked."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        self.batches.append([len(prompt) for prompt in prompts])
        scores = [[hash((tuple(prompt), token)) % 997 for token in token_ids] for prompt in prompts]
        return torch.tensor(scores, dtype=torch.float32)


@settings(max_examples=30)
@given(st.permutations(range(100)), st.integers(1, 99))
def test_categorical_shards_merge(order: list[int], cut: int) -> None:
    task = Colours(100)

    def run(indices: Sequence[int]) -> list[ExampleResult]:
        return evaluate_categorical(Recorder(), TOKENIZER, task, indices, max_len=512)

    whole = run(range(100))
    assert run(order) == [whole[index] for index in order]
    parts = run(order[:cut]) + run(order[cut:])
    assert task_score(task, parts) == task_score(task, whole)


def test_shards_of_whole_groups_are_batched_alike() -> None:
    task = Colours(3 * GROUP_SIZE + 20)
    whole, sharded = Recorder(), Recorder()
    evaluate_categorical(whole, TOKENIZER, task, range(len(task)), max_len=512)
    for start in range(0, len(task), GROUP_SIZE):
        part = range(start, min(start + GROUP_SIZE, len(task)))
        evaluate_categorical(sharded, TOKENIZER, task, part, max_len=512)
    assert sharded.batches == whole.batches
    assert list(map(len, whole.batches)) == [16] * 13 + [4]
    assert all(lengths == sorted(lengths) for lengths in whole.batches)


def test_what_does_not_fit_counts_as_wrong() -> None:
    task = Colours()
    lengths = [len(TOKENIZER.render_for_completion(task.example(i))) for i in range(40)]
    limit = sorted(lengths)[20]
    results = evaluate_categorical(Recorder(), TOKENIZER, task, range(40), max_len=limit)
    for result, length in zip(results, lengths):
        assert (result.problem != "") == (length > limit)
    score = task_score(task, results)
    assert score.num_problems == sum(length > limit for length in lengths) > 0
    engine = Engine(tiny(), TOKENIZER, max_len=64)
    words = Arithmetic("test", 20)
    found = evaluate_generative(engine, TOKENIZER, words, range(20), max_tokens=3)
    assert any(result.problem for result in found)
    assert task_score(words, found).accuracy == 0


def test_an_answer_must_be_one_token() -> None:
    class Words(Colours):
        def _example(self, number: int) -> Conversation:
            return {**super()._example(number), "letters": ["yes", "no"]}

    with pytest.raises(NanorayError, match="the answer 'no' is 2 tokens"):
        evaluate_categorical(Recorder(), TOKENIZER, Words(), [0], max_len=512)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_model_gets_no_accuracy(value: float) -> None:
    def broken(prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        return torch.full((len(prompts), len(token_ids)), value)

    with pytest.raises(NanorayError, match="weights are damaged"):
        evaluate_categorical(broken, TOKENIZER, Colours(), [0, 1], max_len=512)


def test_few_examples_are_of_the_whole_task_and_bad_rows_are_told_first(tmp_path: Path) -> None:
    rows = [
        {"question": f"q{i}", "answer": i % 4, "choices": list("wxyz"), "subject": f"s{i // 100}"}
        for i in range(1000)
    ]
    path = tmp_path / "mmlu" / "test.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = ChatSuite(("mmlu",), Sources(str(tmp_path)), max_per_task=100)
    task = suite._tasks["mmlu"]
    assert Counter(task.example(i)["subject"] for i in range(100)) == Counter(
        {f"s{i}": 10 for i in range(10)}
    )
    rows[990]["answer"] = 9
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(NanorayError, match=r"test.jsonl, line 991: the answer 9 is none"):
        ChatSuite(("mmlu",), Sources(str(tmp_path)), max_per_task=100).items()


def test_problems_are_told_below_the_table() -> None:
    suite = ChatSuite(("arithmetic",), Sources(), max_per_task=2)
    fine, failed = ExampleResult(0, ("",), 0), ExampleResult(1, (), 0, "the prompt is too long")
    assert suite.report([("arithmetic", [fine, replace(fine, index=1)])]).text == ""
    text = suite.report([("arithmetic", [fine, failed])]).text
    assert text.startswith("arithmetic: of 2 examples 1")
    assert text.endswith("the prompt is too long")


def test_generative_results_depend_on_the_example_alone() -> None:
    model = tiny(sequence_len=256)
    task = Arithmetic("test", 12)

    def run(indices: Sequence[int], num_slots: int) -> list[ExampleResult]:
        engine = Engine(model, TOKENIZER, num_slots=num_slots, tool=calculate)
        return evaluate_generative(
            engine,
            TOKENIZER,
            task,
            indices,
            num_samples=3,
            max_tokens=20,
            temperature=1.0,
            top_k=20,
            seed=5,
        )

    whole = run(range(12), 4)
    assert [len(result.completions) for result in whole] == [3] * 12
    assert len({text for result in whole for text in result.completions}) > 30
    order = [7, 2, 11, 0, 5]
    assert run(order, 7) == [whole[index] for index in order]
    assert run([3], 1) == [whole[3]]


class Scripted:
    """An engine that answers example i rightly in the first i of n samples; one request fails."""

    max_len = 10_000

    def generate(self, prompts: Sequence[list[int]], params: Sequence) -> list[Completion]:
        completions = []
        for i, (prompt, sampling) in enumerate(zip(prompts, params)):
            right = reference_answer(Arithmetic("test", 4).example(i))
            for sample in range(sampling.n):
                text = right if sample < i else "#### 1000000"
                tokens = TOKENIZER.encode(text)
                completions.append(
                    Completion(list(prompt), tokens, text=text, finish_reason="stop")
                )
        completions[-1].finish_reason, completions[-1].error = "error", "the logits are NaN"
        return completions


def test_pass_at_k_and_failures_of_a_scripted_engine() -> None:
    task = Arithmetic("test", 4)
    results = evaluate_generative(Scripted(), TOKENIZER, task, range(4), num_samples=3)  # type: ignore[arg-type]
    # Of the last example's three right answers one broke off.
    assert [result.num_correct for result in results] == [0, 1, 2, 2]
    assert [result.problem for result in results] == ["", "", "", "the logits are NaN"]
    score = task_score(task, results)
    assert score.accuracy == pytest.approx(5 / 12)
    assert score.pass_at == pytest.approx({1: 5 / 12, 2: (0 + 2 / 3 + 1 + 1) / 4, 3: 3 / 4})
    assert score.centered == score.accuracy
    assert score.low < score.accuracy < score.high


def test_a_judge_gets_the_answer_without_calls_and_output() -> None:
    """So a number that a tool printed, or that the model took for a tool's, is no answer."""
    mark = TOKENIZER.special_id

    def tokens(*pieces: str) -> list[int]:
        return [
            token
            for piece in pieces
            for token in ([mark(piece)] if piece.startswith("<|") else TOKENIZER.encode(piece))
        ]

    call = ("<|python_start|>", "#### 1", "<|python_end|>")
    output = ("<|output_start|>", "#### 2", "<|output_end|>")
    assert answer_text(TOKENIZER, tokens("So ", *call, *output, "4ü", "<|assistant_end|>")) == (
        "So 4ü"
    )
    assert answer_text(TOKENIZER, tokens("a", *call, "b", *output)) == "ab"
    assert answer_text(TOKENIZER, tokens("a", "<|python_start|>", "#### 1")) == "a"
    assert answer_text(TOKENIZER, tokens("<|output_start|>", "#### 1", "<|bos|>", "b")) == "b"
    assert answer_text(TOKENIZER, []) == ""
    task = Arithmetic("test", 30)
    for conversation in map(task.example, range(30)):
        prompt = TOKENIZER.render_for_completion(conversation)
        whole, _ = TOKENIZER.render_conversation(conversation)
        assert answer_text(TOKENIZER, whole[len(prompt) :]) == reference_answer(conversation)

    class Printing(Scripted):
        def generate(self, prompts: Sequence[list[int]], params: Sequence) -> list[Completion]:
            right = reference_answer(task.example(0))
            answer = tokens("<|output_start|>", right, "<|output_end|>", "?")
            return [Completion(list(prompts[0]), answer, text=f"{right}?", finish_reason="stop")]

    (result,) = evaluate_generative(Printing(), TOKENIZER, task, [0])  # type: ignore[arg-type]
    assert result.num_correct == 0
    assert result.completions == (reference_answer(task.example(0)) + "?",)


def test_judges_wait_together() -> None:
    """A judge that waits, as one for a sandbox does, does not make the others wait."""
    together = threading.Barrier(3, timeout=30)  # the fourth answer failed and is not judged

    class Slow(Arithmetic):
        def evaluate(self, conversation: Conversation, completion: str) -> bool:
            together.wait()
            return super().evaluate(conversation, completion)

    results = evaluate_generative(Scripted(), TOKENIZER, Slow("test", 4), range(4))  # type: ignore[arg-type]
    assert [result.num_correct for result in results] == [0, 1, 1, 0]


def test_what_has_no_judge_is_refused() -> None:
    suite = ChatSuite(("arithmetic", "identity"), Sources())
    with pytest.raises(NanorayError, match=r"identity is for training: .* leave it out"):
        suite.items()


def test_chatcore_is_the_mean_of_centred_accuracies() -> None:
    task = Colours(4)
    results = [ExampleResult(i, ("A",), int(i < 3)) for i in range(4)]
    score = task_score(task, results)
    assert (score.accuracy, score.centered) == (0.75, pytest.approx(2 / 3))
    other = task_score(Arithmetic("test", 1), [ExampleResult(0, ("",), 0)])
    assert chatcore({"a": score, "b": other}) == pytest.approx(1 / 3)
    with pytest.raises(AssertionError, match="every example exactly once"):
        task_score(task, results[1:])
    with pytest.raises(NanorayError, match="no examples"):
        task_score(task.slice(stop=0), [])


def test_the_suite_gives_the_same_for_any_spread(shared_data: Path) -> None:
    model = tiny(sequence_len=256)
    loaded = LoadedModel(model, TOKENIZER, {}, 1, "somewhere")

    def subject() -> Subject:
        return Subject(
            "",
            TOKENIZER,
            model,
            256,
            torch.device("cpu"),
            lambda: None,
            loaded,  # type: ignore[arg-type, return-value]
        )

    suite = ChatSuite(
        ("arithmetic", "arc-easy"),
        Sources(str(shared_data)),
        max_per_task=70,
        num_samples=2,
        max_tokens=6,
        temperature=1.0,
    )
    items = suite.items()
    assert items == [
        *(("arithmetic", 0, 64), ("arithmetic", 64, 70)),
        *(("arc-easy", 0, 64), ("arc-easy", 64, 70)),
    ]
    alone = suite.worker(subject())
    workers = [suite.worker(subject()) for _ in range(3)]
    spread = [workers[i % 3](item) for i, item in reversed(list(enumerate(items)))][::-1]
    results = [alone(item) for item in items]
    assert spread == results
    report = suite.report(results)
    assert set(report.metrics) == {
        *("chatcore", "chat/arithmetic", "chat/arithmetic/pass@2", "chat/arc-easy")
    }
    assert 0 < report.metrics["chat/arc-easy"] < 1
    assert report.metrics["chat/arithmetic"] == 0
    assert [row[0] for row in report.rows] == ["arithmetic", "arc-easy", "ChatCORE"]
    assert {len(row) for row in report.rows} == {len(report.header)}
    lines = [json.loads(line) for line in report.files["chat_samples.jsonl"].splitlines()]
    assert len(lines) == 140
    assert lines[0]["question"].startswith("Paul has 85 marbles")
    assert len(lines[0]["completions"]) == 2
