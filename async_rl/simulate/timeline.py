"""Pure: a picture of who ran what and who waited, as PNG. The arms share one axis of time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from async_rl.errors import require
from async_rl.simulate.arms import ArmName
from async_rl.simulate.fake_cluster import ArmRecord
from async_rl.telemetry import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_STEPS = 10
"""Of the fastest arm."""
MAX_LINES = 8
"""More generators are drawn as their mean and range."""
POINTS = 1200
NAMES: dict[ArmName, str] = {
    "synchronous": "synchronous",
    "one_step_off": "one step off",
    "asynchronous": "asynchronous",
}


class Timeline(msgspec.Struct, frozen=True):
    """What the picture shows of an arm. Virtual seconds since the measured steps began."""

    arm: ArmName
    step_s: float
    changes: list[tuple[list[float], list[int]]]
    """For each generator: when its number of running rollouts changed, and to what."""
    pauses: list[tuple[float, float]]
    """Weight updates of the first generator; the others pause at the same time."""
    training: list[tuple[float, float]]
    """The learner's steps, from their first to their last micro-batch."""


def timeline(record: ArmRecord) -> Timeline:
    begin, end = record.window
    training_s = [step.tokens / record.arm.train_rate for step in record.steps]
    return Timeline(
        record.arm.name,
        (end - begin) / len(record.measured),
        [([at - begin for at in trace.times], trace.running) for trace in record.traces],
        [(start - begin, stop - begin) for start, stop in record.traces[0].pauses],
        [
            (step.began_at - begin, step.began_at - begin + seconds)
            for step, seconds in zip(record.steps, training_s, strict=True)
        ],
    )


def draw(timelines: Sequence[Timeline], title: str) -> bytes:
    """PNG.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "report", "drawing the timeline")
    seconds = SHOWN_STEPS * min(one.step_s for one in timelines)
    height = 0.7 + 1.75 * len(timelines)
    figure: Any = figures.Figure(figsize=(9.6, height), dpi=plots.DPI, layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.012, ha="left", fontsize=11.5, fontweight="bold", color=plots.INK)
    grid = figure.subplots(2 * len(timelines), 1, sharex=True, squeeze=False, height_ratios=[5, 1] * len(timelines))
    for index, one in enumerate(timelines):
        _running(grid[2 * index, 0], one, seconds)
        _learner(grid[2 * index + 1, 0], one, seconds)
    last = grid[-1, 0]
    last.set_xlim(0, seconds)
    last.set_xlabel("virtual seconds", fontsize=9.5, color=plots.INK)
    last.tick_params(labelbottom=True, bottom=True)
    canvas = require("matplotlib.backends.backend_agg", "report", "drawing the timeline").FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _running(axes: Axes, one: Timeline, seconds: float) -> None:
    at = np.linspace(0, seconds, POINTS)
    running_ET = np.array([_sampled(at, times, counts) for times, counts in one.changes])
    if len(running_ET) <= MAX_LINES:
        for index, running in enumerate(running_ET):
            label = f"each of {len(running_ET)} generators" if index == 0 else None
            axes.plot(at, running, color=plots.BLUE, linewidth=0.9, alpha=0.75, label=label)
    else:
        axes.fill_between(at, running_ET.min(0), running_ET.max(0), color=plots.SKY, alpha=0.4, linewidth=0)
        label = f"mean and range of {len(running_ET)} generators"
        axes.plot(at, running_ET.mean(0), color=plots.BLUE, linewidth=1.2, label=label)
    for index, (start, stop) in enumerate(_within(one.pauses, seconds)):
        axes.axvspan(start, stop, color=plots.PURPLE, alpha=0.55, linewidth=0, label=None if index else "weight update")
    axes.set_ylim(0, max(1.0, float(running_ET.max())) * 1.08)
    axes.set_ylabel("rollouts", fontsize=9.5, color=plots.INK)
    axes.set_title(f"{NAMES[one.arm]}: {one.step_s:.0f} s a step", loc="left", fontsize=10, color=plots.INK)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8.5, frameon=False, borderpad=0.1)
    _plain_frame(axes)


def _learner(axes: Axes, one: Timeline, seconds: float) -> None:
    axes.axhspan(0, 1, color=plots.ORANGE, alpha=0.35, linewidth=0, label="waits")
    for index, (start, stop) in enumerate(_within(one.training, seconds)):
        label = None if index else "trains"
        axes.barh(0.5, stop - start, left=start, height=1.0, color=plots.GREEN, edgecolor="white", label=label)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.5], ["learner"], fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8.5, frameon=False, borderpad=0.1)
    _plain_frame(axes)
    axes.tick_params(left=False)


def _plain_frame(axes: Axes) -> None:
    axes.tick_params(labelsize=9, colors=plots.INK, length=3, bottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _sampled(at: npt.NDArray[np.float64], times: list[float], counts: list[int]) -> npt.NDArray[np.int64]:
    """The step function at given moments; 0 before its first."""
    return np.array([0, *counts])[np.searchsorted(np.array(times), at, side="right")]


def _within(spans: Sequence[tuple[float, float]], seconds: float) -> list[tuple[float, float]]:
    return [(max(0.0, start), min(seconds, stop)) for start, stop in spans if stop > 0 and start < seconds]
