"""A generator that samples at another temperature than it was told: a run says so, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import rows

pytestmark = pytest.mark.processes

FAULT = """
import dataclasses, sys
if "generator" in sys.orig_argv:
    from async_rl.engines.embedded import EmbeddedEngine
    submit = EmbeddedEngine.submit
    def hotter(self, requests):
        submit(self, [dataclasses.replace(one, temperature=0.7 * one.temperature) for one in requests])
    EmbeddedEngine.submit = hotter
"""
"""As sitecustomize, which Python runs before anything else."""


OVERRIDES = ("steps=120", "learner.mismatch_steps=4")


def compared(run: Path) -> list[Any]:
    found = [row for row in rows(run) if row["equal_version_tokens"]]
    assert len(found) > 5 and found[-1]["step"] > 60, "also where generation runs ahead"
    return found


def test_a_wrong_generator_is_told_of(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = tmp_path / "fault"
    fault.mkdir()
    (fault / "sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", str(fault))
    code, printed, errors = train(*OVERRIDES).end()
    assert code == 0, printed + errors
    (said,) = [line for line in printed.splitlines() if "do not agree on log-probs" in line]
    assert "limit 0.001" in said and "another temperature" in said and "async-rl doctor" in said
    assert min(row["equal_version_gap"] for row in compared(tmp_path / "run")) > 0.01


def test_a_right_generator_is_not(train: Any, tmp_path: Path) -> None:
    code, printed, errors = train(*OVERRIDES).end()
    assert code == 0 and "agree on log-probs" not in printed, printed + errors
    assert max(row["equal_version_gap_max"] for row in compared(tmp_path / "run")) < 1e-4
