"""Is the answer of a mathematical problem right?"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from async_rl.errors import GradingFailed, require
from async_rl.rewards import answers, client, symbolic
from async_rl.rewards.equality import same
from async_rl.rewards.grade import Grade
from async_rl.rewards.jobs import Compare
from async_rl.rewards.pool import pool, settings

OnFailure = Literal["raise", "wrong"]


async def math(
    text: str,
    answer: str | float | Sequence[str | float],
    *,
    extract: str = "final",
    symbolic: bool = True,
    tolerance: float = 0.0,
    on_failure: OnFailure = "raise",
) -> Grade:
    r"""1.0 if the answer in a reply is the right one, else 0.0; `.reason` says how that was found out.

    First by their text and by exact arithmetic (0.5 = 1/2 = \frac{1}{2} = 50/100; reasons "same", "different"), here
    and at once. What that leaves open, math-verify decides (\sqrt{2} = 2^{1/2}; reasons "symbolic", "different"), in a
    process that is killed after `rewards.deadline_s`. "no answer": the reply has none.

    Args:
        answer: the right one, or all that are right.
        extract: where the answer is in the reply (rewards.answers.EXTRACTORS): by default after `</think>` the last
            \boxed{}, else <answer>, else the last formula or number.
        symbolic: False: what text and arithmetic leave open is wrong, and math-verify is not needed.
        tolerance: of numbers, as a share of the right one.
        on_failure: what a grader that hung or died means: "raise", or "wrong": 0.0 with the reason "failed".

    Raises:
        GradingFailed: the grader hung, died, or could not be set up.
        MissingExtra: math-verify is needed and not installed.
    """
    said = answers.extract(extract, text)
    if said is None:
        return Grade(0.0, "no answer")
    right = [str(one) for one in ([answer] if isinstance(answer, (str, int, float)) else answer)]
    verdicts = {one: same(said, one, tolerance=tolerance) for one in right}
    if True in verdicts.values():
        return Grade(1.0, "same", said)
    undecided = [one for one, verdict in verdicts.items() if verdict is None]
    if not undecided or not symbolic:
        return Grade(0.0, "different", said)
    if not settings().service:
        require_math()
    try:
        verdict = await pool("math").grade(Compare(said, undecided), deadline_s=settings().deadline_s)
    except GradingFailed as failure:
        if on_failure == "raise":
            raise
        return Grade(0.0, "failed", str(failure))
    return Grade(verdict.value, verdict.reason, said)


def require_math() -> None:
    """For `needs` of an environment. Raises MissingExtra where math-verify is not installed; UserError where the reward
    service that the recipe names does not have it."""
    if settings().service:
        client.require(settings(), "math")
        return
    if find_spec(symbolic.MODULE) is None:
        require(symbolic.MODULE, symbolic.EXTRA, "comparing formulae")
