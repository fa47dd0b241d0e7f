"""Pure: frames to bytes and back, with one typed decoder per receiver, so that every message is validated once."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from async_rl.errors import ProtocolError
from async_rl.wire.messages import Frame, GeneratorMessage, LearnerMessage, ToGenerator, ToLearner

S = TypeVar("S")
R = TypeVar("R")


class Codec(Generic[S, R]):
    """Encodes what one side sends and decodes what it receives; `mirror` is the codec of the other side."""

    def __init__(self, sends: Any, receives: Any) -> None:
        self._sends, self._receives = sends, receives
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Frame[R]] = msgspec.msgpack.Decoder(Frame[receives])

    def encode(self, epoch: int, messages: list[S]) -> bytes:
        return self._encoder.encode(Frame(epoch, messages))

    def decode(self, data: bytes | memoryview) -> Frame[R]:
        """Raises ProtocolError, naming the field, where the bytes are not a frame this side may receive."""
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise ProtocolError(f"undecodable frame of {len(data)} bytes: {error}") from error

    @property
    def mirror(self) -> Codec[R, S]:
        return Codec(self._receives, self._sends)


def rollout_stream() -> Codec[ToGenerator, GeneratorMessage]:
    """The controller's side of the rollout stream; `.mirror` is the generator's."""
    return Codec(ToGenerator, GeneratorMessage)


def training_stream() -> Codec[ToLearner, LearnerMessage]:
    """The controller's side of the training stream; `.mirror` is the learner's."""
    return Codec(ToLearner, LearnerMessage)
