"""Runs on several nodes: process groups of this machine, or the nodes of a real Slurm cluster on it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ..system.conftest import ROOT, SMALL, SORT, check, rows, summary  # noqa: F401 - for the tests

SCRIPT = ROOT / "launch" / "torchrun_cluster.sh"
WAIT_S = 90.0


def sets(*overrides: str) -> list[str]:
    return [part for override in (*SMALL, *overrides) for part in ("--set", override)]


class Shell:
    """A command in a process group of its own; `line` waits for what it prints."""

    def __init__(self, *command: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        )
        self.printed: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def line(self, part: str, within: float = WAIT_S) -> str:
        """The next line with this part."""
        deadline = time.monotonic() + within
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {part!r} for {within:.0f} s in:\n{self}") from None
            assert line is not None, f"it ended without {part!r}:\n{self}"
            if part in line:
                return line

    def end(self, within: float = WAIT_S) -> int:
        """Its exit code."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over after {within:.0f} s:\n{self}") from None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def services(self) -> dict[str, psutil.Process]:
        """name -> process of the services it started"""
        found: dict[str, psutil.Process] = {}
        for child in psutil.Process(self.process.pid).children():
            command = child.cmdline()
            if "--name" in command:
                found[command[command.index("--name") + 1]] = child
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reading.join(10)  # its children have the pipe too, and end when they notice

    def __str__(self) -> str:
        return "".join(self.printed)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.printed.append(line)
                self._lines.put(line)
        self._lines.put(None)


@pytest.fixture
def shell() -> Iterator[Any]:
    started: list[Shell] = []

    def start(*command: object, **environment: str) -> Shell:
        started.append(Shell(*command, **environment))
        return started[-1]

    yield start
    for one in started:
        one.close()


def held(run_dir: Path, trained: int) -> None:
    """Every promise was kept, and so many rollouts were trained."""
    assert check(run_dir)["trained"] == trained
    steps = summary(run_dir)["steps"]
    assert [row["step"] for row in rows(run_dir)] == list(range(steps))
