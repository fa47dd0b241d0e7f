"""`async-rl train` from start to end, with every real part."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import admin, asked, check, rows, summary

pytestmark = pytest.mark.processes

SUMMARY = {
    "steps",
    "wall_s",
    "reward_first",
    "reward_last",
    "eval_before",
    "eval_after",
    "samples",
    "tokens",
    "tokens_per_cpu_s",
    "idle",
    "lag",
    "masked_fraction",
    "versions",
    "memory",
}
ROW = {"step", "wall_s", "reward", "samples", "tokens", "tokens_per_cpu_s", "idle", "lag", "masked_fraction", "version"}


def test_a_run_leaves_what_it_promises(train: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, printed, errors = train("steps=25", 'report_to=["tensorboard"]', report=True).end()
    assert code == 0, printed + errors
    assert "complete: 25 steps" in printed
    result, steps = summary(run), rows(run)
    assert result.keys() >= SUMMARY and result["steps"] == 25
    assert list(result["memory"]) == ["policy"], "no model that the recipe does not need"
    assert result["lag"]["max"] <= 4 and result["masked_fraction"] == 0
    assert [row["step"] for row in steps] == list(range(25)) and all(row.keys() >= ROW for row in steps)
    for role in ("generator", "learner"):
        assert abs(result["busy"][role] + sum(result["idle"][role].values()) - 1) < 1e-6, "time is attributed whole"
    compared = [row for row in steps if row["equal_version_tokens"]]
    assert compared and all(row["equal_version_gap_max"] < 1e-4 for row in compared)
    assert not any("equal_version_gap" in row for row in steps if row not in compared)
    assert "do not agree" not in printed and {row["equal_version_limit"] for row in steps} == {1e-3}
    report = check(run)
    assert report["trained"] == 25 * 64 and report["admitted"] == report["trained"] + report["cancelled"]
    newest = sorted((run / "checkpoints").iterdir())[-1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(newest), AutoTokenizer.from_pretrained(newest)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "3102="}], return_tensors="pt")["input_ids"]
    out = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] <= prompt.shape[1] + 4
    assert list((run / "tensorboard").iterdir())
    assert printed.splitlines()[-1] == f"report: {run / 'report.html'}"
    assert len(list((run / "plots").glob("*.png"))) > 5
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["version"] for sample in samples] == [0] * 16 + [25] * 16

    code, printed, _ = train("steps=25", 'report_to=["tensorboard"]').end()
    assert code == 0 and "is complete (25 steps)" in printed
    code, printed, errors = train("steps=30", 'report_to=["tensorboard"]').end()
    assert code == 0 and "continuing" in printed, printed + errors
    assert [row["step"] for row in rows(run)] == list(range(30)) and summary(run)["steps"] == 30
    assert check(run)["trained"] == 30 * 64
    code, _, errors = train("steps=30", "optimizer.learning_rate=1.0").end()
    assert code == 2 and "optimizer.learning_rate: 0.0005 -> 1.0" in errors


def test_synchronous_runs_repeat_bit_for_bit(train: Any, tmp_path: Path) -> None:
    weights = []
    for name in ("first", "second"):
        code, printed, errors = train("steps=12", "staleness.max_staleness=0", run_dir=tmp_path / name).end()
        assert code == 0, printed + errors
        assert summary(tmp_path / name)["lag"] == {"mean": 0.0, "p95": 0, "max": 0}
        gaps = [row["equal_version_gap_max"] for row in rows(tmp_path / name)]
        assert max(gaps) < 1e-4, "log-probs of the engine and of the learner, every token at equal version"
        checkpoint = sorted((tmp_path / name / "checkpoints").iterdir())[-1]
        weights.append(load_file(checkpoint / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    volatile = {"wall_s", "timestamp", "tokens_per_s", "tokens_per_cpu_s", "busy", "idle", "train_s"}
    volatile |= {"ready", "running"}
    first, second = (
        [{key: value for key, value in row.items() if key not in volatile} for row in rows(tmp_path / name)]
        for name in ("first", "second")
    )
    assert first == second


def test_weights_travel_by_process_group_to_two_generators_and_two_ranks_train(train: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["weights.transport=process_group", "generator.count=2", "learner.ranks=2"]
    code, printed, errors = train("steps=15", *overrides).end(90)
    assert code == 0, printed + errors
    assert summary(run)["versions"]["live_updates"] >= 2 and check(run)["trained"] == 15 * 64


def test_weights_travel_over_http_and_say_what_changed(train: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["weights.transport=http", "generator.count=2", "generator.dtype=bfloat16"]
    code, printed, errors = train("steps=15", *overrides).end(90)
    assert code == 0, printed + errors
    assert summary(run)["versions"]["live_updates"] >= 2 and check(run)["trained"] == 15 * 64
    assert 0 < summary(run)["weights_changed"] <= 1
    assert all(0 < row["weights_changed"] <= 1 for row in rows(run)[3:])


def test_the_admin_endpoint_steers_a_run(train: Any, tmp_path: Path) -> None:
    """With keys and a token, as on several machines."""
    run = tmp_path / "run"
    started = train("steps=100000", "security.loopback=true")
    started.line("step")
    file = run / "admin.json"
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(json.loads(file.read_text())["url"] + "/status", timeout=20)
    with refused.value as answer:
        assert answer.status == 401 and str(run / "secrets" / "token") in json.load(answer)["error"]

    status = admin(run, "/status")
    assert status["step"] >= 1 and status["learner"] and status["generators"][0]["name"] == "generator-0"
    with asked(run, "/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if not line.startswith("#"))
    assert lines["async_rl_rollouts_unaccounted"] == "0.0" and float(lines["async_rl_steps_total"]) >= status["step"]
    assert 'async_rl_engine_running{generator="generator-0"}' in lines
    assert float(lines['async_rl_weight_stall_seconds_count{transport="shared_memory"}']) >= 1
    assert admin(run, "/pause", "POST") == {"paused": True} and admin(run, "/status")["paused"]
    assert "exact" in admin(run, "/evaluate", "POST"), "evaluation runs while admission is closed"
    assert admin(run, "/resume", "POST") == {"paused": False}
    assert admin(run, "/stop", "POST") == {"stopping": True}
    code, _, errors = started.end(10)
    assert code == 130, errors
    check(run)
    secret = json.loads((run / "secrets" / "generator.key").read_text())["secret"]
    kept = [path for path in run.rglob("*") if path.is_file() and path.parent.name != "secrets"]
    token = (run / "secrets" / "token").read_text().strip()
    assert not [path for path in kept for part in (secret, token) if part.encode() in path.read_bytes()]


def test_a_users_environment_with_failing_episodes(train: Any, tmp_path: Path) -> None:
    """An exception in user code is a failed rollout with its traceback; the run goes on."""
    (tmp_path / "mine.py").write_text(
        "from async_rl import Policy, Rows, Task, environment\n"
        "def tasks(seed: int):\n"
        "    return Rows([{'digits': str(i)} for i in range(10)], heldout=2, seed=seed)\n"
        "calls = 0\n"
        "@environment('mine', tasks=tasks)\n"
        "async def mine(task: Task, policy: Policy) -> dict[str, float]:\n"
        "    global calls\n"
        "    calls += 1\n"
        "    mine = calls\n"
        "    reply = await policy.chat([{'role': 'user', 'content': task['digits'] + '='}])\n"
        "    if mine % 7 == 0:\n"
        "        raise ValueError('the seventh episode fails')\n"
        "    again = await policy.complete(reply.tokens or [1], max_new_tokens=2)\n"
        "    return {'length': len(reply.text) / 4, 'second': float(again.finish_reason == 'length')}\n"
    )
    overrides = ["environment.name=mine", f"environment.module={tmp_path / 'mine.py'}", "environment.options={}"]
    code, printed, errors = train("steps=6", *overrides).end()
    assert code == 0, printed + errors
    report = check(tmp_path / "run")
    assert report["failed"] > 5 and report["trained"] + report["failed"] + report["cancelled"] == report["admitted"]
    failures = (tmp_path / "run" / "failures.jsonl").read_text().splitlines()
    assert "the seventh episode fails" in json.loads(failures[0])["traceback"]
