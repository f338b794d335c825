"""Mixtures: every example exactly as often as asked, the same order for ever, text to tasks."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.errors import NanorayError
from nanoray.tasks.arithmetic import Arithmetic
from nanoray.tasks.base import Task, TrainingTask, reference_answer
from nanoray.tasks.catalog import TASK_NAMES, Sources
from nanoray.tasks.mixture import (
    MixtureSource,
    Part,
    TaskMixture,
    TaskSequence,
    load_mixture,
    parse_mixture,
)
from nanoray.tasks.multiple_choice import MultipleChoiceTask, multiple_choice
from nanoray.tokenizer import ByteTokenizer, Conversation


def conversation(question: str, answer: str) -> Conversation:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


class Numbers(Task):
    """Example i of the task "x" is the question "x i"; right is what ends with its own name."""

    kind = "generative"

    def _example(self, number: int) -> Conversation:
        return conversation(f"{self.name} {number}", str(number))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        assert conversation.keys() == {"messages"}, "as this task gave it"
        return completion == f"{reference_answer(conversation)} {self.name}"

    def reward(self, conversation: Conversation, completion: str) -> float:
        return 10.0 * self.evaluate(conversation, completion)


class Letters(MultipleChoiceTask):
    baseline = 0.5

    def _example(self, number: int) -> Conversation:
        return multiple_choice(f"{number}?", ["yes", "no"], number % 2)


class Talk(TrainingTask):
    def _example(self, number: int) -> Conversation:
        return conversation(f"hello {number}", "hi")


def question(task: Task, index: int) -> str:
    text: str = task.example(index)["messages"][0]["content"]
    return text


sizes_and_epochs = st.lists(
    st.tuples(st.integers(0, 30), st.floats(0.01, 4) | st.integers(1, 3)), min_size=1, max_size=5
)


@settings(max_examples=100, deadline=None)
@given(sizes_and_epochs, st.integers(0, 2**40))
def test_every_example_comes_as_often_as_asked(parts: list[tuple[int, float]], seed: int) -> None:
    tasks = [Numbers(f"t{k}", size) for k, (size, _) in enumerate(parts)]
    epochs = [times for _, times in parts]
    wanted = []
    for task, times in zip(tasks, epochs):
        whole, rest = divmod(round(len(task) * times), max(1, len(task)))
        names = [question(task, i) for i in range(len(task))]
        wanted += names * whole + [names[i * len(task) // rest] for i in range(rest)]
    sequence = TaskSequence(tasks, epochs)
    assert [question(sequence, i) for i in range(len(sequence))] == wanted
    mixture = TaskMixture(tasks, epochs, seed)
    mixed = [question(mixture, i) for i in range(len(mixture))]
    assert Counter(mixed) == Counter(wanted)
    again = TaskMixture(tasks, epochs, seed)
    assert [question(again, i) for i in range(len(again))] == mixed
    with pytest.raises(IndexError):
        mixture.example(len(mixture))


def test_the_order_is_pinned() -> None:
    """Resumed runs count on it: the order must be this one in every version."""
    mixture = TaskMixture([Numbers("a", 5), Numbers("b", 3)], [1, 2])
    asked = [question(mixture, i) for i in range(len(mixture))]
    assert ", ".join(asked) == "a 4, b 0, b 2, a 1, b 1, a 3, b 1, a 0, b 2, a 2, b 0"
    other = TaskMixture([Numbers("a", 5), Numbers("b", 3)], [1, 2], seed=43)
    assert [question(other, i) for i in range(11)] != asked


def test_a_slice_of_a_mixture() -> None:
    mixture = TaskMixture([Numbers("a", 5), Numbers("b", 3)])
    assert [question(mixture.slice(2, 5), i) for i in range(3)] == [
        question(mixture, i) for i in range(2, 5)
    ]
    assert len(mixture.slice(stop=0)) == 0


def test_verdicts_come_from_the_task_of_the_example() -> None:
    inner = TaskMixture([Numbers("a", 4), Letters("letters", 4)])
    outer = TaskSequence([Numbers("b", 3), inner, Talk("talk", 2)])
    seen = Counter()
    for index in range(len(outer)):
        example = outer.example(index)
        answer = reference_answer(example)
        name = example["messages"][0]["content"].split()[0]
        seen[name[-1]] += 1
        if name in ("a", "b"):
            assert outer.evaluate(example, f"{answer} {name}")
            assert outer.reward(example, f"{answer} {name}") == 10
            assert not outer.evaluate(example, f"{answer} {'ab'.replace(name, '')}")
        elif name == "hello":
            with pytest.raises(NanorayError, match="talk is for training"):
                outer.evaluate(example, "hi")
        else:
            assert example["letters"] == ["A", "B"]
            assert outer.evaluate(example, answer)
            assert not outer.evaluate(example, "AB".replace(answer, ""))
        ByteTokenizer().render_conversation(example)
    assert seen == {"a": 4, "b": 3, "?": 4, "o": 2}


def test_kind_and_baseline() -> None:
    letters, numbers = Letters("x", 4), Numbers("y", 4)
    assert TaskSequence([letters, letters]).kind == "categorical"
    assert TaskSequence([letters, numbers]).kind == "conversation"
    assert TaskSequence([letters, numbers], [1, 3]).baseline == 0.125
    assert TaskSequence([numbers], [0.1]).baseline == 0


def test_the_grammar() -> None:
    assert parse_mixture("smoltalk, mmlu*3,gsm8k * 4 , arithmetic*0.5,") == (
        Part("smoltalk"),
        Part("mmlu", 3),
        Part("gsm8k", 4),
        Part("arithmetic", 0.5),
    )
    here = os.getcwd()
    assert parse_mixture("own.jsonl*2, a/b.txt, s3://c/d.jsonl.gz*0.1, /x/y.jsonl") == (
        Part(f"{here}/own.jsonl", 2),
        Part(f"{here}/a/b.txt"),
        Part("s3://c/d.jsonl.gz", 0.1),
        Part("/x/y.jsonl"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the mixture '' is empty; write NAME"),
        (" , ", "is empty"),
        ("chess", "'chess', which is no task .arc-easy, .* no file"),
        ("*3", "names '', which is no task"),
        ("own.json", "'own.json', which is no task"),
        ("mmlu*0", "'mmlu.0' of the mixture has no positive number of epochs"),
        ("gsm8k, mmlu*-1", "'mmlu.-1' of the mixture has no positive number"),
        ("mmlu*nan", "no positive number"),
        ("mmlu*inf", "no positive number"),
        ("mmlu*", "no positive number"),
        ("mmlu*x", "no positive number"),
        ("mmlu*2*3", "no positive number"),
        ("texts/*.jsonl", "no positive number"),
    ],
)
def test_mistakes_in_a_mixture(text: str, message: str) -> None:
    with pytest.raises(NanorayError, match=message) as caught:
        parse_mixture(text)
    assert "\n" not in str(caught.value)
    with pytest.raises(NanorayError, match=message):
        MixtureSource(text, "train", Sources())


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_the_grammar_takes_any_text(text: str) -> None:
    try:
        parts = parse_mixture(text)
    except NanorayError:
        return
    assert parts
    assert all(0 < part.epochs < math.inf for part in parts)


parts_of_text = st.builds(Part, st.sampled_from(TASK_NAMES), st.floats(1e-6, 1e6))


@given(st.lists(parts_of_text, min_size=1))
@settings(deadline=None)
def test_parts_are_written_as_they_are_read(parts: list[Part]) -> None:
    assert parse_mixture(", ".join(map(str, parts))) == tuple(parts)


def own_file(folder: Path, count: int) -> Path:
    path = folder / "own.jsonl"
    lines = [json.dumps(conversation(f"own {i}", "yes")["messages"]) for i in range(count)]
    path.write_text("\n".join(lines))
    return path


def test_a_mixture_of_names_and_files(tmp_path: Path) -> None:
    parts = parse_mixture(f"arithmetic*0.01, {own_file(tmp_path, 10)}*2.5")
    mixture = load_mixture(parts, "train", Sources())
    asked = Counter(question(mixture, i) for i in range(len(mixture)))
    assert len(mixture) == 225
    assert {text: n for text, n in asked.items() if text.startswith("own")} == {
        f"own {i}": 2 if i % 2 else 3 for i in range(10)
    }
    train = Arithmetic("train", 20_000)
    assert set(asked) >= {question(train, i) for i in range(0, 20_000, 100)}
    with pytest.raises(NanorayError, match=r"0.01 epochs of the 10 examples of .*own.jsonl are"):
        load_mixture([Part(str(tmp_path / "own.jsonl"), 0.01)], "train", Sources())
    for epochs in (1e9, 1e308):
        with pytest.raises(
            NanorayError, match=r"the mixture has .* conversations, more than 100,0"
        ):
            load_mixture([Part("arithmetic", epochs)], "train", Sources())


def test_another_process_opens_the_same_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder of its own, though the mixture was written with a relative path."""
    own_file(tmp_path, 30)
    monkeypatch.chdir(tmp_path)
    source = MixtureSource("./own.jsonl*2, arithmetic*0.002", "test", Sources(), seed=7)
    pickled = pickle.dumps(source)
    assert len(pickled) < 500
    assert source.load() is pickle.loads(pickled).load()
    program = "import pickle, sys, json; source = pickle.load(sys.stdin.buffer); "
    program += "print(json.dumps([source(i)['messages'] for i in range(len(source.load()))]))"
    found = subprocess.run(
        [sys.executable, "-c", program],
        input=pickled,
        capture_output=True,
        check=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert json.loads(found.stdout) == [source(i)["messages"] for i in range(62)]
