"""The recipes of docs/stages.md, run to their end: what each learns on held-out rows, and how long it takes.

    python bench/stages.py        writes bench/results/stages.json and docs/stages.png

One core, a tiny model from random weights. SFT is measured on the hundred rows it learns by heart: that is its point.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from losses import ROOT, cpu_name
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULT, PLOT = ROOT / "bench" / "results" / "stages.json", ROOT / "docs" / "stages.png"
RECIPES = ROOT / "recipes" / "stages"
STAGES = {
    "sort_sft": ("sft", "token_accuracy", "SFT: tokens right", 1.0),
    "sort_preference": ("preference", "reward_accuracy", "DPO: pairs right", 0.95),
    "sort_reward_model": ("reward-model", "accuracy", "Reward model: pairs right", 0.95),
    "sort_distill": ("distill", "kl", "Distillation: KL to the teacher", None),
}
"""recipe -> kind, what is measured, title, what it should reach"""


def main() -> int:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, RECIPES / "make_data.py", Path(name) / "data"], check=True)
        for recipe in STAGES:
            rows.append(run(recipe, Path(name)))
            print({key: value for key, value in rows[-1].items() if key != "curve"}, flush=True)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    head = {
        "what": "held-out figures of recipes/stages over training, one core",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() if commit.returncode == 0 else None,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {cpu_name()}", "torch": torch.__version__,
    }  # fmt: skip
    RESULT.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    draw(rows)
    return 0 if all(row["reached"] for row in rows) else 1


def run(recipe: str, directory: Path) -> dict[str, Any]:
    kind, measure, _, goal = STAGES[recipe]
    command = [sys.executable, "-m", "async_rl.cli", "stage", kind, str(RECIPES / f"{recipe}.toml"), "--no-report"]
    command += ["--run-dir", str(directory / recipe)]
    for key in ("train", "heldout"):
        file = tomllib.loads((RECIPES / f"{recipe}.toml").read_text())["stage"].get(key)
        command += ["--set", f"stage.{key}={directory / file}"] if file else []
    if kind == "distill":
        command += ["--set", f"distill.teacher={directory / 'sort_sft' / 'model'}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    evaluations = [json.loads(line) for line in (directory / recipe / "evaluations.jsonl").read_text().splitlines()]
    summary = json.loads((directory / recipe / "summary.json").read_text())
    curve = [(one["version"], one[measure]) for one in evaluations]
    reached = curve[-1][1] >= goal if goal is not None else curve[-1][1] < curve[0][1] / 4
    return {
        "recipe": recipe, "measure": measure, "before": curve[0][1], "after": curve[-1][1], "goal": goal,
        "reached": reached, "steps": summary["steps"], "wall_s": round(summary["wall_s"], 1), "curve": curve,
    }  # fmt: skip


def draw(rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(12, 2.8), dpi=120, layout="constrained", facecolor="white")
    for axes, row in zip(figure.subplots(1, len(rows)), rows, strict=True):
        axes.plot(*zip(*row["curve"], strict=True), "o-", color="#0072b2", markersize=4)
        if row["goal"] is not None:
            axes.axhline(row["goal"], color="#999999", linestyle="--", linewidth=1)
        axes.set_title(STAGES[row["recipe"]][2], fontsize=10.5, loc="left")
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(PLOT)


if __name__ == "__main__":
    raise SystemExit(main())
