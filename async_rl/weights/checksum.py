"""Pure: checksums of weights, bucket by bucket, at the speed of memory.

XXH3-64 notices every flipped byte with a chance of error of 2^-64, at ten times the speed of CRC-32, without the GIL.
The checksum of a payload is the hash of its buckets' hashes: buckets are checked while others are on their way, and a
damaged one has a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash
from torch import Tensor

BUCKET_BYTES = 16 << 20
"""Also what one broadcast moves. With gloo, a few at a time are as fast as one of everything."""


MANY = 8
"""Buckets, from which on a second thread is worth starting."""


def bucket_checksum(bucket: Tensor | memoryview) -> int:
    """Of a contiguous CPU buffer."""
    data = bucket.detach().numpy().data if isinstance(bucket, Tensor) else bucket
    return xxhash.xxh3_64_intdigest(data)


def combine(buckets: Iterable[int]) -> int:
    """The checksum of a payload, from those of its buckets in order."""
    return xxhash.xxh3_64_intdigest(encode(buckets))


def encode(buckets: Iterable[int]) -> bytes:
    """Little-endian, 8 bytes each: as they travel."""
    return np.fromiter(buckets, "<u8").tobytes()


def decode(data: bytes) -> list[int]:
    return np.frombuffer(data, "<u8").tolist()


def checksum(payload: Tensor) -> int:
    """Of a whole payload on the CPU, [n] uint8."""
    return combine(bucket_checksums(payload))


def bucket_checksums(payload: Tensor) -> list[int]:
    """Of every bucket of a payload on the CPU, [n] uint8; where there are many, two threads do it."""
    buckets = payload.split(BUCKET_BYTES)
    if len(buckets) < MANY:
        return [bucket_checksum(bucket) for bucket in buckets]
    with ThreadPoolExecutor(2, "weights-buckets") as threads:
        return list(threads.map(bucket_checksum, buckets))
