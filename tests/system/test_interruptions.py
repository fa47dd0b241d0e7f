"""Killed, interrupted, started twice: nothing is left running, nothing is lost, the next start continues."""

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


@pytest.mark.parametrize("victim", ["generator-0", "learner-0", "learner-1", "controller"])
def test_a_killed_service_is_started_again_and_the_run_completes(train: Any, tmp_path: Path, victim: str) -> None:
    started = train("steps=120", "learner.ranks=2" if victim == "learner-1" else "learner.ranks=1")
    started.line("step")
    started.children()[victim].kill()
    started.line(f"{victim} died (SIGKILL): started again")
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


def test_a_second_start_in_the_same_directory_names_the_first(train: Any, tmp_path: Path) -> None:
    first = train("steps=100000")
    first.line("step")
    holder = first.children()["controller"].pid
    code, _, errors = train("steps=100000").end(40)
    assert code == 2 and f"is in use by process {holder}" in errors, errors
    first.signal(signal.SIGINT)
    assert first.end(15)[0] == 130
