"""Pure: what a policy needs of the host it runs in, and what it tells the host of its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from async_rl.engines.protocol import Chunk, Request, Swap
from async_rl.rollout.conversations import Text
from async_rl.rollout.openai_server import OpenAIServer
from async_rl.rollout.segments import OpenCall
from async_rl.wire.messages import GroupLease, Segment


class Asking(Protocol):
    """A policy, as the host sees it."""

    lease: GroupLease
    member: int

    def receive(self, chunk: Chunk, delivered: int) -> None:
        """The next tokens of one of its requests; `delivered` counts all chunks of the engine, this one included."""
        ...


class Desk(Protocol):
    """Everything happens on the host's loop."""

    text: Text

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion the engine can hold; 0 = no bound."""
        ...

    def time(self) -> float: ...

    def stepped_at(self) -> float:
        """When the engine sampled last."""
        ...

    def next_request_id(self) -> int: ...

    def ask(self, request: Request, policy: Asking) -> asyncio.Future[None]:
        """The policy's `receive` gets the chunks; the future is done after the last one."""
        ...

    def withdraw(self, request_id: int) -> None:
        """Let go of a request, if it is still with the engine."""
        ...

    def recall(self, request_ids: Sequence[int]) -> None:
        """These end where they are: their last chunk says `aborted`."""
        ...

    def persist(self, segment: Segment) -> None: ...

    def runs(self, policy: Asking) -> bool:
        """False once its rollout was cancelled, failed or yielded, whatever its code still does."""
        ...

    async def endpoint(self) -> OpenAIServer:
        """Started, if it is the first time. Raises UserError: it cannot listen where the recipe says."""
        ...

    def leave(self, policy: Asking) -> None:
        """Forget this rollout without a report; its task is cancelled."""
        ...


@dataclass(slots=True)
class LiveRequest:
    """With the engine now."""

    call: OpenCall
    stop: tuple[str, ...] = ()
    """Texts that end it."""
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    pending: list[Chunk] = field(default_factory=list[Chunk])
    """Those of them that are not durable."""

    @property
    def tokens(self) -> list[int]:
        """Sampled in this call, under earlier leases too."""
        return [token for chunk in (*self.call.recorded, *self.chunks) for token in chunk.tokens.tolist()]


@dataclass(frozen=True, slots=True)
class _Ended:
    id: int
    tokens: int
    delivered: int
    """Chunks the engine had delivered, its last one included."""


class Requests:
    """The requests of one policy: those that are with the engine, and how many tokens each had at any swap.

    Args:
        resumed: tokens of the episode that earlier leases sampled.
    """

    def __init__(self, resumed: int) -> None:
        self.live: dict[int, LiveRequest] = {}
        self._resumed = resumed
        self._ended: list[_Ended] = []

    def receive(self, chunk: Chunk, delivered: int) -> LiveRequest:
        live = self.live[chunk.request_id]
        live.chunks.append(chunk)
        live.pending.append(chunk)
        if chunk.finish_reason is not None:
            self._ended.append(_Ended(chunk.request_id, sum(len(one.tokens) for one in live.chunks), delivered))
        return live

    def sampled_at(self, swap: Swap) -> int:
        """How many tokens the episode had when these weights went live, over all calls and leases."""
        over = {ended.id for ended in self._ended}
        living = sum(swap.sampled.get(request_id, 0) for request_id in self.live if request_id not in over)
        ended = sum(
            swap.sampled.get(one.id, one.tokens if one.delivered <= swap.delivered else 0) for one in self._ended
        )
        return self._resumed + living + ended
