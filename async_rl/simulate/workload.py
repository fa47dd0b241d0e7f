"""Pure: how long every rollout of a simulation is and what it earns, from (seed, group, member) alone.

A rollout that is leased again, at another generator or in another arm, is as long as it was.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from async_rl.config import Simulate

Floats: TypeAlias = npt.NDArray[np.float64]
CHUNK_GROUPS = 256
"""Groups that are drawn together: a generator of random numbers costs more than what it draws."""


class GroupDraw(NamedTuple):
    tokens: list[int]
    """[G] wire tokens"""
    rewards: list[float]
    """[G] 0 or 1; how often 1 differs between groups, so that not all of them are uniform"""


class Workload:
    """Lengths are lognormal with mean `mean_tokens`, cut at `cap` means; `between` of the variance of their logarithm
    is common to a group."""

    def __init__(self, cluster: Simulate, *, group_size: int, seed: int) -> None:
        self._cluster, self._size, self._seed = cluster, group_size, seed
        self._chunks: dict[int, list[GroupDraw]] = {}

    def group(self, group_id: int) -> GroupDraw:
        chunk, index = divmod(group_id, CHUNK_GROUPS)
        drawn = self._chunks.get(chunk)
        if drawn is None:
            drawn = self._chunks[chunk] = self._draw(chunk)
        return drawn[index]

    def _draw(self, chunk: int) -> list[GroupDraw]:
        rng = np.random.default_rng((self._seed, chunk))
        own, common = rng.standard_normal((CHUNK_GROUPS, self._size)), rng.standard_normal((CHUNK_GROUPS, 1))
        difficulty, luck = rng.random((CHUNK_GROUPS, 1)), rng.random((CHUNK_GROUPS, self._size))
        tokens_GM = wire_tokens(self._cluster, own, common)
        rewards_GM = np.where(luck < difficulty, 1.0, 0.0)
        return [GroupDraw(*pair) for pair in zip(tokens_GM.tolist(), rewards_GM.tolist(), strict=True)]


def wire_tokens(cluster: Simulate, own: Floats, common: Floats) -> npt.NDArray[np.int64]:
    """Lengths from standard normal draws: of each rollout, and of its group."""
    normal = (1 - cluster.between) ** 0.5 * own + cluster.between**0.5 * common
    means = np.minimum(np.exp(cluster.sigma * normal - cluster.sigma**2 / 2), cluster.cap)
    return np.maximum(1, np.rint(means * cluster.mean_tokens / cluster.block_tokens)).astype(np.int64)
