"""Runs the arms of a recipe, two at a time, and gathers their figures."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import msgspec

from async_rl.config import Run
from async_rl.simulate.arms import ARMS, ArmName, arm
from async_rl.simulate.fake_cluster import simulate_arm
from async_rl.simulate.figures import ArmFigures, Bound, bounds, figures
from async_rl.simulate.timeline import Timeline, timeline

PROCESSES = 2
WORTH_A_PROCESS = 20_000
"""Rollouts that take longer to simulate than a process takes to start."""


class Simulated(msgspec.Struct, frozen=True):
    """One arm, over all seeds."""

    figures: ArmFigures
    bounds: list[Bound]
    timeline: Timeline
    """Of the first seed."""


def simulate(name: ArmName, run: Run) -> Simulated:
    """In this process."""
    chosen = arm(name, run)
    records = [simulate_arm(chosen, seed=run.seed + index) for index in range(run.simulate.seeds)]
    found = figures(records)
    return Simulated(found, bounds(records[0], found), timeline(records[0]))


def compare(run: Run, names: Sequence[ArmName] = ARMS, *, processes: int = PROCESSES) -> dict[ArmName, Simulated]:
    """processes: 1 = all of them in this one."""
    return dict(zip(names, simulate_all([(name, run) for name in names], processes=processes), strict=True))


def simulate_all(jobs: Sequence[tuple[ArmName, Run]], *, processes: int = PROCESSES) -> list[Simulated]:
    """Several arms or recipes, in order."""
    rollouts = sum(run.step_rollouts * _steps(run) * run.simulate.seeds for _, run in jobs)
    if processes == 1 or len(jobs) == 1 or rollouts < WORTH_A_PROCESS:
        return [simulate(name, run) for name, run in jobs]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=spawn) as pool:
        return list(pool.map(simulate, [name for name, _ in jobs], [run for _, run in jobs]))


def _steps(run: Run) -> int:
    return run.simulate.warmup_steps + run.simulate.measured_steps
