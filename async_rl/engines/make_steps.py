"""Which way of computing decode steps fits a device and a model."""

from __future__ import annotations

import importlib.util
from typing import Literal

from async_rl.engines.decoder import Decoder
from async_rl.engines.kv_cache import KVCache
from async_rl.engines.slots import Slots
from async_rl.engines.static_steps import StaticSteps
from async_rl.engines.steps import EagerSteps, Steps

Kind = Literal["auto", "eager", "static", "fused"]
"""eager: torch operations on the lengths there are. static: torch operations of fixed shapes; a GPU records and replays
them. fused: the same with kernels of our own. auto: fused on a GPU if it can be, else static; eager on a CPU."""


def make_steps(kind: Kind, decoder: Decoder, cache: KVCache, slots: Slots) -> Steps:
    if kind == "auto":
        kind = "eager" if decoder.device.type != "cuda" else "fused" if can_fuse(decoder) else "static"
    if kind == "eager":
        return EagerSteps(decoder, cache, slots)
    if kind == "static":
        return StaticSteps(decoder, cache, slots)
    from async_rl.engines.fused import Fused  # needs Triton

    return StaticSteps(decoder, cache, slots, Fused(decoder, cache, slots))


def can_fuse(decoder: Decoder) -> bool:
    """Triton is there (it comes with torch's CUDA builds), and heads are of a size that its matrix products take."""
    size = decoder.head_size
    return importlib.util.find_spec("triton") is not None and size >= 16 and size & (size - 1) == 0
