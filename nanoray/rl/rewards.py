"""Rewards computed in processes of their own: whatever a reward does, it answers in time.

A reward function looks at what a model wrote, and some run it. One that loops, takes all the
memory, or takes its process down costs its own sample the reward and nobody else anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from nanoray.errors import NanorayError
from nanoray.rl.reward_worker import Settings, TaskReward

Problem = Literal["", "timeout", "memory", "crashed", "error"]

MIB = 2**20
_STARTUP_S = 120.0  # on a machine that is busy with everything else
_GRACE_S = 0.3  # for the worker to keep the deadline itself before the pool does
_MAX_ANSWER_BYTES = 64 * 1024
_CLOSED = "the reward pool was closed while rewards were still wanted"


@dataclass(frozen=True)
class Reward:
    """What a completion is paid.

    Attributes:
        value: finite; 0 if there was a problem.
        problem: empty; ``timeout``: no answer by the deadline; ``memory``: it wanted more than it
            may have; ``crashed``: it took its process down; ``error``: it raised, or gave something
            else than a finite number.
        detail: more about the problem, for the log.
    """

    value: float
    problem: Problem = ""
    detail: str = ""


class RewardProcessError(RuntimeError):
    """A process for rewards could not be started. No user's mistake: it may be later."""


class RewardPool:
    """Worker processes that compute rewards; `judge` may be called from any number of threads.

    Args:
        reward: a task whose `reward` pays, or ``module:function`` of a function of (index, text).
        num_workers: processes, and so rewards computed at a time.
        deadline_s: for one reward, above what it may take by itself: HumanEval's sandbox has 10 s.
        memory_bytes: of address space for one worker beyond what it has when its task is open.

    Raises:
        NanorayError: the reward cannot be opened (told in the worker's words).
        RewardProcessError: no worker can be started.
    """

    def __init__(
        self,
        reward: TaskReward | str,
        num_workers: int = 1,
        deadline_s: float = 15.0,
        memory_bytes: int = 512 * MIB,
    ) -> None:
        self._reward, self._deadline_s, self._memory_bytes = reward, deadline_s, memory_bytes
        self._lock = threading.Lock()
        self._closed = False
        self._workers: set[_Worker] = set()
        # One thread for each worker: who has a thread finds a worker.
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="rewards")
        # Workers that are ready, and why one that was wanted is not.
        self._idle: queue.SimpleQueue[_Worker | Exception] = queue.SimpleQueue()
        for _ in range(num_workers):
            self._bring_in_background()
        for found in [self._idle.get() for _ in range(num_workers)]:
            if isinstance(found, Exception):
                self.close()
                raise found
            self._idle.put(found)

    def judge(self, answers: Iterable[tuple[int, str]]) -> list[Reward]:
        """The rewards of (index of the example, text of the completion), in their order.

        Raises:
            NanorayError: the pool is closed.
            RewardProcessError: a worker's replacement cannot be started.
        """
        try:
            return list(self._threads.map(lambda answer: self._judge_one(*answer), answers))
        except (CancelledError, RuntimeError):
            if self._closed:
                raise NanorayError(_CLOSED) from None
            raise

    def close(self) -> None:
        """Kill the workers. Whoever still waits for a reward gets an error."""
        with self._lock:
            self._closed = True
            workers = self._workers
        for worker in workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _judge_one(self, index: int, text: str) -> Reward:
        worker = self._take()
        try:
            return worker.ask(index, text)
        finally:
            if worker.alive:
                self._idle.put(worker)
            else:
                self._bring_in_background(worker)

    def _take(self) -> _Worker:
        """An idle worker; one that died without being asked anything is replaced first."""
        while True:
            found = self._idle.get()
            if isinstance(found, _Worker) and found.alive:
                return found
            if isinstance(found, Exception):
                self._bring_in_background()
                raise found
            self._bring_in_background(found)

    def _bring_in_background(self, dead: _Worker | None = None) -> None:
        threading.Thread(target=self._bring, args=(dead,), daemon=True).start()

    def _bring(self, dead: _Worker | None) -> None:
        """Start a worker, in the place of a dead one; it is idle when it is ready."""
        if dead:
            dead.close()
        try:
            with self._lock:
                if self._closed:
                    raise NanorayError(_CLOSED)
                worker = _Worker(self._reward, self._deadline_s, self._memory_bytes)
                self._workers = (self._workers - {dead}) | {worker}
            worker.wait_ready()
            self._idle.put(worker)
        except (NanorayError, RewardProcessError) as error:
            self._idle.put(error)


class _Worker:
    """One `reward_worker` process and the socket to it; used by one thread at a time."""

    def __init__(self, reward: TaskReward | str, deadline_s: float, memory_bytes: int) -> None:
        self._deadline_s = deadline_s
        self._ending = threading.Lock()
        # What the caller can import, its worker can: it may run from a folder of Ray's.
        paths = os.pathsep.join(filter(None, sys.path))
        try:
            self._socket, theirs = socket.socketpair()
            with theirs:
                settings = Settings(theirs.fileno(), reward, deadline_s, memory_bytes)
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "nanoray.rl.reward_worker", settings.to_json()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except OSError as error:
            raise RewardProcessError(f"no process for rewards could be started: {error}") from error
        self._answers = self._socket.makefile("rb")

    @property
    def alive(self) -> bool:
        with self._ending:
            return self._process.poll() is None

    def wait_ready(self) -> None:
        """Raises NanorayError: it cannot open the reward; RewardProcessError: it did not start."""
        self._socket.settimeout(_STARTUP_S)
        line = self._read()
        if not line:
            self.kill()
            cause = "its process ended" if line is not None else f"not ready in {_STARTUP_S:.0f} s"
            raise RewardProcessError(f"a process for rewards did not start: {cause}")
        if (mistake := json.loads(line)) is not None:
            self.kill()
            raise NanorayError(mistake)

    def ask(self, index: int, text: str) -> Reward:
        """Afterwards it may be dead, see `alive`."""
        self._socket.settimeout(self._deadline_s + _GRACE_S)
        late = Reward(0.0, "timeout", f"no answer within {self._deadline_s:g} s")
        try:
            self._socket.sendall(json.dumps((index, text)).encode() + b"\n")
        except TimeoutError:
            self.kill()
            return late
        except OSError:
            pass  # it just ended: there is no answer to read either
        if line := self._read():
            value, problem, detail = json.loads(line)
            return Reward(value, problem, detail)
        status = self.kill()
        if line is None or status == -signal.SIGALRM:
            return late
        how = f"signal {-status}" if status < 0 else f"exit code {status}"
        return Reward(0.0, "crashed", f"its process ended with {how}")

    def _read(self) -> bytes | None:
        """A line; empty: the other side closed, or broke the form; None: not in time."""
        try:
            line = self._answers.readline(_MAX_ANSWER_BYTES)
        except TimeoutError:
            return None
        except OSError:
            return b""
        return line if line.endswith(b"\n") else b""

    def kill(self) -> int:
        """End the process and what it has started; its exit status. May be called again."""
        with self._ending:
            if self._process.returncode is None:
                # Unwaited for, the group's leader keeps its number from being another's.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            return self._process.returncode

    def close(self) -> None:
        """Kill it, and let the socket go; nobody may be waiting for an answer."""
        self.kill()
        self._answers.close()
        self._socket.close()
