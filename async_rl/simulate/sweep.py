"""How to split the devices: a fluid model looks at every split, eta and depth, the control plane at the best few."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from async_rl.config import Run, Simulate
from async_rl.errors import UserError
from async_rl.simulate.arms import ArmName
from async_rl.simulate.compare import PROCESSES, simulate_all
from async_rl.simulate.figures import BUDGET_TOLERANCE
from async_rl.simulate.fluid import Estimate, FluidModel

BOUNDS = (1, 2, 3, 4, 6, 8)
"""Values of eta that are looked at."""
MAX_SPLITS = 64
"""Of the devices; more of them are thinned."""
VERIFIED = 4
WARMUP_STEPS, MEASURED_STEPS = 15, 25
"""Of a verification, at most."""
MAX_GENERATORS, MAX_ROLLOUTS = 64, 2048
"""A larger cluster, or one with more rollouts a step, is scaled down for the control plane."""
LEAST_GROUPS = 8
"""It is scaled down no further than to steps of so many groups."""
AS_GOOD = 0.99
"""Of two settings within a hundredth of each other's speed the one with the lower eta wins."""


class Setting(msgspec.Struct, frozen=True):
    """One row of the sweep."""

    generators: int
    learners: int
    max_staleness: int
    depth: int
    model_tokens_per_s: float
    """Of the fluid model, as are the next two."""
    model_masked_share: float
    model_running: float
    simulated_tokens_per_s: float | None = None
    """Of the control plane in virtual time; None where it was not asked."""
    simulated_masked_share: float | None = None
    scale: int = 1
    """The control plane ran with so many times fewer devices and groups."""


class Sweep(msgspec.Struct, frozen=True):
    devices: int
    masked_share: float
    settings: list[Setting]
    """Best first; the simulated ones, then for every other eta the best of the model."""
    winner: Setting
    overrides: list[str]
    """What to put after --set to get the winner."""
    notes: list[str]


def sweep(run: Run, *, masked_share: float, processes: int = PROCESSES) -> Sweep:
    """The best setting for `simulate.generators + simulate.learners` devices like the recipe's.

    Args:
        masked_share: of the trained tokens, at most.

    Raises:
        UserError: the share is none.
    """
    devices = run.simulate.generators + run.simulate.learners
    if not 0 <= masked_share < 1:
        raise UserError(f"--masked {masked_share}: write a share of the tokens, from 0 to below 1")
    candidates = sorted(grid(run, masked_share=masked_share), key=lambda one: (-one.tokens_per_s, one.max_staleness))
    chosen, notes = candidates[:VERIFIED], list[str]()
    jobs: list[tuple[ArmName, Run]] = []
    scales: list[int] = []
    for estimate in chosen:
        scaled, scale = scaled_down(setting_of(run, estimate, masked_share))
        jobs.append(("asynchronous", scaled))
        scales.append(scale)
    if max(scales) > 1:
        notes.append(
            f"more than {MAX_GENERATORS} generators or {MAX_ROLLOUTS} rollouts a step: the control plane ran with up "
            f"to {max(scales)} times fewer devices and groups a step, and its tokens a second are multiplied by that"
        )
    settings: list[Setting] = []
    for estimate, scale, found in zip(chosen, scales, simulate_all(jobs, processes=processes), strict=True):
        tokens_per_s, masked = found.figures.tokens_per_s * scale, found.figures.masked_share
        row = msgspec.structs.replace(
            _row(estimate), simulated_tokens_per_s=tokens_per_s, simulated_masked_share=masked
        )
        settings.append(msgspec.structs.replace(row, scale=scale))
    kept = [one for one in settings if (one.simulated_masked_share or 0.0) <= masked_share + BUDGET_TOLERANCE]
    if not kept:
        notes.append("no simulated setting keeps the masked share: the winner is the one that masks least")
        kept = [min(settings, key=lambda one: one.simulated_masked_share or 0.0)]
    best = max(one.simulated_tokens_per_s or 0.0 for one in kept)
    good = [one for one in kept if (one.simulated_tokens_per_s or 0.0) >= AS_GOOD * best]
    winner = min(good, key=lambda one: (one.max_staleness, one.depth, -(one.simulated_tokens_per_s or 0.0)))
    settings.sort(key=lambda one: -(one.simulated_tokens_per_s or 0.0))
    settings += [_row(estimate) for estimate in candidates[VERIFIED:]]
    return Sweep(devices, masked_share, settings, winner, overrides(run, winner, masked_share), notes)


