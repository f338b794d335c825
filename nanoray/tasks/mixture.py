"""Several tasks as one: shuffled for training, or one after the other.

A configuration says which and how often: ``smoltalk, mmlu*3, gsm8k*4, texts/own.jsonl*2,
arithmetic*0.5`` is SmolTalk once, MMLU three times, …, and every other problem of arithmetic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.tasks.base import Task
from nanoray.tasks.catalog import TASK_NAMES, Sources, Split, load_task
from nanoray.tasks.custom_json import CustomJSON
from nanoray.tokenizer import Conversation

MAX_EXAMPLES = 10**8  # their order takes 16 bytes each, in every process
GRAMMAR = "write NAME or NAME*EPOCHS with commas between, such as smoltalk, mmlu*3, own.jsonl*0.5"


class TaskSequence(Task):
    """All examples of several tasks, one task after the other.

    An example is the task's own with one key more, ``"origin"``: the number of the task, and the
    example as that task gave it. So `evaluate` and `reward` know whom to ask.

    Args:
        tasks: at least one.
        epochs: how often each comes; 2.5 is twice all of it and once half of it, evenly spread
            (data lies ordered: the first half of a file may lack a topic). Default: once.
    """

    def __init__(
        self, tasks: Sequence[Task], epochs: Sequence[float] | None = None, name: str = "sequence"
    ) -> None:
        assert tasks, "at least one task"
        self.tasks = tuple(tasks)
        times = [1.0] * len(tasks) if epochs is None else epochs
        sizes = [round(len(task) * share) for task, share in zip(tasks, times, strict=True)]
        # Task k's examples are numbered from starts[k], those of its second epoch after the first.
        self._starts = np.array([0, *accumulate(sizes)])
        super().__init__(name, sum(sizes))
        kinds = {task.kind for task in tasks}
        self.kind = kinds.pop() if len(kinds) == 1 else "conversation"
        guessed = sum(size * task.baseline for size, task in zip(sizes, tasks))
        self.baseline = guessed / max(1, len(self))

    def _example(self, number: int) -> Conversation:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        task = self.tasks[part]
        epoch, place = divmod(number - int(self._starts[part]), len(task))
        whole, rest = divmod(int(self._starts[part + 1] - self._starts[part]), len(task))
        example = task.example(place if epoch < whole else place * len(task) // rest)
        return {**example, "origin": (part, example)}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        part, example = conversation["origin"]
        return self.tasks[part].evaluate(example, completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        part, example = conversation["origin"]
        return self.tasks[part].reward(example, completion)


class TaskMixture(TaskSequence):
    """A `TaskSequence` whose examples are shuffled, in an order that hangs on ``seed`` alone."""

    def __init__(
        self,
        tasks: Sequence[Task],
        epochs: Sequence[float] | None = None,
        seed: int = 42,
        name: str = "mixture",
    ) -> None:
        super().__init__(tasks, epochs, name)
        # numpy guarantees PCG64's raw stream for all time, but not its Generator's permutations.
        keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(self))
        self._order = np.argsort(keys, kind="stable")

    def _example(self, number: int) -> Conversation:
        return super()._example(int(self._order[number]))


@dataclass(frozen=True)
class Part:
    """A task of a mixture, by name (or a file of conversations, by path), and its epochs."""

    name: str
    epochs: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}*{self.epochs!r}"


def parse_mixture(text: str) -> tuple[Part, ...]:
    """``"smoltalk, mmlu*3"`` -> its parts, with absolute paths.

    Raises:
        NanorayError: no part, an unknown name, or epochs that are no positive number.
    """
    parts = tuple(_parse_part(piece.strip()) for piece in text.split(",") if piece.strip())
    if not parts:
        raise NanorayError(f"the mixture {text!r} is empty; {GRAMMAR}")
    return parts


def _parse_part(text: str) -> Part:
    name, star, times = text.partition("*")
    name = name.strip()
    try:
        epochs = float(times) if star else 1.0
    except ValueError:
        epochs = math.nan
    if not 0 < epochs < math.inf:
        raise NanorayError(f"{text!r} of the mixture has no positive number of epochs; {GRAMMAR}")
    if not is_file(name) and name not in TASK_NAMES:
        raise NanorayError(
            f"the mixture names {name!r}, which is no task ({', '.join(TASK_NAMES)}) and, without "
            f"a slash or .jsonl at its end, no file"
        )
    return Part(storage.normalize(name) if is_file(name) else name, epochs)


def is_file(name: str) -> bool:
    """Whether a part is a file of conversations rather than a task."""
    return "/" in name or name.endswith((".jsonl", ".jsonl.gz"))


def load_mixture(
    parts: Sequence[Part], split: Split, sources: Sources, seed: int = 42
) -> TaskMixture:
    """The mixture of these parts. A file of conversations has no splits: it is taken as it is.

    Raises:
        NanorayError: see `load_task` and `CustomJSON`; also where the epochs leave no example, or
            more than `MAX_EXAMPLES`.
    """
    tasks = [
        CustomJSON(part.name) if is_file(part.name) else load_task(part.name, split, sources)
        for part in parts
    ]
    if (total := sum(len(task) * part.epochs for part, task in zip(parts, tasks))) > MAX_EXAMPLES:
        raise NanorayError(
            f"the mixture has {total:.3g} conversations, more than {MAX_EXAMPLES:,}; take fewer "
            f"epochs ({', '.join(map(str, parts))})"
        )
    for part, task in zip(parts, tasks):
        if not round(len(task) * part.epochs):
            raise NanorayError(
                f"{part.epochs:g} epochs of the {len(task)} examples of {part.name} are none; take "
                f"more epochs, or leave it out of the mixture"
            )
    return TaskMixture(tasks, [part.epochs for part in parts], seed)


@dataclass(frozen=True)
class MixtureSource:
    """A mixture by plain values, for other processes: pickles small, loads at the first use.

    Attributes:
        text: see `parse_mixture`; what is kept has absolute paths, so that it means the same in
            every process.

    Raises:
        NanorayError: the text is no mixture.
    """

    text: str
    split: Split
    sources: Sources
    seed: int = 42

    def __post_init__(self) -> None:
        parts = parse_mixture(self.text)
        object.__setattr__(self, "text", ", ".join(map(str, parts)))

    def load(self) -> TaskMixture:
        """The mixture; one process loads it once. Raises NanorayError."""
        return _load(self)

    def __call__(self, index: int) -> Conversation:
        """Example ``index`` of the mixture."""
        return self.load().example(index)


@functools.lru_cache(maxsize=4)
def _load(source: MixtureSource) -> TaskMixture:
    return load_mixture(parse_mixture(source.text), source.split, source.sources, source.seed)
