"""Wrong input: one clear line, exit code 2, nothing left running."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import SORT

pytestmark = pytest.mark.processes


def refused(cli: Any, *arguments: str) -> str:
    code, printed, errors = cli(*arguments).end(60)
    assert code == 2, printed + errors
    assert errors.startswith("async-rl: ") and errors.count("\n") == 1, errors
    return errors


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("staleness.max_stale=1", "staleness.max_stale = 1: there is no such field"),
        ("rollout.group_size=true", "rollout.group_size = True: expected int, got bool"),
        (
            "environment.name=sortign",
            "environment.name = 'sortign': there is no such environment; did you mean 'sorting'?",
        ),
        ("environment.options.digits=99", "environment.options of sorting: digits = 99: write 2 to 32"),
        ("environment.options.digit=4", "environment.options.digit = 4: sorting knows digits, reward, heldout"),
        ("environment.module=nowhere.py", "there is no such file"),
        ("algorithm.preset=ppoo", "ppoo"),
        ("algorithm.options.clip_hihg=0.3", "clip_hihg"),
        ("algorithm.options.kl_target=6.0", "kl_target = 6.0 with kl = 'none', kl_in = 'loss', kl_coef = 0.0"),
        (
            "algorithm={preset='async_ppo', options={c_bar=2.0}}",
            "rho_bar = 1.0, c_bar = 2.0: V-trace cuts traces no later",
        ),
        ("model.tiny.heads=3", "model.tiny.hidden_size = 64: write a multiple of 2 * heads = 6"),
        ("learner.device=cuda:77", "learner.device = 'cuda:77'"),
    ],
)
def test_a_wrong_recipe(cli: Any, tmp_path: Path, override: str, says: str) -> None:
    assert says in refused(cli, "train", str(SORT), "--run-dir", str(tmp_path / "run"), "--set", override)


def test_a_busy_port(cli: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for field in ("controller.port", "controller.admin_port"):
            line = refused(cli, "train", str(SORT), "--run-dir", str(tmp_path / field), "--set", f"{field}={port}")
            assert f"{field} = {port}: cannot listen on 127.0.0.1" in line


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (
            ["weights.host=203.0.113.5", "weights.transport=process_group"],
            "weights.host = '203.0.113.5': cannot listen there (Cannot assign requested address); write an address of "
            "the learner's machine",
        ),
        (
            ["generator.sglang.host=203.0.113.5", "generator.engine=sglang"],
            "generator.sglang.host = '203.0.113.5': cannot listen there (Cannot assign requested address); write an "
            "address of the generator's machine",
        ),
    ],
)
def test_an_address_that_is_not_ours(cli: Any, tmp_path: Path, sets: list[str], says: str) -> None:
    """A service that finds it out says so and is not started again."""
    flags = [part for one in sets for part in ("--set", one)]
    assert says in refused(cli, "train", str(SORT), "--run-dir", str(tmp_path / "run"), *flags)


def test_an_unwritable_directory(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused(cli, "train", str(SORT), "--run-dir", str(tmp_path / "file" / "run"))
    assert "cannot be written" in line and "choose another --run-dir" in line


def test_a_missing_extra(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tensorboard'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = 'report_to=["tensorboard"]'
    line = refused(cli, "train", str(SORT), "--run-dir", str(tmp_path / "run"), "--set", report)
    assert "pip install 'async-rl[tensorboard]'" in line, sys.path


def test_what_is_no_run_directory(cli: Any, tmp_path: Path) -> None:
    assert "is no run directory" in refused(cli, "inspect", str(tmp_path), "--check")
    assert "No such file" in refused(cli, "train", str(tmp_path / "missing.toml"))


HOPELESS = """
from async_rl import Policy, Rows, Task, environment

def tasks(seed: int) -> Rows:
    return Rows([{"prompt": "12="}] * 8, heldout=4, seed=seed)

@environment("hopeless", tasks=tasks)
async def hopeless(task: Task, policy: Policy) -> float:
    await policy.chat([{"role": "user", "content": task["prompt"]}])
    return task["answer"]
"""


def test_an_environment_whose_every_episode_fails(cli: Any, tmp_path: Path) -> None:
    """What stops it is not that nothing happens: episodes begin and end at full speed."""
    (tmp_path / "hopeless.py").write_text(HOPELESS)
    sets = ["environment.name=hopeless", f"environment.module={tmp_path / 'hopeless.py'}", "environment.options={}"]
    sets += ["evaluation.tasks=0", "environment.failures_in_a_row=100"]
    run = tmp_path / "run"
    flags = [part for one in sets for part in ("--set", one)]
    line = refused(cli, "train", str(SORT), "--run-dir", str(run), *flags)
    assert "100 episodes in a row failed, the last one with: KeyError: 'answer'" in line
    assert f"tracebacks are in {run / 'failures.jsonl'}" in line
    assert 'in hopeless\\n    return task[\\"answer\\"]' in (run / "failures.jsonl").read_text()
