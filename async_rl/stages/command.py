"""`async-rl stage KIND RECIPE`: the recipe, the run directory, the plain lines a person reads."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from async_rl.stages import recipe as recipes
from async_rl.stages.config import Kind, StageRecipe
from async_rl.stages.directory import StageDirectory, Tell, nothing
from async_rl.telemetry.exporters import check_exporters

SAMPLE_EVERY_S = 2.0
"""Lines of steps come at most so often, whatever a step takes."""
SHOWN: dict[Kind, tuple[str, ...]] = {
    "sft": ("loss", "perplexity", "token_accuracy"),
    "preference": ("loss", "reward_accuracy", "reward_margin"),
    "reward-model": ("loss", "accuracy", "margin"),
    "distill": ("loss", "kl", "perplexity"),
    "merge": (),
}
"""Figures of a step or an evaluation that are worth a place in its line."""


def start(kind: Kind, path: Path, overrides: Sequence[str], run_dir: Path, *, report: bool) -> bool:
    """Run a stage, or continue it. Returns False when it was stopped before its end.

    Raises:
        UserError: the recipe, the data or the directory is wrong.
    """
    recipe, directory = recipes.load(path, kind, overrides), StageDirectory(run_dir)
    if int(os.environ.get("RANK", "0")) > 0:  # the first rank says what is to be said
        return directory.is_complete(recipe) or _run(recipe, directory, nothing)
    check_exporters(recipe)
    continues = directory.create(recipe)
    if directory.is_complete(recipe):
        print(f"{directory.path} is complete: choose another --run-dir, or more steps or epochs")
        return True
    print(f"{'continuing' if continues else 'starting'} {path} in {directory.path}", flush=True)
    with directory.files.hold():
        complete = _run(recipe, directory, Lines(kind))
        if complete and report and kind != "merge":
            written = importlib.import_module("async_rl.stages.report").write_report(directory)
            print("\n".join([*written.missing, f"report: {written.html}"]), flush=True)
    return complete


def _run(recipe: StageRecipe, directory: StageDirectory, tell: Tell) -> bool:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads beside a busy process run slower
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return importlib.import_module("async_rl.stages.runner").run(recipe, directory, tell)


class Lines:
    """Prints what is worth a line."""

    def __init__(self, kind: Kind) -> None:
        self._kind: Kind = kind
        self._stepped = float("-inf")

    def __call__(self, kind: str, data: Any) -> None:
        match kind:
            case "step":
                now, last = time.monotonic(), data["version"] == data["steps"]
                if now - self._stepped < SAMPLE_EVERY_S and not last:
                    return
                self._stepped = now
                of = f"{data['version']:>{len(str(data['steps']))}}/{data['steps']}"
                line = f"step {of}  {data['wall_s']:6.1f} s  {self._figures(data)}  {data['tokens_per_s']:.0f} tokens/s"
                line += "  skipped" if data["skipped"] else ""
            case "evaluation":
                line = f"evaluation at step {data['version']}, {data['rows']} held-out rows: {self._figures(data)}"
            case "summary":
                line = f"complete: {data['steps']} steps in {data['wall_s']:.1f} s, model: {data['model']}"
            case _:
                line = str(data)
        print(line, flush=True)

    def _figures(self, data: Mapping[str, Any]) -> str:
        return "  ".join(f"{name} {data[name]:.4g}" for name in SHOWN[self._kind] if name in data)
