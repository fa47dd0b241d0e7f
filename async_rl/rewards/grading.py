"""A program of the model under its tests: runs in a grader's process, the program in a sandbox (sandbox.py)."""

from __future__ import annotations

from collections.abc import Iterator

from async_rl.config import Rewards
from async_rl.rewards.conversation import Conversation, Ended, SetupFailed
from async_rl.rewards.jobs import FromChild, Refused, RunProgram, ToChild, Verdict
from async_rl.rewards.sandbox import Sandbox

ATTEMPTS = 3
"""To set a sandbox up, before the machine is given up on."""
ANSWER_S = 15.0
"""How much longer than a test the examiner may take; then the program has stopped it."""


class Unsupported(Exception):
    """A test does what cannot be done here: an error of the data."""


class ProgramGrader:
    """Raises UserError where programs cannot be isolated, unless `rewards.unsafe_code` is set."""

    def __init__(self, settings: Rewards) -> None:
        self._sandbox = Sandbox(settings)

    def __call__(self, job: ToChild) -> FromChild:
        assert isinstance(job, RunProgram)
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                return self._grade(job)
            except SetupFailed as failed:
                reason = str(failed)
            except Unsupported as error:
                return Refused(f"code: {error}", of_the_user=True)
        return Refused(f"code: the sandbox could not be set up, {ATTEMPTS} times: {reason}")

    def close(self) -> None:
        self._sandbox.close()

    def _grade(self, job: RunProgram) -> Verdict:
        group = self._sandbox.cgroup
        killed, refused = (group.killed_for_memory(), group.refused_processes()) if group is not None else (0, 0)
        passed, reason, detail = 0, "", ""
        talk = self._sandbox.start(job.program, cpu_s=job.cpu_s, wall_s=job.wall_s)
        try:
            for why, told in _tests(talk, job):
                passed += not why
                if why and not reason:
                    reason, detail = why, told
                if why and not job.to_the_end:
                    break
        finally:
            talk.end()
        if reason and group is not None:
            if group.killed_for_memory() > killed:
                reason = "memory"
            elif group.refused_processes() > refused:
                reason = "processes"
        value = passed / job.num_tests if job.to_the_end else float(passed == job.num_tests)
        return Verdict(value, reason or "passed", detail, passed, job.num_tests)


def _tests(talk: Conversation, job: RunProgram) -> Iterator[tuple[str, str]]:
    """(why it failed or "", what a person would look at) of one test after the other; all that follow one after which
    the program is no more fail with it."""
    seconds = job.wall_s + ANSWER_S
    try:
        if job.asserts:
            told = talk.ask({"load": True}, seconds)
            if told["why"]:
                yield from [(_why(told), str(told["detail"]))] * job.num_tests
                return
        for test in job.asserts:
            told = talk.ask({"test": test}, seconds)
            if told["why"] == "unsupported":
                raise Unsupported(told["detail"])
            yield _why(told), str(told["detail"])
        for case in job.cases:
            told = talk.ask({"stdin": case.stdin}, seconds)
            why = _why(told)
            if not why and lines(told["stdout"]) != lines(case.stdout):
                why = "wrong output"
            yield why, str(told["stderr"]) if why != "wrong output" else str(told["stdout"])[:500]
    except Ended as ended:
        yield from [(str(ended), "the program has stopped its examiner")] * job.num_tests
    except (KeyError, TypeError) as error:
        yield from [("ended", f"the examiner answered nonsense: {error!r}")] * job.num_tests


def _why(told: dict[str, object]) -> str:
    why = str(told["why"])
    exhausted = "MemoryError" in (why, str(told.get("stderr", "")).strip().rpartition("\n")[2].partition(":")[0])
    return "memory" if exhausted else why


def lines(output: str) -> list[str]:
    """What is compared: white space at the end of a line, and empty lines at the end, do not count."""
    return [line.rstrip() for line in output.rstrip().split("\n")]
