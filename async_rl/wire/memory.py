"""The same streams within one process, for virtual time and tests: real codec, no sockets, optional latency."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from async_rl.wire.codec import Codec
from async_rl.wire.transport import Client, Server

S = TypeVar("S")
R = TypeVar("R")
T = TypeVar("T")


class _Way(Generic[T]):
    """One direction. Timers of the same moment fire in any order, so each of them takes what was sent first."""

    def __init__(self, arrive: Callable[[T], None]) -> None:
        self._arrive = arrive
        self._under_way: deque[T] = deque()

    def send(self, frame: T, latency_s: float) -> None:
        self._under_way.append(frame)
        asyncio.get_running_loop().call_later(latency_s, self._next)

    def _next(self) -> None:
        self._arrive(self._under_way.popleft())


class MemoryServer(Server[S, R]):
    """Create clients with `connect()`. Frames arrive in order, `latency_s` after they were sent."""

    def __init__(self, codec: Codec[S, R], latency_s: float = 0.0) -> None:
        super().__init__(codec)
        self.latency_s = latency_s
        self._inbox: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._clients: dict[str, MemoryClient[R, S]] = {}
        self._down = _Way[tuple[str, bytes]](lambda frame: self._clients[frame[0]].arrive(frame[1]))
        self.up = _Way[tuple[str, bytes]](self._inbox.put_nowait)

    @property
    def address(self) -> str:
        return "memory"

    def connect(self) -> MemoryClient[R, S]:
        peer = f"peer-{len(self._clients)}"
        client = self._clients[peer] = MemoryClient(self.codec.mirror, self, peer)
        return client

    def _deliver(self, peer: str, data: bytes) -> None:
        self._down.send((peer, data), self.latency_s)

    async def _next(self) -> tuple[str, bytes]:
        return await self._inbox.get()


class MemoryClient(Client[S, R]):
    def __init__(self, codec: Codec[S, R], server: MemoryServer[R, S], peer: str) -> None:
        super().__init__(codec)
        self._server, self._peer = server, peer
        self._inbox: asyncio.Queue[bytes] = asyncio.Queue()

    def arrive(self, data: bytes) -> None:
        self._inbox.put_nowait(data)

    def _deliver(self, data: bytes) -> None:
        self._server.up.send((self._peer, data), self._server.latency_s)

    async def _next(self) -> bytes:
        return await self._inbox.get()
