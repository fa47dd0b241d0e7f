"""Programs that attack: the real sandbox, the real pool, and the grade that names what was tried."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from attacks import CHEATS, EXHAUSTS, REACH, REACHES_NOTHING

from async_rl import config, rewards
from async_rl.rewards import grading
from async_rl.rewards.jobs import Case, RunProgram, Verdict

Run = Callable[[Coroutine[Any, Any, Any]], Any]
SETTINGS = config.Rewards(workers=4, program_memory_mb=192, program_processes=24)
SECONDS = 0.05
"""A second of CPU and 1.15 of the clock, for programs that never end."""


@pytest.fixture(scope="module")
def run(bwrap: str) -> Iterator[Run]:
    assert bwrap
    rewards.configure(SETTINGS)
    with asyncio.Runner() as runner:
        yield runner.run
    rewards.configure(config.Rewards())


def grade(program: str, tests: Any, **options: Any) -> Coroutine[Any, Any, rewards.Grade]:
    return rewards.code(f"```python\n{program}\n```", tests, **options)


async def grades(programs: dict[str, str], tests: Any, **options: Any) -> dict[str, rewards.Grade]:
    found = await asyncio.gather(*(grade(program, tests, **options) for program in programs.values()))
    return dict(zip(programs, found, strict=True))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What there is to be reached."""
    secret = tmp_path / "secret"
    secret.write_text("secret-8731")
    monkeypatch.setenv("ASYNC_RL_SECRET", "secret-8731")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"async_rl-test-{os.getpid()}"
        abstract.bind(f"\0{name}")
        abstract.listen()
        yield {
            "port": server.getsockname()[1],
            "abstract": name,
            "secret": secret,
            "repository": Path(__file__).parents[2],
        }


def test_programs_reach_nothing(run: Run, host: dict[str, Any]) -> None:
    programs = {name: REACH + attack.format(**host) for name, attack in REACHES_NOTHING.items()}
    for name, found in run(grades(programs, [("", "")])).items():
        assert found == 1.0, (name, found, found.detail)


def test_the_attacks_would_reach_something_without_the_sandbox(host: dict[str, Any]) -> None:
    """So that those above are not harmless for another reason."""
    grader = grading.ProgramGrader(config.Rewards(unsafe_code=True))
    for name in ("the network", "a socket of the host without a file", "files of the host"):
        job = RunProgram(REACH + REACHES_NOTHING[name].format(**host), 2, [Case("", "")])
        verdict = grader(job)
        assert isinstance(verdict, Verdict) and verdict.reason == "wrong output" and "REACHED" in verdict.detail, name


def test_what_a_program_uses_up_is_named(run: Run) -> None:
    found = run(
        grades({name: program for name, (program, _) in EXHAUSTS.items()}, [("", "right")], time_limit_s=SECONDS)
    )
    for name, (_, reasons) in EXHAUSTS.items():
        assert found[name] == 0.0 and found[name].reason in reasons, (name, found[name], found[name].detail)


def test_nobody_is_convinced_but_by_a_right_answer(run: Run) -> None:
    tests = [
        "# assert secret-8731\nassert add(20, 21) == 41",
        "import math\nassert math.isclose(add(20, 21), 41) and abs(add(1, 2) - 3) < 1e-6 and isclose(add(1, 2), 3)",
        "assert add(20, 21) in {41}",
        "try:\n    assert add(20, 21) == 41\nexcept Exception:\n    raise AssertionError",
    ]
    for name, found in run(grades(CHEATS, tests, score="fraction")).items():
        assert found.passed == 0, (name, found)
    assert run(grade("def add(a, b): return a + b\nfrom math import isclose", tests)) == 1.0


def test_no_test_is_where_the_program_could_read_it(run: Run) -> None:
    """What is right on standard output never enters the sandbox."""
    program = CHEATS["its memory"] + "\nprint(add(1, 2) or '')"
    found = run(grade(program, [("", ""), ("", "assert secret-8731")], score="fraction"))
    assert found.passed == 1 and found.reason == "wrong output"


def test_nothing_is_left_of_any_of_them(run: Run) -> None:
    """No process but the graders, no control group of anybody who is gone."""
    run(grade("print(1)", [("", "1")]))
    inside = [
        p for p in psutil.Process().children(recursive=True) if "bwrap" in p.name() or p.uids().real != os.getuid()
    ]
    assert not [process for process in inside if process.status() != psutil.STATUS_ZOMBIE]


def test_an_examiner_that_a_program_stops_is_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run
    monkeypatch.setattr(grading, "ANSWER_S", 0.2)
    grader = grading.ProgramGrader(SETTINGS)
    program = "import os, signal, time\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(600)"
    with contextlib.closing(grader):
        verdict = grader(RunProgram(program, SECONDS, [Case("", "")]))
    assert isinstance(verdict, Verdict) and (verdict.value, verdict.reason) == (0.0, "time")
