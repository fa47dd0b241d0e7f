"""Gradings a second, in the processes that may be killed, beside the same work without them.

    python bench/grading.py [--seconds 4] [--write]

math     formulae that only math-verify can compare: by pools of 1, 2, 4 processes; raw is a loop in one process.
code     a script under one test, functions under three asserts, a script under ten tests: in the sandbox, by pools of
         1, 2, 4; raw is a bare `python -I -S -c` for each test (for the asserts: of program and tests together), one
         after the other.
Every figure in one run, interleaved; ratios are to raw of that run. `--write` keeps them in bench/results/grading.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import date
from pathlib import Path
from typing import Any

from stamp import commit

from async_rl import config, rewards
from async_rl.rewards.symbolic import load

RESULT = Path(__file__).parent / "results" / "grading.json"
WORKERS = (1, 2, 4)
SCRIPT = "print(sum(map(int, input().split())))"
FUNCTION = "def add(a, b):\n    return a + b"
ASSERTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add([1], [2]) == [1, 2]"]
PYTHON = ["/usr/bin/python3", "-I", "-S", "-c"]


def formula(i: int) -> tuple[str, str]:
    i = i % 60 + 1
    return rf"\frac{{x^2-{i * i}}}{{x-{i}}}", f"x+{i}"


def script(tests: int) -> list[tuple[str, str]]:
    return [(f"{i} 2", str(i + 2)) for i in range(tests)]


def fence(program: str) -> str:
    return f"```python\n{program}\n```"


PROGRAMS: dict[str, tuple[str, Any]] = {
    "script, 1 test": (SCRIPT, script(1)),
    "functions, 3 asserts": (FUNCTION, ASSERTS),
    "script, 10 tests": (SCRIPT, script(10)),
}


async def by_pool(grade: Callable[[int], Awaitable[rewards.Grade]], workers: int, seconds: float) -> float:
    """Gradings a second, all workers busy; their start does not count."""
    rewards.configure(config.Rewards(workers=workers))
    counter, done = itertools.count(1), 0

    async def keep_busy(until: float) -> None:
        nonlocal done
        while time.perf_counter() < until:
            found = await grade(next(counter))
            assert found == 1.0, (found, found.detail)
            done += 1

    await asyncio.gather(*(grade(next(counter)) for _ in range(workers)))
    started = time.perf_counter()
    await asyncio.gather(*(keep_busy(started + seconds) for _ in range(workers + 1)))
    return done / (time.perf_counter() - started)


def raw(act: Callable[[int], None], seconds: float) -> float:
    started, done = time.perf_counter(), 0
    while time.perf_counter() < started + seconds:
        act(done + 1)
        done += 1
    return done / (time.perf_counter() - started)


def bare(program: str, tests: Any) -> None:
    if isinstance(tests[0], str):
        subprocess.run([*PYTHON, program + "\n" + "\n".join(tests)], check=True)
        return
    for given, wanted in tests:
        found = subprocess.run([*PYTHON, program], input=given, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == wanted


def measure(name: str, grade: Callable[[int], Awaitable[rewards.Grade]], act: Callable[[int], None], s: float) -> Any:
    plain = raw(act, s)
    row: dict[str, Any] = {"raw/s": round(plain, 1)}
    for workers in WORKERS:
        rate = asyncio.run(by_pool(grade, workers, s))
        row[f"{workers} workers/s"], row[f"{workers} workers of raw"] = round(rate, 1), round(rate / plain, 2)
    print(name, json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each figure")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    equal = load()

    def by_hand(i: int) -> None:
        assert equal(*formula(i))

    async def by_math(i: int) -> rewards.Grade:
        answer, right = formula(i)
        return await rewards.math(rf"\boxed{{{answer}}}", right)

    rows = {"math": measure("math", by_math, by_hand, options.seconds)}
    for name, (program, tests) in PROGRAMS.items():
        rows[f"code: {name}"] = measure(
            name,
            lambda _, program=program, tests=tests: rewards.code(fence(program), tests),
            lambda _, program=program, tests=tests: bare(program, tests),
            options.seconds,
        )
    if options.write:
        device = f"{platform.machine()}, {os.cpu_count()} cores"
        head = {
            "date": date.today().isoformat(),
            "commit": commit(),
            "device": device,
            "load": round(os.getloadavg()[0], 1),
        }
        RESULT.write_text(json.dumps({**head, "python": sys.version.split()[0], **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
