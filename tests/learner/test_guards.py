"""What must never reach the weights: stale tokens (P1), non-finite gradients, steps without any token left."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest
import torch
from learner_cases import message, ragged_rollouts, tiny_run
from torch import Tensor

from async_rl.algorithms.batch import LossOutput, Normaliser, TokenBatch
from async_rl.algorithms.objective import Objective
from async_rl.config import Algorithm, Optimizer, Staleness
from async_rl.errors import ProtocolError, UserError
from async_rl.learner.distributed import Ranks
from async_rl.learner.optimisation import Abandoned, learning_rate
from async_rl.learner.step import StalenessViolated
from async_rl.learner.trainer import Learner
from async_rl.wire.messages import Sequence, TrainRollout, VersionSpan

VERSION, ETA = 6, 2
Policy = Literal["mask", "drop", "wait"]


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


def gradients(learner: Learner) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None}


def aged(rollouts: list[TrainRollout], versions: tuple[int, int]) -> list[TrainRollout]:
    """The first span of each sequence sampled by versions[0], the second by versions[1]."""

    def age(sequence: Sequence) -> Sequence:
        spans = [VersionSpan(s.start, s.end, v, v) for s, v in zip(sequence.spans, versions, strict=True)]
        return msgspec.structs.replace(sequence, spans=spans)

    return [msgspec.structs.replace(r, sequences=[age(s) for s in r.sequences]) for r in rollouts]


def with_other_logprobs(rollouts: list[TrainRollout], span: int) -> list[TrainRollout]:
    """Other behaviour log-probs in the given span of each sequence."""

    def change(sequence: Sequence) -> Sequence:
        logprobs = np.frombuffer(sequence.logprobs, "<f4").copy()
        logprobs[sequence.spans[span].start : sequence.spans[span].end] -= 0.1
        return msgspec.structs.replace(sequence, logprobs=logprobs.tobytes())

    return [msgspec.structs.replace(r, sequences=[change(s) for s in r.sequences]) for r in rollouts]


def test_stale_tokens_have_no_gradient_and_stay_in_the_denominator(ranks: Ranks, tmp_path: Path) -> None:
    run = tiny_run(staleness=Staleness(max_staleness=ETA))
    stale = aged(ragged_rollouts(seed=4), (VERSION - ETA - 1, VERSION - ETA))
    learners = [Learner(run, tmp_path / str(i), ranks) for i in range(3)]
    metrics = learners[0].train(message(stale, version=VERSION))
    learners[1].train(message(with_other_logprobs(stale, 0), version=VERSION))
    learners[2].train(message(with_other_logprobs(stale, 1), version=VERSION))
    same, changed = gradients(learners[1]), gradients(learners[2])
    for name, gradient in gradients(learners[0]).items():
        assert torch.equal(gradient, same[name]), f"a stale token moved {name}"
    assert any(not torch.equal(g, changed[n]) for n, g in gradients(learners[0]).items())

    tokens = [s.spans[i].end - s.spans[i].start for i in range(2) for r in stale for s in r.sequences]
    first = sum(tokens[: len(tokens) // 2])
    assert metrics["tokens"] == sum(tokens)
    assert metrics["masked_fraction"] == pytest.approx(first / sum(tokens))
    assert (metrics["lag_max"], metrics["lag_all_max"], metrics["head_lag_max"]) == (ETA, ETA + 1, ETA + 1)

    # the same batch without its stale tokens has a larger loss by exactly the ratio of the denominators
    only_fresh = [
        msgspec.structs.replace(r, sequences=[msgspec.structs.replace(s, spans=[s.spans[1]]) for s in r.sequences])
        for r in stale
    ]
    learner = Learner(run, tmp_path / "fresh", ranks)
    fresh = learner.train(message(only_fresh, version=VERSION))
    assert metrics["loss"] * sum(tokens) == pytest.approx(fresh["loss"] * (sum(tokens) - first), rel=1e-4)


def test_a_stale_token_with_weight_stops_the_step(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Objective.loss

    def forgetful(self: Objective, tokens: TokenBatch, normaliser: Normaliser) -> LossOutput:
        out = original(self, tokens, normaliser)
        return LossOutput(out.loss, out.stats, torch.ones_like(out.weight_T), out.loss_T)

    monkeypatch.setattr(Objective, "loss", forgetful)
    learner = Learner(tiny_run(staleness=Staleness(max_staleness=ETA)), tmp_path, ranks)
    before = weights(learner)
    with pytest.raises(StalenessViolated, match="2 versions old"):
        learner.train(message(aged(ragged_rollouts(seed=4), (0, VERSION)), version=VERSION))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(learner).items())


def test_without_the_bound_nothing_is_masked(ranks: Ranks, tmp_path: Path) -> None:
    """`on_stale = "off"` is as if the bound were out of reach."""
    rollouts = aged(ragged_rollouts(seed=4), (0, VERSION))
    off = Learner(tiny_run(staleness=Staleness(max_staleness=ETA, on_stale="off")), tmp_path / "off", ranks)
    far = Learner(tiny_run(staleness=Staleness(max_staleness=VERSION)), tmp_path / "far", ranks)
    one, other = (learner.train(message(rollouts, version=VERSION)) | {"train_s": 0} for learner in (off, far))
    past = {key for key in other if key.startswith(f"mismatch_lag_{VERSION}_")}
    assert len(past) == 3 and one == {key: value for key, value in other.items() if key not in past}
    assert all(torch.equal(gradient, gradients(far)[name]) for name, gradient in gradients(off).items())


@pytest.mark.parametrize("policy", ["mask", "drop", "wait"])
def test_the_loss_guards_whatever_the_policy(ranks: Ranks, tmp_path: Path, policy: Policy) -> None:
    learner = Learner(tiny_run(staleness=Staleness(max_staleness=ETA, on_stale=policy)), tmp_path, ranks)
    metrics = learner.train(message(aged(ragged_rollouts(seed=4), (0, VERSION)), version=VERSION))
    assert 0 < metrics["masked_fraction"] < 1
    assert (metrics["lag_max"], metrics["lag_all_max"]) == (0, VERSION)


def test_all_tokens_stale_skips_the_update(ranks: Ranks, tmp_path: Path) -> None:
    learner = Learner(tiny_run(staleness=Staleness(max_staleness=0)), tmp_path, ranks)
    before = weights(learner)
    metrics = learner.train(message(aged(ragged_rollouts(seed=4), (0, 1)), version=VERSION))
    assert (metrics["skipped"], metrics["skipped_guarded"], metrics["masked_fraction"]) == (1, 1, 1)
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)
    assert learner.version == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(learner).items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_step_is_skipped_and_counted(ranks: Ranks, tmp_path: Path, bad: float) -> None:
    learner = Learner(tiny_run(), tmp_path, ranks)
    rollouts = ragged_rollouts(seed=5)
    learner.train(message(rollouts))
    good = weights(learner)
    with torch.no_grad():
        learner.model.get_input_embeddings().weight[5, 0] = bad
    broken = weights(learner)
    metrics = learner.train(message(rollouts, step=1))
    assert (metrics["skipped"], metrics["skipped_nonfinite"], learner.version) == (1, 1, 2)
    for name, tensor in weights(learner).items():
        torch.testing.assert_close(tensor, broken[name], rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            parameter.copy_(good[name])
    assert learner.train(message(rollouts, step=2))["skipped"] == 0, "moments were poisoned by the skipped step"


def test_a_missing_reward_gives_no_gradient(ranks: Ranks, tmp_path: Path) -> None:
    rollouts = [msgspec.structs.replace(r, reward=math.nan) for r in ragged_rollouts(seed=5)]
    metrics = Learner(tiny_run(), tmp_path, ranks).train(message(rollouts))
    assert metrics["rewards_missing"] == len(rollouts)
    assert metrics["grad_norm"] == 0


def test_abandoned_between_micro_batches(ranks: Ranks, tmp_path: Path) -> None:
    learner = Learner(tiny_run(), tmp_path, ranks)
    before, rollouts = weights(learner), ragged_rollouts(seed=6)
    answers = iter([False, True])
    with pytest.raises(Abandoned):
        learner.train(message(rollouts, [[list(range(8)), list(range(8, 16))]]), lambda: next(answers))
    assert learner.version == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(learner).items())
    undisturbed = Learner(tiny_run(), tmp_path / "other", ranks)
    plan = [[list(range(8)), list(range(8, 16))]]
    assert learner.train(message(rollouts, plan)) | {"train_s": 0} == undisturbed.train(message(rollouts, plan)) | {
        "train_s": 0
    }


def test_it_says_when_the_last_micro_batch_begins(ranks: Ranks, tmp_path: Path) -> None:
    learner, rollouts, events = Learner(tiny_run(), tmp_path, ranks), ragged_rollouts(seed=6), list[str]()
    plan = [[list(range(4)), list(range(4, 12)), list(range(12, 16))]]
    learner.train(message(rollouts, plan), lambda: bool(events.append("begins")), lambda: events.append("last"))
    assert events == ["begins", "begins", "begins", "last"]


def test_wrong_step_and_unknown_algorithm(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="batch of step 4 came, the learner is at version 0"):
        Learner(tiny_run(), tmp_path, ranks).train(message(ragged_rollouts(seed=1), step=4))
    for algorithm, said in [
        (Algorithm(preset="asink_default"), "asink_default"),
        (Algorithm(options={"x": 1}), "x = 1"),
    ]:
        with pytest.raises(UserError, match=said):
            Learner(tiny_run(algorithm=algorithm), tmp_path, ranks)


def test_warm_up_stable_decay() -> None:
    optimizer = Optimizer(learning_rate=1.0, warmup_steps=4, decay_steps=2, final_rate=0.5)
    rates = [learning_rate(optimizer, version, steps=8) for version in range(8)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.75, 0.5]
    assert learning_rate(Optimizer(learning_rate=1.0), 0, steps=1) == 1.0


def test_linear_and_cosine_decay_over_the_whole_run() -> None:
    linear = Optimizer(learning_rate=1.0, schedule="linear", warmup_steps=2, final_rate=0.5)
    assert [learning_rate(linear, step, steps=6) for step in range(6)] == [0.5, 1.0, 0.875, 0.75, 0.625, 0.5]
    cosine = Optimizer(learning_rate=2.0, schedule="cosine", final_rate=0.0)
    rates = [learning_rate(cosine, step, steps=4) for step in range(4)]
    assert rates == pytest.approx([1 + 2**-0.5, 1, 1 - 2**-0.5, 0])
    assert learning_rate(cosine, 9, steps=4) == 0.0, "past the end it stays there"


def test_engine_and_learner_disagreeing_at_equal_version_shows(ranks: Ranks, tmp_path: Path) -> None:
    rollouts = aged(ragged_rollouts(seed=7), (VERSION - 1, VERSION))
    metrics = Learner(tiny_run(), tmp_path, ranks).train(message(rollouts, version=VERSION))
    fresh = sum(s.spans[1].end - s.spans[1].start for r in rollouts for s in r.sequences)
    assert metrics["equal_version_tokens"] == fresh
    assert 0 < metrics["equal_version_gap"] < metrics["equal_version_gap_max"]
