"""The learner's files of weights: complete before their names exist, in memory where there is some.

    /dev/shm/async-rl-<hash of the run directory>/weights-<lineage>-<version>.safetensors
    ....................................................................... -from-<lineage>-<version>.safetensors

Processes of this host map them (shared_memory.py), others fetch them over HTTP (relay.py). The newest two whole sets
stay, so that a receiver that was just told about one still finds it; one that is being read is not written again
(slots.py). Where there is no tmpfs, or it is full, the files are in `<run directory>/weights` instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from async_rl.models.parameters import Layout
from async_rl.weights.checksum import BUCKET_BYTES, combine, for_each
from async_rl.weights.delta import Comparison, Delta, compare
from async_rl.weights.errors import WeightsError
from async_rl.weights.header import Header, name
from async_rl.weights.places import MEMORY, cleanup, disk_directory, memory_directory
from async_rl.weights.slots import PARTIAL, Slot, Slots
from async_rl.weights.weight_file import Manifest, encode_head, file_name
from async_rl.wire.messages import WeightsId

KEEP = 2
PIECE = 1 << 19
"""Bytes copied and then hashed, which finds them in the cache: together 1.2 times the cost of copying."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WeightFile:
    path: Path
    header: Header
    nbytes: int
    """Of the file."""
    checksums: tuple[int, ...]
    """Of the buckets of its payload."""
    base: WeightsId | None = None
    """A delta to these weights."""


class WeightFiles:
    """`write` each set, read `shelf` from any thread.

    full_every: at least every so many sets, there is no delta to the newest one; 1 = there are none at all.
    """

    def __init__(self, run_directory: Path, layout: Layout, *, full_every: int = 1, memory: Path = MEMORY) -> None:
        cleanup(run_directory, memory)  # what a former learner of this run left
        self._run_directory, self._memory, self._layout = run_directory, memory, layout
        self._full_every = full_every
        self._slots: dict[Path, Slots] = {}
        """directory -> its files"""
        self._whole: list[_Whole] = []
        self._deltas: list[WeightFile] = []
        self.shelf: Sequence[WeightFile] = ()
        """What there is: deltas in the order in which they apply, then the newest set. Replaced, never changed."""

    def write(self, weights: WeightsId, payload: Tensor) -> WeightFile:
        """A complete file of these weights ([layout.nbytes] uint8). All but the newest two may be overwritten.

        Raises:
            WeightsError: neither memory nor disk has room.
        """
        written = self._in_some_directory(weights, lambda directory: self._write_whole(directory, weights, payload))
        self._whole = [*(whole for whole in self._whole if whole.file.path != written.file.path), written][-KEEP:]
        return written.file

    def write_delta(self) -> Comparison | None:
        """What changed between the last two sets, as a file where that is worth it; None for the first set."""
        if self._full_every < 2 or len(self._whole) < 2:
            return None
        before, now = self._whole
        start, base = before.payload, before.file.header.weights
        comparison = compare(start, now.payload, self._layout.width)
        delta, header = comparison.delta, now.file.header
        if delta is None or len(self._deltas) + 1 >= self._full_every or base == header.weights:
            self._drop_deltas()
        else:
            written = self._in_some_directory(
                header.weights, lambda directory: _write_delta(directory, header, delta, base)
            )
            self._deltas.append(written)
        return comparison

    def put_on_shelf(self) -> None:
        """What was written can be had from now on."""
        self.shelf = (*self._deltas, self._whole[-1].file)

    def close(self) -> None:
        self.shelf = ()
        for slots in self._slots.values():
            slots.close()
        cleanup(self._run_directory, self._memory)

    def _write_whole(self, directory: Path, weights: WeightsId, payload: Tensor) -> _Whole:
        blank = Header(weights, self._layout.nbytes, 0, self._layout.fingerprint)
        manifest = _manifest(blank, self._layout)
        start = len(encode_head(manifest))
        size = start + self._layout.nbytes
        slots = self._slots.setdefault(directory, Slots(directory, size))
        slot = slots.begin([whole.slot for whole in self._whole])
        try:
            header, checksums = _fill(slot.data, start, manifest, payload)
            slot.finish(directory / file_name(weights))
        except OSError:
            slots.drop(slot)
            raise
        data = torch.from_numpy(slot.data)[start:]
        return _Whole(WeightFile(slot.path, header, size, checksums), slot, data)

    def _in_some_directory(self, weights: WeightsId, write: Callable[[Path], T]) -> T:
        problems: list[str] = []
        for directory in (memory_directory(self._run_directory, self._memory), disk_directory(self._run_directory)):
            if directory is None:
                continue
            try:
                directory.mkdir(mode=0o700, exist_ok=True)
                return write(directory)
            except OSError as error:
                problems.append(f"{directory}: {error.strerror}")
        raise WeightsError(f"weights {name(weights)} could not be written: {'; '.join(problems)}")

    def _drop_deltas(self) -> None:
        for old in self._deltas:
            old.path.unlink(missing_ok=True)
        self._deltas = []


@dataclass(frozen=True, slots=True)
class _Whole:
    file: WeightFile
    slot: Slot
    payload: Tensor
    """[nbytes] uint8, of the file itself"""


def _manifest(header: Header, layout: Layout, base: WeightsId | None = None) -> Manifest:
    """Before the checksums are known."""
    return Manifest(header, [0] * -(-layout.nbytes // BUCKET_BYTES), layout, base)


def _fill(
    out: npt.NDArray[np.uint8], start: int, manifest: Manifest, payload: Tensor
) -> tuple[Header, tuple[int, ...]]:
    """The whole file, whose payload begins at `start`; its header and the checksums of the buckets. Copied and hashed
    piece by piece; the head, whose checksums are known last, comes last."""
    source = payload.numpy()

    def fill(first: int) -> int:
        digest = xxhash.xxh3_64()
        end = min(first + BUCKET_BYTES, manifest.layout.nbytes)
        for at in range(first, end, PIECE):
            piece = source[at : min(at + PIECE, end)]
            np.copyto(out[start + at : start + at + piece.size], piece)
            digest.update(piece.data)
        return digest.intdigest()

    buckets = for_each(range(0, manifest.layout.nbytes, BUCKET_BYTES), fill)
    header = manifest.header
    if manifest.base is None:
        header = Header(header.weights, header.nbytes, combine(buckets), header.fingerprint)
    head = encode_head(Manifest(header, buckets, manifest.layout, manifest.base))
    out[:start] = np.frombuffer(head, np.uint8)
    return header, tuple(buckets)


def _write_delta(directory: Path, header: Header, delta: Delta, base: WeightsId) -> WeightFile:
    manifest = _manifest(header, delta.layout, base)
    start = len(encode_head(manifest))
    data = np.empty(start + delta.layout.nbytes, np.uint8)
    _, checksums = _fill(data, start, manifest, delta.payload)
    final = directory / file_name(header.weights, base)
    partial = directory / f"{PARTIAL}{final.name}"
    try:
        partial.write_bytes(data.data)
        partial.rename(final)
    except OSError:
        with contextlib.suppress(OSError):  # the same trouble again
            partial.unlink()
        raise
    return WeightFile(final, header, data.size, checksums, base)
