"""A reward service process: graders for environments on other machines. Serves until it is told to stop."""

from __future__ import annotations

import asyncio

import msgspec
from async_rl.launch.child import Parent, ServeOptions

from async_rl import config
from async_rl.errors import UserError
from async_rl.rewards.jobs import Compare, Kind, RunProgram, Verdict
from async_rl.rewards.mathematics import require_math
from async_rl.rewards.pool import configure, pool
from async_rl.rewards.programs import require_code
from async_rl.rewards.service import Grade, Service


def main(run: config.Run, options: ServeOptions, parent: Parent) -> int:
    asyncio.run(_serve(msgspec.structs.replace(run.rewards, service=""), parent))
    return 0


async def _serve(settings: config.Rewards, parent: Parent) -> None:
    configure(settings)
    missing = _missing()
    if len(missing) == 2:
        raise UserError("; ".join(missing.values()))
    kinds: tuple[Kind, ...] = ("math", "code")
    service = Service(settings, {kind: _grade(kind) for kind in kinds if kind not in missing}, missing)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    parent.on_stop(lambda within_s: loop.call_soon_threadsafe(stopped.set))
    await service.start()
    try:
        parent.ready({"url": service.url, "missing": missing})
        await stopped.wait()
    finally:
        await service.close()


def _missing() -> dict[Kind, str]:
    """Why a kind cannot be graded here."""
    found: dict[Kind, str] = {}
    for kind, require in (("math", require_math), ("code", require_code)):
        try:
            require()
        except UserError as error:
            found[kind] = str(error)
    return found


def _grade(kind: Kind) -> Grade:
    async def grade(job: Compare | RunProgram, deadline_s: float) -> Verdict:
        return await pool(kind).grade(job, deadline_s=deadline_s)

    return grade
