"""The sweep: a closed form for every split, the control plane for the best few."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from async_rl import config
from async_rl.errors import UserError
from async_rl.simulate import command
from async_rl.simulate.compare import simulate
from async_rl.simulate.fluid import FluidModel
from async_rl.simulate.sweep import grid, scaled_down, setting_of, sweep

LONGTAIL = Path(__file__).resolve().parents[2] / "recipes" / "simulate" / "longtail.toml"
SMALL = [
    "rollout.groups_per_step=8",
    "rollout.group_size=4",
    "simulate.concurrent=64",
    "simulate.mean_tokens=800",
    "simulate.warmup_steps=4",
    "simulate.measured_steps=10",
]


def load(*overrides: str) -> config.Run:
    return command.load(LONGTAIL, overrides)


@pytest.mark.parametrize(
    ("eta", "sigma", "budget", "step_s"),
    [(4, 0.5, 0.03, 70.1), (4, 0.5, 0.01, 73.0), (2, 0.5, 0.08, 85.4), (4, 1.0, 0.05, 95.8)],
)
def test_the_closed_form_is_near_the_discrete_event_model(eta: int, sigma: float, budget: float, step_s: float) -> None:
    """step_s: of a synchronous step over the speed-up in docs/decisions/2026-11-21-staleness-frontier.md, no lane."""
    estimate = FluidModel(load(f"simulate.sigma={sigma}")).estimate(
        4, 4, max_staleness=eta, depth=eta, masked_share=budget
    )
    assert estimate.step_s == pytest.approx(step_s, rel=0.12) and estimate.masked_share <= budget + 1e-6


def test_more_masking_more_speed_and_never_above_what_is_allowed() -> None:
    model = FluidModel(load("simulate.sigma=1.0"))
    found = [model.estimate(4, 4, max_staleness=4, depth=4, masked_share=share) for share in (0.0, 0.01, 0.03, 0.1)]
    assert all(a.tokens_per_s < b.tokens_per_s for a, b in pairwise(found))
    assert [one.masked_share <= share + 1e-6 for one, share in zip(found, (0.0, 0.01, 0.03, 0.1), strict=True)]


def test_the_grid_finds_the_slower_side() -> None:
    """Where a learner is three times as fast as it was, fewer of them are wanted."""
    balanced = max(grid(load(), masked_share=0.03), key=lambda one: one.tokens_per_s)
    fast = load(f"simulate.learner_tokens_s={3 * load().simulate.train_tokens_per_s}")
    lopsided = max(grid(fast, masked_share=0.03), key=lambda one: one.tokens_per_s)
    assert (balanced.generators, balanced.learners) == (4, 4) and (lopsided.generators, lopsided.learners) == (6, 2)


def test_ten_thousand_generators_are_scaled_down_and_stay_as_full() -> None:
    run = load(
        "simulate.generators=10000",
        "simulate.learners=10000",
        "simulate.concurrent=2560000",
        "rollout.groups_per_step=160000",
    )
    best = max(grid(run, masked_share=0.03), key=lambda one: one.tokens_per_s)
    assert best.generators + best.learners == 20000
    scaled, scale = scaled_down(setting_of(run, best, 0.03))
    assert scale > 100 and scaled.step_rollouts <= 2200
    assert scaled.simulate.concurrent / scaled.simulate.generators == 256
    per_rollout = scaled.simulate.train_tokens_per_s * scaled.simulate.learners / scaled.step_rollouts
    assert per_rollout == pytest.approx(run.simulate.train_tokens_per_s * best.learners / run.step_rollouts, rel=0.02)


def test_the_winner_keeps_the_share_and_its_overrides_reproduce_it(capsys: pytest.CaptureFixture[str]) -> None:
    run = load(*SMALL)
    found = sweep(run, masked_share=0.03, processes=1)
    winner = found.winner
    assert winner.generators + winner.learners == found.devices == 8
    assert winner.simulated_masked_share is not None and winner.simulated_masked_share <= 0.035
    simulated = [one for one in found.settings if one.simulated_tokens_per_s is not None]
    assert len(simulated) == 4 and winner in simulated
    pasted = load(*SMALL, *found.overrides)
    again = simulate("asynchronous", pasted).figures
    assert again.tokens_per_s == pytest.approx(winner.simulated_tokens_per_s, rel=1e-3)
    command.run_sweep(LONGTAIL, SMALL, masked_share=0.03, as_json=True, processes=1)
    assert json.loads(capsys.readouterr().out) == msgspec.to_builtins(found)


def test_a_wrong_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"--masked 3.0: write a share"):
        sweep(load(*SMALL), masked_share=3.0)
