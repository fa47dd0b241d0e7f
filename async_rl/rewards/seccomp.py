"""Pure: the system calls a program of the model may not make, as a filter of the kernel (classic BPF).

What is not named is allowed, as in the filters of container runtimes: the file system, the processes and the network it
can reach are the sandbox's own. Denied are calls that reach into other processes, new namespaces and mounts, kernel
modules, clocks, keys, and interfaces with a history of holes (io_uring, bpf, userfaultfd, perf).
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Mapping

DENIED: Mapping[str, tuple[int, int]] = {
    # name: (number on x86_64, number on aarch64)
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
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
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vmsplice": (278, 75),
}
LOOKED_INTO: Mapping[str, tuple[int, int]] = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "ioctl": (16, 29),
    "socket": (41, 198),
}
ARCHITECTURES = ("x86_64", "aarch64")
AUDIT = (0xC000003E, 0xC00000B7)
"""The kernel's names for them."""

CLONE_NEW = 0x7E020000
"""CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET."""
FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6: what else there is (netlink, packet, vsock, alg) needs no namespace to do harm."""
TERMINAL = (0x5412, 0x541C)
"""TIOCSTI, TIOCLINUX: typing into a terminal."""

LOAD, JUMP_EQUAL, JUMP_SET, JUMP_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
NUMBER, ARCHITECTURE, FIRST, SECOND = 0, 4, 16, 24
"""Where they are in struct seccomp_data; of an argument the lower half, both machines are little-endian."""
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
X32 = 0x40000000


def supported() -> bool:
    return platform.machine() in ARCHITECTURES


def program(machine: str) -> bytes:
    """The filter as an array of struct sock_filter, for one of ARCHITECTURES."""
    which = ARCHITECTURES.index(machine)
    code = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, AUDIT[which]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":  # the same calls once more, under other numbers
        code += [(JUMP_LEAST, 0, 1, X32), (RETURN, 0, 0, FAIL | errno.ENOSYS)]
    for numbers in DENIED.values():
        code += [(JUMP_EQUAL, 0, 1, numbers[which]), (RETURN, 0, 0, FAIL | errno.EPERM)]
    number = {name: numbers[which] for name, numbers in LOOKED_INTO.items()}
    # Flags of clone3 are behind a pointer: without it the C library falls back to clone.
    code += [(JUMP_EQUAL, 0, 1, number["clone3"]), (RETURN, 0, 0, FAIL | errno.ENOSYS)]
    for name, body in (
        ("clone", [(LOAD, 0, 0, FIRST), (JUMP_SET, 0, 1, CLONE_NEW), (RETURN, 0, 0, FAIL | errno.EPERM)]),
        ("socket", [(LOAD, 0, 0, FIRST), *_unless(FAMILIES, FAIL | errno.EAFNOSUPPORT)]),
        ("ioctl", [(LOAD, 0, 0, SECOND), *_if(TERMINAL, FAIL | errno.EPERM)]),
    ):
        code += [(JUMP_EQUAL, 0, len(body) + 1, number[name]), *body, (RETURN, 0, 0, ALLOW)]
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _if(values: tuple[int, ...], result: int) -> list[tuple[int, int, int, int]]:
    return [step for value in values for step in ((JUMP_EQUAL, 0, 1, value), (RETURN, 0, 0, result))]


def _unless(values: tuple[int, ...], result: int) -> list[tuple[int, int, int, int]]:
    checks = [(JUMP_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [*checks, (RETURN, 0, 0, result)]
