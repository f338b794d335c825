"""Processes that outlive the command which starts them, and how they are found again and ended."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

STOP_DEADLINE_S = 20.0


@dataclass(frozen=True)
class Process:
    """A process of a cluster; its pid means it only with its time of start.

    Attributes:
        name: its own in the cluster, such as ``trainer-1``.
        role: what it is for.
        started: as psutil tells it, seconds since the epoch.
    """

    name: str
    role: str
    pid: int
    started: float

    def found(self) -> psutil.Process | None:
        """The running process, or None if it is over."""
        try:
            process = psutil.Process(self.pid)
            alive = process.create_time() == self.started
            return process if alive and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


def start(
    name: str, role: str, command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Process:
    """Start a process whose output is appended to ``log``."""
    with open(log, "ab") as output:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # ctrl-C in this terminal is not for the cluster
        )
    return Process(name, role, child.pid, psutil.Process(child.pid).create_time())


def end(processes: Sequence[psutil.Process]) -> None:
    """SIGTERM, then SIGKILL to what is left of the processes and of all they had started."""
    family = list(processes)
    for process in processes:
        family += process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
    _gone, left = psutil.wait_procs(family, timeout=STOP_DEADLINE_S)
    for process in left:
        process.kill()  # psutil checks that the pid still means the same process
    psutil.wait_procs(left, timeout=STOP_DEADLINE_S)


def lose(process: psutil.Process) -> None:
    """SIGKILL a process and all it had started; halted first, so that nobody acts on a death."""
    family: list[psutil.Process] = []
    while fresh := [p for p in (process, *process.children(recursive=True)) if p not in family]:
        family += fresh
        for member in fresh:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=STOP_DEADLINE_S)


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def listens(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
