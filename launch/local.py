"""One machine: all services of a run as processes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from async_rl.launch.process import Here
from async_rl.launch.supervisor import Outcome, Seat, Supervisor, Watch

from async_rl.config import Run
from async_rl.layout import lay_out, visible_gpus
from async_rl.telemetry.run_directory import RunDirectory


class Local:
    """A fleet of one machine."""

    address = "127.0.0.1"

    def __init__(self, run: Run, here: Here) -> None:
        self._seats = [Seat(placed, here) for placed in lay_out(run, [visible_gpus()])]

    async def seats(self) -> Sequence[Seat]:
        return self._seats

    def opened(self) -> None:
        """Nobody else has to know."""


def train(run: Run, directory: RunDirectory, watch: Watch) -> Outcome:
    """Run to the end, or until it is stopped.

    Raises:
        UserError: a service says so, or the recipe needs more GPUs than there are. ServiceFailed.
    """
    here = Here(directory)
    fleet = Local(run, here)

    async def supervise() -> Outcome:
        return await Supervisor(run, directory, watch, fleet, here).run()

    return asyncio.run(supervise())
