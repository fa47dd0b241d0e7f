"""Decode steps of fixed shapes, so that a GPU replays a recording instead of being told every operation anew.

A batch of N sequences runs as one of the next larger bucket (1, 2, 4, ..., slots), its keys as a power of two of
positions, the rest masked. Slots behind the batch are free: their position is set to 0, and what is computed for them
is never looked at. Everything a step reads or writes stays at its address: weights are copied into the tensors of
those before them. Where an address does change (the KV cache grows, more stop tokens come), recordings are made anew.

The first step of a shape runs as it is, and warms up what must not happen while recording; the second is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from async_rl.engines.decoder import Decoder, DecoderWeights
from async_rl.engines.decoding import decode
from async_rl.engines.graphs import Graphs
from async_rl.engines.kv_cache import KVCache
from async_rl.engines.runs import Run
from async_rl.engines.slots import POSITION, Slots
from async_rl.engines.steps import Batch

if TYPE_CHECKING:
    from async_rl.engines.fused import Fused

LEAST_LENGTH = 256
"""Positions of the smallest bucket of lengths."""


class Recorder(Protocol):
    def __call__(self, key: object, work: Callable[[], None]) -> None: ...

    def clear(self) -> None: ...


class Direct:
    """Records nothing: a CPU, and a GPU that is to be debugged."""

    def __call__(self, key: object, work: Callable[[], None]) -> None:
        work()

    def clear(self) -> None:
        pass


class StaticSteps:
    late = True

    def __init__(self, decoder: Decoder, cache: KVCache, slots: Slots, fused: Fused | None = None) -> None:
        """fused: computes the step by kernels of our own; None: by torch operations."""
        self._decoder, self._cache, self._slots, self._fused = decoder, cache, slots, fused
        self._recorder: Recorder = Graphs(decoder.device) if decoder.device.type == "cuda" else Direct()
        self._addresses: object = None
        self._due: torch.Tensor | None = None
        self._count: torch.Tensor | None = None
        """Sequences in the batch, int64 [1]: read by the device."""
        self._counted = 0

    def batch(self, lengths: Sequence[int], *, tempered: bool, greedy: bool) -> Batch:
        return Batch(lengths, [], tempered, greedy)

    def __call__(self, weights: DecoderWeights, batch: Batch, tick: int) -> torch.Tensor:
        rows = bucket(len(batch.lengths), self._slots.count)
        length = bucket(max(LEAST_LENGTH, max(batch.lengths) + tick), self._cache.max_length)
        self._cache.reserve(length)
        due, count = self._settle_addresses(weights)
        if len(batch.lengths) != self._counted:
            self._counted = len(batch.lengths)
            count.fill_(self._counted)

        if self._fused is not None:
            fused = self._fused
            self._recorder((rows, length), lambda: fused(weights, rows, length, count, due))
            return due[: len(batch.lengths)]

        def work() -> None:
            position_N = self._slots.state[POSITION, :rows]
            position_N.mul_(self._slots.indices[:rows] < count)
            runs = [Run(0, rows, length, ragged=True)]
            arguments = (self._decoder, weights, self._cache, self._slots, runs)
            due[:rows] = decode(*arguments, tempered=batch.tempered, greedy=batch.greedy)

        self._recorder((rows, length, batch.tempered, batch.greedy), work)
        return due[: len(batch.lengths)]

    def swap(self, live: DecoderWeights | None, prepared: DecoderWeights) -> DecoderWeights:
        if live is None:
            return prepared
        live.copy_(prepared)
        if self._decoder.device.type == "cuda":  # other streams may get the memory of the prepared ones
            torch.cuda.current_stream(self._decoder.device).synchronize()
        return live

    def release(self) -> None:
        self._recorder.clear()
        self._due = self._count = None
        self._addresses, self._counted = None, 0

    def _settle_addresses(self, weights: DecoderWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """Flags and count, after recordings of other tensors than those in use are forgotten."""
        device = self._decoder.device
        if self._due is None or self._count is None:
            self._due = torch.zeros(self._slots.count, dtype=torch.bool, device=device)
            self._count = torch.zeros(1, dtype=torch.int64, device=device)
        addresses = (id(weights), self._cache.address, *self._slots.addresses())
        if addresses != self._addresses:
            self._recorder.clear()
            self._addresses = addresses
            if self._fused is not None:
                self._fused.settle(weights)
        return self._due, self._count


def bucket(number: int, most: int) -> int:
    """The next power of two, or `most`.

    >>> [bucket(n, 12) for n in (1, 3, 8, 9)]
    [1, 4, 8, 12]
    """
    return min(1 << (number - 1).bit_length(), most)
