"""Pure: what is said about a set of weights: which they are, how many bytes, their checksum, and of which model.

In front of a broadcast it is 64 bytes; in a file it is in the metadata (weight_file.py). The version travels in here.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from torch import Tensor

from async_rl.models.parameters import Layout
from async_rl.weights.checksum import checksum
from async_rl.weights.errors import WeightsCorrupt, WeightsMismatch
from async_rl.wire.messages import WeightsId

MAGIC = b"async_rl"
FORMAT = 2
STRUCT = struct.Struct("<8sQqqQQQQ")
"""magic, format, lineage, version, nbytes, checksum, layout fingerprint, 0. All but magic are 64 bit."""
SIZE = STRUCT.size


@dataclass(frozen=True, slots=True)
class Header:
    weights: WeightsId
    nbytes: int
    """Of the payload."""
    checksum: int
    """checksum.checksum of the payload; 0 in front of a broadcast, which is checked by what follows it."""
    fingerprint: int
    """Of the layout both ends computed on their own."""

    @classmethod
    def of(cls, weights: WeightsId, payload: Tensor, layout: Layout) -> Header:
        """Of a packed snapshot, [layout.nbytes] uint8 on the CPU."""
        return cls(weights, layout.nbytes, checksum(payload), layout.fingerprint)

    def encode(self) -> bytes:
        lineage, version = self.weights.lineage, self.weights.version
        return STRUCT.pack(MAGIC, FORMAT, lineage, version, self.nbytes, self.checksum, self.fingerprint, 0)

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Raises WeightsCorrupt where the bytes are no header."""
        if len(data) < SIZE:
            raise WeightsCorrupt(f"{len(data)} bytes are too few for a header")
        magic, version_of_format, lineage, version, nbytes, crc, fingerprint, _ = STRUCT.unpack(data[:SIZE])
        if magic != MAGIC or version_of_format != FORMAT:
            raise WeightsCorrupt("there is no weights header")
        return cls(WeightsId(lineage, version), nbytes, crc, fingerprint)

    def check_layout(self, layout: Layout) -> None:
        """Raises WeightsMismatch where the sender's model is not ours."""
        if (self.nbytes, self.fingerprint) != (layout.nbytes, layout.fingerprint):
            raise WeightsMismatch(
                f"weights {name(self.weights)} are {self.nbytes} bytes of layout {self.fingerprint:08x}, this model "
                f"has {layout.nbytes} bytes of layout {layout.fingerprint:08x}: model and dtype must be the same"
            )

    def check_payload(self, payload: Tensor) -> None:
        """Raises WeightsCorrupt where a byte differs."""
        self.check(checksum(payload))

    def check(self, found: int) -> None:
        """Raises WeightsCorrupt unless the checksum of what came is this one."""
        if found != self.checksum:
            raise WeightsCorrupt(
                f"weights {name(self.weights)}: checksum {found:016x}, the header says {self.checksum:016x}"
            )


def name(weights: WeightsId) -> str:
    """`lineage.version`, for people."""
    return f"{weights.lineage}.{weights.version}"
