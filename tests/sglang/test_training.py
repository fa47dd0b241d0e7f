"""A whole training run over a real server, whose server is killed in the middle."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from engine_cases import recompute

from async_rl import config
from async_rl.ledger import records
from async_rl.ledger.store import snapshot
from async_rl.models.loading import build_model
from async_rl.telemetry.run_directory import RunDirectory
from async_rl.wire.messages import RolloutResult

from ..chaos.conftest import Run, completes, start  # noqa: F401 - fixtures among them
from ..system.conftest import cli, summary, train  # noqa: F401
from .conftest import CPU_ARGUMENTS, CPU_ENVIRONMENT, PYTHON

STEPS = 30
TOLERANCE = 1e-5


def overrides() -> list[str]:
    """Completions long enough that weights change in the middle of them; every checkpoint and every rollout is kept."""
    environment = ",".join(f"{key}='{value}'" for key, value in CPU_ENVIRONMENT.items())
    return [
        "generator.engine=sglang",
        f"generator.sglang.python={PYTHON}",
        f"generator.sglang.environment={{{environment}}}",
        f"generator.sglang.arguments={CPU_ARGUMENTS}",
        f"steps={STEPS}",
        "environment.options={digits=32,reward='distance'}",
        "model.tiny.max_length=96",
        "rollout.max_new_tokens=32",
        "rollout.segment_tokens=12",
        "checkpoint.every_steps=1",
        f"checkpoint.keep={STEPS + 1}",
        "controller.keep_rollouts=all",
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
    checked = check_logprobs(RunDirectory(run.path))
    print(f"{sum(checked.values())} tokens of {len(checked)} versions agree with the learner")
    assert len(checked) > 20


def check_logprobs(directory: RunDirectory) -> dict[int, int]:
    """version -> how many tokens were compared."""
    run = directory.load_config()
    sequences = []
    with snapshot(directory.ledger) as store:
        for key, value in store.scan(b"payload/"):
            for result in records.decode(key, value, list[RolloutResult]):
                sequences += [(sequence, span) for sequence in result.sequences for span in sequence.spans]
    checked: dict[int, int] = {}
    sequences.sort(key=lambda pair: pair[1].version)
    for version, parts in itertools.groupby(sequences, key=lambda pair: pair[1].version):
        path = directory.checkpoints / f"v{version:08d}"
        if version and not path.is_dir():
            continue
        source = config.Model(path=str(path)) if version else run.model
        model = build_model(source, seed=run.seed).eval()
        for sequence, span in parts:
            assert span.kv_version == version
            tokens = np.frombuffer(sequence.tokens, "<i4").tolist()
            expected = recompute(model, tokens[: span.start], tokens[span.start : span.end]).numpy()
            found = np.frombuffer(sequence.logprobs, "<f4")[span.start : span.end]
            np.testing.assert_allclose(found, expected, atol=TOLERANCE)
            checked[version] = checked.get(version, 0) + span.end - span.start
    return checked
