"""ARC (Clark et al. 2018): science questions of school exams, the easy and the challenge set."""

from __future__ import annotations

from typing import Literal

from nanoray.errors import NanorayError
from nanoray.tasks.multiple_choice import MultipleChoiceTask, letters_for, multiple_choice
from nanoray.tasks.rows import HubSplit, Row, load_rows
from nanoray.tokenizer import Conversation

Subset = Literal["ARC-Easy", "ARC-Challenge"]
Split = Literal["train", "validation", "test"]


class ARC(MultipleChoiceTask):
    """One set of ARC. Letters are A, B, … in the order of the file, whatever labels it uses.

    Args:
        data_dir: folder with ``ARC-Easy_test.jsonl`` and the like; without it, from the hub.

    Raises:
        NanorayError: see `load_rows`; also a row that breaks ARC's form, by file and line.
    """

    # As in nanochat: few questions have three or five choices, nearly all four.
    baseline = 0.25

    def __init__(self, subset: Subset, split: Split, data_dir: str | None = None) -> None:
        source = HubSplit("allenai/ai2_arc", subset, split, f"{subset}_{split}.jsonl")
        self._questions = [_parse(row) for row in load_rows(source, data_dir)]
        super().__init__(subset, len(self._questions))

    def _example(self, number: int) -> Conversation:
        question, choices, answer = self._questions[number]
        return multiple_choice(question, choices, answer)


def _parse(row: Row) -> tuple[str, list[str], int]:
    """Question, choices, and which of them is right."""
    question, key = row.values.get("question"), row.values.get("answerKey")
    choices = row.values.get("choices")
    texts, labels = (
        (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (None, None)
    )
    if not (isinstance(question, str) and _are_strings(texts) and _are_strings(labels)):
        raise NanorayError(
            f'{row.where}: a question of ARC has the form {{"question": ..., "choices": '
            f'{{"text": [...], "label": [...]}}, "answerKey": ...}}'
        )
    assert isinstance(texts, list)
    assert isinstance(labels, list)
    if len(texts) != len(labels) or key not in labels:
        raise NanorayError(
            f"{row.where}: {len(texts)} choices, the labels {labels} and the answer {key!r} do not "
            f"fit together"
        )
    try:
        letters_for(len(texts))
    except NanorayError as error:
        raise NanorayError(f"{row.where}: {error}") from error
    return question, texts, labels.index(key)


def _are_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
