"""The process that computes rewards for `rewards.RewardPool`, one at a time.

Its one argument is `Settings` as JSON. On the socket that it inherits go lines of JSON: first
``null`` when it is ready or a sentence why not, then for each request ``[index, text]`` an answer
``[value, problem, detail]``. It ends when the other side closes the socket, and otherwise as its
rewards make it end: the pool expects everything.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from nanoray.errors import NanorayError
from nanoray.tasks.catalog import Sources, Split, load_task

_MAX_DETAIL_CHARS = 200
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL")
_MIN_SECRET_CHARS = 6  # what is shorter stands in any text


@dataclasses.dataclass(frozen=True)
class TaskReward:
    """The reward of a task's examples, the task opened anew from plain values."""

    name: str
    split: Split
    sources: Sources = dataclasses.field(default_factory=Sources)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a worker is started with; reward is a task, or a function's ``module:name``."""

    fd: int
    reward: TaskReward | str
    deadline_s: float
    memory_bytes: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        values = json.loads(text)
        reward = values["reward"]
        if isinstance(reward, dict):
            reward["sources"] = Sources(**reward["sources"])
            values["reward"] = TaskReward(**reward)
        return cls(**values)


def open_reward(reward: TaskReward | str) -> Callable[[int, str], object]:
    """The function of (index of the example, completion's text).

    Raises:
        NanorayError: there is no such task or function, or the task's data cannot be had.
    """
    if isinstance(reward, TaskReward):
        task = load_task(reward.name, reward.split, reward.sources)
        return lambda index, text: task.reward(task.example(index), text)
    module, _, name = reward.partition(":")
    try:
        function: Callable[[int, str], object] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise NanorayError(
            f"there is no reward function {reward} ({error}); give module:function"
        ) from error
    return function


def _limit_memory(memory_bytes: int) -> None:
    """Allow so many bytes of address space beyond those in use now, and no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        used_bytes = int(statm.read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used_bytes + memory_bytes
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _answer(reward: Callable[[int, str], object], index: int, text: str) -> tuple[float, str, str]:
    """(value, problem, detail)"""
    try:
        value = float(reward(index, text))  # type: ignore[arg-type]
        if math.isfinite(value):
            return value, "", ""
        problem, detail = "error", f"the reward is {value}"
    except MemoryError:
        problem, detail = "memory", ""
    except BaseException as error:  # sys.exit() too: what a reward does shall not end the pool
        problem, detail = "error", f"{type(error).__name__}: {error}"
    return 0.0, problem, _for_the_log(detail)


def _for_the_log(detail: str) -> str:
    """In one line, not too long, and without the secrets that the environment may hold."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _MIN_SECRET_CHARS:
            detail = detail.replace(value, "***")
    plain = "".join(char if char.isprintable() else " " for char in detail)
    return " ".join(plain.split())[:_MAX_DETAIL_CHARS]


def main(settings: Settings) -> None:
    """Serve until the other side closes."""
    with socket.socket(fileno=settings.fd) as connection, connection.makefile("rwb") as lines:

        def tell(message: object) -> None:
            lines.write(json.dumps(message).encode() + b"\n")
            lines.flush()

        try:
            reward = open_reward(settings.reward)
        except NanorayError as error:
            tell(str(error))
            return
        _limit_memory(settings.memory_bytes)
        # The kernel keeps the deadline, even where the reward never returns to Python and even
        # if the pool is gone: SIGALRM ends this process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        tell(None)
        for line in lines:
            index, text = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, settings.deadline_s)
            answer = _answer(reward, index, text)
            signal.setitimer(signal.ITIMER_REAL, 0)
            tell(answer)


if __name__ == "__main__":
    main(Settings.from_json(sys.argv[1]))
