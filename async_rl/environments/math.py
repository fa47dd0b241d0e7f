"""Mathematical problems from a file of JSON lines: no Python needed.

    [environment]
    name = "math"

    [environment.options]
    data = "problems.jsonl"         # {"prompt": "What is half of 3?", "answer": "3/2"} a line
    heldout = 100
    template = "{prompt}\\nPut the answer in \\\\boxed{}."

An answer is a text, a number, or a list of those that are right. The reward is `rewards.math`, and what the options add
to it (docs/rewards.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from async_rl.environments.api import Policy, Reward, environment
from async_rl.json_lines import Wrong, convert, short
from async_rl.rewards.answers import EXTRACTORS, extract
from async_rl.rewards.mathematics import math as graded
from async_rl.rewards.mathematics import require_math
from async_rl.rewards.shape import check_failure, check_shape, shaped
from async_rl.tasks.problems import PROMPT, Problems
from async_rl.wire.messages import Task


class _Solved(msgspec.Struct, frozen=True):
    answer: str | int | float | list[str | int | float]


class MathProblems(Problems):
    """
    Args:
        data, heldout, heldout_data, template, system, prompt_field, decontaminate: of Problems.
        answer_field: what a row calls its right answer.
        answer_in: where that is in the field: "text" (all of it), "boxed" (of a solution), "last_number", ...
        extract: where the answer is in a reply (rewards.answers.EXTRACTORS).
        tolerance: of numbers, as a share of the right one.
        symbolic: false: what text and arithmetic leave open is wrong, and math-verify is not needed.
        on_failure: what a grader that hung means: "fail" the rollout, or "wrong".
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
        answer_field: str = "answer",
        answer_in: str = "text",
        extract: str = "final",
        tolerance: float = 0.0,
        symbolic: bool = True,
        on_failure: Literal["fail", "wrong"] = "fail",
        format: str = "",
        language: str = "",
        overlong: Sequence[int] = (),
        repetition: bool = False,
        combine: str = "sum",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        for name, value in (("answer_in", answer_in), ("extract", extract)):
            if value not in EXTRACTORS:
                raise ValueError(f"{name} = {value!r}: write one of {', '.join(EXTRACTORS)}")
        if symbolic:
            require_math()
        self._answer, self._answer_in = answer_field, answer_in
        self._graded = {
            "extract": extract,
            "tolerance": tolerance,
            "symbolic": symbolic,
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
        field = self._answer
        if field not in row:
            raise Wrong(f"{field} is missing (fields: {', '.join(row)}); write it, or set answer_field")
        answer = convert({"answer": row[field]}, _Solved).answer
        found: list[str] = []
        for one in answer if isinstance(answer, list) else [answer]:
            right = extract(self._answer_in, str(one))
            if right is None:
                where = "" if self._answer_in == "text" else f", {self._answer_in}"
                raise Wrong(f"{field} = {short(row[field])}: there is no answer in it{where}")
            found.append(right)
        if not found:
            raise Wrong(f"{field} = []: write at least one answer")
        return {"answer": found, "graded": self._graded, "shape": self._shape}


@environment("math", tasks=MathProblems)
async def math(task: Task, policy: Policy) -> Reward:
    """One turn."""
    reply = await policy.chat(task["messages"])
    accuracy = await graded(reply.text, task["answer"], **task["graded"])
    return shaped(accuracy, reply, **task["shape"])
