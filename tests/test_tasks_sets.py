"""GSM8K, MMLU, SmolTalk, own conversations: real files, hand-written expectations, bad rows."""

from __future__ import annotations

import gzip
import json
import re
import sys
import types
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanoray.errors import NanorayError
from nanoray.tasks.base import reference_answer
from nanoray.tasks.catalog import TASK_NAMES, Sources, load_task
from nanoray.tasks.custom_json import CustomJSON
from nanoray.tasks.gsm8k import GSM8K
from nanoray.tasks.mmlu import MMLU
from nanoray.tasks.smoltalk import SmolTalk
from nanoray.tasks.worked_answer import final_number
from nanoray.tokenizer import ByteTokenizer, Conversation, load_tokenizer

BYTES = ByteTokenizer()


def rendered(conversation: Conversation) -> tuple[str, str]:
    """All of it, and what is trained on, with marks by their names."""
    ids, mask = BYTES.render_conversation(conversation)
    trained = [token for token, on in zip(ids, mask) if on]
    return BYTES.decode(ids), BYTES.decode(trained)


def write_lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


# GSM8K


def test_gsm8k_judges_every_real_reference(shared_data: Path) -> None:
    task = load_task("gsm8k", "test", Sources(str(shared_data)))
    assert (task.name, task.kind, task.baseline, len(task)) == ("gsm8k", "generative", 0, 1319)
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()
    for index, line in enumerate(lines):
        row, conversation = json.loads(line), task.example(index)
        assert conversation["messages"][0] == {"role": "user", "content": row["question"]}
        answer = reference_answer(conversation)
        assert answer == re.sub(r"<<.*?>>", "", row["answer"])
        number = Decimal(row["answer"].rsplit("####", 1)[1].strip().replace(",", ""))
        assert final_number(answer) == number
        assert task.evaluate(conversation, answer)
        assert task.reward(conversation, f"So it is\n#### {number:,}") == 1
        for wrong in (f"#### {number + 1}", f"#### {number}1", f"{number}", "", "####"):
            assert not task.evaluate(conversation, wrong)
    parts = Counter(
        part["type"] for i in range(1319) for part in task.example(i)["messages"][1]["content"]
    )
    notes = "".join(lines).count("<<")
    assert parts["python"] == parts["python_output"] == notes > 3000


def test_gsm8k_rendered_by_hand(tmp_path: Path) -> None:
    answer = "He has 3*2=<<3*2=6>>6 eggs.\n#### 6"
    write_lines(tmp_path / "train.jsonl", {"question": "How many?", "answer": answer})
    assert rendered(GSM8K("train", str(tmp_path)).example(0)) == (
        "<|bos|><|user_start|>How many?<|user_end|><|assistant_start|>He has 3*2="
        "<|python_start|>3*2<|python_end|><|output_start|>6<|output_end|>"
        "6 eggs.\n#### 6<|assistant_end|>",
        "He has 3*2=<|python_start|>3*2<|python_end|>6 eggs.\n#### 6<|assistant_end|>",
    )


def test_every_real_gsm8k_training_row_has_its_form(shared_data: Path) -> None:
    task = GSM8K("train", str(shared_data / "gsm8k"))
    assert len(task) == 7473
    assert all(task.evaluate(c, reference_answer(c)) for c in map(task.example, range(len(task))))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "its field 'answer' must be text"),
        ({"question": ["q"], "answer": "#### 1"}, "its field 'question' must be text"),
        ({"question": "q", "answer": "one"}, "the answer does not end with ####"),
        ({"question": "q", "answer": "<<1>> #### 1"}, "the calculator note <<1>> must be"),
        ("nonsense", "no JSON"),
    ],
)
def test_bad_rows_of_gsm8k(tmp_path: Path, row: object, message: str) -> None:
    path = write_lines(tmp_path / "test.jsonl", {"question": "q", "answer": "#### 1"}, row)
    task = GSM8K("test", str(tmp_path))
    assert task.evaluate(task.example(0), "#### 1")
    with pytest.raises(NanorayError, match=f"{path}, line 2: {message}"):
        task.example(1)


# MMLU


