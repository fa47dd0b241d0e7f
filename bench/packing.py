"""How full and how even micro-batches are: our planner beside round-robin, first-fit-decreasing and the rule of verl.

    make bench-packing

A step's time is that of the slowest rank at every micro-batch, times how many there are. Columns: the fewest possible
micro-batches per rank, ceil(T / (cap * ranks)), as a share of how many there are; FLOPs of the dearest rank over the
mean; the same summed over micro-batches, at each of which all ranks wait for each other; micro-batches over the cap
(they would not fit into memory); CPU milliseconds per 100 sequences. FLOPs of a sequence: L + quadratic * L^2, for a
1.5B model.

verl (0.9, `rearrange_micro_batches` over `get_seqlen_balanced_partitions`): ceil(T_rank / cap) micro-batches, the most
of any rank, filled by the largest differencing method of Karmarkar and Karp on FLOPs, without regard to the cap; ranks
by the same method with equally many sequences each.
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from stamp import commit

from async_rl.batching.plan import plan

QUADRATIC = 6 * 28 * 1536 / (6 * 1.54e9)
"""Attention costs 6 * layers * hidden * L^2 FLOPs forward and backward (causal), everything else 6 * parameters * L."""
SEQUENCES = 10_000
Plan: TypeAlias = list[list[list[int]]]
Planner: TypeAlias = Callable[[list[int], int, int], Plan]


def cost(length: int) -> float:
    return length * (1 + QUADRATIC * length)


def lengths(kind: str, seed: int) -> list[int]:
    """Lognormal, or four short sequences to each long one."""
    rng = np.random.default_rng(seed)
    if kind == "lognormal":
        drawn = np.exp(rng.normal(8.0, 1.0, SEQUENCES))
    else:
        long = rng.random(SEQUENCES) < 0.2
        drawn = np.where(long, rng.normal(16_000, 3_000, SEQUENCES), rng.normal(1_500, 300, SEQUENCES))
    return drawn.clip(64, 30_000).astype(int).tolist()


def ours(lengths: list[int], ranks: int, cap: int) -> Plan:
    return plan(lengths, ranks=ranks, cap=cap, quadratic=QUADRATIC)


def round_robin(lengths: list[int], ranks: int, cap: int) -> Plan:
    """Sequence i to rank i mod ranks; a micro-batch is closed when the next one does not fit."""
    planned: Plan = [[[]] for _ in range(ranks)]
    for rank in range(ranks):
        tokens = 0
        for i in range(rank, len(lengths), ranks):
            if tokens + lengths[i] > cap:
                planned[rank].append([])
                tokens = 0
            planned[rank][-1].append(i)
            tokens += lengths[i]
    return _even(planned)


def first_fit(lengths: list[int], ranks: int, cap: int) -> Plan:
    """Longest first, into the first bin with room; bins to the rank with the fewest tokens, heaviest first."""
    bins: list[tuple[int, list[int]]] = []
    rooms: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for at, room in enumerate(rooms):
            if room >= lengths[i]:
                rooms[at] -= lengths[i]
                bins[at][1].append(i)
                break
        else:
            rooms.append(cap - lengths[i])
            bins.append((len(bins), [i]))
    planned: Plan = [[] for _ in range(ranks)]
    load = [(0, rank) for rank in range(ranks)]
    for room, (_, indices) in sorted(zip(rooms, bins, strict=True)):
        tokens, rank = heapq.heappop(load)
        planned[rank].append(indices)
        heapq.heappush(load, (tokens + cap - room, rank))
    return _even(planned)


def karmarkar_karp(lengths: list[int], ranks: int, cap: int) -> Plan:
    costs = [cost(length) for length in lengths]
    per_rank = _differencing(costs, range(len(lengths)), ranks, equal=True)
    rounds = max(ceil(sum(lengths[i] for i in chosen) / cap) for chosen in per_rank)
    return [_differencing(costs, chosen, rounds, equal=False) for chosen in per_rank]


def _differencing(costs: Sequence[float], indices: Sequence[int], parts: int, *, equal: bool) -> list[list[int]]:
    """Largest differencing method: the two partitions with the largest spread are joined, heavy parts to light ones.
    With `equal`, it starts from tuples of `parts` neighbours in order of cost: parts have equally many members."""
    order = sorted(indices, key=lambda i: costs[i])
    chunk = parts if equal else 1
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for start in range(0, len(order), chunk):
        sets = [(costs[i], [i]) for i in order[start : start + chunk]]
        sets += [(0.0, list[int]()) for _ in range(parts - len(sets))]
        sets.sort(key=lambda part: -part[0])
        heap.append((-(sets[0][0] - sets[-1][0]), start, sets))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, number, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        joined = [(a + b, [*x, *y]) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (-(joined[0][0] - joined[-1][0]), number, joined))
    return [members for _, members in heap[0][2]]


def _even(planned: Plan) -> Plan:
    most = max(len(rank) for rank in planned)
    return [[*rank, *([[]] * (most - len(rank)))] for rank in planned]


PLANNERS: dict[str, Planner] = {
    "ours": ours,
    "verl (Karmarkar-Karp)": karmarkar_karp,
    "first-fit-decreasing": first_fit,
    "round-robin": round_robin,
}


def measure(planner: Planner, given: list[int], ranks: int, cap: int, repeats: int) -> dict[str, float]:
    times: list[float] = []
    planned: Plan = []
    for _ in range(repeats):
        began = time.process_time()
        planned = planner(given, ranks, cap)
        times.append(time.process_time() - began)
    assert sorted(i for rank in planned for part in rank for i in part) == list(range(len(given)))
    costs = np.array([[sum(cost(given[i]) for i in part) for part in rank] for rank in planned])
    tokens = [sum(given[i] for i in part) for rank in planned for part in rank]
    return {
        "of_bound": ceil(sum(given) / (cap * ranks)) / costs.shape[1],
        "imbalance": float(costs.sum(1).max() / costs.sum(1).mean() - 1),
        "waiting": float(costs.max(0).sum() / costs.mean(0).sum() - 1),
        "over_cap": float(sum(one > cap for one in tokens)),
        "ms_per_100": statistics.median(times) * 1000 / (len(given) / 100),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()
    figures: list[dict[str, Any]] = []
    print(f"{'lengths':<10} {'cap':>6} {'ranks':>5}  {'planner':<22} of bound  imbalance  waiting  over cap  ms/100")
    for kind in ("lognormal", "bimodal"):
        given = lengths(kind, seed=0)
        for cap in (32_768, 65_536):
            for ranks in (2, 8, 64):
                for name, planner in PLANNERS.items():
                    repeats = options.repeats if planner is ours else 1
                    found = measure(planner, given, ranks, cap, repeats)
                    figures.append({"lengths": kind, "cap": cap, "ranks": ranks, "planner": name, **found})
                    print(
                        f"{kind:<10} {cap:>6} {ranks:>5}  {name:<22} {found['of_bound']:>8.3f}"
                        f"  {found['imbalance']:>9.2%}  {found['waiting']:>7.2%}  {found['over_cap']:>8.0f}"
                        f"  {found['ms_per_100']:>6.2f}",
                        flush=True,
                    )
    if options.write:
        stamp = {
            "date": date.today().isoformat(),
            "commit": commit(),
            "device": platform.processor() or platform.machine(),
        }
        path = Path(__file__).resolve().parent / "results" / "packing.json"
        path.write_text(json.dumps({**stamp, "sequences": SEQUENCES, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
