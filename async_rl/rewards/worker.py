"""A grader's process: one job after the other, on the socket that is its standard input. Started by pool.py.

It ends when its parent closes the socket or dies, and is killed when a job takes too long: nothing it does needs care.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable

import msgspec

from async_rl.config import Rewards
from async_rl.errors import GradingFailed, UserError
from async_rl.rewards.jobs import CHECK, Compare, FromChild, Ready, Refused, Setup, ToChild, Verdict, frame, receive

PR_SET_PDEATHSIG = 1

Grader = Callable[[ToChild], FromChild]


def check() -> int:
    """Look at this machine, with the settings on standard input as JSON."""
    from async_rl.rewards import sandbox

    try:
        print(sandbox.check(msgspec.json.decode(sys.stdin.buffer.read(), type=Rewards)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def main(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent
    _die_with(parent)
    connection = socket.socket(fileno=0)
    setup = receive(connection)
    if not isinstance(setup, Setup):
        return
    try:
        grade = _make(setup)
    except (UserError, GradingFailed) as error:
        connection.sendall(frame(Refused(str(error), isinstance(error, UserError))))
        return
    connection.sendall(frame(Ready()))
    while (job := receive(connection)) is not None:
        connection.sendall(frame(grade(job)))


def _make(setup: Setup) -> Grader:
    if setup.kind == "math":
        return _math(setup.settings.memory_mb << 20)
    from async_rl.rewards.grading import ProgramGrader

    grader = ProgramGrader(setup.settings)
    atexit.register(grader.close)
    return grader


def _math(memory: int) -> Grader:
    from async_rl.rewards.symbolic import load

    equal = load()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    def compare(job: ToChild) -> FromChild:
        assert isinstance(job, Compare)
        try:
            found = any(equal(job.answer, right) for right in job.right)
        except (MemoryError, RecursionError) as error:
            return Refused(f"the grader gave up: {type(error).__name__} over {job.answer[:80]!r}")
        return Verdict(1.0, "symbolic", passed=1) if found else Verdict(0.0, "different")

    return compare


def _die_with(parent: int) -> None:
    """SIGKILL when the thread that started this process ends; where there is no such thing, the socket has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    if sys.argv[1] == CHECK:
        sys.exit(check())
    main(int(sys.argv[1]))
