"""One stage on disk: the files of a run directory (telemetry.run_directory), without ledger and rollouts.

config.json       the resolved recipe      checkpoints/   where a stopped stage continues
metrics.jsonl     one object per step      evaluations.jsonl  one object per evaluation of the held-out rows
data.json         the files it trains on   model/         the result: `model.path` of another recipe
summary.json      when it is complete      plots/ report.html what a person reads
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from async_rl.errors import UserError
from async_rl.stages import recipe as recipes
from async_rl.stages.config import StageRecipe
from async_rl.telemetry.exporters import Exporter
from async_rl.telemetry.files import append_lines, read_lines, write_atomically
from async_rl.telemetry.run_directory import RunDirectory, refuse_another

Row = dict[str, Any]
Tell = Callable[[str, Any], None]
"""(kind, data) for whoever watches: step, evaluation, say, summary"""


class StageDirectory:
    """Making one writes nothing."""

    def __init__(self, path: Path) -> None:
        self.files = RunDirectory(path)
        self.path = self.files.path
        self.model, self.data = self.path / "model", self.path / "data.json"

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a stage, and not RL, was run there."""
        try:
            return "stage" in json.loads((path / "config.json").read_text())
        except (OSError, ValueError, TypeError):
            return False

    def create(self, recipe: StageRecipe) -> bool:
        """A new directory, or the same stage continued; only more epochs or steps may be asked for. Returns whether it
        is continued.

        Raises:
            UserError: it cannot be written, or holds another run.
        """
        continues = self.files.config.exists()
        if continues:
            old, new = self.load_recipe(), recipe.stage
            as_new = msgspec.structs.replace(old.stage, steps=new.steps, epochs=new.epochs)
            refuse_another(self.path, msgspec.structs.replace(old, stage=as_new), recipe)
            for name in ("steps", "epochs"):
                before, now = getattr(old.stage, name), getattr(new, name)
                if now < before:
                    raise UserError(
                        f"stage.{name} = {now}: {self.path} was started for {before} {name}; write at least that"
                    )
        self.files.write_config(recipe)
        return continues

    def load_recipe(self) -> StageRecipe:
        """Raises UserError where there is none."""
        try:
            return recipes.from_table(json.loads(self.files.config.read_text()))
        except OSError as error:
            raise UserError(f"{self.path} is no run directory: config.json: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{self.files.config} is damaged: {error}") from None

    def is_complete(self, recipe: StageRecipe) -> bool:
        summary = self.files.load_summary()
        asked = {"steps": recipe.stage.steps, "epochs": recipe.stage.epochs}
        return summary is not None and summary.get("asked") == asked

    def load_evaluations(self) -> list[Row]:
        return read_lines(self.files.evaluations)

    def keep_data(self, data: Row) -> None:
        """Note what the stage trains on.

        data: file -> its rows and checksum.

        Raises:
            UserError: a file is not what it was when the stage began.
        """
        known: Row = json.loads(self.data.read_text()) if self.data.exists() else {}
        for file, facts in known.items():
            if data.get(file) != facts:
                raise UserError(
                    f"{file} has changed since {self.path} was started (data.json): choose another --run-dir, or bring "
                    "the file back"
                )
        write_atomically(self.data, json.dumps(data, indent=2) + "\n")


class StageJournal:
    """What a stage writes down, step by step. Other ranks than the first have one that writes nothing."""

    def __init__(
        self, directory: StageDirectory, tell: Tell, exporters: Sequence[Exporter] = (), *, silent: bool = False
    ) -> None:
        self._files, self._tell, self._silent = directory.files, tell, silent
        self._exporters = exporters
        self.rows: list[Row] = directory.files.load_metrics()
        self.evaluations: list[Row] = directory.load_evaluations()

    def rewind(self, version: int) -> None:
        """Forget what came after the checkpoint from which the stage goes on."""
        self.rows = [row for row in self.rows if row["version"] <= version]
        self.evaluations = [row for row in self.evaluations if row["version"] <= version]
        if not self._silent:
            for path, rows in ((self._files.metrics, self.rows), (self._files.evaluations, self.evaluations)):
                write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))

    def step(self, row: Row) -> None:
        self._add(self.rows, self._files.metrics, row)
        for exporter in self._exporters:
            exporter.export(row["version"], row)
        self._tell("step", row)

    def evaluated(self, row: Row) -> None:
        self._add(self.evaluations, self._files.evaluations, row)
        measured = {name: value for name, value in row.items() if name not in ("timestamp", "version")}
        for exporter in self._exporters:
            exporter.export(row["version"], {"evaluation": measured})
        self._tell("evaluation", row)

    def say(self, line: str) -> None:
        self._tell("say", line)

    def summary(self, summary: Row) -> None:
        if not self._silent:
            write_atomically(self._files.summary, json.dumps(summary, indent=2) + "\n")
        self._tell("summary", summary)

    def close(self) -> None:
        for exporter in self._exporters:
            exporter.close()

    def _add(self, rows: list[Row], path: Path, row: Row) -> None:
        row["timestamp"] = time.time()
        rows.append(row)
        if not self._silent:
            append_lines(path, [row])


def nothing(kind: str, data: Any) -> None:
    """Nobody watches."""