def grid(run: Run, *, masked_share: float) -> list[Estimate]:
    """For every eta the fastest split and, as far as it is as fast, the smallest depth."""
    devices = run.simulate.generators + run.simulate.learners
    model = FluidModel(run)
    splits = sorted({round(split) for split in np.linspace(1, devices - 1, min(MAX_SPLITS, devices - 1))})
    best: list[Estimate] = []
    for eta in BOUNDS:
        found = [
            model.estimate(split, devices - split, max_staleness=eta, depth=depth, masked_share=masked_share)
            for depth in sorted({1, 2, eta})
            if depth <= eta
            for split in splits
        ]
        fastest = max(one.tokens_per_s for one in found)
        good = [one for one in found if one.tokens_per_s >= AS_GOOD * fastest]
        depth = min(one.depth for one in good)
        best.append(max((one for one in good if one.depth == depth), key=lambda one: one.tokens_per_s))
    return best


def setting_of(run: Run, estimate: Estimate, masked_share: float) -> Run:
    """The recipe with that split: devices as fast as the recipe's, generators with as many slots."""
    cluster, replace = run.simulate, msgspec.structs.replace
    return replace(
        run,
        staleness=replace(
            run.staleness,
            max_staleness=estimate.max_staleness,
            depth=estimate.depth,
            on_stale="mask",
            mask_budget=masked_share,
        ),
        simulate=replace(
            cluster,
            generators=estimate.generators,
            learners=estimate.learners,
            learner_tokens_s=cluster.train_tokens_per_s,
            concurrent=_slots(cluster) * estimate.generators,
            warmup_steps=min(cluster.warmup_steps, WARMUP_STEPS),
            measured_steps=min(cluster.measured_steps, MEASURED_STEPS),
            seeds=1,
        ),
    )


def scaled_down(run: Run) -> tuple[Run, int]:
    """A cluster that the control plane simulates in seconds: fewer engines, as full, and in proportion fewer groups."""
    cluster, groups = run.simulate, run.rollout.groups_per_step
    wanted = max(-(-cluster.generators // MAX_GENERATORS), -(-run.step_rollouts // MAX_ROLLOUTS))
    scale = max(1, min(wanted, groups // LEAST_GROUPS, cluster.generators))
    if scale == 1:
        return run, 1
    replace = msgspec.structs.replace
    generators, learners = max(1, round(cluster.generators / scale)), max(1, round(cluster.learners / scale))
    return replace(
        run,
        rollout=replace(run.rollout, groups_per_step=round(groups / scale)),
        simulate=replace(
            cluster,
            generators=generators,
            learners=learners,
            learner_tokens_s=cluster.train_tokens_per_s * cluster.learners / (scale * learners),
            concurrent=_slots(cluster) * generators,
        ),
    ), scale


def overrides(run: Run, winner: Setting, masked_share: float) -> list[str]:
    cluster = run.simulate
    return [
        f"simulate.generators={winner.generators}",
        f"simulate.learners={winner.learners}",
        f"simulate.concurrent={_slots(cluster) * winner.generators}",
        f"simulate.learner_tokens_s={cluster.train_tokens_per_s:.1f}",
        f"staleness.max_staleness={winner.max_staleness}",
        f"staleness.depth={winner.depth}",
        f"staleness.mask_budget={masked_share:g}",
        "staleness.on_stale=mask",
    ]


def table_rows(found: Sweep) -> list[Sequence[str]]:
    """generators, learners, eta, depth, then speed and masked share of the model, and of the control plane."""
    return [
        (
            f"{one.generators} + {one.learners}",
            str(one.max_staleness),
            str(one.depth),
            f"{one.model_tokens_per_s:,.0f}",
            f"{one.model_masked_share:.1%}",
            "-" if one.simulated_tokens_per_s is None else f"{one.simulated_tokens_per_s:,.0f}",
            "-" if one.simulated_masked_share is None else f"{one.simulated_masked_share:.1%}",
        )
        for one in found.settings
    ]


def _slots(cluster: Simulate) -> int:
    """Of one generator."""
    return -(-cluster.concurrent // cluster.generators)


def _row(estimate: Estimate) -> Setting:
    return Setting(
        estimate.generators,
        estimate.learners,
        estimate.max_staleness,
        estimate.depth,
        estimate.tokens_per_s,
        estimate.masked_share,
        estimate.running,
    )
