"""CORE rendering, spans and decisions, against cases worked out by hand and the real bundle."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.errors import NanorayError
from nanoray.evals.core import (
    ExampleResult,
    TaskResult,
    core_csv,
    core_metric,
    evaluate_examples,
    evaluate_task,
    judge,
    task_result,
)
from nanoray.evals.core_bundle import Example, Task, read_bundle
from nanoray.evals.core_render import Question, build_question, common_prefix, render_prompts
from nanoray.evals.core_score import EMPTY_SPAN, SpanScore

BOS = 0


class CharacterModel:
    """A character is a token. Its loss is its code / 100; greedy are spans of capitals."""

    bos_id = BOS

    def __init__(self, max_len: int = 1000) -> None:
        self.max_len = max_len
        self.asked: list[Question] = []

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def score(self, questions: Sequence[Question]) -> list[list[SpanScore]]:
        self.asked += questions
        return [
            [self.score_span(row[start:]) for row, start in zip(question.rows, question.starts)]
            for question in questions
        ]

    def score_span(self, span: list[int]) -> SpanScore:
        if not span:
            return EMPTY_SPAN
        greedy = "".join(map(chr, span)).isupper()
        return SpanScore(sum(span) / len(span) / 100, 1.0 if greedy else -1.0, greedy)


def task(kind: Any, examples: list[Example], num_fewshot: int = 0, delimiter: str = " ") -> Task:
    return Task("toy", kind, num_fewshot, delimiter, 0.25, tuple(examples))


def choices(query: str, options: str, gold: int) -> Example:
    """Multiple choice: `options` are the choices, separated by slashes."""
    texts = tuple(options.split("/"))
    return Example((query,) * len(texts), texts, gold)


def text_of(ids: list[int]) -> str:
    assert ids[0] == BOS
    return "".join(map(chr, ids[1:]))


def test_multiple_choice_by_hand() -> None:
    toy = task("multiple_choice", [choices("1+1=", "xa/xb/xc", 1)])
    model = CharacterModel()
    (result,) = evaluate_examples(toy, [0], model)
    (question,) = model.asked
    assert [text_of(row) for row in question.rows] == ["1+1= xa", "1+1= xb", "1+1= xc"]
    # The choices share their first letter, so only the second one is scored.
    assert question.starts == (7, 7, 7)
    assert question.num_shared == 6
    assert (result.prediction, result.correct) == (0, False)  # "a" costs .97, "b" .98
    assert result.margin == pytest.approx(0.01)


def test_schema_by_hand() -> None:
    contexts = ("The cup fell since Bo", "The cup fell since Al")
    toy = task("schema", [Example(contexts, ("ran",) * 2, 1)])
    model = CharacterModel()
    (result,) = evaluate_examples(toy, [0], model)
    (question,) = model.asked
    assert [text_of(row[:start]) for row, start in zip(question.rows, question.starts)] == [
        "The cup fell since Bo",
        "The cup fell since Al",
    ]
    assert [row[start:] for row, start in zip(question.rows, question.starts)] == [
        [ord(character) for character in " ran"]
    ] * 2
    assert question.num_shared == 1 + len("The cup fell since ")
    assert (result.prediction, result.correct, result.margin) == (0, False, 0.0)  # a tie: the first


def test_language_modelling_by_hand() -> None:
    examples = [
        Example(("Say A:",), ("A B",), 0),
        Example(("Say b:",), ("b",), 0),
    ]
    model = CharacterModel()
    toy = task("language_modeling", examples)
    right, wrong = evaluate_examples(toy, [0, 1], model)
    assert [text_of(question.rows[0]) for question in model.asked] == ["Say A: A B", "Say b: b"]
    assert [len(question.rows) for question in model.asked] == [1, 1]
    # The text without the continuation is stripped, so the delimiter's space is scored with it.
    assert [question.starts for question in model.asked] == [(7,), (7,)]
    assert (right.prediction, right.correct) == (0, True)
    assert (wrong.prediction, wrong.correct) == (-1, False)
    assert task_result(toy, [wrong, right]).accuracy == 0.5
    assert task_result(toy, [wrong, right]).centered == pytest.approx(1 / 3)


def test_fewshot_prompts_by_hand() -> None:
    examples = [choices(f"q{i}", f"yes{i}/no{i}", i % 2) for i in range(3)]
    toy = task("multiple_choice", examples, num_fewshot=2, delimiter="\nAnswer: ")
    order = random.Random(1234 + 1).sample([0, 2], 2)
    shown = {0: "q0\nAnswer: yes0\n\n", 2: "q2\nAnswer: yes2\n\n"}
    before = "".join(shown[i] for i in order)
    assert render_prompts(toy, 1) == [
        f"{before}q1\nAnswer: yes1",
        f"{before}q1\nAnswer: no1",
    ]
    schema = task("schema", [Example((f"a{i}", f"b{i}"), (f"c{i}",) * 2, 1) for i in range(2)], 1)
    assert render_prompts(schema, 0) == ["b1 c1\n\na0 c0", "b1 c1\n\nb0 c0"]
    modelling = task("language_modeling", [Example((f"a{i}",), (f"c{i}",), 0) for i in range(2)], 1)
    assert render_prompts(modelling, 0) == ["a1 c1\n\na0", "a1 c1\n\na0 c0"]


def test_prompts_are_text_not_templates() -> None:
    toy = task("multiple_choice", [choices("{{ 7 * 6 }} {% if %} <b>&", "{#/#}", 0)])
    assert render_prompts(toy, 0) == [
        "{{ 7 * 6 }} {% if %} <b>& {#",
        "{{ 7 * 6 }} {% if %} <b>& #}",
    ]


def test_long_rows_lose_their_beginning() -> None:
    toy = task("multiple_choice", [choices("abcdefgh", "xx/y", 0)])
    question = build_question(toy, 0, CharacterModel(), max_len=6)
    assert ["".join(map(chr, row)) for row in question.rows] == ["fgh xx", "efgh y"]
    assert question.starts == (4, 5)
    assert question.num_shared == 0
    with pytest.raises(NanorayError, match="example 0 of toy has a continuation that does not fit"):
        build_question(toy, 0, CharacterModel(), max_len=2)


def test_options_without_tokens_of_their_own() -> None:
    """As in nanochat: NaN, which only wins in the first place; equal rows give the first."""
    begins = evaluate_task(
        task("multiple_choice", [choices("q", "no/north/nose", 0)]), CharacterModel()
    )
    assert begins.accuracy == 1
    later = judge(
        task("multiple_choice", [choices("q", "north/no", 0)]),
        0,
        [SpanScore(2.0, -1.0, False), EMPTY_SPAN],
    )
    assert later.prediction == 0
    assert later.margin == math.inf
    equal = task("schema", [Example(("same", "same"), ("end", "end"), 0)])
    assert build_question(equal, 0, CharacterModel(), 100).starts == (1, 1)
    assert evaluate_task(equal, CharacterModel()).accuracy == 1


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
def test_common_prefix(rows: list[list[int]]) -> None:
    expected = 0
    while all(len(row) > expected and row[expected] == rows[0][expected] for row in rows):
        expected += 1
    assert common_prefix(rows) == expected


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_split_merges_to_the_same_result(data: st.DataObject) -> None:
    examples = [choices(f"question {i}", f"{i * 7 % 10}/{i * 3 % 10}x", i % 2) for i in range(20)]
    toy = task("multiple_choice", examples, num_fewshot=3)
    whole = evaluate_examples(toy, range(20), CharacterModel())
    order = data.draw(st.permutations(range(20)))
    cut = data.draw(st.integers(0, 20))
    parts = [evaluate_examples(toy, part, CharacterModel()) for part in (order[:cut], order[cut:])]
    merged = [result for part in parts for result in part]
    assert sorted(merged, key=lambda result: result.index) == whole
    assert task_result(toy, merged) == task_result(toy, whole)


def test_missing_or_double_results_are_noticed() -> None:
    toy = task("language_modeling", [Example(("a",), ("b",), 0)] * 2)
    with pytest.raises(AssertionError):
        task_result(toy, [ExampleResult(0, 0, True, 1.0)])


def test_core_metric_and_csv() -> None:
    results = {"copa": TaskResult(0.75, 0.5), "squad": TaskResult(0.1, 0.1)}
    assert core_metric(results) == pytest.approx(0.3)
    assert core_csv(results).splitlines() == [
        "Task                               , Accuracy  , Centered  ",
        "copa                               , 0.750000  , 0.500000  ",
        "squad                              , 0.100000  , 0.100000  ",
        "CORE                               ,           , 0.300000  ",
    ]


def test_sample_is_nanochats_shuffle() -> None:
    toy = task("language_modeling", [Example((str(i),), ("x",), 0) for i in range(10)], 3)
    order = list(range(10))
    random.Random(1337).shuffle(order)
    assert [example.contexts[0] for example in toy.sample(6).examples] == [
        str(i) for i in order[:6]
    ]
    assert len(toy.sample(100).examples) == 10
    with pytest.raises(NanorayError, match=r"toy shows 3 examples .* needs at least 4, not 2"):
        toy.sample(2)


def test_real_bundle(shared_data: Path) -> None:
    tasks = read_bundle(str(shared_data / "core" / "eval_bundle"))
    assert len(tasks) == 22
    counts = {t.label: len(t.examples) for t in tasks}
    assert counts["hellaswag_zeroshot"] == counts["hellaswag"] == 10042
    assert (counts["copa"], counts["squad"], counts["boolq"]) == (100, 10570, 3270)
    by_label = {t.label: t for t in tasks}
    assert by_label["boolq"].baseline == pytest.approx(0.62)
    assert by_label["arc_easy"].delimiter == "\nAnswer: "
    for each in tasks:
        small = each.sample(40)
        prompts = render_prompts(small, 5)
        assert prompts[-1].count("\n\n") >= each.num_fewshot
        question = build_question(small, 5, CharacterModel(), 100_000)
        example = small.examples[5]
        if each.kind == "language_modeling":
            (row,), (start,) = question.rows, question.starts
            assert "".join(map(chr, row[start:])).strip() == example.continuations[0].strip()
        for row, start, own in zip(question.rows, question.starts, example.continuations):
            assert text_of(row).endswith(example.contexts[0][-10:] + each.delimiter + own) or (
                each.kind == "schema"
            )
            assert text_of(row).endswith(own)
            assert 1 <= start < len(row)


def test_real_multiple_choice_prompt(shared_data: Path) -> None:
    (copa,) = read_bundle(str(shared_data / "core" / "eval_bundle"), ["copa"])
    assert render_prompts(copa, 0) == [
        "The man turned on the faucet, therefore the toilet filled with water.",
        "The man turned on the faucet, therefore water flowed from the spout.",
    ]
    shots = dataclasses.replace(copa, num_fewshot=2)
    drawn = random.Random(1234).sample(range(1, 100), 2)
    golds = [copa.examples[i].continuations[copa.examples[i].gold] for i in drawn]
    first, second, rest = render_prompts(shots, 0)[0].split("\n\n")
    assert first.endswith(golds[0])
    assert second.endswith(golds[1])
    assert rest == render_prompts(copa, 0)[0]
