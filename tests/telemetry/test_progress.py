"""Plain lines: which come, how often, and in which words."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from async_rl import config, recipes
from async_rl.telemetry.progress import (
    CAUSES,
    QUIET_S,
    SAMPLE_EVERY_S,
    Progress,
    cause_words,
    one_line,
    stage_words,
    step_line,
    summary_line,
)
from async_rl.telemetry.usage import BUSY

PACKAGE = Path(config.__file__).parent
RUN = recipes.from_table(
    {
        "steps": 40,
        "model": {"tiny": {"characters": "0123456789="}},
        "environment": {"name": "sorting"},
        "rollout": {"groups_per_step": 8, "group_size": 4},
    }
)
ROW: dict[str, Any] = {
    "reward": 0.7936,
    "ess_frac": 0.98,
    "step": 6,
    "version": 7,
    "wall_s": 39.55,
    "train_exact": 0.543,
    "tokens_per_cpu_s": 14564.9,
    "idle": {
        "learner": {"hand_over": 0.0075, "wait_batch": 0.0313},
        "generator": {"environment": 0.2295, "wait_lease": 0.3752},
    },
    "lag": {"mean": 1.0, "p95": 1, "max": 2},
    "masked_fraction": 0.004,
    "ready": 0,
    "running": 32,
}
"""Recorded, and cut down to what a line shows."""


def pulse(stage: str, done: int = 0, total: int = 0, *, ready: int = 0, version: int = 0) -> dict[str, Any]:
    return {"stage": stage, "done": done, "total": total, "ready": ready, "running": 32, "version": version}


def step(version: int) -> dict[str, Any]:
    return {**ROW, "step": version - 1, "version": version}


def test_a_step_says_how_far_how_good_how_stale_and_who_waits() -> None:
    assert step_line(ROW, 40) == (
        "step  7/40    39.5 s  reward 0.794  exact 0.54  lag 1.0 (max 2)  ess 0.98  masked 0.4%"
        "  14565 tokens/cpu-s  ready 0 running 32  generator 38% admission closed (staleness bound)"
    )


def test_what_a_step_does_not_know_is_no_number() -> None:
    row = {name: value for name, value in ROW.items() if name not in ("ess_frac", "train_exact")} | {"idle": {}}
    line = step_line(row, 40)
    assert "ess -" in line and "exact" not in line and line.endswith("running 32")


def test_quick_steps_are_sampled_and_the_last_one_always_comes() -> None:
    progress = Progress(RUN)
    came = [version for version in range(1, 41) if progress.line("step", step(version), version * 0.25)]
    assert came == [1, 9, 17, 25, 33, 40] and SAMPLE_EVERY_S == 2.0


def test_every_slow_step_has_a_line() -> None:
    progress = Progress(RUN)
    assert all(progress.line("step", step(version), version * 2.0) for version in range(1, 41))


def test_a_stage_says_when_it_begins() -> None:
    progress = Progress(RUN)
    events = [
        pulse("starting"),
        pulse("starting"),
        pulse("evaluation", 0, 30),
        pulse("evaluation", 12, 30),
        pulse("training", 0, 32),
        pulse("evaluation", 12, 30, version=20),
        pulse("training", 0, 32, version=20),
        pulse("evaluation", 12, 30, version=40),
        pulse("saving", version=40),
        pulse("saving", version=40),
    ]
    lines = [line for i, event in enumerate(events) if (line := progress.line("pulse", event, i * 0.25))]
    assert lines == [
        "loading the model",
        "evaluating 30 held-out tasks",
        "training from step 1 of 40, 32 rollouts a step",  # and an evaluation beside it changes nothing
        "evaluating 30 held-out tasks",
        "saving the last checkpoint",
    ]


def test_a_long_stage_speaks_when_nothing_else_does() -> None:
    progress = Progress(RUN)
    said = {now: progress.line("pulse", pulse("evaluation", now // 4, 30), now) for now in range(41)}
    assert {now: line for now, line in said.items() if line} == {
        0: "evaluating 30 held-out tasks",
        15: "evaluating the start: 3 of 30 tasks",
        30: "evaluating the start: 7 of 30 tasks",
    }
    assert QUIET_S == 15.0
    assert progress.line("say", "generator-0 died (SIGKILL): started again", 44)
    assert progress.line("pulse", pulse("evaluation", 11, 30), 45) is None
    assert progress.line("pulse", pulse("evaluation", 11, 30), 59) == "evaluating the start: 11 of 30 tasks"


def test_the_dashboards_address_is_a_line() -> None:
    assert Progress(RUN).line("dashboard", "http://127.0.0.1:9470", 0.0) == "dashboard: http://127.0.0.1:9470"


def test_stages_in_words() -> None:
    assert stage_words(pulse("training", 20, 32, ready=20, version=6), RUN) == "step 7 of 40: 20 of 32 rollouts ready"
    assert stage_words(pulse("training", 40, 32, ready=40, version=6), RUN) == "step 7 of 40: 32 of 32 rollouts ready"
    assert stage_words(pulse("training", 0, 32, version=40), RUN).startswith("step 40 of 40")
    assert stage_words(pulse("evaluation", 3, 30, version=40), RUN) == "evaluating the end: 3 of 30 tasks"
    assert stage_words(pulse("evaluation", 3, 30, ready=5, version=6), RUN) == "step 7 of 40: 5 of 32 rollouts ready"
    assert stage_words(pulse("writing the report"), RUN) == "writing the report"


def test_a_summary_is_one_sentence() -> None:
    summary: dict[str, Any] = {
        "steps": 40,
        "wall_s": 201.34,
        "reward_first": 0.35,
        "reward_last": 0.79,
        "eval_before": {"reward": 0.3, "exact": 1 / 3, "tasks": 30, "failed": 0},
        "eval_after": {"reward": 0.8, "exact": 0.8133, "tasks": 30, "failed": 0},
    }
    progress = Progress(RUN)
    assert progress.line("summary", summary, 0.0) == (
        "complete: 40 steps in 201.3 s, held-out greedy exact 0.333 -> 0.813 (30 tasks), reward 0.350 -> 0.790"
    )
    last = summary_line({**summary, "eval_before": None})
    assert last == "complete: 40 steps in 201.3 s, reward 0.350 -> 0.790"
    known = summary_line({**summary, "eval_before": None, "weights_changed": 0.0341})
    assert known == f"{last}, a step changes 3.4% of the weights"
    assert progress.line("report", "runs/sort/report.html", 0.0) == "report: runs/sort/report.html"


def test_messages_are_one_line_without_control_characters() -> None:
    progress = Progress(RUN)
    said = "an episode failed: ValueError: \x1b[31mbad\x1b[0m\r\nnext\ttab"
    assert progress.line("say", said, 0.0) == "an episode failed: ValueError: [31mbad [0m next tab"
    assert one_line("Ωmega 数") == "Ωmega 数"


def test_every_cause_has_words() -> None:
    """The causes of both roles, read from the source: what a Tracker is given there."""
    found = set(BUSY.values())
    for name in ("rollout/host.py", "learner/service.py"):
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr="switch" | "_in_thread") | ast.Name(id="Tracker")):
                    found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
                case ast.Assign(targets=[ast.Name(id="cause") | ast.Attribute(attr="_rests_in")]):
                    found |= {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
                case _:
                    pass
    assert found >= {"wait_lease", "wait_weights", "wait_batch", "checkpoint", "environment"}
    assert found == CAUSES.keys()
    assert cause_words("something_new") == "something new"
