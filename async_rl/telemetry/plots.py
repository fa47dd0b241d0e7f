"""Pure: the plots of a run as PNG, from its rows. matplotlib is imported when something is drawn, without pyplot.

The colours are those of Okabe and Ito, which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from async_rl.config import Run
from async_rl.errors import require
from async_rl.telemetry.agreement import limit_of
from async_rl.telemetry.journal import EvalSummary, Row
from async_rl.telemetry.usage import BUSY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array: TypeAlias = npt.NDArray[np.float64]
Shares: TypeAlias = dict[str, dict[str, float]]
"""role -> cause -> share of its time"""

WIDTH_IN, HEIGHT_IN, DPI = 6.4, 3.4, 150
MAX_POINTS = 800
"""Of one line; more cannot be told apart on a page."""
SMOOTHED_SHARE = 0.05
"""A smoothed line is the mean over so much of the run."""
LAG_BANDS = 6
MAX_METRICS = 6
"""Plots of what the environment logs."""
SPIKE = 30.0
"""A value so many times the median asks for a logarithmic axis."""

INK, GREY, BLUE, SKY = "#222222", "#999999", "#0072b2", "#56b4e9"
GREEN, ORANGE, VERMILION, PURPLE, YELLOW = "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#f0e442"
FRESH, OLD = (0xC4, 0xDC, 0xF0), (0x0B, 0x3C, 0x6F)
"""Colours of lag 0 and of the oldest tokens that keep their weight; what is over the bound is vermilion."""
CAUSES = {
    "engine_step": GREEN,
    "train_step": GREEN,
    "wait_lease": ORANGE,
    "wait_batch": ORANGE,
    "wait_weights": VERMILION,
    "environment": SKY,
    "weight_swap": PURPLE,
    "publish": PURPLE,
    "hand_over": YELLOW,
    "checkpoint": BLUE,
    "off_device": GREY,
    "device_turn": PURPLE,
}


class Plot(msgspec.Struct, frozen=True):
    name: str
    title: str
    """Says what is good."""
    reading: str
    """One line: how to read it."""
    png: bytes


class Line(NamedTuple):
    label: str
    colour: str
    y: Array
    """[rows], nan where a row has no value"""


class Panel(NamedTuple):
    unit: str
    lines: Sequence[Line]
    points: tuple[Sequence[float], Sequence[float]] = ((), ())
    """Versions and values of evaluations on held-out tasks."""
    bound: tuple[str, float] | None = None
    """A limit, drawn where the values come near it."""
    percent: bool = False
    spiky: bool = False
    """Logarithmic where single values dwarf the others."""
    points_label: str = "held-out, greedy"
    orders: bool = False
    """Orders of magnitude between the points and the bound, which is always drawn: a logarithmic axis."""


def draw(rows: Sequence[Row], evaluations: Sequence[EvalSummary], run: Run, shares: Shares) -> list[Plot]:
    """The plots whose data exist, in the order to read them.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require("matplotlib", "report", "drawing plots")
    found = (*_progress(rows, evaluations), *_models(rows), *_health(rows, run), _mismatch(rows, run))
    plots = [plot for plot in found if plot is not None]
    by_lag = [row for row in rows if row["lag"].get("tokens")]
    if len(by_lag) > 1:
        plots.append(_lag(by_lag, run.staleness.max_staleness))
    if shares:
        plots.append(_waiting(shares))
    return plots


def shares_by_cause(busy: Mapping[str, float], idle: Mapping[str, Mapping[str, float]]) -> Shares:
    """What a role is for comes first, then what it waits for longest; the shares of a role sum to 1.

    >>> shares_by_cause({"learner": 0.75}, {"learner": {"publish": 0.05, "wait_batch": 0.1}})
    {'learner': {'train_step': 0.75, 'wait_batch': 0.1, 'publish': 0.05, 'unaccounted': 0.1}}
    """
    shares: Shares = {}
    for role, working in busy.items():
        causes = sorted(idle.get(role, {}).items(), key=lambda item: -item[1])
        shares[role] = {BUSY[role]: working, **dict(causes)}
        rest = round(1 - sum(shares[role].values()), 6)
        if rest > 0.001:
            shares[role]["unaccounted"] = rest
    return shares


