"""Landlock (Linux 5.13, https://docs.kernel.org/userspace-api/landlock.html): the files that stay.

What a mount namespace hides better. Where none can be had, this keeps the program from reading,
writing and listing what is the user's, in /proc too; it may still ask whether a file exists, and
an ordinary user's program may change modes and times of that user's files.
"""

from __future__ import annotations

import ctypes
import os
import struct

from . import linux

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
# Kinds of access that the kernel knows, by version of Landlock: 1, 2, 3, 4, and 5 or newer.
_NUM_RIGHTS = (13, 14, 15, 15, 16)
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8


def restrict_files(readable: list[str], folder: str) -> bool:
    """From now on only the readable folders and the devices open, and ``folder`` for writing.

    Needs no_new_privs. Whether the kernel took it.
    """
    size = ctypes.c_size_t
    version = linux.libc.syscall(_CREATE_RULESET, None, size(0), 1)
    if version < 1:
        return False
    rights = (1 << _NUM_RIGHTS[min(version, len(_NUM_RIGHTS)) - 1]) - 1
    ruleset = linux.libc.syscall(_CREATE_RULESET, struct.pack("=Q", rights), size(8), 0)
    if ruleset < 0:
        return False
    allowed = dict.fromkeys(readable, _EXECUTE | _READ_FILE | _READ_DIR)
    allowed |= {f"/dev/{name}": _READ_FILE | _WRITE_FILE for name in ("null", "zero", "urandom")}
    allowed[folder] = rights
    try:
        for path, access in allowed.items():
            fd = os.open(path, os.O_PATH)
            try:
                rule = struct.pack("=Qi", access, fd)
                linux.check(linux.libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
            finally:
                os.close(fd)
        return bool(linux.libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    except OSError:
        return False
    finally:
        os.close(ruleset)
