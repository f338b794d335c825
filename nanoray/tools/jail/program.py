"""The program's process: give up what is left of its rights, then run the code."""

from __future__ import annotations

import builtins
import ctypes
import errno
import os
import resource
import sys
import types

from . import linux
from .landlock import restrict_files
from .namespaces import INNER_UID, library_paths

# How the process exits when the code came to an end; all other exit codes are the program's own
# os._exit, so that half a run does not pass for a whole one.
EXIT_FINISHED, EXIT_RAISED, EXIT_MEMORY = 101, 102, 103


def become_the_program(settings: dict, isolation: set[str], folder: str, uids: list[int]) -> None:
    """Working folder, standard input, limits, and the rights that remain: none.

    Adds to ``isolation`` what came to hold. Outside of a user namespace, root becomes the first of
    ``uids`` that exists.
    """
    os.chdir(folder)
    os.environ |= {"HOME": folder, "TMPDIR": folder}
    to_be = [INNER_UID] if "user" in isolation else uids
    if os.geteuid() == 0 and any(_change_user(uid, folder) for uid in to_be):
        isolation.add("uid")
    if not os.access(os.__file__, os.R_OK):
        sys.exit(f"the program's user cannot read Python's library at {os.__file__}")
    _set_standard_input(settings["stdin"])
    for capability in range(64):
        linux.prctl(linux.PR_CAPBSET_DROP, capability)
    linux.check(linux.libc.capset(linux.capability_header(), (ctypes.c_uint32 * 6)()))
    linux.check(linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1))
    landlock = "mount" not in isolation and "landlock" in settings["isolation"]
    if landlock and restrict_files(library_paths(), folder):
        isolation.add("landlock")
    _set_limits(settings, own_user="uid" in isolation)
    isolation.add("rlimits")
    program = settings["seccomp" if "pid" in isolation else "seccomp_without_signals"]
    if program and "seccomp" in settings["isolation"] and install_filter(program):
        isolation.add("seccomp")
    # A change of user withdraws both: dying with the warden, and letting it see the memory used.
    linux.die_with_parent()
    linux.prctl(linux.PR_SET_DUMPABLE, 1)


def _change_user(uid: int, folder: str) -> bool:
    try:
        os.chown(folder, uid, uid)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError:
        return False
    return True


def _set_standard_input(text: str) -> None:
    """A file that is nowhere listed: no pipe to be filled by anybody while the program runs."""
    with open("stdin", "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
    fd = os.open("stdin", os.O_RDONLY)
    os.unlink("stdin")
    os.dup2(fd, 0)
    os.close(fd)


def _set_limits(settings: dict, *, own_user: bool) -> None:
    cpu_s = int(settings["timeout_s"]) + 2
    # Where the user is shared, jailer and warden are of it as well.
    processes = settings["max_processes"] + (0 if own_user else 2)
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, settings["disk_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_AS, settings["memory_bytes"]),
    ):
        _, most = resource.getrlimit(limit)
        bound = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (bound, bound))


def install_filter(program: bytes) -> bool:
    """Hand a seccomp program (``struct sock_fprog``) to the kernel; whether it took it."""

    class _FilterProgram(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    fprog = _FilterProgram(len(program) // 8, program)
    return (
        linux.prctl(linux.PR_SET_SECCOMP, linux.SECCOMP_MODE_FILTER, ctypes.addressof(fprog)) == 0
    )


def run(code: str) -> int:
    """Execute the code as ``__main__``; the exit code that tells how it went."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    # `site` would have defined them.
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    try:
        exec(compile(code, "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as exit_:
        if exit_.code is None or exit_.code == 0:
            return EXIT_FINISHED
        if not isinstance(exit_.code, int):
            sys.stderr.write(f"{exit_.code}\n")
        return EXIT_RAISED
    except BaseException as error:
        memory = isinstance(error, MemoryError)
        memory |= isinstance(error, OSError) and error.errno == errno.ENOMEM
        # The frames hold what filled the memory; else the program's trace starts below this one.
        error.__traceback__ = (
            error.__traceback__.tb_next if error.__traceback__ and not memory else None
        )
        sys.__excepthook__(type(error), error, error.__traceback__)
        return EXIT_MEMORY if memory else EXIT_RAISED
    return EXIT_FINISHED
