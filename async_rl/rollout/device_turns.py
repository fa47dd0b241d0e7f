"""A generator that shares its device with the learner: it takes and leaves it when it is told to, one after the other.

    told to take it    the newest weights that were announced -> live -> held
                       they do not come                       -> those that were live before -> held, with the old ones
                       nothing comes                          -> the next announcement is tried
    told to leave it   the engine stops between two decode steps and frees what it has there -> left

Sequences in flight keep what they sampled and go on under the weights of the next turn: partial rollouts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from async_rl.engines.protocol import Engine, Swap
from async_rl.wire.messages import DeviceHeld, DeviceTurn

Share = Callable[[str | None], None]
"""EpisodeHost.share_device"""


class DeviceTurns:
    """
    Args:
        colocated: else the device is the engine's alone, and there are no turns.
        take: loads the newest weights; calls `live` when they are. Does not raise where they do not come.
        share: tells the episode host whose the device is.
        answer: gets what the engine knew when it took or left the device, and the answer, due after the positions.
    """

    def __init__(
        self,
        colocated: bool,
        engine: Engine,
        *,
        take: Callable[[], Awaitable[None]],
        share: Share,
        answer: Callable[[Swap, DeviceHeld], None],
    ) -> None:
        self.on_device = not colocated
        """Weights may be loaded."""
        self._engine, self._take, self._share, self._answer = engine, take, share, answer
        self._one_at_a_time = asyncio.Lock()
        self._taking: tuple[DeviceTurn, float] | None = None
        """The order to take the device that is not carried out yet, and when it came."""

    @property
    def comes_back(self) -> bool:
        """It is told to take the device, and no weights are there yet: any are better than none."""
        return self._taking is not None

    async def obey(self, turn: DeviceTurn) -> None:
        async with self._one_at_a_time:
            started = asyncio.get_running_loop().time()
            self._share("device_turn")
            if turn.hold:
                self.on_device, self._taking = True, (turn, started)
                await self._take()
                return
            self.on_device, self._taking = False, None
            left = await self._engine.release()
            seconds = asyncio.get_running_loop().time() - started
            self._share("off_device")
            self._answer(left, DeviceHeld(turn.number, False, seconds, left.nbytes))

    def live(self, swap: Swap) -> None:
        """The engine samples on the device."""
        if self._taking is None:
            return
        turn, started = self._taking
        self._taking = None
        self._share(None)
        seconds = asyncio.get_running_loop().time() - started
        self._answer(swap, DeviceHeld(turn.number, True, seconds, swap.nbytes))
