"""What rank 0 tells the other ranks: the only rank that talks ZeroMQ passes on, encoded, what they need.

No bytes at all are a keep-alive.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from async_rl.wire.messages import MicroBatches


class Train(msgspec.Struct, frozen=True, tag=True):
    batch: MicroBatches


class Stop(msgspec.Struct, frozen=True, tag=True):
    pass


Command: TypeAlias = Train | Stop

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


def encode(command: Command) -> bytes:
    return _encoder.encode(command)


def decode(data: bytes) -> Command | None:
    """None = keep-alive."""
    return _decoder.decode(data) if data else None
