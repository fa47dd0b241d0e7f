"""Children under limits, and their end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
FIRST_PROCESSES = 16
"""In a process namespace of one's own the examiner is among the first."""
STACK = 64 << 20


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def guard() -> None:
    """Of the examiner: its memory is not for others of the same user, it ends with whoever started it, and orphans
    become its children."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def fork(limits: dict[str, Any], keep: dict[int, int]) -> int:
    """As os.fork; the child has limits, a session of its own, and of the open files only `keep`: here -> there.

    limits: cpu_s, file_bytes, processes, memory_bytes (of address space); None = no limit.
    """
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for here, there in keep.items():
        os.dup2(here, there)
    os.closerange(max(keep.values()) + 1, 1 << 16)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 1)
    prctl(PR_SET_CHILD_SUBREAPER, 0)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, limits["cpu_s"], spare=1)  # at the first SIGXCPU, at the second SIGKILL
    limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_NPROC, limits["processes"])
    limit(resource.RLIMIT_AS, limits["memory_bytes"])
    return 0


def limit(which: int, value: int | None, spare: int = 0) -> None:
    if value is None:
        return
    hard = resource.getrlimit(which)[1]
    most = value + spare if hard == resource.RLIM_INFINITY else min(value + spare, hard)
    resource.setrlimit(which, (min(value, most), most))


def deepen_stack() -> None:
    """For recursion, of this process and its children."""
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    soft = STACK if hard == resource.RLIM_INFINITY else min(STACK, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def kill_all(contained: bool, group: int) -> None:
    """Everything the program left, daemons too, and reap it."""
    if contained and os.getpid() < FIRST_PROCESSES:  # or this would be all that the user has
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        for orphan in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            return [int(child) for child in children.read().split()]
    except OSError:
        return []
