"""`async-rl stage` as a user starts it: to the end, again, interrupted, with wrong input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, SMALL, SORT, rows, summary

pytestmark = pytest.mark.processes
SFT = ROOT / "recipes" / "stages" / "sort_sft.toml"


@pytest.fixture
def sft(cli: Any, tmp_path: Path) -> Any:
    """Start the SFT recipe on a few rows."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i:04}=", "response": f"{i:04}"}) + "\n" for i in range(16)))

    def start(*overrides: str) -> Any:
        sets = [f"stage.train={file}", f"stage.heldout={file}", "stage.batch_rows=8", *overrides]
        arguments = [argument for one in sets for argument in ("--set", one)]
        return cli("stage", "sft", str(SFT), "--run-dir", str(tmp_path / "run"), *arguments)

    return start


def test_a_stage_leaves_what_it_promises(sft: Any, cli: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, printed, errors = sft("stage.steps=6").end()
    assert code == 0, printed + errors
    assert "evaluation at step 0, 16 held-out rows: loss" in printed and "complete: 6 steps" in printed
    assert [row["step"] for row in rows(run)] == list(range(6)) and summary(run)["steps"] == 6
    assert (run / "model" / "model.safetensors").exists() and (run / "report.html").exists()
    assert {plot.stem for plot in (run / "plots").iterdir()} >= {"loss", "token_accuracy", "stability"}
    code, printed, _ = sft("stage.steps=6").end()
    assert code == 0 and "is complete" in printed
    code, printed, errors = sft("stage.steps=9").end()
    assert code == 0 and printed.startswith("continuing"), printed + errors
    assert [row["step"] for row in rows(run)] == list(range(9)) and summary(run)["steps"] == 9
    code, printed, errors = cli("report", str(run)).end()
    assert code == 0 and "sft: loss" in printed, printed + errors


def test_ctrl_c_can_be_continued(sft: Any, tmp_path: Path) -> None:
    started = sft("stage.steps=100000")
    started.line("step")
    started.signal(signal.SIGINT)
    code, printed, errors = started.end(20)
    assert code == 130 and "the same command continues" in printed and "Traceback" not in errors, printed + errors
    done = len(rows(tmp_path / "run"))
    again = sft("stage.steps=100000")
    again.line("step")
    again.signal(signal.SIGTERM)
    assert again.end(20)[0] == 130
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(len(rows(tmp_path / "run"))))
    assert len(rows(tmp_path / "run")) > done


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stage.train=nowhere.jsonl", "there is no such file or directory"),
        ("stage.epochs=1", "stage.epochs and stage.steps"),
        ("stage.kind=merge", "stage.kind = 'merge'"),
        ("stage.batch_row=1", "did you mean 'stage.batch_rows'?"),
        ("preference.beta=0.2", "preference.beta = 0.2: stage.kind = 'sft' does not read it: leave it out"),
        ('report_to=["trackio"]', "pip install 'async-rl[trackio]'"),
        ("learner.ranks=2", "as many ranks as torchrun starts"),
        ("model.tiny.characters=01", "line 1: character '=' in"),
    ],
)
def test_wrong_input(sft: Any, override: str, says: str) -> None:
    code, printed, errors = sft(override).end(60)
    assert code == 2 and errors.startswith("async-rl: ") and errors.count("\n") == 1, printed + errors
    assert says in errors


def stage(cli: Any, kind: str, recipe: str, run: Path, *sets: str) -> str:
    """Run a recipe to its end; returns what it printed."""
    arguments = [argument for one in sets for argument in ("--set", one)]
    path = ROOT / "recipes" / "stages" / recipe
    code, printed, errors = cli("stage", kind, str(path), "--run-dir", str(run), "--no-report", *arguments).end(90)
    assert code == 0 and f"model: {run / 'model'}" in printed, printed + errors
    return printed


def test_sft_then_dpo_then_a_merge_then_rl(cli: Any, tmp_path: Path) -> None:
    """Each takes the directory that the one before has left: `model.path`."""
    subprocess.run([sys.executable, ROOT / "recipes" / "stages" / "make_data.py", tmp_path], check=True)
    sft, dpo, merged, rl = (tmp_path / name for name in ("sft", "dpo", "merged", "rl"))
    rows = [f"stage.train={tmp_path}/sort_sft.jsonl", f"stage.heldout={tmp_path}/sort_sft_heldout.jsonl"]
    stage(cli, "sft", "sort_sft.toml", sft, *rows, "stage.steps=40", "stage.evaluate_every=0")
    warm = summary(sft)["eval_after"]["token_accuracy"]
    assert warm > 0.4
    rows = [f"stage.train={tmp_path}/sort_pairs.jsonl", f"stage.heldout={tmp_path}/sort_pairs_heldout.jsonl"]
    stage(cli, "preference", "sort_preference.toml", dpo, *rows, f'model={{path="{sft}/model"}}', "stage.epochs=0.2")
    assert summary(dpo)["eval_after"]["reward_accuracy"] > summary(dpo)["eval_before"]["reward_accuracy"]
    stage(cli, "merge", "merge.toml", merged, f"merge.a={sft}/model", f"merge.b={dpo}/model")
    sets = [f'model={{path="{merged}/model"}}', "steps=2", *SMALL, "evaluation.tasks=64"]
    arguments = [argument for one in sets for argument in ("--set", one)]
    code, printed, errors = cli("train", str(SORT), "--run-dir", str(rl), "--no-report", *arguments).end(90)
    assert code == 0, printed + errors
    assert summary(rl)["eval_before"]["reward"] > 0.3, "a policy from random weights is right in a tenth of the places"
