"""Programming problems from a file of JSON lines: no Python needed.

    [environment]
    name = "code"

    [environment.options]
    data = "problems.jsonl"
    heldout = 100

A line is {"prompt": "Write add(a, b).", "tests": ["assert add(1, 2) == 3"]}, or {"prompt": "Print the sum of two
numbers.", "tests": [{"input": "1 2", "output": "3"}]}: whatever `rewards.code` takes. The reward is that, and what the
options add to it (docs/rewards.md). Programs run in a sandbox; a machine that has none refuses to start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from async_rl.environments.api import Policy, Reward, environment
from async_rl.json_lines import Wrong
from async_rl.rewards.programs import code as graded
from async_rl.rewards.programs import read_tests, require_code
from async_rl.rewards.shape import check_failure, check_shape, shaped
from async_rl.tasks.problems import PROMPT, Problems
from async_rl.wire.messages import Task


class CodeProblems(Problems):
    """
    Args:
        data, heldout, heldout_data, template, system, prompt_field, decontaminate: of Problems.
        tests_field: what a row calls its tests.
        max_tests: only the first so many; 0 = all.
        score: "all" tests have to pass, or the "fraction" that does is the accuracy.
        time_limit_s: CPU seconds of a test.
        on_failure: what a sandbox that failed means: "fail" the rollout, or "wrong".
        format, language, overlong, repetition, combine, weights: rewards.shape.check_shape.
    """

    def __init__(
        self,
        seed: int,
        data: str,
        heldout: int = 0,
        heldout_data: str = "",
        template: str = PROMPT,
        system: str = "",
        prompt_field: str = "prompt",
        decontaminate: bool = False,
        tests_field: str = "tests",
        max_tests: int = 0,
        score: Literal["all", "fraction"] = "all",
        time_limit_s: float = 5.0,
        on_failure: Literal["fail", "wrong"] = "fail",
        format: str = "",
        language: str = "",
        overlong: Sequence[int] = (),
        repetition: bool = False,
        combine: str = "sum",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if score not in ("all", "fraction"):
            raise ValueError(f"score = {score!r}: write all or fraction")
        if time_limit_s <= 0:
            raise ValueError(f"time_limit_s = {time_limit_s}: write seconds, above 0")
        if max_tests < 0:
            raise ValueError(f"max_tests = {max_tests}: write 0 or more")
        self._tests, self._max = tests_field, max_tests
        self._graded = {
            "score": score,
            "time_limit_s": time_limit_s,
            "on_failure": check_failure(on_failure),
        }
        self._shape = check_shape(format, language, overlong, repetition, combine, weights)
        super().__init__(
            seed,
            self._solve,
            data=data,
            heldout=heldout,
            heldout_data=heldout_data,
            template=template,
            system=system,
            prompt_field=prompt_field,
            decontaminate=decontaminate,
        )

    def _solve(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if self._tests not in row:
            raise Wrong(f"{self._tests} is missing (fields: {', '.join(row)}); write it, or set tests_field")
        try:
            cases, asserts = read_tests(row[self._tests])
        except ValueError as error:
            raise Wrong(str(error).replace("tests", self._tests, 1)) from None
        tests = [[case.stdin, case.stdout] for case in cases] or asserts
        return {"tests": tests[: self._max or None], "graded": self._graded, "shape": self._shape}


@environment("code", tasks=CodeProblems, needs=require_code)
async def code(task: Task, policy: Policy) -> Reward:
    """One turn."""
    reply = await policy.chat(task["messages"])
    accuracy = await graded(reply.text, task["tests"], **task["graded"])
    return shaped(accuracy, reply, **task["shape"])
