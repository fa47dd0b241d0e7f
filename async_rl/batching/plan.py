"""Pure: rollouts -> micro-batches for every rank, decided once for all ranks, so that their counts are equal."""

from __future__ import annotations

from collections.abc import Sequence

from async_rl.errors import UserError


def plan(lengths: Sequence[int], *, ranks: int, cap: int) -> list[list[list[int]]]:
    """Pack by first-fit-decreasing under a strict cap, then deal the micro-batches to the ranks, heaviest first to
    the lightest rank.

    lengths: tokens of each rollout, prompt included. cap: tokens in one micro-batch.

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
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for b, load in enumerate(loads):
            if load + lengths[index] <= cap:
                bins[b].append(index)
                loads[b] += lengths[index]
                break
        else:
            bins.append([index])
            loads.append(lengths[index])
    while len(bins) % ranks:
        _split_heaviest(bins, loads, lengths)
    per_rank: list[list[list[int]]] = [[] for _ in range(ranks)]
    rank_load = [0] * ranks
    for b in sorted(range(len(bins)), key=lambda b: (-loads[b], b)):
        open_ranks = [r for r in range(ranks) if len(per_rank[r]) < len(bins) // ranks]
        rank = min(open_ranks, key=lambda r: (rank_load[r], r))
        per_rank[rank].append(sorted(bins[b]))
        rank_load[rank] += loads[b]
    return per_rank


def _split_heaviest(bins: list[list[int]], loads: list[int], lengths: Sequence[int]) -> None:
    """One micro-batch more, by halving the tokens of the heaviest one that has two rollouts (else an empty one)."""
    heaviest = max(range(len(bins)), key=lambda b: (len(bins[b]) > 1, loads[b]))
    whole = bins[heaviest]
    kept: list[int] = []
    moved: list[int] = []
    for index in whole:  # longest first: greedy halves
        half = kept if sum(lengths[i] for i in kept) <= sum(lengths[i] for i in moved) else moved
        half.append(index)
    bins[heaviest], loads[heaviest] = kept, sum(lengths[i] for i in kept)
    bins.append(moved)
    loads.append(sum(lengths[i] for i in moved))
