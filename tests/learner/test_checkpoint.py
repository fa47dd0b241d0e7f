"""Resuming equals never stopping, bit for bit; a checkpoint is complete or does not exist."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from learner_cases import message, ragged_rollouts, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_rl.config import Checkpoint, Optimizer
from async_rl.learner import checkpoint
from async_rl.learner.distributed import Ranks
from async_rl.learner.trainer import CHECKPOINTS, Learner
from async_rl.wire.messages import WeightsId


def snapshot(learner: Learner) -> torch.Tensor:
    out = torch.empty(learner.layout.nbytes, dtype=torch.uint8)
    learner.snapshot(out)
    return out


def train(learner: Learner, steps: int) -> list[dict[str, float]]:
    done: list[dict[str, float]] = []
    for _ in range(steps):
        step = learner.version
        done.append(learner.train(message(ragged_rollouts(seed=step, version=step), step=step, version=step)))
    return [{name: value for name, value in metrics.items() if name != "train_s"} for metrics in done]


def test_resume_equals_never_stopping(ranks: Ranks, tmp_path: Path) -> None:
    run = tiny_run(optimizer=Optimizer(learning_rate=1e-2, warmup_steps=5, weight_decay=0.1))
    straight, first = Learner(run, tmp_path / "straight", ranks), Learner(run, tmp_path / "stopped", ranks)
    expected = train(straight, 6)
    first.begin(lineage=7)
    before = train(first, 3)
    path = first.save_checkpoint()
    torch.manual_seed(99)  # whatever happens in between
    second = Learner(run, tmp_path / "stopped", ranks)
    assert second.resumed_from == second.weights == WeightsId(7, 3)
    assert before + train(second, 3) == expected
    assert torch.equal(snapshot(second), snapshot(straight))
    assert path is not None
    assert msgspec.json.decode((path / "trainer.json").read_bytes()) == {
        "version": 3, "lineage": 7, "ledger_position": 3, "seed": run.seed, "format": 1,
    }  # fmt: skip


def test_a_run_repeats_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    one, other = (Learner(tiny_run(), tmp_path / name, ranks) for name in "ab")
    assert train(one, 3) == train(other, 3)
    assert torch.equal(snapshot(one), snapshot(other))


def test_transformers_loads_it(ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    learner = Learner(tiny_run(), tmp_path, ranks)
    train(learner, 1)
    path = learner.save_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, learner.model.get_parameter(name)), name
    assert model.config._attn_implementation == "sdpa"  # nothing of ours is needed to use it
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.encode("12=", add_special_tokens=False) == learner.tokenizer.encode(
        "12=", add_special_tokens=False
    )
    assert "Writing" not in capfd.readouterr().err, "a progress bar in the output of the run"


def test_only_the_newest_are_kept(ranks: Ranks, tmp_path: Path) -> None:
    learner = Learner(tiny_run(checkpoint=Checkpoint(keep=2)), tmp_path, ranks)
    for _ in range(4):
        learner.save_checkpoint()
        train(learner, 1)
    directory = tmp_path / CHECKPOINTS
    assert sorted(path.name for path in directory.iterdir()) == ["v00000002", "v00000003"]
    learner.version = 3
    learner.save_checkpoint()  # the same version again takes the place of the former
    assert sorted(path.name for path in directory.iterdir()) == ["v00000002", "v00000003"]


CRASH = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from learner_cases import tiny_run
from async_rl.learner import checkpoint
from async_rl.learner.trainer import Learner
learner = Learner(tiny_run(), Path(sys.argv[1]))
learner.version = 1
learner.save_checkpoint()
learner.version = 2
checkpoint.publish = lambda partial, final: os.kill(os.getpid(), signal.SIGKILL)
learner.save_checkpoint()
"""


@pytest.mark.processes
def test_a_crash_before_the_rename_leaves_the_previous_one(ranks: Ranks, tmp_path: Path) -> None:
    script = CRASH.format(path=[str(Path(__file__).parent)])
    crashed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=os.environ, timeout=60, check=False)
    assert crashed.returncode == -signal.SIGKILL
    directory = tmp_path / CHECKPOINTS
    assert len(list(directory.iterdir())) == 2, "the crash should have left a partial directory"
    found = checkpoint.latest(directory)
    assert found is not None and found[1].version == 1
    learner = Learner(tiny_run(), tmp_path, ranks)
    assert learner.version == 1
    assert [path.name for path in directory.iterdir()] == ["v00000001"]


def test_a_crash_while_replacing_brings_the_former_back(ranks: Ranks, tmp_path: Path) -> None:
    learner = Learner(tiny_run(), tmp_path, ranks)
    path = learner.save_checkpoint()
    assert path is not None
    path.rename(path.with_name(f"{checkpoint.PARTIAL}former-{path.name}"))
    assert checkpoint.latest(path.parent) is None
    checkpoint.remove_partial(path.parent)
    assert checkpoint.latest(path.parent) == (path, checkpoint.Position(0, 0, 0, 1))


def test_a_damaged_checkpoint_is_named(ranks: Ranks, tmp_path: Path) -> None:
    learner = Learner(tiny_run(), tmp_path, ranks)
    path = learner.save_checkpoint()
    assert path is not None
    (path / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(checkpoint.CheckpointCorrupt, match="v00000000"):
        Learner(tiny_run(), tmp_path, ranks)
    (path / "trainer.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointCorrupt, match=r"trainer\.json cannot be read"):
        checkpoint.latest(path.parent)
