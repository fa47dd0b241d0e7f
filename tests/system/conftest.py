"""Real processes: `async-rl` as a user starts it, small enough for seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SORT = ROOT / "recipes" / "sort.toml"
SMALL = [
    "rollout.groups_per_step=8",
    "rollout.group_size=8",
    "generator.slots=64",
    "evaluation.tasks=16",
    "checkpoint.every_steps=10",
]
"""Overrides that make a step of the sort recipe take about 20 ms."""


class Cli:
    """One `async-rl` process; `line` waits for what it prints."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "async_rl.cli", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.printed: list[str] = []

    def line(self, starts: str) -> str:
        """The next line that starts so; fails with what was printed if the process ends first."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)
            if line.startswith(starts):
                return line
        raise AssertionError(f"no line {starts!r} in:\n{''.join(self.printed)}{self.end()[2]}")

    def end(self, timeout: float = 60) -> tuple[int, str, str]:
        """Exit code, everything it printed, and its errors."""
        out, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, "".join(self.printed) + out, errors

    def children(self) -> dict[str, psutil.Process]:
        """name -> process of the services it started"""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            command = child.cmdline()
            if "--name" in command:
                found[command[command.index("--name") + 1]] = child
        return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@pytest.fixture
def cli() -> Iterator[Any]:
    started: list[Cli] = []

    def start(*arguments: str) -> Cli:
        started.append(Cli(*arguments))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


@pytest.fixture
def train(cli: Any, tmp_path: Path) -> Any:
    """Start `train` on the small sort recipe in one run directory; without the seconds that a report takes."""

    def start(*overrides: str, run_dir: Path | None = None, report: bool = False) -> Cli:
        sets = [argument for override in [*SMALL, *overrides] for argument in ("--set", override)]
        sets += [] if report else ["--no-report"]
        return cli("train", str(SORT), "--run-dir", str(run_dir or tmp_path / "run"), *sets)

    return start


def asked(run_dir: Path, path: str, method: str = "GET") -> Any:
    """What the admin endpoint answers its owner, who sends the token where there is one."""
    found = json.loads((run_dir / "admin.json").read_text())
    headers = (
        {"Authorization": f"Bearer {Path(found['token_file']).read_text().strip()}"} if found["token_file"] else {}
    )
    return urllib.request.urlopen(
        urllib.request.Request(found["url"] + path, method=method, headers=headers), timeout=20
    )


def admin(run_dir: Path, path: str, method: str = "GET") -> dict[str, Any]:
    with asked(run_dir, path, method) as answer:
        return json.load(answer)


def check(run_dir: Path) -> dict[str, int]:
    """`inspect --check` of a run: fails unless every promise held."""
    done = subprocess.run(
        [sys.executable, "-m", "async_rl.cli", "inspect", str(run_dir), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())
