"""PPO with all four models, from preferences to a policy: the example that makes a reward model, the recipe, short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from .conftest import ROOT, check, rows, summary

pytestmark = pytest.mark.processes

SHORT = [
    "steps=30",
    "staleness.max_staleness=0",  # repeats bit for bit: what it learns is no matter of luck
    "rollout.groups_per_step=16",
    "optimizer.learning_rate=2e-3",
    "optimizer.decay_steps=0",
    "evaluation.tasks=0",
    "checkpoint.every_steps=10",
]


def test_it_learns_from_a_reward_model(cli: Any, tmp_path: Path) -> None:
    reward, run = tmp_path / "reward", tmp_path / "run"
    made = subprocess.run(
        [sys.executable, "examples/sort_reward_model.py", str(reward), "--steps", "40"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert float(made.stdout.splitlines()[-1].split("pairs ")[1].split(";")[0]) > 0.85, "a coin says 0.5"
    scored = [f"reward_model.path={reward}", "reward_model.replaces=true", "reward_model.weight=0.1"]
    sets = [argument for override in [*SHORT, *scored] for argument in ("--set", override)]
    recipe = str(ROOT / "recipes" / "sort_ppo.toml")
    code, printed, errors = cli("train", recipe, "--run-dir", str(run), "--no-report", *sets).end(150)
    assert code == 0, printed + errors
    check(run)
    steps, result = rows(run), summary(run)

    def gain(name: str) -> float:
        return sum(row[name] for row in steps[-5:]) / 5 - sum(row[name] for row in steps[:5]) / 5

    assert gain("reward_model") > 1.0, "what it was trained on"
    assert gain("reward_environment") > 0.04, "what the reward model was to stand for"
    assert gain("kl_k1") > 0.1 and steps[0]["kl_k1"] == pytest.approx(0, abs=1e-5)
    assert steps[0]["explained_variance"] == 0.0 and gain("explained_variance") > 0.3
    assert all(row["skipped"] == row["critic_skipped"] == 0 for row in steps)
    assert list(result["memory"]) == ["policy", "critic", "reference", "reward_model"]
    assert result["memory"]["reward_model"]["gradients"] == result["memory"]["reference"]["gradients"] == {}
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert AutoModelForSequenceClassification.from_pretrained(newest / "critic").score.out_features == 1
    assert not (newest / "reference").exists() and not (newest / "reward_model").exists()