def metric_names(rows: Sequence[Row], evaluations: Sequence[EvalSummary]) -> list[str]:
    """What the environment logs, exact match first."""
    logged = {name for evaluation in evaluations for name in evaluation.metrics}
    logged |= {key.removeprefix("train_") for row in rows[-1:] for key in row if key.startswith("train_")}
    return sorted(logged - {"s"}, key=lambda name: (name != "exact", name))  # train_s: seconds of the step


def _progress(rows: Sequence[Row], evaluations: Sequence[EvalSummary]) -> list[Plot | None]:
    """Reward and what the environment logs, in training and on held-out tasks."""
    versions = [evaluation.version for evaluation in evaluations]

    def plot(name: str, title: str, unit: str, key: str, held_out: Callable[[EvalSummary], float]) -> Plot | None:
        lines = [Line("training", BLUE, values_of(rows, key))]
        panel = Panel(unit, lines, (versions, [held_out(evaluation) for evaluation in evaluations]))
        reading = (
            "Thin: every step. Thick: the mean of its neighbours. Dots: held-out tasks, decoded greedily; they say "
            "what was learned, training says what was sampled."
        )
        return line_plot(name, title, reading, rows, [panel])

    plots = [plot("reward", "Reward: higher is better", "mean reward", "reward", lambda one: one.reward)]
    for name in metric_names(rows, evaluations)[:MAX_METRICS]:
        title = "Exact match: higher is better, 1 is every task" if name == "exact" else f"{name}, of the environment"
        file = "exact" if name == "exact" else "metric_" + "".join(c if c.isalnum() else "_" for c in name)
        value: Callable[[EvalSummary], float] = lambda one, name=name: one.metrics.get(name, float("nan"))  # noqa: E731
        plots.append(plot(file, title, f"mean {name}", f"train_{name}", value))
    return plots


def _models(rows: Sequence[Row]) -> list[Plot | None]:
    """What the models beside the policy say: the parts of the reward, and the critic."""

    def line(label: str, colour: str, key: str) -> Line:
        return Line(label, colour, values_of(rows, key))

    parts = [
        line("reward model", PURPLE, "reward_model"),
        line("environment", BLUE, "reward_environment"),
    ]
    return [
        line_plot(
            "reward_parts",
            "Parts of the reward: both should rise",
            "Score of the reward model and reward of the environment. Where the score rises alone, it is being hacked.",
            rows,
            [Panel("mean reward", parts)],
        ),
        line_plot(
            "critic",
            "Critic: explained variance near 1 is good, values follow returns",
            "Explained variance: how much of the returns of the tokens of a step the critic foresaw; at 0 advantages "
            "are those of a constant baseline.",
            rows,
            [
                Panel("share", [line("explained variance", GREEN, "explained_variance")]),
                Panel("", [line("value", BLUE, "value_mean"), line("return", ORANGE, "return_mean")]),
                Panel("", [line("value loss", INK, "value_loss")], spiky=True),
                Panel("norm", [line("critic gradient", SKY, "critic_grad_norm")], spiky=True),
            ],
            columns=2,
        ),
    ]


