"""Loss, gradient and statistics do not depend on padding, packing, order, micro-batch split or data-parallel size."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import Rollout, assert_same, few, run, steps

from async_rl.algorithms.presets import PRESETS, preset

METHODS = sorted(set(PRESETS) - {"r1_zero", "expert_iteration"})  # the same objectives as r1 and reinforce
AGGREGATIONS = ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
GUARDS = ["none", "truncate", "clip", "mask", "seq_truncate", "seq_mask", "geo_truncate", "geo_mask"]


def padded(rollout: Rollout, length: int) -> Rollout:
    """The rollout with tokens behind it that are not trainable and hold rubbish."""
    extra = length - rollout.length
    values = {
        field.name: torch.cat([value, torch.full((extra,), float("nan")).to(value.dtype)])
        for field in dataclasses.fields(rollout)
        if (value := getattr(rollout, field.name)).ndim and value.dtype.is_floating_point
    }
    tail = torch.zeros(extra, dtype=torch.bool)
    return dataclasses.replace(
        rollout, **values, mask=torch.cat([rollout.mask, tail]), fresh=torch.cat([rollout.fresh, ~tail]),
        versions=torch.cat([rollout.versions, tail.long() - 1]),
    )  # fmt: skip


def check(objective, rollouts, data) -> None:
    order = data.draw(st.permutations(range(len(rollouts))))
    whole = run(objective, rollouts)
    assert_same(whole, run(objective, rollouts, [order]))
    cut = data.draw(st.integers(0, len(order)))
    assert_same(whole, run(objective, rollouts, [part for part in (order[:cut], order[cut:]) if part]))
    assert_same(whole, run(objective, rollouts, [[i] for i in order]))  # one rollout per rank
    rectangular = run(objective, [padded(rollout, 14) for rollout in rollouts])
    trimmed = [grad[: r.length] for grad, r in zip(rectangular.grads, rollouts, strict=True)]
    assert all(not grad[r.length :].any() for grad, r in zip(rectangular.grads, rollouts, strict=True))
    assert_same(whole, dataclasses.replace(rectangular, grads=trimmed))


@pytest.mark.parametrize("name", METHODS)
@few
@given(data=st.data(), rollouts=steps())
def test_every_preset(name, data, rollouts):
    check(preset(name, entropy_coef=0.01), rollouts, data)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("guard", GUARDS)
@few
@given(data=st.data(), rollouts=steps())
def test_every_guard_and_aggregation(aggregation, guard, data, rollouts):
    objective = preset("async_default", guard=guard, aggregation=aggregation, kl="k3", kl_coef=0.1, opsm_delta=0.5)
    check(objective, rollouts, data)
