"""How a question with lettered answers is put, and judged: the form of every categorical task."""

from __future__ import annotations

from collections.abc import Sequence

from nanoray.errors import NanorayError
from nanoray.tasks.base import Task, reference_answer
from nanoray.tokenizer import Conversation

LETTERS = "ABCDEFGHIJ"


def letters_for(num_choices: int) -> list[str]:
    """A, B, … for that many choices. Raises NanorayError beyond J or below two."""
    if not 2 <= num_choices <= len(LETTERS):
        raise NanorayError(
            f"a multiple-choice question has 2 to {len(LETTERS)} choices, not {num_choices}"
        )
    return list(LETTERS[:num_choices])


def multiple_choice(question: str, choices: Sequence[str], answer: int) -> Conversation:
    """The conversation of a question whose ``choices[answer]`` is right.

    A choice comes before its letter, and the letter right after ``=``: so the letter is the very
    token that the answer begins with (with a space before it, it would be another one), and a
    small model binds letters to choices better (nanochat).
    """
    letters = letters_for(len(choices))
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, letters)]
    prompt = "\n".join([question, *lines, "", "Answer with the letter of the right choice only."])
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": letters[answer]},
        ],
        "letters": letters,
    }


class MultipleChoiceTask(Task):
    """A task of `multiple_choice` conversations."""

    kind = "categorical"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion.strip() == reference_answer(conversation)
