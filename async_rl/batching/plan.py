"""Pure: rollouts -> micro-batches for every rank, decided once for all ranks, so that their counts are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from async_rl.errors import UserError


def plan(lengths: Sequence[int], *, ranks: int, cap: int, groups: Sequence[int] | None = None) -> list[list[list[int]]]:
    """Pack by first-fit-decreasing under a strict cap, then deal the micro-batches to the ranks, heaviest first to
    the lightest rank.

    lengths: tokens of each rollout, prompt included. cap: tokens in one micro-batch. groups: of each rollout; a group
    that fits under the cap stays together as far as the counts allow, because what trains together shares its prompt.

    Returns:
        [ranks][micro-batches] -> indices into `lengths`, ascending. Every index occurs once; every rank has equally
        many micro-batches (short of that, bins are split); where there are fewer rollouts than ranks some are empty.

    Raises:
        UserError: a rollout is longer than the cap.
    """
    too_long = max(lengths, default=0)
    if too_long > cap:
        raise UserError(
            f"learner.microbatch_tokens = {cap}: a rollout of {too_long} tokens does not fit; write at least {too_long}"
        )
    bins: list[Bin] = []
    for unit in sorted(_units(lengths, groups, cap), key=lambda unit: (-unit.tokens, unit.indices)):
        for candidate in bins:
            if candidate.tokens + unit.tokens <= cap:
                candidate.units.append(unit)
                break
        else:
            bins.append(Bin([unit]))
    while len(bins) % ranks:
        _split_heaviest(bins, lengths)
    per_rank: list[list[Bin]] = [[] for _ in range(ranks)]
    for one in sorted(bins, key=lambda one: (-one.tokens, one.indices)):
        open_ranks = [r for r in range(ranks) if len(per_rank[r]) < len(bins) // ranks]
        lightest = min(open_ranks, key=lambda r: (sum(has.tokens for has in per_rank[r]), r))
        per_rank[lightest].append(one)
    return [[one.indices for one in chosen] for chosen in per_rank]


class Unit(NamedTuple):
    """Rollouts that stay together."""

    tokens: int
    indices: list[int]


@dataclass(slots=True)
class Bin:
    """A micro-batch to be."""

    units: list[Unit]

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.units)

    @property
    def indices(self) -> list[int]:
        return sorted(index for unit in self.units for index in unit.indices)


def _units(lengths: Sequence[int], groups: Sequence[int] | None, cap: int) -> list[Unit]:
    together: dict[int, list[int]] = {}
    for index in range(len(lengths)):
        together.setdefault(index if groups is None else groups[index], []).append(index)
    units: list[Unit] = []
    for indices in together.values():
        tokens = sum(lengths[i] for i in indices)
        units += [Unit(tokens, indices)] if tokens <= cap else [Unit(lengths[i], [i]) for i in indices]
    return units


def _split_heaviest(bins: list[Bin], lengths: Sequence[int]) -> None:
    """One micro-batch more, by halving the tokens of the heaviest one that has two rollouts (else an empty one)."""
    heaviest = max(bins, key=lambda one: (len(one.indices) > 1, one.tokens))
    units = heaviest.units
    if len(units) == 1:  # a single group: there is nothing else to divide
        units = [Unit(lengths[i], [i]) for i in units[0].indices]
    kept, moved = Bin([]), Bin([])
    for unit in sorted(units, key=lambda unit: (-unit.tokens, unit.indices)):  # longest first: greedy halves
        (kept if kept.tokens <= moved.tokens else moved).units.append(unit)
    heaviest.units = kept.units
    bins.append(moved)
