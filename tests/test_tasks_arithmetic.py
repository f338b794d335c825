"""Generated word problems: right, in form, disjoint."""

from __future__ import annotations

import itertools
import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.tasks.arithmetic import Arithmetic, Split, split_of
from nanoray.tasks.base import reference_answer
from nanoray.tokenizer import ByteTokenizer
from nanoray.tools.calculator import calculate

NUM_EXAMPLES = 2000


def calls(conversation: Any) -> list[tuple[str, str]]:
    parts = conversation["messages"][1]["content"]
    return [
        (call["text"], output["text"])
        for call, output in itertools.pairwise(parts)
        if call["type"] == "python"
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_problem_is_right_and_of_its_split(split: Split) -> None:
    task = Arithmetic(split, NUM_EXAMPLES)
    tokenizer = ByteTokenizer()
    num_steps = []
    for index in range(len(task)):
        conversation = task.example(index)
        question = conversation["messages"][0]["content"]
        assert not re.search(r"[{}]", question)
        found = calls(conversation)
        num_steps.append(len(found))
        for expression, output in found:
            assert calculate(expression) == output
            a, op, b = re.fullmatch(r"(\d+)([-+*])(\d+)", expression).groups()  # type: ignore[union-attr]
            assert split_of(int(a), op, int(b)) == split
            assert int(output) > 0
            assert b in re.findall(r"\d+", question)
        answer = reference_answer(conversation)
        assert answer.endswith(f"#### {found[-1][1]}")
        assert task.evaluate(conversation, answer)
        assert not task.evaluate(conversation, f"#### {int(found[-1][1]) + 1}")
        assert not task.evaluate(conversation, found[-1][1])
        ids, mask = tokenizer.render_conversation(conversation)
        assert 0 < sum(mask) < len(ids) < 512
    assert {1, 2} == set(num_steps)


def test_train_and_test_share_no_question_and_no_calculation() -> None:
    questions, expressions = {}, {}
    for split in ("train", "test"):
        examples = [Arithmetic(split, NUM_EXAMPLES).example(i) for i in range(NUM_EXAMPLES)]
        questions[split] = {example["messages"][0]["content"] for example in examples}
        expressions[split] = {call for example in examples for call, _ in calls(example)}
        assert len(questions[split]) > 0.8 * NUM_EXAMPLES
    assert not questions["train"] & questions["test"]
    assert not expressions["train"] & expressions["test"]


@given(st.integers(1, 10_000), st.sampled_from("+*"), st.integers(1, 10_000))
def test_order_does_not_matter_where_the_result_does_not(a: int, op: str, b: int) -> None:
    assert split_of(a, op, b) == split_of(b, op, a)


@settings(max_examples=50)
@given(st.integers(0, 2**63), st.integers(0, 10**6))
def test_a_pure_function_of_split_seed_and_index(seed: int, index: int) -> None:
    task, longer = Arithmetic("train", index + 1, seed), Arithmetic("train", index + 9, seed)
    assert task.example(index) == longer.example(index)


def test_seeds_differ_and_one_example_is_known() -> None:
    """The stream must not change between versions: figures would no longer compare."""
    assert Arithmetic("train", 1, 1).example(0) != Arithmetic("train", 1, 2).example(0)
    task = Arithmetic("test")
    assert len(task) == 1000
    user, assistant = task.example(2)["messages"]
    assert user["content"] == (
        "Max fills 8 bags, and 7 shells fit into each. Then 3 shells get lost. "
        "How many shells are left?"
    )
    assert [part["text"] for part in assistant["content"]] == [
        *("8 * 7 = ", "8*7", "56"),
        *("56.\n56 - 3 = ", "56-3", "53"),
        "53.\n#### 53",
    ]
    assert split_of(17, "+", 25) == "train"


def test_numbers_compare_as_numbers() -> None:
    task = Arithmetic("test", 1)
    conversation = task.example(0)
    result = Decimal(calls(conversation)[-1][1])
    assert task.evaluate(conversation, f"so #### {result}.0 things")
    assert not task.evaluate(conversation, "#### ")
