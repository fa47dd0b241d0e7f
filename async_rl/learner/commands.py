"""What rank 0 tells the other ranks: the only rank that talks ZeroMQ passes on, encoded, what they need.

No bytes at all are a keep-alive.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from async_rl.wire.messages import MicroBatches


class Train(msgspec.Struct, frozen=True, tag=True):
    batch: MicroBatches


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """Join in gathering the weights, for the engines."""


class Save(msgspec.Struct, frozen=True, tag=True):
    """Join in a checkpoint: gather the weights, write your rows of the optimiser's states."""

    lineage: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    pass


Command: TypeAlias = Train | Snapshot | Save | Stop

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


def encode(command: Command) -> bytes:
    return _encoder.encode(command)


def decode(data: bytes) -> Command | None:
    """None = keep-alive."""
    return _decoder.decode(data) if data else None
