"""What a grader says."""

from __future__ import annotations


class Grade(float):
    """A reward, which also says why: `Grade(1.0, "numeric")` is 1.0 wherever a number is wanted.

    reason: one word or a few, the same for the same cause (docs/rewards.md lists them).
    detail: what a person would look at, such as the end of stderr; may be empty.
    passed, total: tests of a program; one for anything else.
    """

    __slots__ = ("detail", "passed", "reason", "total")

    reason: str
    detail: str
    passed: int
    total: int

    def __new__(cls, value: float, reason: str, detail: str = "", passed: int | None = None, total: int = 1) -> Grade:
        grade = super().__new__(cls, value)
        grade.reason, grade.detail, grade.total = reason, detail, total
        grade.passed = int(value == 1.0) if passed is None else passed
        return grade

    def __repr__(self) -> str:
        return f"Grade({float(self)}, {self.reason!r}, passed={self.passed}, total={self.total})"
