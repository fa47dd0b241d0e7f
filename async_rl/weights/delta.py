"""Pure: only the elements that changed between two sets of weights. Lossless: elements are compared as bits.

The payload is seen as elements of the layout's narrowest dtype, in blocks of 65536. A delta has, for each block, how
many elements changed in it; then for each changed element its place in its block and its new bits. n changed elements
of w bytes cost (2 + w) n bytes: less than the whole while n / N < w / (2 + w), half for bfloat16, two thirds for
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_rl.models.parameters import Layout
from async_rl.weights.errors import WeightsCorrupt

BLOCK = 1 << 16
"""Elements: a place within one is 16 bits."""
CHUNK = 64 * BLOCK
"""Elements compared at a time, so that what is made on the way stays in the cache."""
WORTH = 0.7
"""A delta is worth its trouble below this share of the bytes of the whole."""

Ints = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class Delta:
    layout: Layout
    payload: Tensor
    """[layout.nbytes] uint8: `counts` [blocks] uint32, `places` [n] uint16, `values` [n, width] uint8"""


@dataclass(frozen=True, slots=True)
class Comparison:
    changed: int
    """Elements."""
    elements: int
    """Of the whole."""
    delta: Delta | None
    """None where it would not be worth its trouble."""

    @property
    def fraction(self) -> float:
        return self.changed / self.elements


def compare(base: Tensor, new: Tensor, width: int) -> Comparison:
    """base, new: [n] uint8 on the CPU, of one layout whose narrowest dtype has `width` bytes."""
    before, after = _elements(base, width), _elements(new, width)
    most = int(WORTH * new.numel() / (2 + width))
    counts = np.zeros(-(-after.size // BLOCK), np.uint32)
    places: list[Ints] = []
    values: list[Ints] = []
    changed = 0
    for start in range(0, after.size, CHUNK):
        differs = before[start : start + CHUNK] != after[start : start + CHUNK]
        found = int(np.count_nonzero(differs))
        changed += found
        if changed > most:
            places.clear()
            values.clear()
        elif found:
            where = np.flatnonzero(differs)
            per_block = np.bincount(where >> 16, minlength=-(-differs.size // BLOCK))
            counts[start // BLOCK :][: per_block.size] = per_block
            places.append((where & (BLOCK - 1)).astype(np.uint16))
            values.append(after[start : start + CHUNK][where])
    delta = None if changed > most else _pack(counts, places, values, changed, width)
    return Comparison(changed, after.size, delta)


def apply(delta: Delta, base: Tensor, into: Tensor, width: int) -> Tensor:
    """`base` with the changes, in `into`, which may be `base` itself; returns it. The caller verifies its checksum.

    Raises:
        WeightsCorrupt: the delta is of weights of another size.
    """
    views = delta.layout.views(delta.payload)
    if views.keys() != {"counts", "places", "values"}:
        raise WeightsCorrupt(f"a delta holds counts, places and values, not {', '.join(views)}")
    counts, places = views["counts"].numpy(), views["places"].numpy()
    elements = _elements(into, width)
    values = views["values"].numpy().reshape(-1).view(elements.dtype)
    if counts.size != -(-elements.size // BLOCK) or int(counts.sum()) != places.size or places.size != values.size:
        raise WeightsCorrupt("the delta is of weights of another size")
    if into is not base:
        into.copy_(base)
    for blocks, first, last in _groups(counts):
        base_places = np.repeat(np.arange(blocks.start, blocks.stop, dtype=np.int64) * BLOCK, counts[blocks])
        where = base_places + places[first:last]
        if last > first and int(where[-1]) >= elements.size:
            raise WeightsCorrupt("the delta changes elements beyond the end")
        elements[where] = values[first:last]
    return into


def _groups(counts: npt.NDArray[np.uint32]) -> Iterator[tuple[slice, int, int]]:
    """Blocks of one chunk at a time, and which of the changes are theirs."""
    step = CHUNK // BLOCK
    first = 0
    for start in range(0, counts.size, step):
        blocks = slice(start, min(start + step, counts.size))
        last = first + int(counts[blocks].sum())
        yield blocks, first, last
        first = last


def _pack(counts: npt.NDArray[np.uint32], places: list[Ints], values: list[Ints], changed: int, width: int) -> Delta:
    layout = Layout.pack_up(
        [
            ("counts", (counts.size,), torch.uint32),
            ("places", (changed,), torch.uint16),
            ("values", (changed, width), torch.uint8),
        ]
    )
    payload = torch.empty(layout.nbytes, dtype=torch.uint8)
    views = layout.views(payload)
    views["counts"].numpy()[:] = counts
    if changed:
        views["places"].numpy()[:] = np.concatenate(places)
        views["values"].numpy()[:] = np.concatenate(values).view(np.uint8).reshape(-1, width)
    return Delta(layout, payload)


def _elements(payload: Tensor, width: int) -> Ints:
    return payload.numpy().view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width])
