"""GSM8K (Cobbe et al. 2021): word problems of grade school, with worked answers."""

from __future__ import annotations

from typing import Literal

from nanoray.errors import NanorayError
from nanoray.tasks.base import Task, reference_answer
from nanoray.tasks.rows import HubSplit, load_rows
from nanoray.tasks.worked_answer import calculator_parts, final_number
from nanoray.tokenizer import Conversation

Split = Literal["train", "test"]


class GSM8K(Task):
    """A problem a row; right is an answer whose number after ``####`` is the reference's.

    Args:
        data_dir: folder with ``train.jsonl`` and ``test.jsonl``; without it, from the hub.

    Raises:
        NanorayError: see `load_rows`; `example`, for a row that breaks GSM8K's form.
    """

    kind = "generative"

    def __init__(self, split: Split, data_dir: str | None = None) -> None:
        self._rows = load_rows(HubSplit("openai/gsm8k", "main", split, (split,)), data_dir)
        super().__init__("gsm8k", len(self._rows))

    def _example(self, number: int) -> Conversation:
        row = self._rows[number]
        question, answer = row.field("question", str), row.field("answer", str)
        if final_number(answer) is None:
            raise NanorayError(f"{row.where}: the answer does not end with #### and a number")
        with row.named():
            parts = calculator_parts(answer)
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": parts},
            ]
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        number = final_number(completion)
        return number is not None and number == final_number(reference_answer(conversation))