def _health(rows: Sequence[Row], run: Run) -> list[Plot | None]:
    def line(label: str, colour: str, *path: str) -> Line:
        return Line(label, colour, values_of(rows, *path))

    clip_norm = run.optimizer.clip_norm
    clips = [
        line("guarded", INK, "guarded_fraction"),
        line("clipped low", SKY, "clip_fraction_low"),
        line("clipped high", VERMILION, "clip_fraction_high"),
        line("dual clip", PURPLE, "clip_fraction_dual"),
    ]
    return [
        line_plot(
            "completion_length",
            "Completion length: a steady change is learning, a jump is a warning",
            "Mean of the tokens the policy sampled in a rollout. Near the limit, answers are cut off.",
            rows,
            [
                Panel(
                    "tokens",
                    [line("completion", BLUE, "completion_length_mean")],
                    bound=("max_new_tokens", run.rollout.max_new_tokens),
                )
            ],
        ),
        line_plot(
            "speed",
            "Tokens per second: higher is better, both sides level",
            "Sampled by the generators and trained on by the learner; the slower side decides how fast the run is.",
            rows,
            [
                Panel(
                    "tokens / s",
                    [
                        line("generators", ORANGE, "tokens_per_s", "generator"),
                        line("learner", BLUE, "tokens_per_s", "learner"),
                    ],
                )
            ],
        ),
        line_plot(
            "weights",
            "Effective sample size: near 100 % is good; clipping: a few % at most",
            "Above: how much of the batch the importance weights leave. Below: tokens clipped, or left out by a guard.",
            rows,
            [
                Panel(
                    "% of tokens",
                    [line("used", BLUE, "ess_frac"), line("before guards", ORANGE, "ess_frac_raw")],
                    percent=True,
                ),
                Panel("% of tokens", [clip for clip in clips if np.nansum(clip.y) > 0] or clips[:1], percent=True),
            ],
        ),
        line_plot(
            "stability",
            "Stability: no spikes, entropy above 0",
            "Mismatch: between the policy that sampled and the one that is trained. "
            "Entropy at 0 means that the policy no longer explores.",
            rows,
            [
                Panel("nats", [line("entropy", GREEN, "entropy")]),
                Panel(
                    "norm",
                    [line("gradient", INK, "grad_norm")],
                    bound=("cut to", clip_norm) if clip_norm else None,
                    spiky=True,
                ),
                Panel("nats", [line("mismatch KL (k3)", ORANGE, "mismatch_k3")], spiky=True),
                Panel("", [line("learning rate", BLUE, "learning_rate")]),
                Panel("nats", [line("KL to the reference (k3)", PURPLE, "kl_k3")], spiky=True),
                Panel("reward", [line("KL penalty", VERMILION, "kl_penalty")]),
            ],
            columns=2,
        ),
    ]


def _mismatch(rows: Sequence[Row], run: Run) -> Plot | None:
    """Engine and learner, by lag and under the same weights, which those of lag 0 are."""
    limit = limit_of(rows, run)
    lags = range(1, run.staleness.max_staleness + 1)
    seen = np.array([lag for lag in lags if any(f"mismatch_lag_{lag}_abs" in row for row in rows)], np.int64)
    shown: list[int] = [int(part[0]) for part in np.array_split(seen, LAG_BANDS) if len(part)]

    def by_lag(measure: str) -> list[Line]:
        return [
            Line(f"lag {lag}", _mixed((index + 1) / len(shown)), values_of(rows, f"mismatch_lag_{lag}_{measure}"))
            for index, lag in enumerate(shown)
        ]

    equal = values_of(rows, "equal_version_gap")
    known = np.isfinite(equal)
    points = (values_of(rows, "version")[known].tolist(), equal[known].tolist())
    return line_plot(
        "mismatch",
        "Engine and learner: under the same weights their log-probs agree",
        "How far the learner's log-probs are from the engine's. By lag: the policy moved on since it sampled, so the "
        "older the further. Under the same weights only rounding is left; what stays over the limit is a fault "
        "(async-rl doctor).",
        rows,
        [
            Panel("|difference|, nats", by_lag("abs")),
            Panel("KL (k3), nats", by_lag("k3"), spiky=True),
            Panel("|difference|, nats", [], points, bound=("limit", limit), points_label="same weights", orders=True),
        ],
    )


