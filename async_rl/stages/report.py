"""Plots and report.html of a stage, from its run directory alone, also while it is at work."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from async_rl import tables
from async_rl.errors import MissingExtra, UserError
from async_rl.stages.config import Kind
from async_rl.stages.directory import Row, StageDirectory
from async_rl.telemetry.files import write_atomically
from async_rl.telemetry.plots import BLUE, GREEN, INK, ORANGE, VERMILION, Line, Panel, Plot, line_plot, values_of
from async_rl.telemetry.report import Report, write_plots

TEMPLATE = "report.html.jinja"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION)
FIGURES: dict[Kind, list[tuple[str, str, str, tuple[str, ...]]]] = {
    "sft": [
        ("token_accuracy", "Token accuracy: higher is better", "share of tokens", ("token_accuracy",)),
    ],
    "preference": [
        ("accuracy", "Implicit-reward accuracy: higher is better", "share of pairs", ("reward_accuracy",)),
        ("rewards", "Implicit rewards: chosen above rejected", "beta log ratio",
         ("reward_chosen", "reward_rejected", "reward_margin")),
    ],
    "reward-model": [
        ("accuracy", "Pairs in the right order: higher is better", "share of pairs", ("accuracy",)),
        ("margin", "Margin between better and worse answers", "score", ("margin",)),
    ],
    "distill": [("kl", "KL to the teacher: lower is better", "nats per token", ("kl",))],
    "merge": [],
}  # fmt: skip
"""name, title, unit, keys of the rows: what each kind adds to the plots of all."""


def write_report(directory: StageDirectory) -> Report:
    """Raises UserError where there is no stage in the directory, or it cannot be written."""
    recipe, rows, evaluations = directory.load_recipe(), directory.files.load_metrics(), directory.load_evaluations()
    kind, missing = recipe.stage.kind, list[str]()
    drawn: list[Plot] = []
    if len(rows) < 2:
        missing.append("Fewer than two steps have been trained.")
    try:
        drawn = draw(kind, rows, evaluations)
    except MissingExtra as error:
        missing.append(f"No plots: {error}")
    sentence = one_sentence(kind, rows, evaluations)
    view = {
        "name": directory.path.name,
        "kind": kind,
        "sentence": sentence,
        "plots": [(plot, base64.b64encode(plot.png).decode()) for plot in drawn],
        "evaluations": [msgspec.to_builtins(row) for row in evaluations],
        "columns": [key for key in (evaluations[-1] if evaluations else {}) if key != "timestamp"],
        "summary": directory.files.load_summary() or {},
        "recipe": tables.dumps(recipe),
        "missing": missing,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        written = write_plots(directory.files.plots, drawn)
        page = environment.get_template(TEMPLATE).render(view)
        write_atomically(directory.files.report, page.encode("ascii", "xmlcharrefreplace").decode())
    except OSError as error:
        raise UserError(f"the report of {directory.path} cannot be written ({error.strerror})") from None
    return Report(directory.files.report, written, sentence, missing)


def one_sentence(kind: Kind, rows: Sequence[Row], evaluations: Sequence[Row]) -> str:
    """preference: loss 0.693 -> 0.041; held-out reward_accuracy 0.5 -> 0.98 on 64 rows, 120 steps"""
    parts = [f"{kind}: loss {rows[0]['loss']:.3g} -> {rows[-1]['loss']:.3g}"] if rows else [f"{kind}: no step yet"]
    keys = [figure[3][0] for figure in FIGURES[kind]] or ["loss"]
    if evaluations and keys[0] in evaluations[-1]:
        first, last = evaluations[0], evaluations[-1]
        parts.append(f"held-out {keys[0]} {first[keys[0]]:.3g} -> {last[keys[0]]:.3g} on {last['rows']} rows")
    return "; ".join(parts) + (f"; {rows[-1]['version']} steps" if rows else "")


def draw(kind: Kind, rows: Sequence[Row], evaluations: Sequence[Row]) -> list[Plot]:
    """Raises MissingExtra where matplotlib is not installed."""
    versions = [row["version"] for row in evaluations]
    reading = "Thin: every step. Thick: the mean of its neighbours. Dots: held-out rows."
    made: list[Plot | None] = []
    for name, title, unit, keys in [("loss", "Loss: lower is better", "loss", ("loss",)), *FIGURES[kind]]:
        lines = [Line(key, colour, values_of(rows, key)) for key, colour in zip(keys, COLOURS, strict=False)]
        points = [row.get(keys[0], float("nan")) for row in evaluations]
        panel = Panel(unit, lines, (versions, points), points_label=f"{keys[0]}, held-out")
        made.append(line_plot(name, title, reading, rows, [panel]))
    health: list[Any] = [
        Panel("norm", [Line("gradient", INK, values_of(rows, "grad_norm"))], spiky=True),
        Panel("", [Line("learning rate", BLUE, values_of(rows, "learning_rate"))]),
        Panel("tokens / s", [Line("read", GREEN, values_of(rows, "tokens_per_s"))]),
    ]
    made.append(line_plot("stability", "Stability: no spikes", "Gradient norm before clipping.", rows, health))
    return [plot for plot in made if plot is not None]
