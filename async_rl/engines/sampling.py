"""Pure: randomness without state. Token t of a rollout is drawn with one uniform, a hash of (seed, rollout, t); where
the environment asks the policy several times, each call has a stream of its own.

So a resumed rollout, a segment that is generated again and a run that is repeated see the same uniforms, whatever else
is in the batch. The hash is SplitMix64 (Steele, Lea & Flood 2014, https://doi.org/10.1145/2714064.2660195) read at any
position: its n-th output under seed s is `mix(s + n * GOLDEN)`.

    key = rollout_key(seed=1, rollout_id=7)
    uniform(key, 0)  # 0.794..., for the first token

`engines.draw.uniforms` is the same for torch tensors, bit for bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, odd."""
MULTIPLY_1, MULTIPLY_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SHIFT_1, SHIFT_2, SHIFT_3 = 30, 27, 31
MASK = (1 << 64) - 1
CALL_STREAM = 0x43414C4C
UNIFORM_BITS = 53
"""Every uniform is a multiple of 2^-53 below 1: exact in a double."""


def mix(z: int) -> int:
    """SplitMix64's finaliser, a bijection of the 64-bit integers."""
    z &= MASK
    z = ((z ^ (z >> SHIFT_1)) * MULTIPLY_1) & MASK
    z = ((z ^ (z >> SHIFT_2)) * MULTIPLY_2) & MASK
    return z ^ (z >> SHIFT_3)


def rollout_key(seed: int, rollout_id: int) -> int:
    """64-bit key of a rollout; no two rollouts of a run share one."""
    return mix(mix(seed + GOLDEN) + rollout_id * GOLDEN)


def call_key(key: int, call: int) -> int:
    """Key of one call of the policy within a rollout; the first one has the rollout's own."""
    return key if call == 0 else mix(key ^ mix(CALL_STREAM + call * GOLDEN))


def uniform(key: int, position: int) -> float:
    """In [0, 1)."""
    return (mix(key + (position + 1) * GOLDEN) >> (64 - UNIFORM_BITS)) * 2.0**-UNIFORM_BITS


def uniforms(key: int, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """`uniform` at every position."""
    z = np.uint64(key & MASK) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(SHIFT_1))) * np.uint64(MULTIPLY_1)
    z = (z ^ (z >> np.uint64(SHIFT_2))) * np.uint64(MULTIPLY_2)
    z = z ^ (z >> np.uint64(SHIFT_3))
    return (z >> np.uint64(64 - UNIFORM_BITS)).astype(np.float64) * 2.0**-UNIFORM_BITS
