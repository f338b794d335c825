"""Linux by hand: Python has no names for these calls before 3.12, or none at all."""

from __future__ import annotations

import ctypes
import errno
import os
import signal

libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8  # the same as MOUNT_ATTR_*
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442  # Linux 5.12
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3, CAP_SETFCAP = 0x20080522, 31


def check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def unshare(flag: int) -> bool:
    return bool(libc.unshare(flag) == 0)


def prctl(option: int, value: int, pointer: int = 0) -> int:
    zero = ctypes.c_ulong(0)
    result = libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(pointer), zero, zero)
    return int(result)


def capability_header() -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)


def has_capability(number: int) -> bool:
    """Of the first 32, which are the first word of capget(2)."""
    words = (ctypes.c_uint32 * 6)()
    check(libc.capget(capability_header(), words))
    return bool(words[0] >> number & 1)


def die_with_parent() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    names = [None if name is None else os.fsencode(name) for name in (source, target, kind)]
    check(libc.mount(*names, ctypes.c_ulong(flags), data.encode()))


def restrict_mount(target: str, attributes: int, flags: int) -> None:
    """mount_setattr(2): add the attributes, keep those that a namespace may not take away."""
    request = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    path, size = os.fsencode(target), ctypes.c_size_t(32)
    check(libc.syscall(_SYS_MOUNT_SETATTR, AT_FDCWD, path, flags, request, size))


def pivot_root_here() -> None:
    """Make the working folder the root; the old one gets stacked over it and is taken off."""
    number = _SYS_PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, "pivot_root's number is not known here")
    check(libc.syscall(number, b".", b"."))
    check(libc.umount2(b".", MNT_DETACH))


def write(path: str, text: str) -> bool:
    """One write(2), as /proc wants it; whether it was accepted."""
    try:
        fd = os.open(path, os.O_WRONLY)
    except OSError:
        return False
    try:
        os.write(fd, text.encode())
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
