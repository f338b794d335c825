"""Generated word problems in GSM8K's form, small enough for a model of a few million parameters.

No calculation of the test split occurs in the training split: every pair of numbers belongs, for
each operation, to one split (and 17+25 to the same as 25+17). A problem is one or two calculations
of its split, told as a story or asked outright. There is no division: the calculator answers 7.0
to 84/12, as Python does, and a story wants 7.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from nanoray.tasks.base import Task, reference_answer
from nanoray.tasks.worked_answer import calculator_parts, final_number
from nanoray.tokenizer import Conversation

Split = Literal["train", "test"]

_TEST_SHARE = 5  # one pair of numbers in five is for testing
_TWO_STEPS = 0.25  # share of problems
_OUTRIGHT = 0.2

_NAMES = "Mia Tom Ana Leo Zoe Sam Eva Max Ida Ben Lily Omar Nina Paul Rosa Finn".split()
_THINGS = "apples books stamps marbles shells pencils coins cards stickers cookies".split()
_BOXES = "boxes bags jars baskets".split()

# {a} and {b} are the numbers of a calculation, {n} the name, {t} the things, {x} the boxes.
_OPENINGS = {
    "+": (
        "{n} has {a} {t} and gets {b} more.",
        "{n} finds {a} {t} in the morning and {b} {t} in the evening.",
        "There are {a} {t} on the table, and {n} puts {b} {t} beside them.",
    ),
    "-": (
        "{n} has {a} {t} and gives away {b}.",
        "There were {a} {t} in the house, but {n} lost {b} of them.",
        "Of {a} {t}, {n} sells {b}.",
    ),
    "*": (
        "{n} has {a} {x} with {b} {t} in each.",
        "In every one of {a} {x} {n} keeps {b} {t}.",
        "{n} fills {a} {x}, and {b} {t} fit into each.",
    ),
}
_GOING_ON = {
    "+": ("Then {n} buys {b} {t}.", "A friend brings {b} {t} more."),
    "-": ("Then {b} {t} get lost.", "Later {n} gives {b} {t} to a friend."),
}
_QUESTIONS = {
    "+": ("How many {t} are there now?", "How many {t} is that?"),
    "-": ("How many {t} are left?", "How many {t} remain?"),
    "*": ("How many {t} are there in all?", "How many {t} is that?"),
}
_OUTRIGHT_QUESTIONS = ("What is {a} {op} {b}?", "How much is {a} {op} {b}?", "{a} {op} {b} = ?")

_Step = tuple[int, str, int]


class Arithmetic(Task):
    """``num_examples`` problems; problem i is a pure function of (split, seed, i)."""

    kind = "generative"

    def __init__(self, split: Split, num_examples: int = 1000, seed: int = 42) -> None:
        super().__init__("arithmetic", num_examples)
        self.split = split
        self.seed = seed

    def _example(self, number: int) -> Conversation:
        rng = random.Random(f"{self.seed} {self.split} {number}")
        steps = list(_draw_steps(rng, self.split))
        question = _ask(rng, steps)
        worked = [f"{a} {op} {b} = <<{a}{op}{b}={_apply(a, op, b)}>>" for a, op, b in steps]
        results = [_apply(*step) for step in steps]
        lines = [f"{line}{result}." for line, result in zip(worked, results)]
        answer = "\n".join([*lines, f"#### {results[-1]}"])
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": calculator_parts(answer)},
            ]
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        number = final_number(completion)
        return number is not None and number == final_number(reference_answer(conversation))


def split_of(a: int, op: str, b: int) -> Split:
    """The one split that the calculation ``a op b`` may occur in."""
    low, high = sorted((a, b)) if op in "+*" else (a, b)
    digest = hashlib.sha256(f"{low}{op}{high}".encode()).digest()
    return "test" if digest[0] * 256 + digest[1] < 65536 // _TEST_SHARE else "train"


def _apply(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[op]


@lru_cache(maxsize=64)
def _pairs(split: Split, op: str) -> list[tuple[int, int]]:
    """All pairs of numbers of a split: a + b with 2 to 99, a - b above 0, a * b with 2 to 12."""
    numbers = range(2, 13) if op == "*" else range(2, 100)
    return [
        (a, b)
        for a in numbers
        for b in numbers
        if (op != "-" or a > b) and split_of(a, op, b) == split
    ]


@lru_cache(maxsize=4096)
def _continuations(split: Split, a: int, op: str) -> list[int]:
    """All second numbers that may follow the intermediate result ``a``."""
    return [b for b in range(2, 100) if (op != "-" or a > b) and split_of(a, op, b) == split]


def _draw_steps(rng: random.Random, split: Split) -> Iterator[_Step]:
    op = rng.choice("+-*")
    a, b = rng.choice(_pairs(split, op))
    yield a, op, b
    if rng.random() < _TWO_STEPS:
        result, op = _apply(a, op, b), rng.choice("+-")
        if choices := _continuations(split, result, op):
            yield result, op, rng.choice(choices)


def _ask(rng: random.Random, steps: list[_Step]) -> str:
    a, op, b = steps[0]
    if len(steps) == 1 and rng.random() < _OUTRIGHT:
        return rng.choice(_OUTRIGHT_QUESTIONS).format(a=a, op=op, b=b)
    words = {"n": rng.choice(_NAMES), "t": rng.choice(_THINGS), "x": rng.choice(_BOXES)}
    sentences = [rng.choice(_OPENINGS[op]).format(a=a, b=b, **words)]
    for _, op, b in steps[1:]:
        sentences.append(rng.choice(_GOING_ON[op]).format(b=b, **words))
    return " ".join([*sentences, rng.choice(_QUESTIONS[op]).format(**words)])
