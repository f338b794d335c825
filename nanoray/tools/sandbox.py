"""Run a Python program that nobody has read, as a model writes them, without harm to the host.

``run_python`` starts a separate interpreter that leaves the caller's user, pid, network, mount,
ipc and uts namespaces, sees only Python's own files (read-only) and an empty folder in memory, and
drops its rights before it runs the first line (``jail/``). Where a kernel or container refuses
one of these, the others still hold, and the result names what held.
"""

from __future__ import annotations

import dataclasses
import marshal
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Set
from typing import Literal

from nanoray.errors import NanorayError
from nanoray.tools.jail import program
from nanoray.tools.seccomp import filter_program

Status = Literal["ok", "error", "timeout", "memory", "crashed"]

# What is tried; tests take some away to see that the rest still works.
ISOLATION = frozenset({"user", "mount", "pid", "network", "ipc", "uts", "seccomp", "landlock"})
# Without these a program could read the user's files, reach other processes or the network.
REQUIRED = frozenset({"pid", "mount", "network"})

MIB = 1024 * 1024
_STARTUP_S = 30.0  # on a machine that is busy with everything else
_DRAIN_S = 0.5  # for output after the end; only who has no pid namespace can keep the pipe open
_GRACE_S = 1.0  # for the warden to keep the deadline itself before the caller does

# No site, no user site, no unsafe path, no bytecode written, UTF-8 everywhere.
_OPTIONS = ("-S", "-s", "-P", "-B", "-X", "utf8")
_TOOLS_FOLDER = os.path.dirname(__file__)
_BOOT = "import sys; sys.path.append(sys.argv[1]); import jail; sys.path.pop(); "
_BOOT += "sys.exit(jail.main(int(sys.argv[2])))"


_STATUS_OF_END: dict[str, Status] = {
    f"exit {program.EXIT_FINISHED}": "ok",
    f"exit {program.EXIT_RAISED}": "error",
    f"exit {program.EXIT_MEMORY}": "memory",
    "memory": "memory",
    "timeout": "timeout",
    f"signal {int(signal.SIGXCPU)}": "timeout",
}


@dataclasses.dataclass(frozen=True, slots=True)
class SandboxResult:
    """How a program ended, and what it printed.

    ``status``: ``ok`` – the code ran to its end or called ``exit(0)``; ``error`` – it raised or
    exited otherwise; ``timeout`` – it did not end in time; ``memory`` – it wanted more than it may
    have; ``crashed`` – its process died (a signal) or left by ``os._exit``.
    """

    status: Status
    stdout: str
    stderr: str
    truncated: bool
    """Whether output beyond ``max_output_bytes`` was dropped."""
    duration_s: float
    """From the program's first line to its end; starting the sandbox is not in it."""
    isolation: frozenset[str]
    """What held of ``user mount pid network ipc uts`` (namespaces), ``uid`` (it ran as a user that
    owns nothing on the host), ``seccomp``, ``landlock`` (only tried without ``mount``) and
    ``rlimits``."""


