"""However a step is split into micro-batches, ordered and spread over ranks: the same loss and the same gradient."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_cases import message, ragged_rollouts, tiny_run
from torch import Tensor

from async_rl.learner.distributed import Ranks
from async_rl.learner.trainer import Learner
from async_rl.wire.messages import MicroBatches

Outcome = tuple[dict[str, float], dict[str, Tensor]]
SAME = (
    "loss",
    "grad_norm",
    "reward",
    "tokens",
    "ess_frac",
    "entropy",
    "lag_mean",
    "guarded_fraction",
    "raw_weight_max",
)


def outcome(learner: Learner, batch: MicroBatches) -> Outcome:
    metrics = learner.train(batch)
    return metrics, {n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None}


def assert_same(one: Outcome, other: Outcome) -> None:
    for name in SAME:
        assert one[0][name] == pytest.approx(other[0][name], rel=1e-5, abs=1e-6), name
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def split(order: list[int], parts: int) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(np.array(order), parts)]


@pytest.mark.parametrize("parts", [2, 5, 16])
def test_any_split_and_order(ranks: Ranks, tmp_path: Path, parts: int) -> None:
    run, rollouts = tiny_run(), ragged_rollouts(seed=3)
    whole = outcome(Learner(run, tmp_path / "a", ranks), message(rollouts))
    order = np.random.default_rng(parts).permutation(len(rollouts)).tolist()
    parts_of_it = outcome(Learner(run, tmp_path / "b", ranks), message(rollouts, [split(order, parts)]))
    assert_same(whole, parts_of_it)


def test_micro_batches_may_be_empty(ranks: Ranks, tmp_path: Path) -> None:
    run, rollouts = tiny_run(), ragged_rollouts(seed=3)
    everyone = list(range(len(rollouts)))
    whole = outcome(Learner(run, tmp_path / "a", ranks), message(rollouts))
    assert_same(whole, outcome(Learner(run, tmp_path / "b", ranks), message(rollouts, [[[], everyone]])))


def serve_rank(rank: int, port: int, directory: str, results: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    learner = Learner(tiny_run(), Path(directory))
    if rank == 0:
        rollouts = ragged_rollouts(seed=3)
        order = list(range(len(rollouts)))
        plan = [split(order[:9], 2), split(order[9:], 2)]
        learner.keep_alive()
        first = outcome(learner, message(rollouts, plan))
        metrics = learner.train(message(rollouts, plan, step=1))
        learner.save_checkpoint()
        learner.close()
        results.send((first[0], {n: g.numpy() for n, g in first[1].items()}, metrics["loss"]))
    else:
        learner.follow()
        learner.close()
        results.send((learner.version, {n: p.detach().numpy() for n, p in learner.model.named_parameters()}))


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
    metrics, gradients, second_loss = ends[0].recv()
    version, parameters = ends[1].recv()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0

    learner = Learner(tiny_run(), tmp_path / "one", ranks)
    rollouts = ragged_rollouts(seed=3)
    assert_same(outcome(learner, message(rollouts)), (metrics, {n: torch.from_numpy(g) for n, g in gradients.items()}))
    assert learner.train(message(rollouts, step=1))["loss"] == pytest.approx(second_loss, abs=1e-4)
    assert version == learner.version == 2
    resumed = Learner(tiny_run(), tmp_path / "two", ranks)
    assert resumed.version == 2
    for name, parameter in resumed.model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), parameters[name]), f"ranks differ in {name}"
