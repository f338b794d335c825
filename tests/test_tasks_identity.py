"""The identity set: in form, short, without repetition, and clear about the name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nanoray.errors import NanorayError
from nanoray.tasks.identity import Identity
from nanoray.tokenizer import ByteTokenizer
from nanoray.tokenizer.conversation import check_conversation
from nanoray.tools.calculator import calculate


def whole(split: Any) -> list[Any]:
    task = Identity(split)
    return [task.example(index) for index in range(len(task))]


def spoken(message: Any) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


ALL = whole("train") + whole("test")
TURNS = [
    (question, answer)
    for conversation in ALL
    for question, answer in zip(conversation["messages"][::2], conversation["messages"][1::2])
]


def test_every_tenth_is_for_testing() -> None:
    train, test = whole("train"), whole("test")
    assert len(train) + len(test) >= 220
    assert len(test) == len(ALL) // 10
    assert not [conversation for conversation in test if conversation in train]


def test_every_conversation_is_one() -> None:
    tokenizer = ByteTokenizer()
    for conversation in ALL:
        assert set(conversation) == {"messages"}
        messages = check_conversation(conversation)
        assert len(messages) % 2 == 0
        ids, mask = tokenizer.render_conversation(conversation)
        assert mask[-1] == 1
        assert len(ids) < 700
        for _, parts in messages:
            assert all(text.strip() for _, text in parts)
            calls = [text for kind, text in parts if kind == "python"]
            outputs = [text for kind, text in parts if kind == "python_output"]
            assert [calculate(call) for call in calls] == outputs


def test_enough_of_each_kind() -> None:
    longer = [c for c in ALL if len(c["messages"]) > 2]
    assert len(longer) >= 40
    assert {len(c["messages"]) for c in ALL} == {2, 4, 6}
    named = [q for q, a in TURNS if spoken(a).startswith("I am nanoray")]
    assert len({spoken(question).lower() for question in named}) >= 25
    assert sum(not spoken(question).isascii() for question, _ in TURNS) >= 10


def test_single_questions_are_asked_once() -> None:
    questions = [spoken(c["messages"][0]) for c in ALL if len(c["messages"]) == 2]
    assert len(set(questions)) == len(questions)


def test_answers_are_short_and_plain_english() -> None:
    lengths = []
    for _, answer in TURNS:
        text = spoken(answer)
        assert text.isascii(), text
        assert len(text.split()) <= 40, text
        assert not re.search(r"\bNanoray|NanoRay|https?:|www\.", text), text
        lengths.append(len(text.split()))
    assert 8 <= sum(lengths) / len(lengths) <= 25


def test_the_plainest_questions_are_trained_on() -> None:
    trained = {spoken(c["messages"][0]): spoken(c["messages"][1]) for c in whole("train")}
    for question in ("Who are you?", "who are you", "What are you?"):
        assert trained[question].startswith("I am nanoray, a small language model")


def test_has_no_judge() -> None:
    task = Identity("test")
    assert task.kind == "conversation"
    with pytest.raises(NanorayError, match="identity is for training"):
        task.evaluate(task.example(0), "I am nanoray.")
