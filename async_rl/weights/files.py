"""The learner's files of weights: complete before their names exist, in memory where there is some.

    /dev/shm/async-rl-<hash of the run directory>/weights-<lineage>-<version>.safetensors
    ....................................................................... -from-<lineage>-<version>.safetensors

    draft = files.draft()                          # in the thread that trains: fill draft.payload
    file = files.write(weights, draft)             # in another one: checksums, the head, the name

A snapshot is made in the file itself: nothing is copied again on this side. Processes of this host map the file
(shared_memory.py), others fetch it over HTTP (relay.py), a broadcast reads it. The newest two whole sets stay, so that
a receiver that was just told about one still finds it; one that is being read is not written again (slots.py). Where
there is no tmpfs, or it is full, the files are in `<run directory>/weights` instead.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from async_rl.models.parameters import Layout
from async_rl.weights.checksum import bucket_checksums, combine
from async_rl.weights.delta import Comparison, Delta, compare
from async_rl.weights.errors import WeightsError
from async_rl.weights.header import Header, name
from async_rl.weights.places import MEMORY, cleanup, disk_directory, memory_directory
from async_rl.weights.slots import PARTIAL, Slot, Slots
from async_rl.weights.weight_file import Manifest, encode_head, file_name, head_length
from async_rl.wire.messages import WeightsId

KEEP = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WeightFile:
    path: Path
    header: Header
    nbytes: int
    """Of the file."""
    checksums: Sequence[int]
    """Of the buckets of its payload."""
    base: WeightsId | None = None
    """A delta to these weights."""


@dataclass(slots=True, eq=False)
class Draft:
    """A file whose payload is being filled; after `write`, one that nobody may change."""

    payload: Tensor
    """[layout.nbytes] uint8, of the file itself"""
    slot: Slot
    slots: Slots
    file: WeightFile | None = None

    @property
    def written(self) -> bool:
        return self.file is not None


class WeightFiles:
    """`draft` and `write` each set, read `shelf` from any thread.

    full_every: at least every so many sets, there is no delta to the newest one; 1 = there are none at all.
    pinned: files in memory are page-locked, for weights that come from a GPU.
    """

    def __init__(
        self,
        run_directory: Path,
        layout: Layout,
        *,
        full_every: int = 1,
        pinned: bool = False,
        memory: Path = MEMORY,
    ) -> None:
        cleanup(run_directory, memory)  # what a former learner of this run left
        self._run_directory, self._memory, self._layout = run_directory, memory, layout
        self._full_every, self._pinned = full_every, pinned
        self._start = head_length(layout)
        self._lock = threading.Lock()
        """Who takes and gives back slots."""
        self._slots: dict[Path, Slots] = {}
        """directory -> its files"""
        self._whole: list[Draft] = []
        """The newest, written."""
        self._deltas: list[WeightFile] = []
        self.shelf: Sequence[WeightFile] = ()
        """What there is: deltas in the order in which they apply, then the newest set. Replaced, never changed."""

    def draft(self) -> Draft:
        """A file to fill and `write`. In any thread, also while another one is written.

        Raises:
            WeightsError: neither memory nor disk has room.
        """
        with self._lock:
            return self._in_some_directory("the next weights", self._draft)

    def write(self, weights: WeightsId, draft: Draft, checksums: Sequence[int] | None = None) -> WeightFile:
        """Complete it, once; all but the newest two may be overwritten. checksums: of the buckets, where known.

        Raises:
            WeightsError: it cannot be given its name.
        """
        if draft.file is not None:
            return draft.file
        buckets = checksums or bucket_checksums(draft.payload)
        header = Header(weights, self._layout.nbytes, combine(buckets), self._layout.fingerprint)
        head = encode_head(Manifest(header, buckets, self._layout))
        draft.slot.data[: self._start] = np.frombuffer(head, np.uint8)
        with self._lock:
            if draft.slot.gone:
                self._move(draft)
            path = draft.slot.path.with_name(file_name(weights))
            for same in [whole for whole in self._whole if whole.slot.path == path]:
                self._whole.remove(same)
                same.slots.drop(same.slot)
            try:
                draft.slot.finish(path)
            except OSError as error:
                draft.slots.drop(draft.slot)
                raise WeightsError(f"weights {name(weights)} could not be written: {path}: {error.strerror}") from error
            draft.file = WeightFile(path, header, draft.slot.data.size, buckets)
            self._whole.append(draft)
            for old in self._whole[:-KEEP]:
                old.slots.release(old.slot)
            del self._whole[:-KEEP]
        return draft.file

    def write_delta(self) -> Comparison | None:
        """What changed between the last two sets, as a file where that is worth it; None for the first set."""
        if self._full_every < 2 or len(self._whole) < 2:
            return None
        before, now = self._whole
        assert before.file is not None and now.file is not None
        base, header = before.file.header.weights, now.file.header
        comparison = compare(before.payload, now.payload, self._layout.width)
        delta = comparison.delta
        if delta is None or len(self._deltas) + 1 >= self._full_every:
            self._drop_deltas()
        else:
            self._deltas.append(
                self._in_some_directory(
                    f"weights {name(header.weights)}", lambda directory: _write_delta(directory, header, delta, base)
                )
            )
        return comparison

    def put_on_shelf(self) -> None:
        """What was written can be had from now on."""
        newest = self._whole[-1].file
        assert newest is not None
        self.shelf = (*self._deltas, newest)

    def close(self) -> None:
        self.shelf = ()
        with self._lock:
            for slots in self._slots.values():
                slots.close()
        cleanup(self._run_directory, self._memory)

    def _draft(self, directory: Path) -> Draft:
        size = self._start + self._layout.nbytes
        in_memory = directory != disk_directory(self._run_directory)
        slots = self._slots.setdefault(directory, Slots(directory, size, pinned=self._pinned and in_memory))
        slot = slots.take()
        return Draft(torch.from_numpy(slot.data)[self._start :], slot, slots)

    def _move(self, draft: Draft) -> None:
        """Somebody removed its file, as systemd does with what is in /dev/shm when a user logs out (RemoveIPC). Raises
        WeightsError: there is no room for another one."""
        made = self._in_some_directory("weights whose file was removed", self._draft)
        made.slot.data[:] = draft.slot.data
        draft.slots.drop(draft.slot)
        draft.payload, draft.slot, draft.slots = made.payload, made.slot, made.slots

    def _in_some_directory(self, what: str, make: Callable[[Path], T]) -> T:
        problems: list[str] = []
        for directory in (memory_directory(self._run_directory, self._memory), disk_directory(self._run_directory)):
            if directory is None:
                continue
            try:
                directory.mkdir(mode=0o700, exist_ok=True)
                return make(directory)
            except OSError as error:
                problems.append(f"{directory}: {error.strerror}")
        raise WeightsError(f"there is no room for {what}: {'; '.join(problems)}")

    def _drop_deltas(self) -> None:
        for old in self._deltas:
            old.path.unlink(missing_ok=True)
        self._deltas = []


def _write_delta(directory: Path, header: Header, delta: Delta, base: WeightsId) -> WeightFile:
    buckets = bucket_checksums(delta.payload)
    head = encode_head(Manifest(header, buckets, delta.layout, base))
    final = directory / file_name(header.weights, base)
    partial = directory / f"{PARTIAL}{final.name}"
    try:
        with partial.open("wb") as file:
            file.write(head)
            file.write(delta.payload.numpy().data)
        partial.rename(final)
    except OSError:
        with contextlib.suppress(OSError):  # the same trouble again
            partial.unlink()
        raise
    return WeightFile(final, header, len(head) + delta.layout.nbytes, buckets, base)
