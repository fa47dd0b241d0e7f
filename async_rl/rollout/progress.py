"""A time-out that moves with progress. Progress costs nothing: when it was is looked at when the timer fires."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Protocol


class NoProgress(Exception):
    """The body of a `progress_timeout` did not progress for too long; says in which stage."""


class Progressing(Protocol):
    """Whose progress is watched."""

    def last_progress(self) -> float:
        """When it was, in seconds of the running loop's clock."""
        ...

    @property
    def stage(self) -> str:
        """Where it is now, in words."""
        ...


@asynccontextmanager
async def progress_timeout(seconds: float, watched: Progressing) -> AsyncGenerator[None]:
    """Cancels its body and raises NoProgress once the last progress lies `seconds` back."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None
    stage = ""

    def look() -> None:
        nonlocal timer, stage
        deadline = watched.last_progress() + seconds
        if loop.time() < deadline:
            timer = loop.call_at(deadline, look)
        else:
            stage = watched.stage
            scope.reschedule(loop.time())

    scope = asyncio.timeout(None)
    try:
        async with scope:
            look()
            try:
                yield
            finally:
                if timer is not None:
                    timer.cancel()
    except TimeoutError:
        if scope.expired():
            raise NoProgress(stage) from None
        raise
