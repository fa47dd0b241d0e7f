"""However a step is split into micro-batches, ordered and spread over ranks: the same loss and the same gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import message, ragged_rollouts, tiny_run
from torch import Tensor

from async_rl.algorithms.batch import Normaliser, TokenBatch
from async_rl.algorithms.presets import PRESETS, preset
from async_rl.config import Learner as LearnerConfig
from async_rl.config import Optimizer, Run
from async_rl.learner.checkpoint import restore
from async_rl.learner.distributed import Ranks
from async_rl.learner.saved_parts import CheckpointCorrupt
from async_rl.learner.sharding import gathered, local
from async_rl.learner.trainer import Learner
from async_rl.wire.messages import MicroBatches
from tests.many_ranks import in_ranks

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


def train_with_others(rank: int, directory: str, run: Run, plans: list[list[list[list[int]]]]) -> Any:
    """One rank of a learner that trains on these plans and saves. Rank 0 returns its metrics, the gradient of the first
    step and the weights; all return their weights or rows of them."""
    ranks = Ranks.start(torch.device("cpu"))
    learner = Learner(run, Path(directory), ranks)
    first: dict[str, Tensor] = {}
    if rank == 0:
        learner.keep_alive()
        metrics = []
        for plan in plans:
            step = learner.version
            metrics.append(learner.train(message(ragged_rollouts(seed=3), plan, step=step)))
        weights = torch.empty(learner.layout.nbytes, dtype=torch.uint8)
        learner.snapshot(weights)
        learner.save_checkpoint()
        learner.close()
    else:
        learner.follow()
        learner.close()
    named = [(name, parameter.grad) for name, parameter in learner.model.named_parameters()]
    first = {name: gradient.numpy().copy() for name, gradient in gathered(named, ranks)}
    mine = {name: local(parameter).numpy().copy() for name, parameter in learner.model.named_parameters()}
    ranks.stop()
    return (metrics, first, weights.numpy(), mine) if rank == 0 else mine


@pytest.mark.processes
@pytest.mark.parametrize(("sharding", "size"), [("none", 2), ("full", 2), ("full", 3)])
def test_many_ranks_equal_one(ranks: Ranks, tmp_path: Path, sharding: Any, size: int) -> None:
    """Also where a rank has a micro-batch without anything to train on, and where layers are computed again."""
    # Adam divides a gradient of about nothing by about nothing: eps keeps rounding from deciding
    optimizer = Optimizer(learning_rate=1e-2, clip_norm=0.5, eps=1e-4)
    learner = LearnerConfig(sharding=sharding, ranks=size, activation_checkpointing=size == 3)
    run = tiny_run(learner=learner, optimizer=optimizer)
    rollouts = ragged_rollouts(seed=3)
    shares = split(list(range(len(rollouts))), size)
    plan = [[*split(share, 2), []] for share in shares[:-1]] + [[shares[-1], [], []]]
    results = in_ranks(size, train_with_others, str(tmp_path / "many"), run, [plan, plan])
    metrics, gradients, weights, mine = results[0]
    assert len(mine["model.layers.0.mlp.up_proj.weight"]) == (256 if sharding == "none" else -(-256 // size))

    one = Learner(run, tmp_path / "one", ranks)
    first = one.train(message(rollouts))
    second = outcome(one, message(rollouts, step=1))
    for name in SAME:
        assert metrics[0][name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name
    assert_same(second, (metrics[1], {name: torch.from_numpy(gradient) for name, gradient in gradients.items()}))
    assert first["grad_norm"] > run.optimizer.clip_norm, "the case should exercise clipping"
    expected = torch.empty(one.layout.nbytes, dtype=torch.uint8)
    one.snapshot(expected)
    torch.testing.assert_close(
        torch.from_numpy(weights).view(torch.float32), expected.view(torch.float32), atol=1e-5, rtol=1e-5
    )

    resumed = Learner(run, tmp_path / "many", ranks)
    assert resumed.version == 2
    again = torch.empty(one.layout.nbytes, dtype=torch.uint8)
    resumed.snapshot(again)
    assert np.array_equal(again.numpy(), weights), "what is saved is what is published"
    if sharding == "none":
        for other in results[1:]:
            assert all(np.array_equal(mine[name], other[name]) for name in mine), "ranks differ"


@pytest.mark.processes
def test_sharded_in_bfloat16_over_fp32_weights(ranks: Ranks, tmp_path: Path) -> None:
    """Gathered and multiplied in bfloat16, which rounds; masters, gradients and what is saved are fp32."""
    rollouts, both = ragged_rollouts(seed=3), [[list(range(9))], [list(range(9, 16))]]
    run = tiny_run(learner=LearnerConfig(sharding="full", ranks=2, dtype="bfloat16"))
    metrics, gradients, weights, mine = in_ranks(2, train_with_others, str(tmp_path / "two"), run, [both])[0]
    one = Learner(tiny_run(), tmp_path / "one", ranks)
    exact = outcome(one, message(rollouts))
    assert metrics[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
    assert metrics[0]["loss"] != pytest.approx(exact[0]["loss"], rel=1e-5)
    assert metrics[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.05)
    for name, gradient in gradients.items():
        assert gradient.dtype == mine[name].dtype == np.float32, name
    saved = Learner(tiny_run(), tmp_path / "two", ranks)
    views = saved.layout.views(torch.from_numpy(weights))
    rounded = [torch.equal(view, view.to(torch.bfloat16).float()) for view in views.values()]
    assert not any(rounded[:4]), "weights went through bfloat16"


@pytest.mark.processes
def test_resumed_by_any_number_of_ranks_in_any_sharding(ranks: Ranks, tmp_path: Path) -> None:
    optimizer = Optimizer(learning_rate=1e-2, warmup_steps=5, weight_decay=0.1, eps=1e-4)
    whole = list(range(16))

    def run(size: int, sharding: Any) -> Run:
        return tiny_run(learner=LearnerConfig(sharding=sharding, ranks=size), optimizer=optimizer)

    chain = str(tmp_path / "chain")
    for size, sharding in ((2, "full"), (1, "none"), (3, "full"), (2, "none")):
        plan = [split(share, 2) for share in split(whole, size)]
        metrics, _, weights, _ = in_ranks(size, train_with_others, chain, run(size, sharding), [plan])[0]
    assert metrics[0]["learning_rate"] == pytest.approx(0.8e-2)
    straight = Learner(run(1, "none"), tmp_path / "straight", ranks)
    for step in range(4):
        loss = straight.train(message(ragged_rollouts(seed=3), step=step))["loss"]
    assert metrics[0]["loss"] == pytest.approx(loss, abs=1e-5)
    expected = torch.empty(straight.layout.nbytes, dtype=torch.uint8)
    straight.snapshot(expected)
    torch.testing.assert_close(
        torch.from_numpy(weights).view(torch.float32), expected.view(torch.float32), atol=1e-5, rtol=1e-4
    )
    (tmp_path / "chain" / "checkpoints" / "v00000003" / "optimizer-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointCorrupt, match="optimizer-00000-of-00003"):
        restore(tmp_path / "chain" / "checkpoints" / "v00000003", straight.parts, ranks)


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_of_no_token_depends_on_the_parameters(name: str) -> None:
    """Ranks that share parameters make equally many backward passes: one with nothing to train on gives zeros."""
    logp_T = torch.zeros(5, requires_grad=True)
    nothing = torch.zeros(0)
    indices = torch.zeros(0, dtype=torch.int64)
    empty = TokenBatch(
        logp_T=logp_T[:0], behaviour_T=nothing, mask_T=indices.bool(), weight_mask_T=indices.bool(),
        sequence_T=indices, advantages_N=nothing, entropy_T=nothing, versions_T=indices, current_version=0,
        reference_T=nothing,
    )  # fmt: skip
    loss = preset(name).loss(empty, Normaliser(tokens=7, sequences=2, constant=8, all_sequences=2)).loss
    loss.backward()
    assert float(loss.detach()) == 0 and logp_T.grad is not None and not logp_T.grad.any()
