"""The way out of the caller's world: namespaces, and a root filesystem with nothing of it."""

from __future__ import annotations

import os
import sys

from . import linux

_NAMESPACES = {  # CLONE_NEW* of sched.h; the user namespace first: it gives the right to the others
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
}
INNER_UID = 1000  # the program's user in a user namespace


def leave_namespaces(wanted: list[str], uids: list[int]) -> set[str]:
    """Unshare each of the wanted namespaces; which of them the kernel granted.

    ``uids`` are users of the host, the first that is available is who the program will be there.
    """
    # The host's killer of last resort shall take the program, not its caller.
    linux.write("/proc/self/oom_score_adj", "1000")
    held = set()
    for name, flag in _NAMESPACES.items():
        if name not in wanted:
            continue
        if _enter_user_namespace(uids) if name == "user" else linux.unshare(flag):
            held.add(name)
    return held


def _enter_user_namespace(uids: list[int]) -> bool:
    """A user namespace in which the program's user is nobody's on the host, if root calls.

    Two lines of map can only be written from outside, by a helper that stays there. An ordinary
    user's program keeps its user, under another number.
    """
    uid, gid, pid = os.getuid(), os.getgid(), os.getpid()
    if uid == 0 and not linux.has_capability(linux.CAP_SETFCAP):
        return False  # Linux 5.12 lets nobody else map a root; ask before there is no way back.
    told, tell = os.pipe()
    mapper_pid = os.fork()
    if mapper_pid == 0:
        os.close(tell)
        mapped = bool(os.read(told, 1)) and any(
            linux.write(f"/proc/{pid}/gid_map", f"0 0 1\n{INNER_UID} {outer} 1\n")
            and linux.write(f"/proc/{pid}/uid_map", f"0 0 1\n{INNER_UID} {outer} 1\n")
            for outer in uids
        )
        os._exit(0 if mapped else 1)
    entered = linux.unshare(_NAMESPACES["user"])
    if entered and uid == 0:
        os.write(tell, b"!")
    os.close(tell)
    os.close(told)
    mapped = os.waitpid(mapper_pid, 0)[1] == 0
    if entered and not mapped:
        linux.write("/proc/self/setgroups", "deny")
        linux.write("/proc/self/gid_map", f"{INNER_UID} {gid} 1")
        mapped = linux.write("/proc/self/uid_map", f"{INNER_UID} {uid} 1")
        assert mapped, "the kernel grants a user namespace but no user in it"
    return entered


def enter_new_root(folder: str, disk_bytes: int, *, proc: bool) -> None:
    """A root of Python's own files, read-only, some devices, and an empty /tmp of bounded size.

    ``folder`` serves as mount point; ``proc`` asks for a /proc of this pid namespace. Raises
    OSError where a mount is refused.
    """
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", folder, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    for path in library_paths():
        target = folder + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
        else:
            os.makedirs(target, exist_ok=True)
            linux.mount(path, target, None, linux.MS_BIND | linux.MS_REC)
            linux.restrict_mount(
                target, linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV, linux.AT_RECURSIVE
            )
    os.mkdir(f"{folder}/dev")
    for device in ("null", "zero", "random", "urandom"):
        os.close(os.open(f"{folder}/dev/{device}", os.O_CREAT))
        linux.mount(f"/dev/{device}", f"{folder}/dev/{device}", None, linux.MS_BIND)
    os.mkdir(f"{folder}/tmp")
    small = f"size={disk_bytes},nr_inodes=4096,mode=1777"
    linux.mount("tmpfs", f"{folder}/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, small)
    if proc:
        os.mkdir(f"{folder}/proc")
        flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
        try:
            linux.mount("proc", f"{folder}/proc", "proc", flags, "subset=pid")
        except OSError:
            os.rmdir(f"{folder}/proc")  # A container that hides parts of /proc allows no new one.
    linux.restrict_mount(folder, linux.MS_RDONLY, 0)
    os.chdir(folder)
    linux.pivot_root_here()
    os.chdir("/tmp")


def leave_new_root(folder: str) -> None:
    """Take off a root that came to stand only half."""
    os.chdir("/")
    linux.libc.umount2(os.fsencode(folder), linux.MNT_DETACH)


def library_paths() -> list[str]:
    """Folders (and links to them) with the standard library and what its extensions link to."""
    paths = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib"]
    paths.append(os.path.dirname(os.__file__))
    chosen: list[str] = []
    for path in paths:
        inside = any(path == c or path.startswith(c + "/") for c in chosen)
        if os.path.isdir(path) and not inside:
            chosen.append(path)
    return chosen
