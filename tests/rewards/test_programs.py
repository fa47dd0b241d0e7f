"""Programs under tests: what counts as passed, and what is no verdict at all."""

# ruff: noqa: E501

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from async_rl import config, rewards
from async_rl.errors import GradingFailed, UserError
from async_rl.rewards import cgroups, grading, sandbox, seccomp
from async_rl.rewards.conversation import SetupFailed
from async_rl.rewards.jobs import Case, Refused, RunProgram, Verdict
from async_rl.rewards.programs import read_tests

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Without isolation, which is not what is tested here: then every machine can."""
    rewards.configure(config.Rewards(workers=1, unsafe_code=True))
    with asyncio.Runner() as runner:
        yield runner.run
    rewards.configure(config.Rewards())


def grade(program: str, tests: Any, **options: Any) -> Coroutine[Any, Any, rewards.Grade]:
    return rewards.code(f"```python\n{program}\n```", tests, **options)


SOLUTION = """
import math
from collections import Counter, namedtuple
from fractions import Fraction
LIMIT = 10 ** 30
class Full(ValueError): pass
Point = namedtuple("Point", "x y")
def add(a, b): return a + b
def sort_in_place(xs): xs.sort()
def fill(d): d["a"] = {1: (2, 3)}
def values(): return [None, True, -1, 2.5, float("inf"), 1j, "ü\\ud800", b"x", (1,), {1}, {"a": [2]}, Fraction(1, 3), LIMIT]
def count(s): return Counter(s)
def refuse(): raise Full("no room")
def apply(f, xs): return [f(x) for x in xs]
def numbers():
    i = 0
    while True:
        yield i
        i += 1
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, x):
        if len(self.items) > 2: raise Full(x)
        self.items.append(x)
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
    def __getitem__(self, i): return self.items[i]
    def __repr__(self): return f"Stack{self.items}"
    @property
    def top(self): return self.items[-1]
