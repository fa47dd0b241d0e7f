"""`placement = "colocated"` with real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .conftest import check, rows, summary

pytestmark = pytest.mark.processes


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("v*"))[-1] / "model.safetensors")


def test_a_synchronous_run_is_the_same_bit_for_bit(train: Any, tmp_path: Path) -> None:
    """What is sampled, what is trained on and what becomes of the weights do not depend on who has which device."""
    for placement in ("separate", "colocated"):
        overrides = ["steps=8", "staleness.max_staleness=0", f"placement={placement}"]
        code, printed, errors = train(*overrides, run_dir=tmp_path / placement).end()
        assert code == 0, printed + errors
        assert check(tmp_path / placement)["trained"] == 8 * 64
    separate, colocated = (weights(tmp_path / name) for name in ("separate", "colocated"))
    assert separate.keys() == colocated.keys()
    assert all(torch.equal(separate[name], colocated[name]) for name in separate)
    told = ("step", "reward", "loss", "grad_norm", "tokens", "entropy")
    for one, other in zip(rows(tmp_path / "separate"), rows(tmp_path / "colocated"), strict=True):
        assert [one[name] for name in told] == [other[name] for name in told]


def test_an_asynchronous_run_takes_turns(train: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, printed, errors = train("steps=25", "placement=colocated", "staleness.depth=1").end()
    assert code == 0 and "complete: 25 steps" in printed, printed + errors
    assert check(run)["trained"] == 25 * 64
    result = summary(run)
    assert result["steps"] == 25 and result["eval_before"] and result["eval_after"]
    for role in ("generator", "learner"):
        assert abs(result["busy"][role] + sum(result["idle"][role].values()) - 1) < 1e-6
        assert result["idle"][role]["off_device"] > 0.1
    states = {state for row in rows(run) for state in row["turns"]["seconds"]}
    assert states == {"update", "rollout", "release", "onload", "train", "offload"}
    bytes_held = rows(run)[-1]["turns"]["bytes"]
    assert bytes_held.keys() == {"generator_on", "generator_off", "learner_on", "learner_off"}
    assert all(count > 0 for count in bytes_held.values())
