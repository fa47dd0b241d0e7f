"""Killed, interrupted: nothing is left running, nothing is lost, the next start continues."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import check, rows, summary

pytestmark = pytest.mark.processes


def gone(processes: list[psutil.Process], timeout: float) -> bool:
    return not psutil.wait_procs(processes, timeout=timeout)[1]


def test_killed_services_are_started_again_and_the_run_completes(train: Any, tmp_path: Path) -> None:
    """One after the other; in every combination, and of two ranks: tests/chaos."""
    started = train("steps=120")
    for victim in ("generator-0", "learner-0", "controller"):
        started.line("step")
        started.children()[victim].kill()
        started.line(f"{victim} died (SIGKILL)")
    code, printed, errors = started.end(90)
    assert code == 0 and "complete: 120 steps" in printed, printed + errors
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(120))
    assert check(tmp_path / "run")["trained"] == 120 * 64


def test_no_child_survives_its_parent_and_the_next_start_continues(train: Any, tmp_path: Path) -> None:
    started = train("steps=100")
    started.line("step")
    children = list(started.children().values())
    assert len(children) == 3
    started.process.kill()
    assert gone(children, 2.0), "children outlived their parent by more than 2 s"
    code, printed, errors = train("steps=100").end(90)
    assert code == 0 and printed.startswith("continuing"), printed + errors
    assert summary(tmp_path / "run")["steps"] == 100 and check(tmp_path / "run")["trained"] == 100 * 64


@pytest.mark.parametrize("moment", ["starting", "evaluation", "step"])
def test_ctrl_c_ends_within_five_seconds_and_can_be_continued(train: Any, tmp_path: Path, moment: str) -> None:
    started = train("steps=60")
    started.line(moment)
    children = list(started.children().values())
    began = time.monotonic()
    started.signal(signal.SIGINT)
    code, printed, errors = started.end(15)
    assert code == 130 and time.monotonic() - began < 5, printed + errors
    assert gone(children, 0.5) and "Traceback" not in printed + errors
    code, printed, errors = train("steps=60").end(90)
    assert code == 0, printed + errors
    assert summary(tmp_path / "run")["steps"] == 60 and check(tmp_path / "run")["trained"] == 60 * 64
