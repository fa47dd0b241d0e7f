"""The same streams within one process, for virtual time and tests: real codec, no sockets, optional latency."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from async_rl.wire.codec import Codec
from async_rl.wire.transport import Client, Server

S = TypeVar("S")
R = TypeVar("R")


class MemoryServer(Server[S, R]):
    """Create clients with `connect()`. Frames arrive in order, `latency_s` after they were sent."""

    def __init__(self, codec: Codec[S, R], latency_s: float = 0.0) -> None:
        super().__init__(codec)
        self.latency_s = latency_s
        self._inbox: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._clients: dict[str, MemoryClient[R, S]] = {}

    @property
    def address(self) -> str:
        return "memory"

    def connect(self) -> MemoryClient[R, S]:
        peer = f"peer-{len(self._clients)}"
        client = self._clients[peer] = MemoryClient(self.codec.mirror, self, peer)
        return client

    def arrive(self, peer: str, data: bytes) -> None:
        self._inbox.put_nowait((peer, data))

    def _deliver(self, peer: str, data: bytes) -> None:
        asyncio.get_running_loop().call_later(self.latency_s, self._clients[peer].arrive, data)

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
        asyncio.get_running_loop().call_later(self._server.latency_s, self._server.arrive, self._peer, data)

    async def _next(self) -> bytes:
        return await self._inbox.get()
