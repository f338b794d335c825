"""What the sandbox's child process does: give up rights one by one, then run the program.

``sandbox.py`` starts this package in a bare interpreter (no site, no environment). It imports only
the quickest of the standard library: ``json``, ``typing`` and ``contextlib`` would double the time
to start. Up to three processes follow:

    jailer   leaves the caller's namespaces and waits
    warden   pid 1 of the new pid namespace (its death kills everything in it); builds the root
             filesystem, keeps the deadline, tells the caller how the program ended
    program  drops its rights and runs the code

Without a pid namespace jailer and warden are one process, which hunts down what the program left.
Each isolation is tried by itself; what the kernel refuses is missing from the report. On the
status pipe go two lines: ``isolation NAME ...`` when the program starts, and when it ended
``end exit CODE``, ``end signal NUMBER``, ``end timeout`` or ``end memory``.
"""

from __future__ import annotations

import marshal
import os
import resource
import signal
import time

from . import linux, program
from .namespaces import enter_new_root, leave_namespaces, leave_new_root
from .program import become_the_program, run

_POLL_S = 0.05


def main(status_fd: int) -> int:
    """Carry out the settings on standard input; returns, in the program's process, its exit code.

    The settings are a marshalled dictionary, see ``sandbox.run_python``.
    """
    with open(0, "rb", closefd=False) as file:
        settings = marshal.load(file)
    linux.die_with_parent()
    if os.getppid() != settings["caller_pid"]:
        os._exit(1)
    # Users to run as: one that no other sandbox has, else (in a small container) nobody.
    uids = [2**30 + os.getpid(), 65534]
    isolation = leave_namespaces(settings["isolation"], uids)
    if "pid" in isolation and (warden_pid := os.fork()):
        os.close(status_fd)
        os.waitpid(warden_pid, 0)
        os._exit(0)
    linux.die_with_parent()
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    children_fd = _open_list_of_children()
    if "mount" in isolation:
        try:
            enter_new_root(settings["folder"], settings["disk_bytes"], proc="pid" in isolation)
        except OSError:
            leave_new_root(settings["folder"])
            isolation.remove("mount")
    # Blocked, a child's end interrupts the warden's sigtimedwait instead of getting lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    ready_fd, tell_ready_fd = os.pipe()
    if program_pid := os.fork():
        os.close(tell_ready_fd)
        if held := os.read(ready_fd, 4096):  # nothing if the program's process failed before
            os.write(status_fd, b"isolation " + held + b"\n")
        own_proc = "pid" in isolation and "mount" in isolation and os.path.exists("/proc/self")
        memory_bytes = settings["memory_bytes"] if own_proc else None
        end = _watch(program_pid, time.monotonic() + settings["timeout_s"], memory_bytes)
        if "pid" not in isolation:
            _kill_descendants(children_fd)
        os.write(status_fd, f"end {end}\n".encode())
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    for fd in (status_fd, ready_fd, children_fd):
        if fd is not None:
            os.close(fd)
    folder = "/tmp" if "mount" in isolation else settings["folder"]
    become_the_program(settings, isolation, folder, uids)
    os.write(tell_ready_fd, " ".join(isolation).encode())
    os.close(tell_ready_fd)
    if not isolation.issuperset(settings["require"]):
        return program.EXIT_RAISED  # The caller sees from the report that nothing ran.
    return run(settings["code"])


def _watch(program_pid: int, deadline: float, memory_bytes: int | None) -> str:
    """Wait for the program's end, reaping orphans; also ends at the deadline or out of memory."""
    while True:
        pid, wait_status = os.waitpid(-1, os.WNOHANG)
        if pid == program_pid:
            code = os.waitstatus_to_exitcode(wait_status)
            return f"signal {-code}" if code < 0 else f"exit {code}"
        if pid:
            continue
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return "timeout"
        if memory_bytes is not None and _memory_of_all() > memory_bytes:
            return "memory"
        signal.sigtimedwait([signal.SIGCHLD], min(_POLL_S, left_s))


def _memory_of_all() -> int:
    """Bytes that the namespace's processes hold together: the limit on each does not bound many.

    Shared pages count once (``Pss``), except of a process that hides: it pays for all it sees.
    Zero while there is only the program, which has its limit.
    """
    pids = [name for name in os.listdir("/proc") if name.isdecimal() and name != "1"]
    if len(pids) < 2:
        return 0
    return sum(map(_memory_of, pids))


def _memory_of(pid: str) -> int:
    try:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as file:
                return sum(int(row.split()[1]) for row in file if row.startswith("Pss:")) * 1024
        except PermissionError:
            with open(f"/proc/{pid}/statm") as file:
                return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0  # It ended in between.


def _open_list_of_children() -> int | None:
    """This process's children as a file, opened while there is a /proc of its pid namespace."""
    try:
        return os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY)
    except OSError:
        return None


def _kill_descendants(children_fd: int | None) -> None:
    """Kill until no child is left: orphans come to us, the subreaper, one generation a round."""
    give_up = time.monotonic() + 1
    while children_fd is not None and time.monotonic() < give_up:
        for pid in os.pread(children_fd, 4096, 0).split():
            os.kill(int(pid), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)
