"""The seam between processes: a server (the controller) and its clients, over ZeroMQ or in memory.

Both ends gather what is sent within one turn of the event loop into frames of at most 16 messages. `send` never
blocks and never fails: flow control is credit, and what a dead peer does not get it asks for again after its Hello.
Frames that do not decode, or carry another run epoch, are refused here and counted. A peer of an older epoch is told to
start again: what it holds was leased by a controller that is gone.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from async_rl.errors import ProtocolError
from async_rl.wire.codec import Codec
from async_rl.wire.messages import Hello, HelloAck, Shutdown

S = TypeVar("S")
R = TypeVar("R")

MESSAGES_PER_FRAME = 16
MAX_FRAME_BYTES = 256 << 20
"""A longer frame is refused before it is buffered."""

START_AGAIN = Shutdown("the controller has started again", restart=True)
WELCOME_TIMEOUT_S = 300.0
"""A controller answers a Hello within this time, or the service that said it ends."""
NO_WELCOME = f"no controller answered for {WELCOME_TIMEOUT_S:.0f} s: start it, or write its address after --connect"

log = logging.getLogger(__name__)


class _Outbox(Generic[S]):
    """Messages of this turn of the loop, by peer."""

    def __init__(self, flush: Callable[[str, list[S]], None]) -> None:
        self._pending: dict[str, list[S]] = {}
        self._flush = flush

    def add(self, peer: str, message: S) -> None:
        if not self._pending:
            asyncio.get_running_loop().call_soon(self.drain)
        self._pending.setdefault(peer, []).append(message)

    def drain(self) -> None:
        pending, self._pending = self._pending, {}
        for peer, messages in pending.items():
            for start in range(0, len(messages), MESSAGES_PER_FRAME):
                self._flush(peer, messages[start : start + MESSAGES_PER_FRAME])


class Server(ABC, Generic[S, R]):
    """One stream of the controller. `epoch` is the run epoch; set it before the first receive."""

    def __init__(self, codec: Codec[S, R]) -> None:
        self.codec = codec
        self.epoch = 0
        self.refused = 0
        """Frames that did not decode or came from another epoch."""
        self._outbox: _Outbox[S] = _Outbox(self._flush)

    def send(self, peer: str, message: S) -> None:
        self._outbox.add(peer, message)

    def flush(self) -> None:
        """Send now what was gathered, not at the end of this turn of the loop."""
        self._outbox.drain()

    async def receive(self) -> tuple[str, list[R]]:
        """The next accepted frame: who sent it, and its messages."""
        while True:
            peer, data = await self._next()
            try:
                frame = self.codec.decode(data)
            except ProtocolError as error:
                self.refused += 1
                log.warning("refused a frame of peer %s: %s", peer, error)
                continue
            if frame.epoch != self.epoch and not (frame.messages and isinstance(frame.messages[0], Hello)):
                self.refused += 1
                log.info("refused a frame of epoch %d from peer %s, this is epoch %d", frame.epoch, peer, self.epoch)
                if 0 < frame.epoch < self.epoch:  # 0: it was not welcomed yet
                    self._deliver(peer, self.codec.encode(frame.epoch, [cast(S, START_AGAIN)]))
                continue
            return peer, frame.messages

    def _flush(self, peer: str, messages: list[S]) -> None:
        self._deliver(peer, self.codec.encode(self.epoch, messages))

    async def close(self) -> None:
        """Flush, then let go of the address."""
        self._outbox.drain()

    @property
    @abstractmethod
    def address(self) -> str: ...

    @abstractmethod
    def _deliver(self, peer: str, data: bytes) -> None: ...

    @abstractmethod
    async def _next(self) -> tuple[str, bytes | memoryview]: ...


class Client(ABC, Generic[S, R]):
    """One connection to the controller. The epoch is learnt from the frame that carries the HelloAck."""

    def __init__(self, codec: Codec[S, R]) -> None:
        self.codec = codec
        self.epoch = 0
        self._outbox: _Outbox[S] = _Outbox(self._flush)

    def send(self, message: S) -> None:
        self._outbox.add("", message)

    async def receive(self) -> list[R]:
        """The messages of the next frame. Raises ProtocolError: the controller is trusted, so this is a bug."""
        while True:
            frame = self.codec.decode(await self._next())
            if any(isinstance(message, HelloAck) for message in frame.messages):
                self.epoch = frame.epoch
            if frame.epoch == self.epoch:
                return frame.messages

    def _flush(self, peer: str, messages: list[S]) -> None:
        self._deliver(self.codec.encode(self.epoch, messages))

    async def close(self) -> None:
        """Flush, then disconnect."""
        self._outbox.drain()

    @abstractmethod
    def _deliver(self, data: bytes) -> None: ...

    @abstractmethod
    async def _next(self) -> bytes | memoryview: ...
