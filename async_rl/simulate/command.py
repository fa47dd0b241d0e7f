"""`async-rl simulate`: what a recipe would do on a cluster, from the unchanged control plane in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from async_rl import recipes
from async_rl.config import Run
from async_rl.errors import MissingExtra
from async_rl.simulate.arms import ArmName
from async_rl.simulate.compare import PROCESSES, Simulated, compare
from async_rl.simulate.figures import ArmFigures, Bound
from async_rl.simulate.sweep import sweep, table_rows
from async_rl.simulate.timeline import NAMES, draw

REST = 0.002
"""Lags that make up less than this share together are not listed one by one."""
NO_MODEL = ('model.path=""', 'model.tiny={characters="01"}')
"""Nothing of the model is simulated: a recipe whose model is not on this machine is simulated all the same."""


class Comparison(msgspec.Struct, frozen=True):
    """The JSON that `simulate --json` prints."""

    recipe: str
    holds: bool
    """Every bound was held."""
    arms: dict[ArmName, ArmFigures]
    speedup: dict[ArmName, float]
    """Trained tokens a second over those of the synchronous arm."""
    bounds: list[Bound]
    timeline: str | None
    """Path of the picture; None where matplotlib is not installed."""


def load(recipe: Path, overrides: Sequence[str]) -> Run:
    """Raises UserError as recipes.load does."""
    return recipes.load(recipe, [*overrides, *NO_MODEL])


def run(recipe: Path, overrides: Sequence[str], *, out: Path, as_json: bool, processes: int = PROCESSES) -> bool:
    """Print the comparison of a recipe's arms and draw their timeline. Returns whether every bound was held.

    Args:
        out: directory of the picture; made if it does not exist.
    """
    chosen = load(recipe, overrides)
    with Console(stderr=True).status(f"simulating {chosen.simulate.seeds} x 3 arms of {recipe}"):
        arms = compare(chosen, processes=processes)
        picture, missing = _picture(arms, recipe, out)
    made = comparison(str(recipe), arms, picture)
    if as_json:
        print(msgspec.json.encode(made).decode())
        return made.holds
    console = Console()
    console.print(table(made, chosen))
    for line in histograms(made):
        console.print(line, style="dim", highlight=False)
    console.print(f"timeline: {picture}" if picture else f"no timeline: {missing}", highlight=False, soft_wrap=True)
    for bound in made.bounds:
        if not bound.held:
            console.print(broken(bound), style="bold red", highlight=False, soft_wrap=True)
    if made.holds:
        console.print(f"all {len(made.bounds)} bounds held", highlight=False)
    return made.holds


def run_sweep(
    recipe: Path, overrides: Sequence[str], *, masked_share: float, as_json: bool, processes: int = PROCESSES
) -> None:
    """Print how to split the devices of a recipe. masked_share: of the tokens, at most."""
    chosen = load(recipe, overrides)
    with Console(stderr=True).status(f"sweeping {recipe}"):
        found = sweep(chosen, masked_share=masked_share, processes=processes)
    if as_json:
        print(msgspec.json.encode(found).decode())
        return
    console = Console()
    title = f"{recipe}: {found.devices} devices, at most {found.masked_share:.1%} of the tokens masked"
    shown = Table(title=Text(title), title_justify="left", title_style="bold")
    for column in (
        "generators + learners",
        "eta",
        "depth",
        "model: tokens/s",
        "masked",
        "simulated: tokens/s",
        "masked",
    ):
        shown.add_column(column, justify="right")
    for row in table_rows(found):
        shown.add_row(*row)
    console.print(shown)
    console.print(
        "model: a closed form (simulate.fluid); simulated: the control plane in virtual time; one row for each eta",
        style="dim",
    )
    for note in found.notes:
        console.print(f"note: {note}", highlight=False)
    best = found.winner
    console.print(
        f"winner: {best.generators} generators, {best.learners} learners, eta {best.max_staleness}, depth {best.depth}",
        highlight=False,
    )
    print("  " + " ".join(f"--set {override}" for override in found.overrides))


def comparison(recipe: str, arms: dict[ArmName, Simulated], picture: str | None) -> Comparison:
    base = arms["synchronous"].figures.tokens_per_s
    bounds = [bound for one in arms.values() for bound in one.bounds]
    return Comparison(
        recipe,
        all(bound.held for bound in bounds),
        {name: one.figures for name, one in arms.items()},
        {name: one.figures.tokens_per_s / base for name, one in arms.items()},
        bounds,
        picture,
    )


def broken(bound: Bound) -> str:
    if bound.value is None:
        return (
            f"BROKEN: {NAMES[bound.arm]}: {bound.name}: no group was followed to its end; raise simulate.measured_steps"
        )
    return f"BROKEN: {NAMES[bound.arm]}: {bound.name} is {bound.value:.4g}, promised is {bound.limit}"


def table(made: Comparison, chosen: Run) -> Table:
    cluster, staleness = chosen.simulate, chosen.staleness
    title = (
        f"{made.recipe}: {cluster.generators} generators, {cluster.learners} learners, "
        f"{chosen.step_rollouts} rollouts a step; eta {staleness.max_staleness}, {staleness.on_stale}"
        f"{f', budget {staleness.mask_budget:.1%}' if staleness.on_stale == 'mask' else ''}"
    )
    found = Table(title=Text(title), title_justify="left", title_style="bold")
    found.add_column("")
    for name in made.arms:
        found.add_column(NAMES[name], justify="right")

    def row(label: str, values: Sequence[str]) -> None:
        found.add_row(label, *values)

    arms = list(made.arms.values())
    row("throughput over synchronous", [f"{made.speedup[name]:.2f}x" for name in made.arms])
    row("trained tokens a second", [f"{arm.tokens_per_s:,.0f}" for arm in arms])
    row("seconds a step", [f"{arm.step_s:.1f}" for arm in arms])
    row("rollouts decoding, mean", [f"{arm.concurrency:.0f}" for arm in arms])
    row("masked tokens", [f"{arm.masked_share:.2%}" for arm in arms])
    row("  of the longest tenth", [f"{arm.masked_by_decile[-1]:.1%}" for arm in arms])
    row("fully masked rollouts", [str(arm.fully_masked) for arm in arms])
    row("dropped, failed, filtered", [f"{arm.dropped}, {arm.failed}, {arm.filtered}" for arm in arms])
    row("length trained / submitted", [_ratio(arm.length_ratio) for arm in arms])
    row("  of tokens with weight", [_ratio(arm.weighted_ratio) for arm in arms])
    row("trained before their group was complete", [f"{arm.early_share:.1%}" for arm in arms])
    for role in ("generator", "learner"):
        for cause in sorted({cause for arm in arms for cause in arm.time[role]}):
            label = f"{role}: {cause.replace('_', ' ')}"
            row(label, [f"{arm.time[role].get(cause, 0.0):.1%}" for arm in arms])
    return found


def histograms(made: Comparison) -> list[str]:
    """Lags of tokens, and of the oldest token of each rollout."""
    lines: list[str] = []
    for name, arm in made.arms.items():
        for of, shares in (("tokens", arm.lag_tokens), ("rollouts, by their oldest token", arm.lag_head)):
            lines.append(f"lag, {NAMES[name]}, {of}: {_shares(shares)}")
    return lines


def _shares(by_lag: dict[int, float]) -> str:
    """
    >>> _shares({0: 0.25, 1: 0.7499, 2: 0.00007, 9: 0.00003})
    '0: 25.0%  1: 75.0%  2 to 9: 0.0%'
    """
    shown: list[str] = []
    for lag, share in by_lag.items():
        rest = sum(other for further, other in by_lag.items() if further >= lag)
        if rest < REST and lag < max(by_lag):
            return "  ".join([*shown, f"{lag} to {max(by_lag)}: {rest:.1%}"])
        shown.append(f"{lag}: {share:.1%}")
    return "  ".join(shown)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _picture(arms: dict[ArmName, Simulated], recipe: Path, out: Path) -> tuple[str | None, str]:
    """Where the timeline was saved, or why it was not."""
    speedup = arms["asynchronous"].figures.tokens_per_s / arms["synchronous"].figures.tokens_per_s
    title = f"{recipe.stem}: who works when; {speedup:.2f} times the tokens of the synchronous run"
    try:
        png = draw([one.timeline for one in arms.values()], title)
    except MissingExtra as missing:
        return None, str(missing)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{recipe.stem}_timeline.png"
    path.write_bytes(png)
    return str(path), ""
