"""Mathematical answers under a real symbolic grader in processes of its own, and what becomes of those that hang."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from async_rl import config, rewards
from async_rl.errors import GradingFailed, MissingExtra
from async_rl.rewards import mathematics

pytest.importorskip("math_verify")

Run = Callable[[Coroutine[Any, Any, Any]], Any]
ENDLESS = r"\boxed{9^{9^{9^9}}+x}"
"""sympy computes its digits."""


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One event loop for the module, so that a grader starts once."""
    rewards.configure(config.Rewards(workers=1, deadline_s=60))
    with asyncio.Runner() as runner:
        yield runner.run
    rewards.configure(config.Rewards())


def graders() -> list[psutil.Process]:
    children = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in children if "async_rl.rewards.worker" in child.cmdline()]


VERDICTS = [
    # the three of DeepSeek-R1's report
    ("0.5", "1/2", True),
    (r"\sqrt{2}", "2^{1/2}", True),
    ("a^2-4", "(a+2)(a-2)", True),
    # plain notation
    ("√2", "2^(1/2)", True),
    ("sqrt(2)", "2**(1/2)", True),
    ("sin(x)^2 + cos(x)^2", "1", True),
    ("2*x + 1", "1 + 2x", True),
    ("10^3", "1000", True),
    ("5!", "120", True),
    ("log(100)", "2", True),
    ("x>=3", r"x \ge 3", True),
    ("√(x+1)", r"(x+1)^{\frac{1}{2}}", True),
    # LaTeX
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
    (r"\sin^2 x+\cos^2 x", "1", True),
    (r"\ln e", "1", True),
    (r"\binom{5}{2}", "10", True),
    (r"\frac{x^2-1}{x-1}", "x+1", True),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", True),
    (r"30^\circ", "30", True),
    (r"50\%", "0.5", True),
    ("x=5", "5", True),
    (r"\{1,2\}", r"\{2,1\}", True),
    ("3+4i", "4i+3", True),
    # wrong ones
    (r"\sqrt{2}", "2", False),
    ("a^2-4", "(a+2)^2", False),
    ("3.14", r"\pi", False),
    ("[1,2]", "(1,2)", False),
    ("(1,2)", "(2,1)", False),
    (r"\{1,2\}", r"\{1,2,3\}", False),
    ("1/0", "2", False),
    ("A", "B", False),
    ("x", "y", False),
    ("I do not know", "2", False),
    ("2 or 3", "2", False),
    (r"\frac{", "2", False),
    ("\\undefined{x}" * 20, "x", False),
    ("import os; os.abort()", "2", False),
    ("__import__('os').abort()", "x", False),
]


def test_a_table_of_verdicts(run: Run) -> None:
    async def verdicts() -> list[tuple[str, str, bool]]:
        graded = [await rewards.math(rf"So \boxed{{{said}}}.", right) for said, right, _ in VERDICTS]
        return [(said, right, grade == 1.0) for grade, (said, right, _) in zip(graded, VERDICTS, strict=True)]

    assert run(verdicts()) == VERDICTS


def test_a_grade_says_why(run: Run) -> None:
    async def grades() -> list[rewards.Grade]:
        return [
            await rewards.math("so 12", 12),
            await rewards.math("so $x+1$", ["7", "1+x"]),
            await rewards.math("so 12", 13),
            await rewards.math("so 12", ["x", "y"]),
            await rewards.math("no idea", "12"),
            await rewards.math("so $x+1$", "1+x", symbolic=False),
        ]

    found = run(grades())
    assert [float(grade) for grade in found] == [1, 1, 0, 0, 0, 0]
    reasons = ["same", "symbolic", "different", "different", "no answer", "different"]
    assert [grade.reason for grade in found] == reasons and found[0].detail == "12"


def test_a_grader_that_hangs_is_killed_and_replaced(run: Run) -> None:
    """The loop goes on meanwhile; no thread and no process is left behind."""
    run(rewards.math("$x+1$", "1+x"))
    (before,) = graders()

    async def hang() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        rewards.configure(config.Rewards(workers=1, deadline_s=0.3))
        with pytest.raises(GradingFailed, match=r"no verdict after 0\.3 s; the grader was killed"):
            await rewards.math(ENDLESS, "1+x")
        rewards.configure(config.Rewards(workers=1, deadline_s=60))
        ticking.cancel()
        assert ticks > 100

    run(hang())
    assert not before.is_running() and not graders()
    assert run(rewards.math("$x+1$", "1+x")) == 1.0


def test_a_grader_that_dies_is_named_and_replaced(run: Run) -> None:
    async def die() -> None:
        await rewards.math("$x+1$", "1+x")
        (grader,) = graders()
        grader.send_signal(signal.SIGSTOP)
        grading = asyncio.create_task(rewards.math("$x+1$", "1+x"))
        await asyncio.sleep(0)  # the job is on its way
        grader.send_signal(signal.SIGSEGV)
        grader.send_signal(signal.SIGCONT)
        with pytest.raises(GradingFailed, match="the grader died of SIGSEGV"):
            await grading
        assert await rewards.math("$x+1$", "1+x") == 1.0

    run(die())


def test_one_process_serves_all_who_wait_and_a_cancelled_one_frees_it(run: Run) -> None:
    async def many() -> None:
        hanging = asyncio.create_task(rewards.math(ENDLESS, "1+x"))
        waiting = [asyncio.create_task(rewards.math(f"$x+{i}$", "1+x")) for i in range(8)]
        await asyncio.sleep(0)
        hanging.cancel()
        assert [await one for one in waiting] == [float(i == 1) for i in range(8)]
        assert hanging.cancelled() and len(graders()) == 1

    run(many())


def test_nothing_is_left_when_the_loop_ends() -> None:
    async def main() -> psutil.Process:
        others = graders()
        await rewards.math("$x+1$", "1+x")
        (grader,) = (one for one in graders() if one not in others)
        return grader

    assert not asyncio.run(main()).is_running()


def test_graders_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """In the middle of a job that would never end, and what they have started with them."""
    news = tmp_path / "news"
    os.mkfifo(news)
    program = f"import os\nopen({str(news)!r}, 'w').write(str(os.getpid()))\nwhile True: pass"
    code = f"""
import asyncio
from async_rl import config, rewards
rewards.configure(config.Rewards(unsafe_code=True))
asyncio.run(rewards.code({f"```{chr(10)}{program}{chr(10)}```"!r}, [("", "")], time_limit_s=600))
"""
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        running = psutil.Process(int(news.read_text()))
        started = running.parents()[: running.parents().index(psutil.Process(parent.pid))]
        os.kill(parent.pid, signal.SIGKILL)
    assert len(started) == 2  # the grader, and the examiner
    assert not psutil.wait_procs([running, *started], timeout=10)[1]


def test_without_the_extra_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics.symbolic, "MODULE", "math_verify_that_is_not_there")
    with pytest.raises(MissingExtra, match=r"pip install 'async-rl\[math\]'"):
        run(rewards.math("$x+1$", "1+x"))
    assert run(rewards.math("12", "12")) == 1.0
