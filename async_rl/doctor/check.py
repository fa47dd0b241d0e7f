"""Pure: one thing that was looked at."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Status = Literal["ok", "warn", "FAIL"]


class Check(msgspec.Struct, frozen=True):
    name: str
    status: Status
    detail: str
    """What was found, and what to do about it."""
    data: dict[str, Any] = {}
    """Numbers for --json."""


def line(check: Check) -> str:
    return f"{check.status:<4}  {check.name:<19}  {check.detail}"
