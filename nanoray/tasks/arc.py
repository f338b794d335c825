"""ARC (Clark et al. 2018): science questions of school exams, the easy and the challenge set."""

from __future__ import annotations

from typing import Literal

from nanoray.errors import NanorayError
from nanoray.tasks.files import Row
from nanoray.tasks.multiple_choice import MultipleChoiceTask, multiple_choice
from nanoray.tasks.rows import HubSplit, load_rows
from nanoray.tokenizer import Conversation

Subset = Literal["ARC-Easy", "ARC-Challenge"]
Split = Literal["train", "validation", "test"]


class ARC(MultipleChoiceTask):
    """One set of ARC. Letters are A, B, … in the order of the file, whatever labels it uses.

    Args:
        data_dir: folder with ``ARC-Easy_test.jsonl`` and the like; without it, from the hub.

    Raises:
        NanorayError: see `load_rows`; `example`, for a row that breaks ARC's form.
    """

    # As in nanochat: few questions have three or five choices, nearly all four.
    baseline = 0.25

    def __init__(self, subset: Subset, split: Split, data_dir: str | None = None) -> None:
        source = HubSplit("allenai/ai2_arc", subset, split, (f"{subset}_{split}",))
        self._rows = load_rows(source, data_dir)
        super().__init__(subset, len(self._rows))

    def _example(self, number: int) -> Conversation:
        row = self._rows[number]
        question, key = row.field("question", str), row.field("answerKey", str)
        choices = Row(row.field("choices", dict), f"{row.where}, choices")
        texts, labels = choices.texts("text"), choices.texts("label")
        if len(texts) != len(labels) or key not in labels:
            raise NanorayError(
                f"{row.where}: {len(texts)} choices, the labels {labels} and the answer {key!r} do "
                f"not fit together"
            )
        with row.named():
            return multiple_choice(question, texts, labels.index(key))
