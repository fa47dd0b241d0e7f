"""Weights between processes of one host: a new file in memory for each version, complete before its name exists.

    /dev/shm/async-rl-<hash of the run directory>/weights-<lineage>-<version>     header (header.py), then the payload

The sender keeps the newest two, so that a receiver that was just told about one still finds it. A mapped file stays
valid for as long as it is mapped, also after its name is gone. Where there is no tmpfs, or it is full, the files are in
`<run directory>/weights` instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from async_rl.engines.protocol import Snapshot
from async_rl.models.parameters import Layout
from async_rl.weights.errors import WeightsCorrupt, WeightsError, WeightsGone, WeightsMismatch
from async_rl.weights.header import SIZE, Header, name
from async_rl.wire.messages import WeightGroup, WeightsAnnounce, WeightsId

MEMORY = Path("/dev/shm")
KEEP = 2
PREFIX, PARTIAL = "weights-", ".partial-"


def memory_directory(run_directory: Path, memory: Path = MEMORY) -> Path | None:
    """This run's directory in memory, made if need be; None where there is no tmpfs we may write to."""
    directory = memory / f"async-rl-{_digest(run_directory)}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError:
        return None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return directory if ours and os.access(directory, os.W_OK) else None


def disk_directory(run_directory: Path) -> Path:
    """Where the files are when memory will not have them."""
    return run_directory / "weights"


def cleanup(run_directory: Path, memory: Path = MEMORY) -> None:
    """Remove every weights file of this run. For the end of a run; receivers keep what they have mapped."""
    shutil.rmtree(memory / f"async-rl-{_digest(run_directory)}", ignore_errors=True)
    shutil.rmtree(disk_directory(run_directory), ignore_errors=True)


class SharedMemorySender:
    """The learner's end; a publisher.Sender."""

    store = ""
    ready = True

    def __init__(self, run_directory: Path, layout: Layout, memory: Path = MEMORY) -> None:
        cleanup(run_directory, memory)  # what a former learner of this run left
        self._run_directory, self._memory, self._layout = run_directory, memory, layout
        self._files: list[Path] = []

    def send(self, weights: WeightsId, payload: Tensor, announce: Callable[[WeightsAnnounce], None]) -> None:
        """Write the file, announce it, drop all but the newest two.

        Raises:
            WeightsError: neither memory nor disk has room.
        """
        header = Header.of(weights, payload, self._layout)
        path = self._write(header, payload)
        announce(WeightsAnnounce(weights, "shared_memory", str(path), header.nbytes, header.checksum))
        self._files = [*(file for file in self._files if file != path), path]
        for old in self._files[:-KEEP]:
            old.unlink(missing_ok=True)
        self._files = self._files[-KEEP:]

    def form(self, group: WeightGroup) -> bool:
        """Files need no group. False: nothing has to be sent again."""
        return False

    def interrupt(self, epoch: int) -> None:
        """Writing to memory waits for nobody."""

    def close(self) -> None:
        cleanup(self._run_directory, self._memory)

    def _write(self, header: Header, payload: Tensor) -> Path:
        problems: list[str] = []
        for directory in (memory_directory(self._run_directory, self._memory), disk_directory(self._run_directory)):
            if directory is None:
                continue
            final = directory / f"{PREFIX}{header.weights.lineage}-{header.weights.version}"
            partial = directory / f"{PARTIAL}{final.name}"
            try:
                directory.mkdir(mode=0o700, exist_ok=True)
                with partial.open("wb") as file:
                    file.write(header.encode())
                    file.write(payload.numpy().data)
                partial.rename(final)
                return final
            except OSError as error:
                problems.append(f"{directory}: {error.strerror}")
                with contextlib.suppress(OSError):  # the same trouble again
                    partial.unlink()
        raise WeightsError(f"weights {name(header.weights)} could not be written: {'; '.join(problems)}")


def fetch(announce: WeightsAnnounce, layout: Layout) -> Snapshot:
    """The announced weights. The tensors are private views of the mapped file: writing to them changes nobody else's.

    Raises:
        WeightsGone: the file was replaced by a newer one.
        WeightsMismatch: it holds other weights than announced, or those of another model.
        WeightsCorrupt: a byte differs from what was written.
    """
    try:
        with open(announce.location, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
    except FileNotFoundError:
        raise WeightsGone(f"weights {name(announce.weights)} are gone: newer ones have taken their place") from None
    header = Header.decode(mapped[:SIZE])
    if header.weights != announce.weights:
        found = name(header.weights)
        raise WeightsMismatch(f"weights {name(announce.weights)} were announced, the file holds {found}")
    header.check_layout(layout)
    if size != SIZE + header.nbytes:
        raise WeightsCorrupt(f"weights {name(header.weights)}: {size} bytes, not {SIZE + header.nbytes}")
    payload = torch.from_numpy(np.frombuffer(mapped, np.uint8, offset=SIZE))
    header.check_payload(payload)
    return Snapshot(header.weights, layout.views(payload))


def _digest(run_directory: Path) -> str:
    return hashlib.sha256(str(run_directory.resolve()).encode()).hexdigest()[:16]