"""

GOOD_TESTS = [
    "assert add(1, 2) == 3 and add('a', 'b') == 'ab' and add(LIMIT, 1) == 10 ** 30 + 1",
    "xs = [3, 1, 2]\nassert sort_in_place(xs) is None and xs == [1, 2, 3]",
    "d = {}\nfill(d)\nassert d == {'a': {1: (2, 3)}}",
    "from fractions import Fraction\nwanted = [None, True, -1, 2.5, float('inf'), 1j, 'ü\\ud800', b'x', (1,), {1}, {'a': [2]}, "
    "Fraction(1, 3), 10 ** 30]\ngot = values()\nassert got == wanted and [*map(type, got)] == [*map(type, wanted)]",
    "assert count('aab') == {'a': 2, 'b': 1}",
    "try:\n    refuse()\nexcept Full as error:\n    assert isinstance(error, ValueError) and str(error) == 'no room'\n"
    "else:\n    assert False",
    "s = Stack(1)\ns.push(2)\nassert len(s) == 2 and s.top == 2 and s[0] == 1 and list(s.items) == [1, 2]\n"
    "assert s == Stack(1, 2) and s != Stack(1) and isinstance(s, Stack) and repr(s) == 'Stack[1, 2]' and list(s) == [1, 2]",
    "assert apply(lambda x: x * 2, range(3)) == [0, 2, 4] and apply(str, {7: 8}.keys()) == ['7']",
    "import itertools\nassert list(itertools.islice(numbers(), 3)) == [0, 1, 2] and next(numbers()) == 0",
    "assert Point(1, 2) == (1, 2) and math.isclose(math.sqrt(2) ** 2, 2)",
    "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)",
]


def test_functions_are_called_from_another_process_as_if_they_were_here(run: Run) -> None:
    found = run(grade(SOLUTION, GOOD_TESTS, score="fraction"))
    assert found == 1.0, (found, found.detail)


def test_what_a_script_prints_is_compared_line_by_line(run: Run) -> None:
    cases = [("1 2\n3 4\n", "3\n7\n"), ("1 1", "2   \n\n"), ("", "")]
    program = "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))"
    found = run(grade(program, cases))
    assert found == 1.0 and (found.passed, found.total, found.reason) == (3, 3, "passed")
    assert run(grade(program, {"inputs": ["1 2"], "outputs": ["3"]})) == 1.0
    assert run(grade("print(1)\nprint()\nprint(2)", [{"input": "", "output": "1\n2"}])) == 0.0


def test_scripts_run_as_scripts(run: Run) -> None:
    program = (
        "import atexit, sys, threading\natexit.register(lambda: print('bye'))\n"
        "def main(): threading.Thread(target=lambda: print(input())).start()\n"
        "if __name__ == '__main__': main()\nsys.exit(None)"
    )
    assert run(grade(program, [("x", "x\nbye")])) == 1.0
    assert run(grade("import sys; sys.setrecursionlimit(10**6)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(20000))", [("", "20000")])) == 1.0  # fmt: skip


def test_all_tests_have_to_pass_and_a_fraction_is_an_option(run: Run) -> None:
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add(2, 2) == 4"]
    every = run(grade(SOLUTION, tests))
    assert every == 0.0 and (every.reason, every.passed, every.total) == ("assertion", 1, 3)
    share = run(grade(SOLUTION, tests, score="fraction"))
    assert share == pytest.approx(2 / 3) and share.reason == "assertion" and "test.py, line 1" in share.detail


def test_a_grade_names_what_went_wrong(run: Run) -> None:
    for program, reason, detail in [
        ("def add(a, b): return a / 0", "ZeroDivisionError", "division"),
        ("def plus(a, b): return 3", "NameError", "add"),
        ("def add(", "SyntaxError", ""),
        ("raise OSError('x')", "OSError", ""),
        ("def add(a, b): return [add]", "assertion", ""),
        ("import os\ndef add(a, b): os._exit(7)", "exit code 7", "ended"),
        ("import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV", "ended"),
    ]:
        found = run(grade(program, ["assert add(1, 2) == 3"]))
        assert (float(found), found.reason) == (0.0, reason) and detail in found.detail, (program, found, found.detail)
    found = run(rewards.code("I would use a loop.", ["assert True"]))
    assert (float(found), found.reason) == (0.0, "no program")
    found = run(grade("def add(a, b):\n while True: pass", ["assert add(1, 2) == 3"], time_limit_s=0.05))
    assert (float(found), found.reason) == (0.0, "time")


def test_a_test_that_is_none_is_an_error_of_the_data(run: Run) -> None:
    for test, message in [
        ("assert add(1,", "the test is not Python"),
        ("add(object(), 1)", "pass plain values"),
        ("raise SystemExit", "ends"),
    ]:
        with pytest.raises(UserError, match=message):
            run(grade(SOLUTION, [test]))


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], r"tests = \[\]: write at least one"),
        (7, "tests = 7: write at least one"),
        ([("1", 2)], r"tests\[0\] = \('1', 2\): write a pair of texts"),
        ([("1", "2"), "assert True"], "not both"),
        ({"inputs": ["1"], "outputs": []}, "two lists of the same length"),
        ({"inputs": ["1"]}, "two lists of the same length"),
        ([{"input": "1"}], r"tests\[0\] = \('1', None\)"),
    ],
)
def test_tests_are_checked(tests: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(tests)


def test_without_bubblewrap_programs_are_refused_unless_the_recipe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"bubblewrap is not installed .* rewards.unsafe_code = true"):
        sandbox.check(config.Rewards())
    sandbox.check(config.Rewards(unsafe_code=True))


def test_an_environment_may_need_it_before_its_first_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.rewards.pool._settings", config.Rewards(unsafe_code=True))
    rewards.require_code()
    monkeypatch.setattr("async_rl.rewards.pool._settings", config.Rewards(unsafe_code=True, python="/bin/false"))
    with pytest.raises(UserError, match=r"^rewards.python = '/bin/false': programs of the model cannot run here"):
        rewards.require_code()


def test_a_python_that_does_not_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rewards.python = '.*nothing': programs of the model cannot run here"):
        sandbox.check(config.Rewards(unsafe_code=True, python=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match=r"rewards.python = '/bin/false': .* exit code 1"):
        sandbox.check(config.Rewards(unsafe_code=True, python="/bin/false"))


def test_a_machine_that_is_refused_keeps_no_control_group(bwrap: str) -> None:
    assert bwrap
    with pytest.raises(UserError, match=r"rewards.python = '/bin/false'"):
        sandbox.check(config.Rewards(python="/bin/false"))
    assert not list(cgroups.ROOT.glob(f"*/{cgroups.PREFIX}{os.getpid()}"))


def test_a_sandbox_that_does_not_come_up_is_tried_again_and_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    grader = grading.ProgramGrader(config.Rewards(unsafe_code=True))
    job, start, failures = RunProgram("print(1)", 2, [Case("", "1")]), sandbox.Sandbox.start, [SetupFailed("EAGAIN")]

    def flaky(self: sandbox.Sandbox, *arguments: Any, **named: Any) -> Any:
        if failures:
            raise failures.pop()
        return start(self, *arguments, **named)

    monkeypatch.setattr(sandbox.Sandbox, "start", flaky)
    assert grader(job) == Verdict(1.0, "passed", "", 1, 1)
    failures += [SetupFailed("EAGAIN")] * grading.ATTEMPTS
    refused = grader(job)
    assert isinstance(refused, Refused) and "could not be set up, 3 times: EAGAIN" in refused.reason
    assert not refused.of_the_user


def test_a_bwrap_that_fails_is_an_error_of_the_machine(bwrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It worked when it was looked at, and then no more: no program gets a 0 for that."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are for its user alone
        os.chmod(folder, 0o755)
        fails_later(bwrap, Path(folder), monkeypatch)


def fails_later(bwrap: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch, fake = folder / "broken", folder / "bwrap"
    fake.write_text(f'#!/bin/sh\n[ -e {switch} ] && {{ echo "bwrap: no more room" >&2; exit 1; }}\nexec {bwrap} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda *_, **__: str(fake))
    grader = grading.ProgramGrader(config.Rewards())
    job = RunProgram("print(1)", 2, [Case("", "1")])
    assert grader(job) == Verdict(1.0, "passed", "", 1, 1)
    switch.touch()
    refused = grader(job)
    grader.close()
    assert isinstance(refused, Refused) and "could not be set up, 3 times: ended: bwrap: no more room" in refused.reason


def test_a_grader_that_cannot_start_is_named(real: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_rl.rewards.pool._settings", config.Rewards(unsafe_code=True, python="/bin/false"))
    with pytest.raises(UserError, match=r"rewards.python = '/bin/false'"):
        real(grade("print(1)", [("", "1")]))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GradingFailed, match="code: a grader left with exit code 1 while it started"):
        real(grade("print(1)", [("", "1")]))
    assert real(grade("print(1)", [("", "1")], on_failure="wrong")).reason == "failed"


def test_an_ordinary_user_has_the_same_sandbox(bwrap: str) -> None:
    """In a child that stops being root; without root's control groups the limits are those of processes."""
    assert bwrap
    if os.geteuid() != 0:
        pytest.skip("not permitted here: only root can become somebody else")
    reader, writer = os.pipe()
    with warnings.catch_warnings(action="ignore"):
        child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(60_900, 60_900, 60_900)
            os.setresuid(60_900, 60_900, 60_900)
            os.chdir("/")
            os.environ["TMPDIR"] = "/tmp"
            grader = grading.ProgramGrader(config.Rewards(program_memory_mb=128, program_processes=8))
            found = [
                grader(RunProgram("print(input())", 2, [Case("1", "1")])),
                grader(RunProgram("b = bytearray(1 << 30)", 2, [Case("", "")])),
                grader(
                    RunProgram("import os\nfor _ in range(500):\n if os.fork() == 0: os.read(0, 1)", 2, [Case("", "")])
                ),
                grader(RunProgram("open('/etc/passwd')", 2, [Case("", "")])),
            ]
            said = json.dumps([[one.reason, getattr(one, "detail", "")] for one in found])
        except BaseException:
            said = json.dumps(traceback.format_exc())
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = json.load(pipe)
    os.waitpid(child, 0)
    assert isinstance(said, list), said
    assert [reason for reason, _ in said] == ["passed", "memory", "exit code 1", "exit code 1"], said
    assert "BlockingIOError" in said[2][1] and "FileNotFoundError" in said[3][1]


