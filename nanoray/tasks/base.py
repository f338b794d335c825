"""What a task is: conversations with a reference answer, and a judge of a model's own answer.

An example is a conversation in the tokenizer's form (`nanoray.tokenizer.conversation`) that ends
with the reference answer, so the same example trains (whole) and evaluates
(`Tokenizer.render_for_completion` leaves the answer out). The kind says how a model is asked:

* generative: it writes an answer, `evaluate` judges the text;
* categorical: the example also has ``"letters"``, its possible answers, and the likeliest of these
  as the first token of the answer is taken;
* conversation: it is not asked as a whole: its examples are for training and have no judge, or (in
  a mixture) are of several kinds.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Self

from nanoray.errors import NanorayError
from nanoray.tokenizer import Conversation

Kind = Literal["categorical", "generative", "conversation"]


class Task(ABC):
    """A deterministic list of examples with their judge.

    Attributes:
        name: as in tables and on the command line.
        kind: how a model is asked, see above.
        baseline: accuracy of guessing, which centred accuracy counts as 0.
    """

    kind: Kind
    baseline: float = 0.0

    def __init__(self, name: str, num_examples: int) -> None:
        self.name = name
        self._numbers: Sequence[int] = range(num_examples)

    def slice(self, start: int | None = None, stop: int | None = None, step: int = 1) -> Self:
        """The same task with the examples ``[start:stop:step]`` only, renumbered from 0."""
        part = copy.copy(self)
        part._numbers = self._numbers[start:stop:step]
        return part

    def spread(self, limit: int) -> Self:
        """At most ``limit`` of the examples, evenly over the whole task, renumbered from 0.

        Data sets lie ordered: the first 100 questions of MMLU are all about abstract algebra.
        """
        part = copy.copy(self)
        numbers, count = self._numbers, min(limit, len(self))
        part._numbers = [numbers[i * len(numbers) // count] for i in range(count)]
        return part

    def __len__(self) -> int:
        return len(self._numbers)

    def example(self, index: int) -> Conversation:
        """Example ``index``, always the same. Raises IndexError outside of [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, asked for number {index}")
        return self._example(self._numbers[index])

    @abstractmethod
    def _example(self, number: int) -> Conversation:
        """Example ``number`` of the task as it was before any slicing."""

    @abstractmethod
    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether ``completion`` answers the example rightly.

        Args:
            conversation: what `example` gave, reference answer included.
            completion: the text of the model's answer, marks, tool calls and their output left
                out (for categorical tasks: the letter).

        Raises:
            NanorayError: the example is for training and has no judge.
        """

    def reward(self, conversation: Conversation, completion: str) -> float:
        """What reinforcement learning pays for ``completion``: 1 if it is right, else 0."""
        return float(self.evaluate(conversation, completion))


class TrainingTask(Task):
    """Conversations to train on, without a judge."""

    kind = "conversation"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        raise NanorayError(f"{self.name} is for training: nothing says which answer to it is right")


def reference_answer(conversation: Conversation) -> str:
    """The text of the last message, calculator calls and their output left out."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
