"""The learner's end of shared files: a few that are written again and again, each by one writer or read by many.

Pages that exist cost nothing but what is written; new ones cost several copies, in the writer and in every reader. So
a file is written in place when nobody reads it. Readers hold a shared flock on it for as long as they use it, and the
kernel gives it back when they die. A file has its final name only while it is complete: it is renamed before it is
touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

PARTIAL = ".partial-"
"""Prefix of the name of a file that is being written."""
SPARE = 1
"""Files beyond those in use that stay for the next version."""
PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every device."""


class Slot:
    """One file, mapped for writing."""

    def __init__(self, directory: Path, nbytes: int, number: int, *, pinned: bool) -> None:
        """Raises OSError where there is no room: it is taken at once, not when a page is first touched."""
        room = os.statvfs(directory)
        if room.f_bavail * room.f_frsize < nbytes:  # tmpfs would fill up with zeros first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.path = directory / f"{PARTIAL}slot-{number}"
        self.taken = False
        """It is being written, or has to stay as it is."""
        self._pinned = False
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(self._descriptor, 0, nbytes)
            self._mapped = mmap.mmap(self._descriptor, nbytes)
        except OSError:
            self.drop()
            raise
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._mapped, np.uint8)
        """[nbytes], of the file itself"""
        self._pinned = pinned and _pin(self.data)

    @property
    def gone(self) -> bool:
        """We dropped it, or somebody removed it: it cannot be given a name any more."""
        return self._descriptor < 0 or os.fstat(self._descriptor).st_nlink == 0

    def begin(self) -> bool:
        """For writing, if nobody reads it: then it has no final name until `finish`."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        partial = self.path.with_name(f"{PARTIAL}{self.path.name.removeprefix(PARTIAL)}")
        self.path.rename(partial)
        self.path = partial
        return True

    def finish(self, path: Path) -> None:
        """It is complete and has this name; it may be read."""
        self.path.rename(path)
        self.path = path
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def drop(self) -> None:
        """Its name goes; whoever reads it still can."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1
        if self._pinned:
            _runtime().cudaHostUnregister(self.data.ctypes.data)


class Slots:
    """Files of one size in one directory. pinned: their memory is page-locked, so that a GPU copies into it."""

    def __init__(self, directory: Path, nbytes: int, *, pinned: bool = False) -> None:
        self._directory, self._nbytes, self._pinned = directory, nbytes, pinned
        self._all: list[Slot] = []
        self._made = 0

    def take(self) -> Slot:
        """A file to write. `finish` it, and `release` it once it may be written again; or `drop` it here.

        Raises OSError: no room.
        """
        for slot in [slot for slot in self._all if not slot.taken and slot.gone]:
            self.drop(slot)
        idle = [slot for slot in self._all if not slot.taken and slot.begin()]
        for slot in idle[1 + SPARE :]:
            self.drop(slot)
        slot = idle[0] if idle else self._new()
        slot.taken = True
        return slot

    def release(self, slot: Slot) -> None:
        """It may be written again as soon as nobody reads it."""
        slot.taken = False

    def drop(self, slot: Slot) -> None:
        """Nothing to do where it was dropped before."""
        if slot in self._all:
            self._all.remove(slot)
            slot.drop()

    def close(self) -> None:
        for slot in self._all:
            slot.drop()
        self._all = []

    def _new(self) -> Slot:
        self._made += 1
        slot = Slot(self._directory, self._nbytes, self._made, pinned=self._pinned)
        self._all.append(slot)
        slot.begin()
        return slot


def _runtime() -> Any:
    return torch.cuda.cudart()


def _pin(data: npt.NDArray[np.uint8]) -> bool:
    """Whether CUDA could lock these pages. If not, it copies to them a little slower."""
    if int(_runtime().cudaHostRegister(data.ctypes.data, data.size, PORTABLE)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # the next operation would raise the error that was returned
        torch.zeros(1, device="cuda")
    return False


class Held:
    """A complete file which nobody writes before `close`, or before this is collected."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.close = weakref.finalize(self, _release, descriptor)


def _release(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not do: a mapping has its own copy of the descriptor
    os.close(descriptor)


def hold(path: Path) -> Held | None:
    """None where the file is gone, or is being written for another version. One reader holds it once."""
    try:
        held = Held(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        fcntl.flock(held.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(held.descriptor)):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    return None
