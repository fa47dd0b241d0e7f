"""Where metrics go besides metrics.jsonl: TensorBoard event files, if the recipe asks for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from async_rl.config import Run
from async_rl.errors import require

Export = Callable[[int, Mapping[str, Any]], None]
"""(step, row)"""


def check_exporters(run: Run) -> None:
    """Raises MissingExtra where the package of one is not installed."""
    for name in run.report_to:
        require(name, name, f'report_to = ["{name}"]')


def exporters(run: Run, run_directory: Path) -> list[Export]:
    """Raises MissingExtra where the package of one is not installed."""
    return [tensorboard(run_directory / "tensorboard") for name in run.report_to if name == "tensorboard"]


def tensorboard(directory: Path) -> Export:
    """Event files that `tensorboard --logdir` reads, written without torch; nested numbers become `lag/mean`."""
    writers = require("tensorboard.summary.writer.event_file_writer", "tensorboard", 'report_to = ["tensorboard"]')
    event = require("tensorboard.compat.proto.event_pb2", "tensorboard", "tensorboard")
    summary = require("tensorboard.compat.proto.summary_pb2", "tensorboard", "tensorboard")
    writer = writers.EventFileWriter(str(directory))

    def export(step: int, row: Mapping[str, Any]) -> None:
        values = [summary.Summary.Value(tag=tag, simple_value=number) for tag, number in _numbers(row)]
        writer.add_event(event.Event(wall_time=time.time(), step=step, summary=summary.Summary(value=values)))

    return export


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(value, (int, float)):
            found.append((prefix + name, float(value)))
    return found