@pytest.mark.parametrize(
    ("split", "count"), [("train", 14_698), ("validation", 1531), ("dev", 285), ("test", 14_042)]
)
def test_mmlu_of_the_real_files(shared_data: Path, split: Any, count: int) -> None:
    task = MMLU(split, str(shared_data / "mmlu"))
    assert (task.kind, task.baseline, len(task)) == ("categorical", 0.25, count)
    num_choices = Counter()
    for index in range(0, count, 97):
        conversation = task.example(index)
        letters = conversation["letters"]
        num_choices[len(letters)] += 1
        right = [letter for letter in letters if task.evaluate(conversation, letter)]
        assert right == [reference_answer(conversation)]
    assert set(num_choices) == ({4, 5} if split == "train" else {4})


ROW = {"question": "Which?", "subject": "art", "choices": ["x", "y", "z"], "answer": 1}


def test_mmlu_rendered_by_hand(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "test.parquet")
    conversation = MMLU("test", str(tmp_path)).example(0)
    assert conversation["subject"] == "art"
    assert rendered(conversation) == (
        "<|bos|><|user_start|>Which?\n- x=A\n- y=B\n- z=C\n\nAnswer with the letter of the right "
        "choice only.<|user_end|><|assistant_start|>B<|assistant_end|>",
        "B<|assistant_end|>",
    )


def test_mmlu_from_the_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the training rows are in a config of their own, each in a wrapper."""
    asked = []

    def load(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((*args, kwargs["split"]))
        return [{"train": ROW} if "auxiliary_train" in args else ROW]

    fake: Any = types.ModuleType("datasets")
    fake.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for split in ("train", "test"):
        task = load_task("mmlu", split, Sources())
        assert reference_answer(task.example(0)) == "B"
    assert asked == [("cais/mmlu", "auxiliary_train", "train"), ("cais/mmlu", "all", "test")]
    names = {path.name for path in (home / "tasks/cais--mmlu").iterdir()}
    assert names == {"auxiliary_train.jsonl", "test.jsonl"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, "the answer 3 is none of the 3 choices"),
        ({"answer": -1}, "the answer -1 is none"),
        ({"answer": "B"}, "its field 'answer' must be a whole number"),
        ({"choices": ["x", None]}, "its field 'choices' must be a list of texts"),
        ({"choices": ["x"], "answer": 0}, "2 to 10 choices, not 1"),
        ({"subject": None}, "its field 'subject' must be text"),
        ({"train": 3}, "a JSON object is expected"),
    ],
)
def test_bad_rows_of_mmlu(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "test.jsonl", ROW, ROW | change)
    with pytest.raises(NanorayError, match=f"{path}, line 2: .*{message}"):
        MMLU("test", str(tmp_path)).example(1)


@pytest.mark.parametrize("name", ["mmlu", "arc-easy", "arc-challenge"])
def test_letters_are_single_tokens_of_a_trained_tokenizer(
    shared_data: Path, tokenizer_dir: str, name: str
) -> None:
    """And the letter is what comes right after the mark of the assistant's turn."""
    tokenizer = load_tokenizer(tokenizer_dir)
    task = load_task(name, "test", Sources(str(shared_data)))
    for index in range(0, len(task), 211):
        conversation = task.example(index)
        ids, mask = tokenizer.render_conversation(conversation)
        answer = [token for token, trained in zip(ids, mask) if trained]
        assert answer == [
            tokenizer.encode(reference_answer(conversation))[0],
            tokenizer.special_id("<|assistant_end|>"),
        ]
        assert all(len(tokenizer.encode(letter)) == 1 for letter in conversation["letters"])


# Conversations


MESSAGES = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "See you."},
]
SYSTEM = {"role": "system", "content": "Be kind."}
WHOLE = (
    "<|bos|><|user_start|>{}Hi.<|user_end|><|assistant_start|>Hello!<|assistant_end|>"
    "<|user_start|>Bye.<|user_end|><|assistant_start|>See you.<|assistant_end|>"
)


