"""SIGKILL and SIGSTOP of every process, in every combination: the run completes and keeps its promises."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import SEGMENTS, SERVICES, completes, newest_checkpoint
from .faults import run_first

STEP_S, START_S = 0.05, 5.0
"""Kills come anywhere within a step, or within the start of a process."""
STOP_S = 10.0
COMBINATIONS = [names for size in (1, 2, 3) for names in itertools.combinations(SERVICES, size)]


@pytest.mark.timeout(900)
def test_thirty_kills(start: Any, rng: random.Random) -> None:
    """Each combination twice, the whole tree twice: 30 processes. Some of them while others are being started."""
    kills = [*COMBINATIONS, *COMBINATIONS, ("train",), ("train",)]
    rng.shuffle(kills)
    run = start("steps=700", *SEGMENTS)
    recovering = False
    for names in kills:
        if recovering:
            time.sleep(rng.uniform(0, START_S))
        else:
            run.rows(rng.randrange(1, 25))
            time.sleep(rng.uniform(0, STEP_S))
        run.kill(names)
        print(f"killed {' + '.join(names)}{' again' if recovering else ''}", flush=True)
        if names == ("train",):
            run.process.process.wait()
            run.start()
        recovering = not recovering and rng.random() < 0.5
    report = completes(run, 700)
    print(f"regenerated {report['regenerated']} tokens, at most {report['regenerated_most']} of a rollout at a kill")


@pytest.mark.timeout(300)
def test_kills_of_two_ranks(start: Any, rng: random.Random) -> None:
    run = start("steps=150", "learner.ranks=2")
    for names in (["learner-1"], ["learner-0", "learner-1"], ["controller", "learner-1"]):
        run.rows(rng.randrange(1, 25))
        run.kill(names)
    completes(run, 150)


@pytest.mark.timeout(300)
def test_ten_seconds_without_a_turn(start: Any, rng: random.Random) -> None:
    """SIGSTOP: longer than heartbeats may be missing, so that leases go to others before the process wakes up."""
    run = start("steps=200", "controller.heartbeat_timeout_s=3")
    for name in rng.sample(SERVICES, 3):
        run.rows(rng.randrange(1, 25))
        process = run.children()[name]
        process.suspend()
        time.sleep(STOP_S)
        process.resume()
        print(f"stopped {name}", flush=True)
    completes(run, 200)


@pytest.mark.timeout(240)
def test_a_checkpoint_that_the_controller_never_heard_of(start: Any) -> None:
    """The learner saves what the ledger holds as composed, and the controller dies before it reads that."""
    run = start("steps=40", "checkpoint.every_steps=1")
    seen = run.rows(5)["version"]
    controller = run.children()["controller"]
    controller.suspend()
    deadline = time.monotonic() + 30
    while newest_checkpoint(run.path) <= max(seen, run.newest_row["version"]):
        assert time.monotonic() < deadline, "the learner holds no batch whose end the controller has not seen"
        time.sleep(0.1)
    controller.kill()
    completes(run, 40, lost_rows=2)


@pytest.mark.timeout(240)
def test_a_service_that_is_being_started_when_the_controller_dies(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for a controller that is gone, and the supervisor for it."""
    slow = (
        "import asyncio, sys\n"
        "real = asyncio.create_subprocess_exec\n"
        "async def create_subprocess_exec(*command, **options):\n"
        "    process = await real(*command, **options)\n"
        "    await asyncio.sleep(1)\n"
        "    return process\n"
        "asyncio.create_subprocess_exec = create_subprocess_exec\n"
    )
    run_first(monkeypatch, tmp_path / "first", slow)
    run = start("steps=60")
    run.rows(3)
    run.kill(["learner-0"])
    run.line("learner-0 died")
    run.kill(["controller"])
    completes(run, 60)
