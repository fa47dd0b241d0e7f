"""Metrics in TensorBoard's and W&B's own files, read back by their own readers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from async_rl.config import Environment, Model, Run, TinyModel
from async_rl.errors import MissingExtra
from async_rl.telemetry.exporters import check_exporters, exporters
from async_rl.telemetry.journal import EvalSummary
from async_rl.telemetry.run_directory import DirectoryJournal, RunDirectory

SORT = Path(__file__).resolve().parents[2] / "recipes" / "sort.toml"
ROWS: list[dict[str, Any]] = [
    {"step": i, "version": i + 1, "reward": i / 4, "lag": {"mean": 1.5, "tokens": {"0": 3}}} for i in range(3)
]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "demo")
    directory.create(recipe())
    return directory


def recipe(*report_to: Any) -> Run:
    model = Model(tiny=TinyModel(characters="01"))
    return Run(steps=3, model=model, environment=Environment(name="sorting"), report_to=list(report_to))


def write(directory: RunDirectory, run: Run) -> None:
    journal = DirectoryJournal(directory, lambda kind, data: None, exporters(run, directory.path))
    for row in ROWS:
        journal.step(row)
    journal.evaluated(EvalSummary(3, 8, 0, 0.5, {"exact": 0.25}, 100), [])
    journal.close()


def test_tensorboard(directory: RunDirectory) -> None:
    write(directory, recipe("tensorboard"))
    events = EventAccumulator(str(directory.path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.0), (2, 0.25), (3, 0.5)]
    assert [e.value for e in events.Scalars("lag/tokens/0")] == [3.0] * 3
    assert [(e.step, e.value) for e in events.Scalars("evaluation/exact")] == [(3, 0.25)]


def test_wandb_offline(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = recipe("wandb")
    check_exporters(run)
    write(directory, run)
    (written,) = directory.path.glob("wandb/offline-run-*/run-demo.wandb")
    content = written.read_bytes()
    assert b"evaluation/exact" in content and b"lag/mean" in content


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtra, match=r'report_to = \["trackio"\] needs the package \'trackio\': pip install'):
        check_exporters(recipe("trackio"))


def test_a_missing_key_is_said_before_anything_starts(tmp_path: Path) -> None:
    """In a process of its own: wandb remembers its settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"NETRC": "/dev/null"}
    command = [sys.executable, "-m", "async_rl.cli", "train", str(SORT), "--run-dir", str(tmp_path / "run")]
    command += ["--set", 'report_to=["wandb"]']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "no API key; run `wandb login`, or set WANDB_MODE=offline" in done.stderr
