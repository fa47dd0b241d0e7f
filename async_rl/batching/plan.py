"""Pure: rollouts -> micro-batches for every rank, decided once for all ranks, so that their counts are equal.

What a micro-batch costs is estimated as the sum of L + quadratic * L^2 over its sequences: attention makes one long
sequence dearer than many short ones of as many tokens. Ranks wait for each other at every micro-batch (FSDP gathers
there), so micro-batches of one index have to cost alike, not only the ranks in total.

Bins are filled longest-first, each rollout into the cheapest bin with room (LPT), which balances cost by itself; where
that does not fit into as few micro-batches as the cap allows, into the emptiest, and else into the fullest bin that has
room (best-fit-decreasing), which packs tightest.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

from async_rl.errors import UserError

MAX_FULL = 64
"""So many cheapest bins without room mean that cost and tokens do not go together: pack by tokens."""
SPARE_ROUNDS = 1.1
"""Groups stay together if that takes at most so many times the micro-batches per rank of rollouts packed one by one."""


def plan(
    lengths: Sequence[int],
    *,
    ranks: int,
    cap: int,
    groups: Sequence[int] | None = None,
    quadratic: float = 0.0,
) -> list[list[list[int]]]:
    """Pack under a strict cap into as few micro-batches as possible, of equal cost as far as possible.

    lengths: tokens of each rollout, prompt included. cap: tokens in one micro-batch. groups: of each rollout; what
    trains together shares its prompt: a group that fits under the cap stays together where that costs little.
    quadratic: cost of a token per token of its sequence, relative to what it costs without attention.

    Returns:
        [ranks][micro-batches] -> indices into `lengths`, ascending. Every index occurs once; every rank has equally
        many micro-batches; where there are fewer rollouts than ranks some are empty.

    Raises:
        UserError: a rollout is longer than the cap.
    """
    too_long = max(lengths, default=0)
    if too_long > cap:
        raise UserError(
            f"learner.microbatch_tokens = {cap}: a rollout of {too_long} tokens does not fit; write at least {too_long}"
        )
    costs = [length * (1 + quadratic * length) for length in lengths]
    single = [Unit(length, cost, (i,)) for i, (length, cost) in enumerate(zip(lengths, costs, strict=True))]
    bins = _pack(single, ranks, cap)
    if groups is not None:
        together = _pack(_units(lengths, costs, groups, cap), ranks, cap)
        if len(together) <= max(ranks, SPARE_ROUNDS * len(bins)) and all(one.indices for one in together):
            bins = together  # or else a rank would have nothing to do while another has two rollouts
    return _deal(bins, ranks)


class Unit(NamedTuple):
    """Rollouts that stay together."""

    tokens: int
    cost: float
    indices: tuple[int, ...]


@dataclass(slots=True)
class Bin:
    """A micro-batch to be."""

    tokens: int = 0
    cost: float = 0.0
    indices: list[int] = field(default_factory=list[int])

    def add(self, unit: Unit) -> None:
        self.tokens += unit.tokens
        self.cost += unit.cost
        self.indices.extend(unit.indices)


def _units(lengths: Sequence[int], costs: Sequence[float], groups: Sequence[int], cap: int) -> list[Unit]:
    together: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        together.setdefault(group, []).append(index)
    units: list[Unit] = []
    for indices in together.values():
        unit = Unit(sum(lengths[i] for i in indices), sum(costs[i] for i in indices), tuple(indices))
        units += [unit] if unit.tokens <= cap else [Unit(lengths[i], costs[i], (i,)) for i in indices]
    return units


def _pack(units: list[Unit], ranks: int, cap: int) -> list[Bin]:
    """Into a multiple of `ranks` bins, as few as can be found."""
    units = sorted(units, key=lambda unit: (-unit.tokens, unit.indices))
    rounds = max(1, ceil(sum(unit.tokens for unit in units) / (cap * ranks)))
    while True:
        count = rounds * ranks
        bins = _least_first(units, count, cap, by_cost=True) or _least_first(units, count, cap, by_cost=False)
        bins = bins or _best_fit(units, count, cap)
        if bins is not None:
            return bins
        rounds += 1


def _least_first(units: list[Unit], count: int, cap: int, *, by_cost: bool) -> list[Bin] | None:
    """Each into the cheapest (or the emptiest) bin that has room; None if one finds no room."""
    bins = [Bin() for _ in range(count)]
    heap: list[tuple[float, int]] = [(0, i) for i in range(count)]
    full: list[tuple[float, int]] = []
    for unit in units:
        while heap and bins[heap[0][1]].tokens + unit.tokens > cap:
            full.append(heapq.heappop(heap))
        if not heap or len(full) > MAX_FULL:
            return None
        _, chosen = heap[0]
        bins[chosen].add(unit)
        heapq.heapreplace(heap, (bins[chosen].cost if by_cost else bins[chosen].tokens, chosen))
        if full:  # a later unit is shorter: it may fit where this one did not
            for entry in full:
                heapq.heappush(heap, entry)
            full.clear()
    return bins


def _best_fit(units: list[Unit], count: int, cap: int) -> list[Bin] | None:
    """Each into the fullest bin that has room; None if one finds no room."""
    bins = [Bin() for _ in range(count)]
    room = [(cap, i) for i in range(count)]
    for unit in units:
        at = bisect_left(room, (unit.tokens, -1))
        if at == len(room):
            return None
        left, chosen = room.pop(at)
        bins[chosen].add(unit)
        insort(room, (left - unit.tokens, chosen))
    return bins


def _deal(bins: list[Bin], ranks: int) -> list[list[list[int]]]:
    """Bins of like cost to the same index, the dearest of them to the rank that has least so far."""
    planned: list[list[list[int]]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    ordered = sorted(bins, key=lambda one: (-one.cost, one.indices))
    for start in range(0, len(ordered), ranks):
        lightest = sorted(range(ranks), key=lambda rank: (total[rank], rank))
        for rank, one in zip(lightest, ordered[start : start + ranks], strict=True):
            planned[rank].append(sorted(one.indices))
            total[rank] += one.cost
    return planned
