"""The first process in the sandbox: runs the program under tests. It speaks with sandbox.py over its standard input and
output:

    <- setup (program, limits)                              -> {"ready"}
    <- {"stdin": text}   the program reads it, runs         -> {"why", "stdout", "stderr", "cpu_s"}     ... as often
    <- {"load": true}    the program defines functions      -> {"why", "detail"}
    <- {"test": source}  the test calls them                -> {"why", "detail"}                        ... as often

The program never shares a process with what judges it. It runs in a forked child, whose memory holds no test and whose
open files lead nowhere; what is right on standard output is compared outside the sandbox. Assert-style tests run here,
and each of their calls goes to the child (calls.py), so that an object that is equal to everything, a patched builtin
or an early exit convinces nobody. This process is not dumpable: the child, though of the same user, can neither read
nor trace it. It can kill it, and then has not passed.
"""

from __future__ import annotations

import builtins
import importlib
import os
import signal
import socket
import sys
import time
import traceback
import types
from typing import Any, NoReturn

from async_rl.rewards.inside import script
from async_rl.rewards.inside.calls import Gone, OutOfTime, Peer, Unsupported
from async_rl.rewards.inside.channel import receive, send
from async_rl.rewards.inside.processes import deepen_stack, fork, guard, kill_all

MODULES = {
    *("bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"),
    *("json", "math", "operator", "random", "re", "statistics", "string", "typing"),
}
"""What a program imports under these names, tests may use without importing it."""
DETAIL = 2_000


def main() -> None:
    commands, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    guard()
    deepen_stack()
    setup = receive(commands)
    send(answers, {"ready": status()})
    program: _Program | None = None
    while (asked := receive(commands)) is not None:
        if "stdin" in asked:
            send(answers, script.run(setup, asked["stdin"]))
        elif "load" in asked:
            program = _Program(setup)
            send(answers, program.load())
        else:
            assert program is not None
            send(answers, program.test(asked["test"]))
    if program is not None:
        kill_all(setup["contained"], program.child)


def status() -> dict[str, str]:
    """How this process is confined, as the kernel says it."""
    try:
        with open("/proc/self/status") as lines:
            return dict(
                line.rstrip("\n").replace("\t", " ").split(": ", 1) for line in lines if ": " in line.replace("\t", " ")
            )
    except OSError:
        return {}


class _Program:
    """A program whose functions are called, in a child."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._wall_s: float = setup["wall_s"]
        ours, theirs = socket.socketpair()
        self.child = fork(setup, {theirs.fileno(): 3})
        if self.child == 0:
            _as_library(setup["program"], socket.socket(fileno=3))
        theirs.close()
        self._peer = Peer(ours)
        self._names: dict[str, Any] = {}

    def load(self) -> dict[str, str]:
        return self._guarded(self._load)

    def test(self, source: str) -> dict[str, str]:
        try:
            code = compile(source, "test.py", "exec")
        except (SyntaxError, ValueError) as error:
            return {"why": "unsupported", "detail": f"the test is not Python: {error}"}
        return self._guarded(lambda: exec(code, self._names))

    def _load(self) -> None:
        defined = self._peer.request("load")
        if not isinstance(defined, dict):
            raise Gone("the program answered nonsense")
        for name, value in defined.items():
            if isinstance(name, str) and not hasattr(builtins, name):  # a test's `abs` is Python's
                self._names[name] = importlib.import_module(name) if name in MODULES else value

    def _guarded(self, act: Any) -> dict[str, str]:
        """{"why": "" if it went well, ...}"""
        self._peer.deadline = time.monotonic() + self._wall_s
        why, detail = "", ""
        try:
            act()
        except AssertionError:
            why, detail = "assertion", _where()
        except Unsupported as error:
            why, detail = "unsupported", str(error)
        except SystemExit:
            why, detail = "unsupported", "the test ends the interpreter"
        except (Gone, OutOfTime):
            why = "ended"
        except BaseException as error:
            why, detail = type(error).__name__, _where()
        if isinstance(self._peer.broken, OutOfTime):
            why = "time"
        elif self._peer.broken is not None:
            why, detail = self._fate(), str(self._peer.broken)
        return {"why": why, "detail": detail[-DETAIL:]}

    def _fate(self) -> str:
        """What ended the program; it ends now, if it has not."""
        try:
            os.kill(self.child, signal.SIGKILL)
            _, ended = os.waitpid(self.child, 0)
        except (ProcessLookupError, ChildProcessError):
            return "ended"
        if os.WIFSIGNALED(ended):
            number = os.WTERMSIG(ended)
            names = {signal.SIGKILL: "ended", signal.SIGXCPU: "time"}
            return names.get(signal.Signals(number), f"signal {signal.Signals(number).name}")
        return f"exit code {os.WEXITSTATUS(ended)}"


def _as_library(program: str, connection: socket.socket) -> NoReturn:
    """In the child: its functions, for whoever asks."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module

    def load() -> dict[str, Any]:
        exec(compile(program, "solution.py", "exec"), module.__dict__)
        names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
        return {name: None if isinstance(value, types.ModuleType) else value for name, value in names.items()}

    code = 1
    try:
        Peer(connection, load).serve()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    os._exit(code & 255)


def _where() -> str:
    kind, error, trace = sys.exc_info()
    frames = [frame for frame in traceback.extract_tb(trace) if frame.filename == "test.py"]
    line = f"test.py, line {frames[-1].lineno}: " if frames else ""
    return line + "".join(traceback.format_exception_only(kind, error)).strip()
