"""A whole training run over a real server, whose server is killed in the middle."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from async_rl.telemetry.run_directory import RunDirectory

from ..chaos.conftest import Run, completes, newest_checkpoint, start  # noqa: F401 - fixtures among them
from ..chaos.faults import Meeting, run_first
from ..chaos.recomputation import KEPT, check_logprobs
from ..system.conftest import cli, summary, train  # noqa: F401
from .conftest import CPU_ARGUMENTS, CPU_ENVIRONMENT, PYTHON

STEPS = 30
TOLERANCE = 1e-5


def on_sglang() -> list[str]:
    """Whatever a recipe needs for a server of its own."""
    environment = ",".join(f"{key}='{value}'" for key, value in CPU_ENVIRONMENT.items())
    return [
        "generator.engine=sglang",
        f"generator.sglang.python={PYTHON}",
        f"generator.sglang.environment={{{environment}}}",
        f"generator.sglang.arguments={CPU_ARGUMENTS}",
    ]


def overrides() -> list[str]:
    """Completions long enough that weights change in the middle of them; every checkpoint and every rollout is kept."""
    return [
        *on_sglang(),
        f"steps={STEPS}",
        "environment.options={digits=32,reward='distance'}",
        "model.tiny.max_length=96",
        "rollout.max_new_tokens=32",
        "rollout.segment_tokens=12",
        *KEPT,
        "evaluation.every_steps=10",
    ]


def server_of(run: Run) -> psutil.Process:
    for child in run.children()["generator-0"].children():
        if "sglang.launch_server" in child.cmdline():
            return child
    raise AssertionError("the generator has no server")


@pytest.mark.timeout(580)
def test_a_run_whose_server_is_killed(start: Any, tmp_path: Path) -> None:  # noqa: F811
    """Every promise holds, and every log-prob of every rollout is that of the weights its version names."""
    run = start(*overrides())
    run.rows(8, within=300)
    server_of(run).kill()
    run.rows(1, within=300)
    completes(run, STEPS)
    assert summary(run.path)["eval_after"]["failed"] == 0
    log = (run.path / "logs" / "generator-0.log").read_text()
    assert re.search(r"is gone \(.+\); it is started again", log), log
    checked = check_logprobs(RunDirectory(run.path), atol=TOLERANCE)
    print(f"{sum(checked.values())} tokens of {len(checked)} versions agree with the learner")
    assert len(checked) > 20


EVERY = 10
OTHERS = 16
"""Training rollouts that must end while an evaluation rollout is in flight."""
EXAM = f"""
from async_rl import environment
from async_rl.environments.api import Reward
from async_rl.environments.sorting import SortingTasks

ended = 0


class Tasks(SortingTasks):
    def heldout(self):
        return [{{**task, "exam": True}} for task in super().heldout()]


@environment("exam", tasks=Tasks)
async def exam(task, policy):
    global ended
    if "exam" not in task.data:
        reply = await policy.complete(task["digits"] + "=", max_new_tokens=4)
        ended += 1
        return float(reply.text == "".join(sorted(task["digits"])))
    before = ended
    for _ in range(100):
        await policy.complete(task["digits"] + "=", max_new_tokens=1)
        if ended - before >= {OTHERS}:
            break
    return Reward(0.0, {{}}, {{"others": float(ended - before)}})
"""
SLOW_DISK = """
import os, sys

if "learner-0" in sys.orig_argv:
    real = os.fsync

    def fsync(descriptor):
        if "/checkpoints/" in os.readlink(f"/proc/self/fd/{{descriptor}}") and os.path.exists({path!r}):
            open({path!r}).read()
        real(descriptor)

    os.fsync = fsync
"""


@pytest.mark.timeout(300)
def test_generation_goes_on_during_checkpoint_and_evaluation(
    start: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A checkpoint whose disk does not answer, until batches were sampled and trained on that began after it; and an
    evaluation whose every rollout asks for one token more until training rollouts have ended beside it."""
    (tmp_path / "exam.py").write_text(EXAM)
    run_first(monkeypatch, tmp_path / "first", SLOW_DISK.format(path=str(tmp_path / "disk")))
    disk = Meeting(tmp_path / "disk")
    run = start(
        *on_sglang(),
        f"steps={2 * EVERY}",
        f"checkpoint.every_steps={EVERY}",
        f"evaluation.every_steps={EVERY}",
        "environment.name=exam",
        f"environment.module={tmp_path / 'exam.py'}",
        "environment.options={}",
    )
    disk.wait()
    row = run.rows(1)
    while row["step"] - row["lag_max"] <= EVERY:
        row = run.rows(1)
    assert newest_checkpoint(run.path) == 0 and row["step"] < 2 * EVERY - 1
    disk.end()
    completes(run, 2 * EVERY)
    assert newest_checkpoint(run.path) == 2 * EVERY
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    beside = [sample["metrics"]["others"] for sample in samples if sample["version"] == EVERY]
    assert len(beside) == 16 and min(beside) >= OTHERS


def in_turn(run: Run, *states: str) -> None:
    """Wait until the device is in one of these."""
    deadline = time.monotonic() + 60
    while (turn := run.call("/status")["turn"]) not in states:
        assert time.monotonic() < deadline, f"in {turn}, never in {states}"


@pytest.mark.timeout(400)
def test_a_run_in_turns_with_its_server(start: Any) -> None:  # noqa: F811
    """`placement = "colocated"`: the server leaves the device for every step, is killed once off it and once on it, and
    is started again when it is its turn. What it samples over a turn is of the weights of that turn."""
    run = start(*on_sglang(), *KEPT, "steps=30", "placement=colocated", "staleness.depth=1")
    run.rows(3, within=200)
    learner = run.children()["learner-0"]
    learner.suspend()
    in_turn(run, "onload", "train", "offload")
    server_of(run).kill()
    learner.resume()
    run.rows(3, within=200)
    in_turn(run, "rollout")
    server_of(run).kill()
    completes(run, 30)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    states = {state for row in rows for state in row["turns"]["seconds"]}
    assert states == {"update", "rollout", "release", "onload", "train", "offload"}
    assert rows[-1]["engine"]["restarts"] == 2
    checked = check_logprobs(RunDirectory(run.path), atol=TOLERANCE)
    print(f"{sum(checked.values())} tokens of {len(checked)} versions agree with the learner")
    assert len(checked) > 20
