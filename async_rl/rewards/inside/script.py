"""The program as a script: text on standard input, text on standard output."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn, cast

from async_rl.rewards.inside.processes import fork, kill_all

CHUNK = 1 << 16
STDERR = 2_000
"""So much of its end is kept."""


def run(setup: dict[str, Any], stdin: str) -> dict[str, Any]:
    """Once. {"why", "stdout", "stderr", "cpu_s"}; why: "" where it ended well, "time", "output", "exit code 1", "signal
    SIGSEGV"."""
    given = _file(stdin.encode("utf-8", "surrogatepass"))
    out, err = os.pipe(), os.pipe()
    running = _Running(out[0], err[0], setup["output_bytes"], time.monotonic() + setup["wall_s"])
    child = fork(setup, {given: 0, out[1]: 1, err[1]: 2})
    if child == 0:
        _as_main(setup["program"])
    os.close(given)
    os.close(out[1])
    os.close(err[1])
    why, status = running.wait(child)
    kill_all(setup["contained"], child)
    running.close()
    return {"why": why or _fate(status, running.cpu_s, setup["cpu_s"]), "cpu_s": running.cpu_s, **running.texts()}


class _Running:
    """A child whose output is collected until it ends, whoever else still holds the pipes."""

    def __init__(self, out: int, err: int, most: int, deadline: float) -> None:
        self._out, self._err, self._most, self._deadline = out, err, most, deadline
        self._texts = {out: bytearray(), err: bytearray()}
        self._woken, self._waker = os.pipe()
        for descriptor in (out, err, self._woken, self._waker):
            os.set_blocking(descriptor, False)
        signal.signal(signal.SIGCHLD, _nothing)
        signal.set_wakeup_fd(self._waker)
        self.cpu_s = 0.0

    def wait(self, child: int) -> tuple[str, int]:
        """("" | "time" | "output", its status). It is reaped, and killed before where that is why."""
        ended, status, open_ones = 0, 0, {self._out, self._err}
        while True:
            if not ended:
                ended, status, usage = os.wait4(child, os.WNOHANG)
                self.cpu_s = usage.ru_utime + usage.ru_stime
            left = self._deadline - time.monotonic()
            ready, _, _ = select.select([*open_ones, self._woken], [], [], 0 if ended else max(0.0, left))
            if self._woken in ready:
                os.read(self._woken, CHUNK)
            written = [one for one in ready if one in open_ones and self._read(one, open_ones)]
            why = "output" if len(self._texts[self._out]) > self._most else "time" if left <= 0 else ""
            if why and not ended:
                os.kill(child, signal.SIGKILL)
                _, status, usage = os.wait4(child, 0)
                self.cpu_s = usage.ru_utime + usage.ru_stime
            if why or (ended and not written):
                return why, status

    def texts(self) -> dict[str, str]:
        out, err = (self._texts[one].decode("utf-8", "replace") for one in (self._out, self._err))
        return {"stdout": out[: self._most], "stderr": err[-STDERR:]}

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        for descriptor in (self._out, self._err, self._woken, self._waker):
            os.close(descriptor)

    def _read(self, descriptor: int, open_ones: set[int]) -> bool:
        part = os.read(descriptor, CHUNK)
        if not part:
            open_ones.discard(descriptor)
        self._texts[descriptor] += part
        if descriptor == self._err:
            del self._texts[self._err][: -2 * STDERR]
        return bool(part)


def _file(content: bytes) -> int:
    """A pipe would be full before the program reads."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("stdin")
    else:
        descriptor, path = __import__("tempfile").mkstemp()
        os.unlink(path)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _fate(status: int, cpu_s: float, limit: float) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        late = number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_s >= limit)
        return "time" if late else f"signal {signal.Signals(number).name}"
    return f"exit code {os.WEXITSTATUS(status)}" if os.WEXITSTATUS(status) else ""


def _nothing(*_: object) -> None:
    """So that SIGCHLD reaches the wake-up descriptor."""


def _as_main(program: str) -> NoReturn:
    """In the child, on the descriptors 0, 1 and 2: as `python main.py` would, to the exit code."""
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, errors="replace")
    sys.argv = ["main.py"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    code = 0
    try:
        exec(compile(program, "main.py", "exec"), main.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        cast(Callable[[], None], vars(threading)["_shutdown"])()  # waits for threads that are no daemons
        cast(Callable[[], None], vars(atexit)["_run_exitfuncs"])()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 255)
