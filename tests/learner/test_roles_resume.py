"""Critic and reference across checkpoints and ranks: resuming equals never stopping, two ranks equal one."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest
import torch
from learner_cases import message, ragged_rollouts, save_scalar, tiny_run
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from async_rl.config import Algorithm, Critic, Optimizer, Reference, RewardModel, Run
from async_rl.learner.distributed import Ranks
from async_rl.learner.trainer import Learner

PLAN = [[[0, 3, 7], [1, 2, 4, 5, 6]], [[8, 15], [*range(9, 15)]]]


def everything(folder: Path) -> Run:
    """PPO with all four models, the reference refreshed every two steps."""
    return tiny_run(
        algorithm=Algorithm(preset="ppo", options={"kl_coef": 0.2}),
        optimizer=Optimizer(learning_rate=1e-3, clip_norm=0.0),
        reference=Reference(refresh_steps=2),
        critic=Critic(init="reward_model", optimizer=Optimizer(learning_rate=1e-3, weight_decay=0.1, clip_norm=0.0)),
        reward_model=RewardModel(path=save_scalar(folder / "reward", seed=7, bias=0.1)),
    )


def train(learner: Learner, steps: int, plan: list[list[list[int]]] | None = None) -> list[dict[str, float]]:
    rows = []
    for _ in range(steps):
        step = learner.version
        batch = message(ragged_rollouts(seed=step, version=step), plan, step=step, version=step)
        rows.append({name: value for name, value in learner.train(batch).items() if name != "train_s"})
    return rows


def state(learner: Learner) -> dict[str, Tensor]:
    """Weights of every model of the learner."""
    critic, reference = learner.roles.critic, learner.roles.reference
    assert critic is not None and reference is not None
    modules = {"policy": learner.model, "critic": critic.module, "reference": reference.model}
    return {f"{role}/{name}": p.detach().clone() for role, m in modules.items() for name, p in m.named_parameters()}


def test_resume_equals_never_stopping(ranks: Ranks, tmp_path: Path) -> None:
    run = everything(tmp_path)
    straight, first = Learner(run, tmp_path / "straight", ranks), Learner(run, tmp_path / "stopped", ranks)
    expected = train(straight, 6)
    before = train(first, 3)
    path = first.save_checkpoint()
    second = Learner(run, tmp_path / "stopped", ranks)
    assert second.version == 3
    assert before + train(second, 3) == expected
    found = state(second)
    for name, tensor in state(straight).items():
        assert torch.equal(found[name], tensor), name
    critic = first.roles.critic
    assert critic is not None
    saved = AutoModelForSequenceClassification.from_pretrained(path / "critic")
    assert torch.equal(saved.score.weight, critic.module.model.score.weight)
    assert not (path / "reward_model").exists(), "nothing changes it"


def test_a_reference_that_stays_is_not_part_of_a_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    run = msgspec.structs.replace(everything(tmp_path), reference=Reference())
    first = Learner(run, tmp_path / "run", ranks)
    train(first, 2)
    assert not (first.save_checkpoint() / "reference").exists()
    again = Learner(run, tmp_path / "run", ranks)
    fresh = Learner(run, tmp_path / "fresh", ranks)
    found, expected = state(again), state(fresh)
    assert all(torch.equal(found[name], expected[name]) for name in found if name.startswith("reference/"))
    assert train(again, 1) == train(first, 1)


def serve_rank(rank: int, port: int, directory: str, results: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    learner = Learner(everything(Path(directory) / f"models-{rank}"), Path(directory))
    rows: list[dict[str, float]] = []
    if rank == 0:
        rows = train(learner, 3, PLAN)
        learner.close()
    else:
        learner.follow()
        learner.close()
    results.send((rows, {name: tensor.numpy() for name, tensor in state(learner).items()}))


@pytest.mark.processes
def test_two_ranks_equal_one(ranks: Ranks, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes, ends = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve_rank, args=(rank, port, str(tmp_path / "two"), theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    (rows, first), (_, second) = (end.recv() for end in ends)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert all((first[name] == second[name]).all() for name in first), "ranks differ"
    alone = Learner(everything(tmp_path / "models"), tmp_path / "one", ranks)
    for expected, found in zip(train(alone, 3), rows, strict=True):
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    for name, tensor in state(alone).items():
        torch.testing.assert_close(torch.from_numpy(first[name]), tensor, atol=1e-5, rtol=1e-4, msg=name)
