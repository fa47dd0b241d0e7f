"""The streams over ZeroMQ: ROUTER at the controller, DEALER elsewhere, one frame per message.

High-water marks are a fuse, not flow control: credit bounds what is in flight far below them. A ROUTER drops what it
cannot route; the peer asks again after its next Hello.

With keys, both ends prove who they are and everything is encrypted (CURVE): gate.py is the controller's side of it,
handshake.py says why a client is not let in. A routing id belongs to the connection that came with it first: nobody
gets the answers to somebody else.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable
from typing import TypeVar

import zmq
import zmq.asyncio

from async_rl.errors import UserError
from async_rl.listening import bracketed, numeric
from async_rl.run_secrets import ClientKeys, Role, ServerKeys
from async_rl.wire.codec import Codec
from async_rl.wire.gate import Gate
from async_rl.wire.handshake import Handshakes
from async_rl.wire.transport import MAX_FRAME_BYTES, Client, Server

S = TypeVar("S")
R = TypeVar("R")

HANDSHAKE_TIMEOUT_MS = 5000
LINGER_MS = 1000
"""How long a closing socket tries to hand over what it still holds (the last ack, the goodbye)."""
MAX_CONNECTIONS = 16384
COPY_BELOW_BYTES = 65536
"""Larger frames are handed to ZeroMQ without a copy."""

log = logging.getLogger(__name__)


def _socket(kind: int) -> zmq.asyncio.Socket:
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, MAX_CONNECTIONS)
    socket = context.socket(kind)
    for option, value in (
        (zmq.LINGER, LINGER_MS),
        (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS),
        (zmq.SNDHWM, 100_000),
        (zmq.RCVHWM, 100_000),
    ):
        socket.setsockopt(option, value)
    return socket


def use_keys(socket: zmq.asyncio.Socket, keys: ClientKeys) -> None:
    """Of a client, before it connects."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.controller.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())


async def _close(socket: zmq.asyncio.Socket) -> None:
    """Returns when the peer's transport has the last frame, or after LINGER_MS."""
    context = socket.context
    socket.close()
    await asyncio.to_thread(context.term)


class _Sends:
    """Keeps pending sends alive and looks at their result, so that no error is lost."""

    def __init__(self) -> None:
        self._pending: set[asyncio.Future[object]] = set()

    def track(self, sending: Awaitable[object]) -> None:
        future = asyncio.ensure_future(sending)
        if future.done():  # as a rule: the socket took it at once
            self._done(future)
            return
        self._pending.add(future)
        future.add_done_callback(self._done)

    def _done(self, future: asyncio.Future[object]) -> None:
        self._pending.discard(future)
        if not future.cancelled() and (error := future.exception()) is not None:
            log.info("a frame was not sent: %s", error)  # EHOSTUNREACH: the peer is gone, its heartbeats will say so


class ZmqServer(Server[S, R]):
    def __init__(
        self, codec: Codec[S, R], host: str, port: int, *, role: Role = "generator", keys: ServerKeys | None = None
    ) -> None:
        """Binds at once. Port 0 takes any free one.

        Args:
            role: of those who connect.
            keys: only who holds the key of `role` may come in; None: everybody who reaches the port.

        Raises:
            UserError: the address is not ours, or the port is taken.
        """
        super().__init__(codec)
        address = numeric(host, field="controller.host", owner="controller")
        self._socket = _socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.IPV6, int(":" in address))
        self._sends = _Sends()
        if keys is not None:
            Gate(self._socket, role=role, secret=keys.secret, allowed=keys.allowed[role])
        try:
            self._socket.bind(f"tcp://{bracketed(address)}:{port or '*'}")
        except zmq.ZMQError as error:
            self._socket.close(0)
            self._socket.context.term()
            raise UserError(
                f"controller.port = {port}: cannot listen on {host}:{port} ({error.strerror}); write a free port, or 0"
            ) from None

    @property
    def address(self) -> str:
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _deliver(self, peer: str, data: bytes) -> None:
        self._sends.track(self._socket.send_multipart([bytes.fromhex(peer), data], copy=len(data) < COPY_BELOW_BYTES))

    async def _next(self) -> tuple[str, bytes]:
        while True:
            parts = await self._socket.recv_multipart()
            if len(parts) == 2:
                return parts[0].hex(), parts[1]
            self.refused += 1  # one frame per message: MAXMSGSIZE bounds a frame, not a message of many frames

    async def close(self) -> None:
        await super().close()
        await _close(self._socket)


class ZmqClient(Client[S, R]):
    def __init__(self, codec: Codec[S, R], address: str, keys: ClientKeys | None = None) -> None:
        """keys: where the controller asks for them. `receive` raises UserError when it does not let us in."""
        super().__init__(codec)
        self._socket = _socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, b"\1" + uuid.uuid4().bytes)  # a first byte of 0 is reserved by ZeroMQ
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        if keys is not None:
            use_keys(self._socket, keys)
        self._receiving: asyncio.Future[bytes] | None = None
        self._error: BaseException | None = None
        """Why nothing will come any more."""
        self._handshakes = Handshakes(self._socket, address, keys)
        self._watching = asyncio.create_task(self._handshakes.watch(), name="handshakes")
        self._watching.add_done_callback(self._watched)
        self._socket.connect(address)
        self._sends = _Sends()

    def _deliver(self, data: bytes) -> None:
        self._sends.track(self._socket.send(data, copy=len(data) < COPY_BELOW_BYTES))

    async def _next(self) -> bytes:
        if self._error is not None:
            raise self._error
        self._receiving = asyncio.ensure_future(self._socket.recv())
        return await self._receiving

    def _watched(self, watching: asyncio.Task[None]) -> None:
        if not watching.cancelled():
            self._error = watching.exception()
        if self._error is not None and self._receiving is not None and not self._receiving.done():
            self._receiving.set_exception(self._error)

    async def close(self) -> None:
        await super().close()
        self._watching.cancel()
        await asyncio.wait({self._watching})
        self._socket.disable_monitor()
        self._handshakes.close()
        if self._error is not None:
            self._socket.setsockopt(zmq.LINGER, 0)  # nobody will take what it holds
        await _close(self._socket)
