"""Every task by the name that the command line and configurations use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.tasks.arc import ARC
from nanoray.tasks.arithmetic import Arithmetic
from nanoray.tasks.base import Task
from nanoray.tasks.gsm8k import GSM8K
from nanoray.tasks.humaneval import HumanEval
from nanoray.tasks.identity import Identity
from nanoray.tasks.mmlu import MMLU
from nanoray.tasks.smoltalk import SmolTalk
from nanoray.tasks.spelling import SimpleSpelling, SpellingBee

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Sources:
    """Where the tasks' data lies.

    Attributes:
        data_dir: folder or URI with a folder for each data set (``arc``, ``gsm8k``, ``humaneval``,
            ``mmlu``, ``smoltalk``); without it they come from the Hugging Face hub.
        words: path or URI of a list of words, one a line, for the spelling tasks.
    """

    data_dir: str | None = None
    words: str | None = None

    def __post_init__(self) -> None:
        # Absolute, so that they mean the same in every process.
        for field in ("data_dir", "words"):
            if value := getattr(self, field):
                object.__setattr__(self, field, storage.normalize(value))

    def folder(self, name: str) -> str | None:
        """The folder of one data set; None: the hub has it."""
        return storage.join(self.data_dir, name) if self.data_dir else None

    def word_list(self) -> str:
        if not self.words:
            raise NanorayError("the spelling tasks need a list of words; give --words FILE")
        return self.words


_TASKS: dict[str, Callable[[Split, Sources], Task]] = {
    "arc-easy": lambda split, sources: ARC("ARC-Easy", split, sources.folder("arc")),
    "arc-challenge": lambda split, sources: ARC("ARC-Challenge", split, sources.folder("arc")),
    "mmlu": lambda split, sources: MMLU(split, sources.folder("mmlu")),
    "gsm8k": lambda split, sources: GSM8K(split, sources.folder("gsm8k")),
    "humaneval": lambda split, sources: HumanEval(split, sources.folder("humaneval")),
    "smoltalk": lambda split, sources: SmolTalk(split, sources.folder("smoltalk")),
    "spelling-bee": lambda split, sources: SpellingBee(
        split, sources.word_list(), 80_000 if split == "train" else 256
    ),
    "simple-spelling": lambda split, sources: SimpleSpelling(
        split, sources.word_list(), 200_000 if split == "train" else 256
    ),
    "arithmetic": lambda split, _sources: Arithmetic(split, 20_000 if split == "train" else 1000),
    "identity": lambda split, _sources: Identity(split),
}
TASK_NAMES = tuple(_TASKS)
SPELLING = frozenset({"spelling-bee", "simple-spelling"})
"""Those that need a list of words."""


def load_task(name: str, split: Split, sources: Sources) -> Task:
    """The task of that name.

    Raises:
        NanorayError: there is no such task, it has no such split, or its data cannot be had.
    """
    if name not in _TASKS:
        raise NanorayError(f"there is no task {name!r}; there are {', '.join(TASK_NAMES)}")
    return _TASKS[name](split, sources)
