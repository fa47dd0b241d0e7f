"""Pure: a set of weights as a safetensors file, whose header is the manifest: name, shape, dtype, place of each tensor.

    8 bytes: length of the JSON | JSON, padded with spaces so that the payload is aligned to 64 bytes | payload

`__metadata__` holds what the format has no field for: which weights these are, the checksum of the payload and of each
of its buckets, the fingerprint of the layout; in a delta (delta.py) also the weights it starts from. Numbers have
a fixed length: heads of one layout are equally long.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from async_rl.models.parameters import Entry, Layout
from async_rl.weights.checksum import BUCKET_BYTES, combine
from async_rl.weights.errors import WeightsCorrupt
from async_rl.weights.header import Header
from async_rl.wire.messages import WeightsId

LENGTH = struct.Struct("<Q")
ALIGNMENT = 64
MAX_HEAD = 100 << 20
"""Bytes; what the safetensors library accepts."""
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The head of a file, read."""

    header: Header
    """Of the weights one holds after using this file; `nbytes` and checksum are of the whole set, also in a delta."""
    buckets: Sequence[int]
    """Checksums of BUCKET_BYTES each of the payload of this file."""
    layout: Layout
    """Of the payload of this file."""
    base: WeightsId | None = None
    """Delta: what it has to be applied to."""
    start: int = 0
    """Where the payload begins in the file."""

    @property
    def num_buckets(self) -> int:
        return -(-self.layout.nbytes // BUCKET_BYTES)

    @property
    def file_bytes(self) -> int:
        return self.start + self.layout.nbytes


def encode_head(manifest: Manifest) -> bytes:
    """Everything in front of the payload. Its length does not depend on the checksums."""
    header, base = manifest.header, manifest.base
    metadata = {
        "format": "pt",
        "lineage": f"{header.weights.lineage:012d}",
        "version": f"{header.weights.version:012d}",
        "nbytes": str(header.nbytes),
        "checksum": f"{header.checksum:016x}",
        "fingerprint": f"{header.fingerprint:016x}",
        "bucket_bytes": str(BUCKET_BYTES),
        "buckets": ",".join(f"{one:016x}" for one in manifest.buckets),
    }
    if base is not None:
        metadata |= {"base_lineage": f"{base.lineage:012d}", "base_version": f"{base.version:012d}"}
    tensors: dict[str, Any] = {
        entry.name: {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.offset, entry.offset + entry.nbytes],
        }
        for entry in manifest.layout.entries
    }
    text = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH.size + len(text)) % ALIGNMENT)
    return LENGTH.pack(len(text)) + text


def head_length(layout: Layout) -> int:
    """Bytes of the head of every whole set of this layout."""
    nothing = [0] * -(-layout.nbytes // BUCKET_BYTES)
    return len(encode_head(Manifest(Header(WeightsId(0, 0), layout.nbytes, 0, 0), nothing, layout)))


def head_bytes(prefix: bytes) -> int:
    """Length of the head, from the first 8 bytes of a file. Raises WeightsCorrupt where there is none."""
    if len(prefix) < LENGTH.size:
        raise WeightsCorrupt(f"{len(prefix)} bytes are too few for a header")
    (length,) = LENGTH.unpack(prefix[: LENGTH.size])
    if not 2 <= length <= MAX_HEAD:
        raise WeightsCorrupt("there is no weights header")
    return LENGTH.size + length


def decode_head(head: bytes) -> Manifest:
    """Raises WeightsCorrupt where the bytes are not the head of a file of weights."""
    size = head_bytes(head)
    if len(head) < size:
        raise WeightsCorrupt(f"{len(head)} bytes are too few for a header of {size}")
    try:
        table: dict[str, Any] = json.loads(head[LENGTH.size : size])
        metadata = table.pop("__metadata__")
        header = Header(
            WeightsId(int(metadata["lineage"]), int(metadata["version"])),
            int(metadata["nbytes"]),
            int(metadata["checksum"], 16),
            int(metadata["fingerprint"], 16),
        )
        base = None
        if "base_lineage" in metadata:
            base = WeightsId(int(metadata["base_lineage"]), int(metadata["base_version"]))
        entries = tuple(
            Entry(key, tuple(one["shape"]), DTYPES[one["dtype"]], one["data_offsets"][0]) for key, one in table.items()
        )
        buckets = [int(one, 16) for one in metadata["buckets"].split(",") if one]
        if int(metadata["bucket_bytes"]) != BUCKET_BYTES:
            raise ValueError(f"buckets of {metadata['bucket_bytes']} bytes")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise WeightsCorrupt(f"there is no weights header: {type(error).__name__} {error}") from None
    manifest = Manifest(header, buckets, Layout(entries), base, size)
    if (
        size % ALIGNMENT
        or len(buckets) != manifest.num_buckets
        or (base is None and combine(buckets) != header.checksum)
    ):
        raise WeightsCorrupt("the checksums in the header do not agree with each other")
    return manifest


def file_name(weights: WeightsId, base: WeightsId | None = None) -> str:
    """`weights-1-8.safetensors`; a delta is `weights-1-8-from-1-7.safetensors`."""
    start = "" if base is None else f"-from-{base.lineage}-{base.version}"
    return f"weights-{weights.lineage}-{weights.version}{start}.safetensors"