def test_both_forms_of_own_conversations(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "own.jsonl",
        MESSAGES,
        {"messages": MESSAGES},
        {"messages": [SYSTEM, *MESSAGES], "source": "me"},
        [SYSTEM, *MESSAGES],
    )
    task = CustomJSON(str(path))
    assert (task.kind, len(task)) == ("conversation", 4)
    trained = "Hello!<|assistant_end|>See you.<|assistant_end|>"
    for index, system in enumerate(["", "", "Be kind.\n\n", "Be kind.\n\n"]):
        assert rendered(task.example(index)) == (WHOLE.format(system), trained)
    with pytest.raises(NanorayError, match=r"own.jsonl is for training"):
        task.evaluate(task.example(0), "Hello!")
    zipped = tmp_path / "own.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert CustomJSON(str(zipped)).example(3) == task.example(3)


def test_smoltalk_reads_its_split(tmp_path: Path) -> None:
    row = {"messages": [SYSTEM, *MESSAGES], "source": "everyday"}
    write_lines(tmp_path / "smoltalk" / "train.jsonl", row, row)
    task = load_task("smoltalk", "train", Sources(str(tmp_path)))
    assert (task.name, task.kind, len(task)) == ("smoltalk", "conversation", 2)
    assert rendered(task.example(1))[0] == WHOLE.format("Be kind.\n\n")


def test_the_real_conversations_have_their_form(shared_data: Path) -> None:
    task = CustomJSON(str(shared_data / "sft" / "train.jsonl"))
    assert len(task) == 5285
    rows = (shared_data / "sft" / "train.jsonl").read_text().split("\n")
    for index in range(len(task)):
        assert task.example(index) == {"messages": json.loads(rows[index])}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "at least one message"),
        (3, "a JSON object is expected"),
        ({"text": "x"}, "its field 'messages' must be a list"),
        ({"messages": "x"}, "its field 'messages' must be a list"),
        (MESSAGES[:1], "no answer of the assistant"),
        ([SYSTEM, *MESSAGES[:1]], "no answer of the assistant"),
        ([SYSTEM], "no user message after it"),
        (MESSAGES[1:], "message 0 is from 'assistant', but it is user's turn"),
        ([*MESSAGES[:2], *MESSAGES[:2], *MESSAGES[1:2]], "message 4 is from 'assistant'"),
        ([*MESSAGES[:2], SYSTEM], "message 2 is from 'system'"),
        ([MESSAGES[0], {"role": "assistant"}], "message 1 must be"),
        ([MESSAGES[0], {"role": "assistant", "content": 3}], "must be a string or a list of parts"),
        ([{"role": "user", "content": []}, MESSAGES[1]], "a user message must be a string"),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, row: object, message: str) -> None:
    path = write_lines(tmp_path / "train.jsonl", MESSAGES, "", row)
    with pytest.raises(NanorayError, match=f"{path}, line 3: .*{message}"):
        CustomJSON(str(path)).example(1)
    write_lines(path, {"messages": MESSAGES}, row if isinstance(row, dict) else {"messages": row})
    with pytest.raises(NanorayError, match=f"{path}, line 2: "):
        SmolTalk("train", str(tmp_path)).example(1)


# All


def test_every_task_is_one(shared_data: Path) -> None:
    words = shared_data / "words" / "words_alpha.txt"
    sources = Sources(str(shared_data), str(words))
    counts = {"humaneval": 164, "spelling-bee": 256, "simple-spelling": 256, "arithmetic": 1000}
    for name in set(TASK_NAMES) - {"smoltalk"}:
        task = load_task(name, "test", sources)
        assert len(task) == counts.get(name, len(task))
        conversation = task.example(len(task) - 1)
        assert task.example(len(task) - 1) == conversation
        assert ("letters" in conversation) == (task.kind == "categorical")
        assert BYTES.render_conversation(conversation)
        if task.kind == "conversation":
            with pytest.raises(NanorayError, match="is for training"):
                task.evaluate(conversation, "")
        else:
            assert task.evaluate(conversation, reference_answer(conversation))
            assert not task.evaluate(conversation, "?")
    with pytest.raises(NanorayError, match="need a list of words; give --words"):
        load_task("spelling-bee", "test", Sources())