def _lag(rows: Sequence[Row], bound: int) -> Plot:
    """Tokens by lag as a share of each step, and the lag of those with weight against the bound."""
    kept = np.array_split(np.arange(bound + 1), min(LAG_BANDS, bound + 1))
    names = [str(lags[0]) if len(lags) == 1 else f"{lags[0]}-{lags[-1]}" for lags in kept]
    colours = [_mixed(index / max(1, len(kept) - 1)) for index in range(len(kept))]
    bands = {int(lag): band for band, lags in enumerate(kept) for lag in lags}
    buckets = np.array_split(np.arange(len(rows)), min(len(rows), MAX_POINTS // 2))
    share = np.zeros((len(kept) + 1, len(buckets)))
    for column, bucket in enumerate(buckets):
        tokens: Counter[int] = Counter()
        for index in bucket:
            tokens.update({int(lag): count for lag, count in rows[index]["lag"]["tokens"].items()})
        for lag, count in tokens.items():
            share[bands.get(lag, len(kept)), column] += 100 * count / max(1, tokens.total())
    versions = values_of(rows, "version")[[bucket[-1] for bucket in buckets]]
    masked = sum(row["masked_fraction"] * row["tokens"] for row in rows) / max(1, sum(row["tokens"] for row in rows))
    title = f"Lag: tokens with weight never over the bound of {bound}; {masked:.1%} masked"
    figure = _figure(title, HEIGHT_IN * 1.35)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.3])
    for label, key, colour, width in (("mean", "mean", BLUE, 3.0), ("oldest with weight", "max", INK, 1.0)):
        above.plot(
            *thinned(values_of(rows, "version"), values_of(rows, "lag", key)), color=colour, lw=width, label=label
        )
    above.axhline(bound, color=VERMILION, linestyle="--", linewidth=1.5, label=f"bound {bound}", zorder=3)
    above.set_ylim(-0.2, bound * 1.15 + 0.5)
    _finish(above, "lag, versions")
    names = [f"lag {names[0]}", *names[1:], f"over {bound}, masked"]
    shown = [band for band in range(len(names)) if share[band].any()]
    labels, palette = [names[band] for band in shown], [[*colours, VERMILION][band] for band in shown]
    below.stackplot(versions, share[shown], labels=labels, colors=palette, linewidth=0)
    below.set_ylim(0, 100)
    below.set_xlim(versions[0], versions[-1])
    _finish(below, "% of tokens", bottom=True)
    reading = (
        "Lag: how many versions older than the trained policy the sampling one was. Above: tokens with weight never "
        f"pass the bound of {bound}. Below: the stronger the blue, the older; vermilion is over it and has no weight."
    )
    return Plot("lag", title, reading, _png(figure))


def _waiting(shares: Shares) -> Plot:
    title = "Who waits for whom: the more green, the better"
    figure = _figure(title, 0.9 + 1.15 * len(shares))
    for axes, (role, causes) in zip(figure.subplots(len(shares), 1, squeeze=False)[:, 0], shares.items(), strict=True):
        start = 0.0
        for cause, share in causes.items():
            label = f"{cause.replace('_', ' ')} {share:.1%}"
            colour = CAUSES.get(cause, GREY)
            axes.barh(0, 100 * share, left=start, color=colour, edgecolor="white", linewidth=0.6, label=label)
            start += 100 * share
        axes.set_xlim(0, 100)
        axes.set_yticks([0], [role], fontsize=11)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.legend(
            loc="upper left", bbox_to_anchor=(0, 0), ncols=3, fontsize=9, frameon=False, handlelength=0.9, borderpad=0
        )
    reading = (
        "The time of each role by what it did, summing to 100 %. Green is the work it is there for. Where the learner "
        "waits for batches, add generators; where generators wait for leases, the learner is the bottleneck."
    )
    return Plot("waiting", title, reading, _png(figure))


