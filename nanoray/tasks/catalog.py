"""Every task by the name that the command line and configurations use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from nanoray import storage
from nanoray.errors import NanorayError
from nanoray.tasks.arc import ARC
from nanoray.tasks.arithmetic import Arithmetic
from nanoray.tasks.base import Task

Split = Literal["train", "test"]

# (split, folder with the data sets) -> the task. A set's files lie in a folder of its own there.
_TASKS: dict[str, Callable[[Split, str | None], Task]] = {
    "arc-easy": lambda split, data_dir: ARC("ARC-Easy", split, _in(data_dir, "arc")),
    "arc-challenge": lambda split, data_dir: ARC("ARC-Challenge", split, _in(data_dir, "arc")),
    "arithmetic": lambda split, _data_dir: Arithmetic(split),
}
TASK_NAMES = tuple(_TASKS)


def load_task(name: str, split: Split, data_dir: str | None = None) -> Task:
    """The task of that name.

    Args:
        data_dir: folder or URI with a folder for each data set (``arc``); without it they come
            from the Hugging Face hub.

    Raises:
        NanorayError: there is no such task, or its data cannot be had.
    """
    if name not in _TASKS:
        raise NanorayError(f"there is no task {name!r}; there are {', '.join(TASK_NAMES)}")
    return _TASKS[name](split, data_dir)


def _in(data_dir: str | None, folder: str) -> str | None:
    return storage.join(storage.normalize(data_dir), folder) if data_dir else None
