"""Where metrics go besides metrics.jsonl, if the recipe's `report_to` asks for it: TensorBoard, W&B, Trackio.

Each row of a step and each evaluation goes out under the version it belongs to; nested numbers become `lag/mean`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from async_rl.config import Tracker
from async_rl.errors import UserError, require

PROJECT = "async_rl"


class Recipe(Protocol):
    """Of RL or of a stage: a msgspec struct."""

    @property
    def report_to(self) -> Sequence[Tracker]: ...


class Exporter(Protocol):
    def export(self, version: int, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        """Everything exported so far is safe."""
        ...


def check_exporters(recipe: Recipe) -> None:
    """Raises MissingExtra where the package of one is not installed, UserError where it lacks credentials."""
    for name in recipe.report_to:
        module = require(name, name, f'report_to = ["{name}"]')
        if name == "wandb" and module.setup().settings.mode == "online" and not module.login(prompt=False):
            raise UserError('report_to = ["wandb"]: no API key; run `wandb login`, or set WANDB_MODE=offline')


def exporters(recipe: Recipe, run_directory: Path) -> list[Exporter]:
    """Those that the recipe asks for, writing into the run directory as far as they write to disk."""
    make = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
    return [make[name](recipe, run_directory) for name in recipe.report_to]


class TensorBoard:
    """Event files that `tensorboard --logdir RUN/tensorboard` reads, written without torch."""

    def __init__(self, recipe: Recipe, run_directory: Path) -> None:
        writers = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        self._writer = writers.EventFileWriter(str(run_directory / "tensorboard"))

    def export(self, version: int, row: Mapping[str, Any]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=number) for tag, number in numbers(row).items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=version, summary=summary))

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, online or (WANDB_MODE=offline) into RUN/wandb. A continued run continues there too."""

    def __init__(self, recipe: Recipe, run_directory: Path) -> None:
        wandb: Any = importlib.import_module("wandb")
        name = run_directory.name
        settings = wandb.Settings(console="off", silent=True)
        options = {"id": name, "dir": str(run_directory), "resume": "allow", "settings": settings}
        self._teardown = wandb.teardown
        self._run = wandb.init(project=PROJECT, name=name, config=msgspec.to_builtins(recipe), **options)
        self._run.define_metric("*", step_metric="version")  # a rewound run logs a version again

    def export(self, version: int, row: Mapping[str, Any]) -> None:
        self._run.log({"version": version, **numbers(row)})

    def close(self) -> None:
        self._run.finish()
        self._teardown()  # W&B's own process writes the file: wait until it has


class Trackio:
    """Hugging Face's local tracker: `trackio show --project async_rl`."""

    def __init__(self, recipe: Recipe, run_directory: Path) -> None:
        trackio: Any = importlib.import_module("trackio")
        options = {"config": msgspec.to_builtins(recipe), "resume": "allow", "embed": False}
        self._run = trackio.init(project=PROJECT, name=run_directory.name, **options)

    def export(self, version: int, row: Mapping[str, Any]) -> None:
        self._run.log(numbers(row), step=version)

    def close(self) -> None:
        self._run.finish()


def numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a row under a flat name.

    >>> numbers({"reward": 0.5, "lag": {"mean": 1, "tokens": {"0": 3}}, "name": "x"})
    {'reward': 0.5, 'lag/mean': 1.0, 'lag/tokens/0': 3.0}
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(value, (int, float)):
            found[prefix + name] = float(value)
    return found
