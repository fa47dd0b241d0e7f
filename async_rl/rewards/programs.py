"""Does a program of the model pass its tests?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import msgspec

from async_rl.config import Rewards
from async_rl.errors import GradingFailed, UserError
from async_rl.rewards import answers
from async_rl.rewards.client import require
from async_rl.rewards.grade import Grade
from async_rl.rewards.jobs import CHECK, Case, RunProgram
from async_rl.rewards.mathematics import OnFailure
from async_rl.rewards.pool import pool, settings

SETUP_S = 120.0
"""What a grader may take for everything but the tests."""
TOTAL_S = 600.0
"""What all tests of a program may take together."""


async def code(
    text: str,
    tests: Any,
    *,
    score: Literal["all", "fraction"] = "all",
    extract: str = "program",
    time_limit_s: float = 5.0,
    on_failure: OnFailure = "raise",
) -> Grade:
    """1.0 if the program in a reply passes all its tests, else 0.0; with `score="fraction"` the share that it passes.

    `.reason` says why not: "wrong output", "assertion", "time", "memory", "processes", "output" (too much of it), "exit
    code 1", "signal SIGSEGV", "ended", the name of an exception, or "no program"; `.detail` has the end of stderr.
    Programs run in a sandbox (sandbox.py), and never in the process of their tests.

    Args:
        tests: of a script, pairs of what it reads and what it has to print: [("1 2\\n", "3\\n")], or
            [{"input": ..., "output": ...}], or {"inputs": [...], "outputs": [...]}. Of functions, Python with asserts
            that calls them, or a list of such: ["assert add(1, 2) == 3"]; one namespace, in order.
        extract: where the program is in the reply (rewards.answers.EXTRACTORS): by default the last fenced block of
            Python after `</think>`.
        time_limit_s: seconds of CPU for one test; of the clock three times as many, and one.
        on_failure: what a grader that hung or died means: "raise", or "wrong": 0.0 with the reason "failed".

    Raises:
        GradingFailed: there is no verdict; the grader or its sandbox failed.
        UserError: programs cannot be isolated on this machine, or a test is none.
        ValueError: `tests` is none of the above.
    """
    cases, asserts = read_tests(tests)
    program = answers.extract(extract, text)
    total = len(cases) + len(asserts)
    if program is None:
        return Grade(0.0, "no program", total=total)
    job = RunProgram(program, time_limit_s, cases, asserts, to_the_end=score == "fraction")
    deadline_s = SETUP_S + min(TOTAL_S, job.wall_s * job.num_tests)
    try:
        verdict = await pool("code").grade(job, deadline_s=deadline_s)
    except GradingFailed as failure:
        if on_failure == "raise":
            raise
        return Grade(0.0, "failed", str(failure), total=total)
    return Grade(verdict.value, verdict.reason, verdict.detail, verdict.passed, verdict.total)


def require_code() -> None:
    """For `needs` of an environment: whether programs of the model can run here, isolated as the recipe wants it.

    Raises:
        UserError: they cannot; says what is missing.
    """
    if settings().service:
        require(settings(), "code")
    else:
        describe_sandbox(settings())


def describe_sandbox(settings: Rewards) -> str:
    """What programs of the model run in on this machine, in words. Looked at by a process of its own, as graders are.

    Raises:
        UserError: they cannot run, or not isolated.
    """
    command = [sys.executable, "-m", "async_rl.rewards.worker", CHECK]
    found = subprocess.run(command, input=msgspec.json.encode(settings), capture_output=True, timeout=SETUP_S)
    said = (found.stderr if found.returncode else found.stdout).decode(errors="replace").strip().splitlines()
    if found.returncode:
        raise UserError(said[-1] if said else f"a grader left with exit code {found.returncode}")
    return said[-1]


def read_tests(tests: Any) -> tuple[list[Case], list[str]]:
    """(cases of a script, sources of asserts); one of the two is empty. Raises ValueError: see `code`."""
    if isinstance(tests, str):
        tests = [tests]
    if isinstance(tests, Mapping):
        pairs = cast("Mapping[str, Any]", tests)
        try:
            tests = list(zip(pairs["inputs"], pairs["outputs"], strict=True))
        except (KeyError, TypeError, ValueError):
            raise ValueError("tests: write inputs and outputs, two lists of the same length") from None
    if not isinstance(tests, Sequence) or not tests:
        raise ValueError(f"tests = {tests!r}: write at least one; pairs of input and output, or asserts")
    found: list[Case] = []
    sources: list[str] = []
    for number, test in enumerate(cast("Sequence[Any]", tests)):
        if isinstance(test, Mapping):
            test = (cast("Mapping[str, Any]", test).get("input"), cast("Mapping[str, Any]", test).get("output"))
        if isinstance(test, str):
            sources.append(test)
        elif isinstance(test, Sequence) and [type(part) for part in cast("Sequence[Any]", test)] == [str, str]:
            found.append(Case(*cast("Sequence[str]", test)))
        else:
            raise ValueError(f"tests[{number}] = {test!r}: write a pair of texts, what it reads and prints, or asserts")
    if found and sources:
        raise ValueError("tests: write pairs of input and output, or asserts, not both")
    return found, sources
