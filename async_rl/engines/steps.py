"""How a decode step is computed: the seam between the batcher, which knows requests, and a device.

EagerSteps    on the lengths that sequences really have; the host looks at the result of every step at once
StaticSteps   engines.static_steps: on a few fixed shapes, so that a GPU replays what it once recorded
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from async_rl.engines.decoder import Decoder, DecoderWeights
from async_rl.engines.decoding import decode
from async_rl.engines.kv_cache import KVCache
from async_rl.engines.runs import Run, cut
from async_rl.engines.slots import Slots

RUN_ALLOWANCE = {"cpu": 64, "cuda": 1 << 40}
"""What one more attention call costs, in positions of one sequence; on a GPU more than it can save."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What stays the same from step to step while the same sequences are in the slots."""

    lengths: Sequence[int]
    """Of slots 0, 1, ...; counted from tick 0: add the tick."""
    runs: list[Run]
    """Of the same lengths."""
    tempered: bool
    """A temperature other than 1 occurs."""
    greedy: bool
    """A greedy sequence occurs."""


class Steps(Protocol):
    late: bool
    """The host looks at a step's flags when the next step is launched, which may sample one token too many."""

    def batch(self, lengths: Sequence[int], *, tempered: bool, greedy: bool) -> Batch: ...

    def __call__(self, weights: DecoderWeights, batch: Batch, tick: int) -> torch.Tensor:
        """Advance every slot of the batch by one token. Returns whether each is due, bool [N] (or more: those behind
        the batch say nothing), valid until the next call."""
        ...

    def swap(self, live: DecoderWeights | None, prepared: DecoderWeights) -> DecoderWeights:
        """The weights to step with from now on; None: there were none."""
        ...

    def release(self) -> None:
        """Hold nothing on the device until the next step."""
        ...


class EagerSteps:
    late = False

    def __init__(self, decoder: Decoder, cache: KVCache, slots: Slots) -> None:
        self._decoder, self._cache, self._slots = decoder, cache, slots
        self._allowance = RUN_ALLOWANCE.get(decoder.device.type, RUN_ALLOWANCE["cuda"])

    def batch(self, lengths: Sequence[int], *, tempered: bool, greedy: bool) -> Batch:
        return Batch(lengths, cut(lengths, self._allowance), tempered, greedy)

    def __call__(self, weights: DecoderWeights, batch: Batch, tick: int) -> torch.Tensor:
        runs = [Run(run.first, run.last, run.length + tick, run.ragged) for run in batch.runs]
        self._cache.reserve(max(run.length for run in runs))
        arguments = (self._decoder, weights, self._cache, self._slots, runs)
        return decode(*arguments, tempered=batch.tempered, greedy=batch.greedy)

    def swap(self, live: DecoderWeights | None, prepared: DecoderWeights) -> DecoderWeights:
        return prepared

    def release(self) -> None:
        pass