def line_plot(
    name: str, title: str, reading: str, rows: Sequence[Row], panels: Sequence[Panel], columns: int = 1
) -> Plot | None:
    """One figure of panels over the steps; None where no panel has two values to join."""
    panels = [panel._replace(lines=[line for line in panel.lines if np.isfinite(line.y).sum() > 1]) for panel in panels]
    panels = [panel for panel in panels if panel.lines or np.isfinite(panel.points[1]).sum() > 1]
    if not panels:
        return None
    columns = min(columns, len(panels))
    height = -(-len(panels) // columns)
    figure = _figure(title, HEIGHT_IN * (0.55 + 0.45 * height))
    grid = figure.subplots(height, columns, sharex=True, squeeze=False).ravel()
    versions = values_of(rows, "version")
    for index, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
        _fill(axes, versions, panel)
        _finish(axes, panel.unit, bottom=index >= len(panels) - columns)
    for axes in grid[len(panels) :]:
        axes.remove()
    return Plot(name, title, reading, _png(figure))


def _fill(axes: Axes, versions: Array, panel: Panel) -> None:
    scale = 100.0 if panel.percent else 1.0
    positive = np.concatenate([line.y[line.y > 0] for line in panel.lines] or [np.empty(0)])
    logarithmic = panel.spiky and len(positive) > 0 and positive.max() > SPIKE * np.median(positive)
    for line in panel.lines:
        smooth = smoothed(line.y * scale)
        if logarithmic:  # the geometric mean: one spike does not lift its whole neighbourhood
            smooth = np.exp(smoothed(np.log(np.where(line.y > 0, line.y, np.nan))))
        axes.plot(*thinned(versions, line.y * scale), color=line.colour, linewidth=0.7, alpha=0.35)
        axes.plot(*thinned(versions, smooth), color=line.colour, linewidth=1.9, label=line.label)
    at, values = panel.points
    if len(at):
        axes.plot(at, values, "o--", color=VERMILION, markersize=5, linewidth=1, label=panel.points_label)
    if panel.bound is not None:
        label, limit = panel.bound
        highest = max(*(float(np.nanmax(line.y)) for line in panel.lines), *values, 0.0)
        if highest > limit / 2 or panel.orders:
            axes.axhline(limit, color=GREY, linestyle="--", linewidth=1.2, label=f"{label} {limit:g}")
    if panel.orders:
        axes.set_yscale("log")
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(positive.min(), np.median(positive) / SPIKE))


def _figure(title: str, height_in: float) -> Figure:
    figure = require("matplotlib.figure", "report", "drawing plots").Figure(
        figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained", facecolor="white"
    )
    figure.suptitle(_plain(title), x=0.012, ha="left", fontsize=11.5, fontweight="bold", color=INK)
    return figure


def _finish(axes: Axes, unit: str, *, bottom: bool = False) -> None:
    """The same frame for all: a light grid, two spines, the legend above the data."""
    axes.set_ylabel(_plain(unit), fontsize=10, color=INK)
    if bottom:
        axes.set_xlabel("step", fontsize=10, color=INK)
        axes.tick_params(labelbottom=True)
        ticker = require("matplotlib.ticker", "report", "drawing plots")
        axes.xaxis.set_major_locator(ticker.MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=9.5, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=7, fontsize=9.5, frameon=False, handlelength=1.3,
        columnspacing=1.2, borderpad=0.1,
    )  # fmt: skip


def _png(figure: Figure) -> bytes:
    canvas = require("matplotlib.backends.backend_agg", "report", "drawing plots").FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def values_of(rows: Sequence[Row], *path: str) -> Array:
    """One number of every row; nan where it is missing or not finite."""
    values: list[float] = []
    for row in rows:
        value: object = row
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        values.append(float(value) if isinstance(value, int | float) else float("nan"))
    column = np.array(values, np.float64)
    column[~np.isfinite(column)] = np.nan
    return column


def smoothed(y: Array) -> Array:
    """The mean of the values around each one."""
    width = max(1, round(len(y) * SMOOTHED_SHARE))
    known = np.isfinite(y)
    window = np.ones(2 * (width // 2) + 1)
    total, count = (np.convolve(part, window, "same")[: len(y)] for part in (np.where(known, y, 0.0), known * 1.0))
    return np.where(known, total / np.maximum(count, 1), np.nan)


def thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """At most MAX_POINTS of them: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(y) <= MAX_POINTS:
        return x, y
    known = np.flatnonzero(np.isfinite(y))
    stretches = [part for part in np.array_split(known, MAX_POINTS // 2) if len(part)]
    kept = sorted({int(part[choose(y[part])]) for part in stretches for choose in (np.argmin, np.argmax)})
    return x[kept], y[kept]


def _mixed(share: float) -> str:
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(FRESH, OLD, strict=True))


def _plain(text: str) -> str:
    """Metric names are the user's: a $ in them is no formula."""
    return text.replace("$", r"\$")
