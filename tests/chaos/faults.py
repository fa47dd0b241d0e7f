"""Faults at a pinned place of a process of ours. The product has no fault points: `sitecustomize`, which Python runs
first of all in every process it starts, wraps what is there.

A meeting is a FIFO: opened for reading it blocks until we come.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import pytest

from ..system.conftest import ROOT

LOOK_S = 0.02
Moment = Literal["within a bucket", "between two buckets"]


def run_first(monkeypatch: pytest.MonkeyPatch, directory: Path, code: str) -> None:
    """Every Python that is started from now on runs this code before anything else."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{directory}{os.pathsep}{ROOT}")


class Meeting:
    """A FIFO at which another process waits, in `open(path).read()`, until we let it go on."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._path = path
        self._held = -1

    def wait(self, within: float = 180) -> None:
        """Until somebody is there. Who comes later finds nothing to wait at."""
        deadline = time.monotonic() + within
        while self._held < 0:
            try:
                self._held = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # it has no reader
                assert time.monotonic() < deadline, f"nobody came to {self._path} within {within:.0f} s"
                time.sleep(LOOK_S)
        self._path.unlink()

    def end(self) -> None:
        """Whoever waits goes on."""
        os.close(self._held)


DIES = """
import os, signal, sys
from pathlib import Path

directory, names = Path({directory!r}), {names!r}
name = next((one for one in names if one in sys.orig_argv), None)
if name is not None:
    if (directory / f"{{name}}-comes-back").exists():
        (directory / f"{{name}}-comes-back").read_bytes()
    from async_rl.weights.group import Group

    order, begin, former = directory / name, Group.begin, []

    def begin_or_die(group, tensor, what):
        if ", part 2 of " in what and order.exists():
            if order.read_text() == "between two buckets":
                former[0].wait()
            else:
                begin(group, tensor, what)
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        former[:] = [begin(group, tensor, what)]
        return former[0]

    Group.begin = begin_or_die
"""


class BroadcastDeaths:
    """Members of a weight group that die when they are told to, in the broadcast that comes next. Between two buckets:
    the first has arrived (or left) and the second has not begun. Within a bucket: it has begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, names: list[str]) -> None:
        self._directory = directory
        run_first(monkeypatch, directory, DIES.format(directory=str(directory), names=names))

    def order(self, name: str, moment: Moment) -> Meeting:
        """Its successor waits at this meeting before it does anything."""
        meeting = Meeting(self._directory / f"{name}-comes-back")
        written = self._directory / "order"
        written.write_text(moment)
        written.rename(self._directory / name)
        return meeting


DIES_AT = """
import importlib, os, signal, sys
from pathlib import Path

for order, (name, module, kind, method) in {places!r}.items():
    if name in sys.orig_argv:
        owner = getattr(importlib.import_module(module), kind)

        def call_or_die(*arguments, order=Path({directory!r}) / order, call=getattr(owner, method)):
            if order.exists():
                order.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        setattr(owner, method, call_or_die)
"""


class DeathsAt:
    """Processes that die when they are told to, as soon as they come to a place: name of the order -> (name of the
    process, module, class, method)."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, directory: Path, places: dict[str, tuple[str, str, str, str]]
    ) -> None:
        self._directory = directory
        run_first(monkeypatch, directory, DIES_AT.format(directory=str(directory), places=places))

    def order(self, name: str) -> None:
        (self._directory / name).touch()

    def done(self, name: str) -> bool:
        return not (self._directory / name).exists()
