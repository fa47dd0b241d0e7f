"""Weights between processes of one host: the learner's file in memory (files.py), mapped and held while it is used."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from async_rl.engines.protocol import Snapshot
from async_rl.models.parameters import Layout
from async_rl.weights.errors import WeightsCorrupt, WeightsGone, WeightsMismatch
from async_rl.weights.header import name
from async_rl.weights.slots import Held, hold
from async_rl.weights.weight_file import Manifest, decode_head, head_bytes
from async_rl.wire.messages import WeightsAnnounce

REMEMBERED = 6
"""Mappings kept for the next version in the same file. The learner uses three in turn, more while some are held."""


class SharedMemoryReceiver:
    """The generator's end. Mappings are kept: the learner writes into the same files again, once nobody holds them."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._mapped: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
        """(device, inode) -> the file"""

    def fetch(self, announce: WeightsAnnounce) -> Snapshot:
        """The announced weights, whose file is held for as long as a tensor of them is referenced. The tensors are
        private: writing to them changes nobody else's.

        Raises:
            WeightsGone: the file was replaced by a newer one.
            WeightsMismatch: it holds other weights than announced, or those of another model.
            WeightsCorrupt: a byte differs from what was written.
        """
        held = hold(Path(announce.location))
        if held is None:
            raise WeightsGone(f"weights {name(announce.weights)} are gone: newer ones have taken their place")
        status = os.fstat(held.descriptor)
        key = (status.st_dev, status.st_ino)
        known = self._mapped.get(key)
        if known is not None and known.size == status.st_size:
            try:
                return self._read(announce, known, held)
            except WeightsCorrupt:  # perhaps only our copy of a page, which someone here has written to
                del self._mapped[key]
        data = _map(held.descriptor, status.st_size)
        snapshot = self._read(announce, data, held)
        self._mapped[key] = data
        while len(self._mapped) > REMEMBERED:
            del self._mapped[next(iter(self._mapped))]
        return snapshot

    def _read(self, announce: WeightsAnnounce, data: npt.NDArray[np.uint8], held: Held) -> Snapshot:
        manifest = _checked(announce, data, self._layout)
        payload = data[manifest.start :].view(_Payload)
        payload.held = held
        tensor = torch.from_numpy(payload)
        manifest.header.check_payload(tensor)
        return Snapshot(manifest.header.weights, self._layout.views(tensor))


class _Payload(np.ndarray[tuple[int], np.dtype[np.uint8]]):
    """Keeps its file held for as long as a tensor looks at it."""

    held: Held


def _map(descriptor: int, size: int) -> npt.NDArray[np.uint8]:
    if size == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY), np.uint8)


def _checked(announce: WeightsAnnounce, data: npt.NDArray[np.uint8], layout: Layout) -> Manifest:
    manifest = decode_head(data[: head_bytes(data[:8].tobytes())].tobytes())
    header = manifest.header
    if header.weights != announce.weights:
        found = name(header.weights)
        raise WeightsMismatch(f"weights {name(announce.weights)} were announced, the file holds {found}")
    header.check_layout(layout)
    if data.size != manifest.file_bytes:
        raise WeightsCorrupt(f"weights {name(header.weights)}: {data.size} bytes, not {manifest.file_bytes}")
    return manifest
