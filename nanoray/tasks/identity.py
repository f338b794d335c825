"""Who nanoray is: conversations written by hand, so that a model can say what it is and can do.

They lie in ``identity.jsonl`` beside this file, ordered by topic: the name, how it was made, how it
is used, what it can and cannot do, greetings, other languages, refusals, longer chats. What a model
should say reliably ("I am nanoray, a small language model") recurs there in many contexts: a model
of a few million parameters learns it from repetition.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Literal

from nanoray.tasks.base import TrainingTask
from nanoray.tokenizer import Conversation

Split = Literal["train", "test"]

_TEST_EVERY = 10


class Identity(TrainingTask):
    """Every tenth conversation is the test split, so that it has all topics; the others train."""

    def __init__(self, split: Split) -> None:
        text = files("nanoray.tasks").joinpath("identity.jsonl").read_text(encoding="utf-8")
        self._lines = [
            line
            for number, line in enumerate(text.strip().split("\n"), start=1)
            if (number % _TEST_EVERY == 0) == (split == "test")
        ]
        super().__init__("identity", len(self._lines))

    def _example(self, number: int) -> Conversation:
        conversation: Conversation = json.loads(self._lines[number])
        return conversation
