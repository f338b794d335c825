"""The system calls a sandboxed program does without, as a classic BPF program.

A denied call answers EPERM, as it would for lack of rights, so a program meets an ordinary
``PermissionError``. What is denied would widen the kernel's attack surface (namespaces, mounts,
BPF, keys, io_uring), reach other processes (ptrace), open a network, or hold memory that no
resource limit counts (memfd, System V shared memory).
"""

from __future__ import annotations

import struct

# (x86_64, aarch64); kernel calls since 5.1 have one number everywhere.
_DENIED = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
# Where the program shares its process ids with the host, it may not signal at all.
_SIGNALS = {
    "kill": (62, 129),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "tgkill": (234, 131),
    "tkill": (200, 130),
}
_CLONE = (56, 220)
_CLONE3 = 435
_PRLIMIT64 = (302, 261)
_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_MACHINES = {"x86_64": 0, "aarch64": 1}

_NEW_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
_X32_BIT = 0x40000000
_EPERM, _ENOSYS = 1, 38

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _ARCH, _ARGUMENT_0 = 0, 4, 16  # offsets in struct seccomp_data, little-endian


def filter_program(machine: str, *, may_signal: bool) -> bytes | None:
    """The instructions (``struct sock_filter[]``) for ``platform.machine()``, None if unknown.

    Without ``may_signal`` the calls that send signals are denied as well.
    """
    if machine not in _MACHINES:
        return None
    m = _MACHINES[machine]
    denied = [numbers[m] for numbers in _DENIED.values()]
    denied += [] if may_signal else [numbers[m] for numbers in _SIGNALS.values()]
    program = [
        _instruction(_LOAD, _ARCH),
        _instruction(_JUMP_EQUAL, _AUDIT_ARCH[m], if_true=1),
        _instruction(_RETURN, _ERRNO | _EPERM),
        _instruction(_LOAD, _NUMBER),
        _instruction(_JUMP_GREATER_EQUAL, _X32_BIT, if_false=1),
        _instruction(_RETURN, _ERRNO | _EPERM),
        # glibc falls back to clone, whose flags a filter can read.
        _instruction(_JUMP_EQUAL, _CLONE3, if_false=1),
        _instruction(_RETURN, _ERRNO | _ENOSYS),
    ]
    for number in denied:
        program.append(_instruction(_JUMP_EQUAL, number, if_false=1))
        program.append(_instruction(_RETURN, _ERRNO | _EPERM))
    program += [
        _instruction(_JUMP_EQUAL, _CLONE[m], if_false=4),
        _instruction(_LOAD, _ARGUMENT_0),
        _instruction(_JUMP_ANY_BIT, _NEW_NAMESPACE_FLAGS, if_false=1),
        _instruction(_RETURN, _ERRNO | _EPERM),
        _instruction(_RETURN, _ALLOW),
        # Limits of the caller itself (pid 0) only.
        _instruction(_JUMP_EQUAL, _PRLIMIT64[m], if_false=3),
        _instruction(_LOAD, _ARGUMENT_0),
        _instruction(_JUMP_EQUAL, 0, if_true=1),
        _instruction(_RETURN, _ERRNO | _EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _instruction(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    """One ``struct sock_filter``; jumps count the instructions to skip."""
    return struct.pack("=HBBI", code, if_true, if_false, value)
