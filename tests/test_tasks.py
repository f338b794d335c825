"""Tasks: slicing, the form of examples, judging; ARC from files and from a pretended hub."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import types
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoray.errors import NanorayError
from nanoray.tasks.arc import ARC
from nanoray.tasks.base import Task, reference_answer
from nanoray.tasks.catalog import TASK_NAMES, Sources, load_task
from nanoray.tasks.multiple_choice import letters_for, multiple_choice
from nanoray.tasks.rows import HubSplit, load_rows
from nanoray.tasks.worked_answer import calculator_parts, final_number
from nanoray.tokenizer import ByteTokenizer, Conversation


class Echo(Task):
    """Example i asks for the number i."""

    kind = "generative"

    def _example(self, number: int) -> Conversation:
        return {
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": str(number)},
            ]
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == reference_answer(conversation)


bound = st.none() | st.integers(-30, 30)


@settings(deadline=None)
@given(st.integers(0, 20), bound, bound, st.integers(1, 5), bound, bound)
def test_slices_are_those_of_a_list(
    length: int,
    start: int | None,
    stop: int | None,
    step: int,
    start2: int | None,
    stop2: int | None,
) -> None:
    task = Echo("echo", length)
    part = task.slice(start, stop, step).slice(start2, stop2)
    wanted = list(range(length))[start:stop:step][start2:stop2]
    assert [int(reference_answer(part.example(i))) for i in range(len(part))] == wanted
    assert len(task) == length
    for index in (-1, len(part)):
        with pytest.raises(IndexError, match="echo has"):
            part.example(index)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 60))
def test_a_sample_is_spread_evenly(length: int, limit: int) -> None:
    part = Echo("echo", 2 * length).slice(step=2).spread(limit)
    numbers = [int(reference_answer(part.example(i))) // 2 for i in range(len(part))]
    assert len(numbers) == min(limit, length)
    if numbers:
        gaps = {b - a for a, b in itertools.pairwise([*numbers, length])}
        assert numbers[0] == 0
        assert gaps <= {length // len(numbers), -(-length // len(numbers))}


def test_reward_is_the_verdict() -> None:
    task = Echo("echo", 3)
    conversation = task.example(2)
    assert (task.reward(conversation, "2"), task.reward(conversation, "3")) == (1.0, 0.0)


def test_a_letter_follows_its_choice_without_space() -> None:
    conversation = multiple_choice("Which is red?", ["blood", "milk", "grass"], 0)
    prompt, answer = (message["content"] for message in conversation["messages"])
    assert "\n- blood=A\n- milk=B\n- grass=C\n" in prompt
    assert prompt.startswith("Which is red?\n")
    assert answer == "A"
    assert conversation["letters"] == ["A", "B", "C"]
    ids, mask = ByteTokenizer().render_conversation(conversation)
    assert next(token for token, trained in zip(ids, mask) if trained) == ord("A")
    for count in (0, 1, 11):
        with pytest.raises(NanorayError, match="2 to 10 choices"):
            letters_for(count)


def test_calculator_notes_become_calls() -> None:
    answer = "She has 16 - 3 = <<16-3=13>>13 eggs.\nThat is <<13*2=26>>$26.\n#### 26"
    assert calculator_parts(answer) == [
        {"type": "text", "text": "She has 16 - 3 = "},
        {"type": "python", "text": "16-3"},
        {"type": "python_output", "text": "13"},
        {"type": "text", "text": "13 eggs.\nThat is "},
        {"type": "python", "text": "13*2"},
        {"type": "python_output", "text": "26"},
        {"type": "text", "text": "$26.\n#### 26"},
    ]
    with pytest.raises(NanorayError, match="<<3>> must be <<expression=result>>"):
        calculator_parts("a <<3>>")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 18", "18"),
        ("#### 1,234.", "1234"),
        ("#### -5 apples", "-5"),
        ("####$3.50", "3.5"),
        ("#### 7\n#### 8", "7"),
        ("#### 12.0", "12"),
        ("no number", None),
        ("#### x", None),
        ("#### .", None),
        ("#### 1.2.3", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@settings(deadline=None)
@given(st.text())
def test_final_number_takes_any_text(text: str) -> None:
    final_number("####" + text)


@pytest.mark.parametrize("name", ["arc-easy", "arc-challenge"])
def test_arc_of_the_real_files(shared_data: Path, name: str) -> None:
    task = load_task(name, "test", Sources(str(shared_data)))
    assert len(task) == {"arc-easy": 2376, "arc-challenge": 1172}[name]
    assert (task.kind, task.baseline) == ("categorical", 0.25)
    tokenizer = ByteTokenizer()
    for index in range(0, len(task), 50):
        conversation = task.example(index)
        assert task.example(index) == conversation
        answer = reference_answer(conversation)
        verdicts = {
            letter: task.evaluate(conversation, letter) for letter in conversation["letters"]
        }
        assert [letter for letter, right in verdicts.items() if right] == [answer]
        prompt = tokenizer.render_for_completion(conversation)
        assert prompt[-1] == tokenizer.special_id("<|assistant_start|>")


def test_labels_of_any_kind_become_letters(shared_data: Path) -> None:
    """The validation split has labels 1 to 4, too."""
    path = shared_data / "arc" / "ARC-Easy_validation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    task = ARC("ARC-Easy", "validation", str(path.parent))
    numbered = [i for i, row in enumerate(rows) if row["answerKey"].isdigit()]
    assert numbered
    for i in numbered:
        assert reference_answer(task.example(i)) == " ABCD"[int(rows[i]["answerKey"])]


GOOD = {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}


def arc_of(folder: Path, *lines: str | dict[str, Any]) -> ARC:
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "ARC-Easy_test.jsonl").write_text("\n".join(texts))
    return ARC("ARC-Easy", "test", str(folder))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "a JSON object is expected"),
        ({}, "its field 'question' must be text"),
        ({**GOOD, "question": 3}, "its field 'question' must be text"),
        ({**GOOD, "choices": ["x"]}, "its field 'choices' must be an object"),
        ({**GOOD, "choices": {"text": [1], "label": ["A"]}}, "choices: .*'text' must be a list of"),
        ({**GOOD, "answerKey": "C"}, "do not fit together"),
        ({**GOOD, "answerKey": ["A"]}, "its field 'answerKey' must be text"),
        ({**GOOD, "choices": {"text": ["x"], "label": ["A", "B"]}}, "do not fit together"),
        ({**GOOD, "choices": {"text": ["x"], "label": ["B"]}}, "2 to 10 choices, not 1"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    tmp_path: Path, line: str | dict[str, Any], message: str
) -> None:
    task = arc_of(tmp_path, GOOD, "", line)
    assert reference_answer(task.example(0)) == "B"
    with pytest.raises(NanorayError, match=message) as caught:
        task.example(1)
    assert f"{tmp_path}/ARC-Easy_test.jsonl, line 3" in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(NanorayError, match=r"no ARC-Easy_test \(.jsonl, .*--data-dir"):
        ARC("ARC-Easy", "test", str(tmp_path))
    with pytest.raises(NanorayError, match="is empty"):
        arc_of(tmp_path, "", "")
    with pytest.raises(NanorayError, match=f"there is no task 'x'; there are {TASK_NAMES[0]}, "):
        load_task("x", "test", Sources())


def hub(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    fake: Any = types.ModuleType("datasets")
    fake.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_the_hub_is_asked_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((args, kwargs))
        return [GOOD, {**GOOD, "question": "zwei ü"}]

    hub(monkeypatch, load)
    found: list[ARC] = []
    threads = [
        threading.Thread(target=lambda: found.append(ARC("ARC-Easy", "test"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [(("allenai/ai2_arc", "ARC-Easy"), {"split": "test"})]
    assert len(found) == 4
    for task in found:
        assert len(task) == 2
        assert task.example(1)["messages"][0]["content"].startswith("zwei ü\n")
    assert (home / "tasks/allenai--ai2_arc/ARC-Easy_test.jsonl").is_file()


def test_a_hub_that_does_not_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_args: Any, **_kwargs: Any) -> None:
        raise ConnectionError("nobody\nhome")

    hub(monkeypatch, load)
    source = HubSplit("a/b", None, "train", ("b",))
    with pytest.raises(
        NanorayError, match=r"a/b could not be loaded .*nobody.*--data-dir"
    ) as caught:
        load_rows(source)
    assert "\n" not in str(caught.value)
    assert "--data-dir" in str(caught.value)
    assert not list((home / "tasks/a--b").iterdir())


def test_a_hub_that_breaks_off_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_args: Any, **_kwargs: Any) -> Iterator[dict[str, Any]]:
        yield GOOD
        raise ConnectionError("line cut")

    hub(monkeypatch, load)
    with pytest.raises(NanorayError, match="line cut"):
        ARC("ARC-Easy", "test")
    hub(monkeypatch, lambda *_args, **_kwargs: [GOOD])
    assert len(ARC("ARC-Easy", "test")) == 1
