"""Resuming equals never stopping, bit for bit; a checkpoint is complete or does not exist."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
import torch
from learner_cases import message, ragged_rollouts, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from async_rl.config import Checkpoint, Model, Optimizer
from async_rl.errors import UserError
from async_rl.learner import checkpoint, checkpoint_writer
from async_rl.learner.distributed import Ranks
from async_rl.learner.saved_parts import CheckpointCorrupt, Part
from async_rl.learner.trainer import CHECKPOINTS, Learner
from async_rl.models.loading import build_model
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
    assert msgspec.json.decode((path / "trainer.json").read_bytes()) == {
        "version": 3, "lineage": 7, "ledger_position": 3, "seed": run.seed, "format": 1, "kl_coef": None,
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


def test_the_best_are_kept_too(ranks: Ranks, tmp_path: Path) -> None:
    """A checkpoint is not removed before its evaluation has come."""
    learner = Learner(tiny_run(checkpoint=Checkpoint(keep=1, keep_best=1)), tmp_path, ranks)
    rewards = {0: 0.1, 1: 0.9, 2: 0.9, 3: 0.5}
    left: list[list[str]] = []
    for version in range(6):
        learner.save_checkpoint()
        left.append(sorted(path.name[-1] for path in (tmp_path / CHECKPOINTS).iterdir()))
        if version - 1 in rewards:  # evaluations take a while
            learner.evaluated(version - 1, rewards[version - 1])
        learner.version += 1
    assert left == [["0"], ["0", "1"], ["0", "1", "2"], ["1", "2", "3"], ["2", "3", "4"], ["2", "4", "5"]]


def test_every_part_has_a_folder(ranks: Ranks, tmp_path: Path) -> None:
    """Another module that is trained beside the policy, and one that only has to be there again."""
    run = tiny_run()
    learner = Learner(run, tmp_path, ranks)
    critic, reference = (build_model(run.model, seed=seed) for seed in (5, 6))
    optimizer = torch.optim.AdamW(critic.parameters(), fused=True)
    critic(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    optimizer.step()
    learner.parts += [Part("critic", critic, optimizer), Part("reference", reference)]
    path = learner.save_checkpoint()

    for name, model in (("critic", critic), ("reference", reference)):
        loaded = build_model(Model(path=str(path / name)), seed=0)
        for key, parameter in loaded.named_parameters():
            assert torch.equal(parameter, model.get_parameter(key)), f"{name}: {key}"
    again = build_model(Model(path=str(path / "critic")), seed=0)
    restored = torch.optim.AdamW(again.parameters(), fused=True)
    checkpoint.restore(path, [Part("critic", again, restored)], ranks)
    for name, parameter in critic.named_parameters():
        kept, found = optimizer.state[parameter], restored.state[again.get_parameter(name)]
        assert kept.keys() == found.keys() and all(torch.equal(kept[key], found[key]) for key in kept), name
    (path / "critic" / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointCorrupt, match="critic"):
        checkpoint.restore(path, [Part("critic", again, restored)], ranks)


def test_training_goes_on_while_a_checkpoint_is_written(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the moment it was begun at; the next one waits for it."""
    learner, straight = (Learner(tiny_run(), tmp_path / name, ranks) for name in "ab")
    disk = threading.Event()
    publish = checkpoint.publish

    def slow(partial: Path, final: Path) -> None:
        assert disk.wait(60)
        publish(partial, final)

    monkeypatch.setattr(checkpoint, "publish", slow)
    train(learner, 2)
    saved = learner.begin_checkpoint()
    train(learner, 2)
    assert not saved.done() and checkpoint.latest(tmp_path / "a" / CHECKPOINTS) is None

    monkeypatch.setattr(checkpoint_writer, "WRITE_TIMEOUT_S", 0.01)
    with pytest.raises(UserError, match=r"checkpoint\.every_steps = 100: the checkpoint before this one is not in"):
        learner.begin_checkpoint()
    disk.set()
    learner.close()
    assert saved.result().name == "v00000002"
    train(straight, 2)
    resumed = Learner(tiny_run(), tmp_path / "a", ranks)
    assert torch.equal(snapshot(resumed), snapshot(straight))
    train(resumed, 2)
    assert torch.equal(snapshot(resumed), snapshot(learner))


def test_a_full_disk_is_told_by_the_next_checkpoint(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(tiny_run(), tmp_path, ranks)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_part", full)
    saved = learner.begin_checkpoint()
    with pytest.raises(UserError, match=r"v00000000: No space left on device: free some"):
        learner.begin_checkpoint()
    assert isinstance(saved.exception(), UserError)


CRASH = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from learner_cases import tiny_run
from async_rl.learner import checkpoint
from async_rl.learner.saved_parts import CheckpointCorrupt, Part
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
    path.rename(path.with_name(f"{checkpoint.PARTIAL}former-{path.name}"))
    assert checkpoint.latest(path.parent) is None
    checkpoint.remove_partial(path.parent)
    assert checkpoint.latest(path.parent) == (path, checkpoint.Position(0, 0, 0, 1))


def test_a_damaged_checkpoint_is_named(ranks: Ranks, tmp_path: Path) -> None:
    learner = Learner(tiny_run(), tmp_path, ranks)
    path = learner.save_checkpoint()
    (path / "optimizer.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointCorrupt, match="v00000000"):
        Learner(tiny_run(), tmp_path, ranks)
    (path / "trainer.json").write_text("{")
    with pytest.raises(CheckpointCorrupt, match=r"trainer\.json cannot be read"):
        checkpoint.latest(path.parent)