def test_system_calls_have_the_numbers_that_libseccomp_knows() -> None:
    name = ctypes.util.find_library("seccomp")
    if name is None:
        pytest.skip("not permitted here: there is no libseccomp to compare with")
    resolve = ctypes.CDLL(name).seccomp_syscall_resolve_name_arch
    for call, numbers in {**seccomp.DENIED, **seccomp.LOOKED_INTO}.items():
        assert tuple(resolve(ctypes.c_uint32(audit), call.encode()) for audit in seccomp.AUDIT) == numbers, call


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_the_filter_only_jumps_forward_and_ends(machine: str) -> None:
    code = [seccomp.struct.unpack("=HBBI", chunk) for chunk in batched(seccomp.program(machine), 8)]
    assert len(code) < 4096 and code[-1][0] == seccomp.RETURN
    for place, (operation, yes, no, _) in enumerate(code):
        if operation in (seccomp.JUMP_EQUAL, seccomp.JUMP_SET, seccomp.JUMP_LEAST):
            assert place + 1 + max(yes, no) < len(code)


def batched(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_a_directory_that_is_no_control_group_limits_nothing_and_is_not_taken_for_one(tmp_path: Path) -> None:
    for folder in ("memory", "pids"):
        (tmp_path / folder).mkdir()
    assert cgroups.make(1 << 20, 4, tmp_path) is None
    assert not list(tmp_path.rglob("async_rl.*"))