def run_python(
    code: str,
    *,
    stdin: str = "",
    timeout_s: float = 5.0,
    memory_bytes: int = 256 * MIB,
    disk_bytes: int = 16 * MIB,
    max_processes: int = 16,
    max_output_bytes: int = 64 * 1024,
    require: Set[str] = REQUIRED,
) -> SandboxResult:
    """Run the code as ``__main__`` of a fresh interpreter with the standard library.

    ``timeout_s`` is wall-clock time. ``memory_bytes`` bounds the address space of each process and,
    where there is a pid namespace, the memory of all together; ``max_processes`` counts threads.
    ``max_output_bytes`` is for each of stdout and stderr; more is read and dropped. ``require``
    names what must hold (see `SandboxResult.isolation`) for the program to be run at all; require
    less only of programs that you would run without a sandbox. Works from any thread, many at once.
    A program can print what it likes: a checker must not trust a verdict
    that the program under test could have printed or exited with.

    Raises ``NanorayError`` for limits that make no sense, where no interpreter can be started or
    something required does not hold, and outside of Linux.
    """
    if sys.platform != "linux":
        raise NanorayError("the sandbox needs Linux; run programs in a Linux container")
    if not 0 < timeout_s < 1e6:
        raise NanorayError(f"a sandbox's timeout_s must be positive and finite, not {timeout_s}")
    for name, value, least in (
        ("memory_bytes", memory_bytes, 64 * MIB),
        ("disk_bytes", disk_bytes, len(stdin.encode(errors="replace")) + 64 * 1024),
        ("max_processes", max_processes, 1),
        ("max_output_bytes", max_output_bytes, 0),
    ):
        if value < least:
            raise NanorayError(f"a sandbox's {name} must be at least {least:,}, not {value:,}")
    machine = platform.machine()
    settings = {
        "caller_pid": os.getpid(),
        "code": code,
        "stdin": stdin,
        "timeout_s": timeout_s,
        "memory_bytes": memory_bytes,
        "disk_bytes": disk_bytes,
        "max_processes": max_processes,
        "isolation": sorted(ISOLATION),
        "require": sorted(require),
        "seccomp": filter_program(machine, may_signal=True),
        "seccomp_without_signals": filter_program(machine, may_signal=False),
    }
    with (
        tempfile.TemporaryDirectory(prefix="nanoray-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as settings_file,
    ):
        settings["folder"] = folder
        marshal.dump(settings, settings_file)
        settings_file.seek(0)
        result = _run(settings_file.fileno(), timeout_s, max_output_bytes)
    if missing := require - result.isolation:
        raise NanorayError(
            f"this machine cannot isolate a program (it has no {', '.join(sorted(missing))} for "
            f"the sandbox), so nothing was run; allow user namespaces, in containers too"
        )
    return result


def _run(settings_fd: int, timeout_s: float, max_output_bytes: int) -> SandboxResult:
    status_fd, child_status_fd = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, *_OPTIONS, "-c", _BOOT, _TOOLS_FOLDER, str(child_status_fd)],
            stdin=settings_fd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PYTHONHASHSEED": "0"},  # the same program prints the same sets
            pass_fds=[child_status_fd],
            start_new_session=True,
        )
    except OSError as error:
        os.close(status_fd)
        raise NanorayError(f"no sandbox could be started: {error}") from error
    finally:
        os.close(child_status_fd)
    assert process.stdout, "piped"
    assert process.stderr, "piped"
    status = _Pipe(status_fd, 4096)
    stdout = _Pipe(process.stdout.fileno(), max_output_bytes)
    stderr = _Pipe(process.stderr.fileno(), max_output_bytes)
    with process.stdout, process.stderr, os.fdopen(status_fd):
        report: dict[str, str] = {}
        try:
            duration_s = _follow(status, stdout, stderr, timeout_s)
            for line in status.text().splitlines():
                key, _, value = line.partition(" ")
                report[key] = value
        finally:
            isolation = frozenset(report.get("isolation", "").split())
            if "end" not in report or "pid" not in isolation:
                # Unwaited for, the group's leader keeps its number from being another's.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _read(stdout, stderr, until=time.monotonic() + _DRAIN_S)
    if "isolation" not in report:
        cause = stderr.text().strip().rpartition("\n")[2] or "no answer from its process"
        raise NanorayError(f"the sandbox did not start: {cause}")
    return SandboxResult(
        status=_status(report.get("end"), duration_s, timeout_s),
        stdout=stdout.text(),
        stderr=stderr.text(),
        truncated=stdout.truncated or stderr.truncated,
        duration_s=duration_s,
        isolation=isolation,
    )


def _follow(status: _Pipe, stdout: _Pipe, stderr: _Pipe, timeout_s: float) -> float:
    """Read until the end is reported or overdue; the seconds since the program's first line."""
    until = time.monotonic() + _STARTUP_S
    while status.open and not status.data and time.monotonic() < until:
        _read(status, stdout, stderr, until=until, once=True)
    start = time.monotonic()
    until = start + timeout_s + _GRACE_S
    while status.open and status.data.count(b"\n") == 1 and time.monotonic() < until:
        _read(status, stdout, stderr, until=until, once=True)
    return time.monotonic() - start


def _status(end: str | None, duration_s: float, timeout_s: float) -> Status:
    if end is None:  # The warden was killed: by the caller for being late, or by the program.
        return "timeout" if duration_s >= timeout_s else "crashed"
    return _STATUS_OF_END.get(end, "crashed")


class _Pipe:
    """The reading end of a pipe, and the first ``max_bytes`` that came out of it."""

    def __init__(self, fd: int, max_bytes: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.open = True
        self.truncated = False
        self.data = b""
        self._max_bytes = max_bytes

    def take(self) -> None:
        """Read what is there and keep what there is room for."""
        chunk = os.read(self.fd, 64 * 1024)
        room = self._max_bytes - len(self.data)
        self.open = bool(chunk)
        self.truncated |= len(chunk) > room
        self.data += chunk[:room]

    def text(self) -> str:
        return self.data.decode(errors="replace")


def _read(*pipes: _Pipe, until: float, once: bool = False) -> None:
    """Empty the pipes until they are closed or time is up, or (``once``) just what is ready."""
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            if pipe.open:
                selector.register(pipe.fd, selectors.EVENT_READ, pipe)
        while selector.get_map() and (left_s := until - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                key.data.take()
                if not key.data.open:
                    selector.unregister(key.fd)
            if once:
                return
