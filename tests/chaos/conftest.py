"""Faults from outside, on real processes: `async-rl train` as a user starts it, killed, stopped, starved and damaged.

Moments are tied to what the run does: a row in metrics.jsonl, a line it prints. What is drawn comes from CHAOS_SEED
(default 1), which the header of the report shows.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import random
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ..system.conftest import Cli, admin, check, cli, rows, train  # noqa: F401 - fixtures among them

SEED = int(os.environ.get("CHAOS_SEED", "1"))
LOOK_S = 0.02
"""How often we look for a new row."""
SERVICES = ("controller", "learner-0", "generator-0")
ROLLOUTS = 64
"""Of a step."""
SEGMENT = 2
"""Tokens of a segment, in runs of answers that have eight."""
SEGMENTS = (
    'environment.options={digits=8, reward="distance"}',
    "model.tiny.max_length=24",
    "rollout.max_new_tokens=8",
    f"rollout.segment_tokens={SEGMENT}",
)


def pytest_report_header() -> str:
    return f"CHAOS_SEED={SEED}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{SEED}/{request.node.name}")


class Run:
    """A run directory and the `train` process at work on it."""

    def __init__(self, start: Any, path: Path, *overrides: str) -> None:
        self.path, self._start, self.overrides = path, start, overrides
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.closed = threading.Event()
        self.newest_row: dict[str, Any] = {}
        threading.Thread(target=self._read_rows, daemon=True).start()
        self.process: Cli
        self.start()

    def start(self) -> None:
        """The same command, first or again."""
        self.process = self._start(*self.overrides, run_dir=self.path)
        command = list(self.process.process.args)
        self.sets = [part for flag, value in itertools.pairwise(command) if flag == "--set" for part in (flag, value)]
        threading.Thread(target=self._read_lines, args=(self.process,), daemon=True).start()

    def rows(self, count: int, within: float = 90) -> dict[str, Any]:
        """The so-manieth row that is written from now on."""
        began = time.time()
        row: dict[str, Any] = {}
        for _ in range(count):
            row = self._next("row", lambda row: row["timestamp"] > began, within)
        return row

    def line(self, part: str, within: float = 90) -> str:
        return self._next("line", lambda line: part in line, within)

    def children(self) -> dict[str, psutil.Process]:
        return self.process.children()

    def call(self, path: str, method: str = "GET") -> dict[str, Any]:
        """The admin endpoint."""
        return admin(self.path, path, method)

    def version_at(self, generator: str) -> int:
        """Of the weights that a generator samples with; -1 while it is not there."""
        versions = {one["name"]: one["weights"] for one in self.call("/status")["generators"]}
        found = versions.get(generator)
        return -1 if found is None else found

    def kill(self, names: Iterable[str]) -> None:
        """SIGKILL those that are there, at once; "train" is the process that started them."""
        found = self.children() | {"train": psutil.Process(self.process.process.pid)}
        for process in [found[name] for name in names if name in found]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def end(self, within: float = 180) -> tuple[int, str]:
        """Exit code, and everything it printed."""
        code = self.process.process.wait(within)
        self._next("end", lambda process: process is self.process, 10)
        return code, self.printed

    @property
    def printed(self) -> str:
        assert self.process.process.stderr is not None
        errors = self.process.process.stderr.read() if self.process.process.poll() is not None else ""
        return "".join(self.process.printed) + errors

    def close(self) -> None:
        self.closed.set()

    def _next(self, kind: str, wanted: Any, within: float) -> Any:
        deadline = time.monotonic() + within
        while True:
            try:
                found, data = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {kind} for {within:.0f} s in:\n{''.join(self.process.printed)}") from None
            if found == kind and wanted(data):
                return data
            if found == "end" and data is self.process:
                raise AssertionError(f"it ended before the {kind} that was waited for:\n{self.printed}")

    def _read_lines(self, process: Cli) -> None:
        assert process.process.stdout is not None
        for line in process.process.stdout:
            process.printed.append(line)
            self._events.put(("line", line))
        self._events.put(("end", process))

    def _read_rows(self) -> None:
        metrics, inode, seen, newest = self.path / "metrics.jsonl", -1, 0, 0.0
        while not self.closed.wait(LOOK_S):
            with contextlib.suppress(FileNotFoundError):
                found = metrics.stat()
                if found.st_ino != inode:  # written anew, when the learner went back: the same rows, and then others
                    inode, seen = found.st_ino, 0
                if found.st_size <= seen:
                    continue
                with metrics.open("rb") as file:
                    file.seek(seen)
                    whole = file.read().rpartition(b"\n")[0]
                seen += len(whole) + 1 if whole else 0
                for row in map(json.loads, whole.splitlines()):
                    if row["timestamp"] > newest:
                        newest, self.newest_row = row["timestamp"], row
                        self._events.put(("row", row))


@pytest.fixture
def start(train: Any, tmp_path: Path) -> Iterator[Any]:  # noqa: F811
    """Start `train` on the small sort recipe, in a run directory whose rows are watched."""
    runs: list[Run] = []

    def begin(*overrides: str, path: Path = tmp_path / "run") -> Run:
        runs.append(Run(train, path, *overrides))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def completes(run: Run, steps: int, *, lost_rows: int = 0) -> dict[str, int]:
    """Every promise held, and the rows are those of a run that nothing happened to.

    lost_rows: so many at most are missing, because their step is in a checkpoint and the controller never heard of it.
    """
    code, printed = run.end()
    assert code == 0 and f"complete: {steps} steps" in printed, printed
    written = [row["step"] for row in rows(run.path)]
    assert written == sorted(set(written)) and steps - lost_rows <= len(written) <= steps, written
    report = check(run.path)
    assert report["admitted"] == report["trained"] + report["filtered"] + report["failed"] + report["cancelled"]
    assert report["trained"] + report["failed"] >= steps * ROLLOUTS
    if SEGMENTS[-1] in run.overrides:
        assert report["regenerated_most"] <= SEGMENT, "at most one segment per rollout and kill"
    return report


def newest_checkpoint(path: Path) -> int:
    return max((int(found.name[1:]) for found in (path / "checkpoints").glob("v*")), default=0)


@pytest.fixture
def ports() -> list[int]:
    """Two in a row, and one more; free a moment ago."""
    while True:
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            one.bind(("127.0.0.1", 0))
            three.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return [port, int(three.getsockname()[1])]


def caught_up(run: Run, generator: str, version: int, within: float = 120) -> None:
    """It samples with weights of at least this version."""
    deadline = time.monotonic() + within
    while (at := run.version_at(generator)) < version:
        assert time.monotonic() < deadline, f"{generator} is at {at}, not at {version}:\n{run.call('/status')}"
        time.sleep(0.05)


def works(run: Run, generator: str, within: float = 120) -> None:
    """It holds groups."""
    deadline = time.monotonic() + within
    while not any(one["name"] == generator and one["groups"] for one in run.call("/status")["generators"]):
        assert time.monotonic() < deadline, run.call("/status")
        time.sleep(0.05)


def stopped(run: Run) -> None:
    """Stopped by us: everything is accounted for."""
    run.call("/stop", "POST")
    code, printed = run.end(60)
    assert code == 130, printed
    check(run.path)
