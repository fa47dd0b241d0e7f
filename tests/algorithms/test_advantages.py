"""Advantages of groups of any size and order, with missing rewards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.algorithms.group_advantage import group_advantage, max_advantage
from async_rl.algorithms.presets import PRESETS, preset

advantages = settings(max_examples=40, derandomize=True)
NAN = float("nan")
REWARD = st.one_of(st.sampled_from([0.0, 1.0, 0.7, NAN]), st.floats(-30, 30, width=32))
GROUPS = st.lists(st.tuples(REWARD, st.integers(0, 4)), min_size=1, max_size=24)
CRITIC_FREE = sorted(name for name, entry in PRESETS.items() if not entry.objective.needs_critic)
RELATIVE = [name for name in CRITIC_FREE if PRESETS[name].objective.center in ("mean", "loo")]
RELATIVE = [name for name in RELATIVE if PRESETS[name].objective.advantage != "max"]


def split(pairs):
    return torch.tensor([reward for reward, _ in pairs]), torch.tensor([group for _, group in pairs])


@pytest.mark.parametrize("name", CRITIC_FREE)
@advantages
@given(pairs=GROUPS, data=st.data())
def test_order_and_labels_do_not_matter_and_missing_rewards_give_zero(name, pairs, data):
    rewards_N, group_N = split(pairs)
    objective = preset(name)
    found = objective.advantages(rewards_N, group_N)
    order = torch.tensor(data.draw(st.permutations(range(len(pairs)))))
    torch.testing.assert_close(objective.advantages(rewards_N[order], 7 * group_N[order] + 3), found[order])
    assert found.isfinite().all()
    assert not found[rewards_N.isnan()].any()


@pytest.mark.parametrize("name", RELATIVE)
@advantages
@given(reward=st.floats(-30, 30, width=32), size=st.integers(1, 16), other=GROUPS)
def test_equal_rewards_and_lone_rollouts_give_exactly_zero(name, reward, size, other):
    rewards_N, group_N = split(other)
    rewards_N = torch.cat([torch.full((size,), reward), rewards_N])
    group_N = torch.cat([torch.full((size,), 9), group_N])
    assert torch.equal(preset(name).advantages(rewards_N, group_N)[:size], torch.zeros(size))


@advantages
@given(rewards=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=16))
def test_mean_baseline_is_a_shrunken_leave_one_out(rewards):
    rewards_N, group_N = torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.int64)
    mean = group_advantage(rewards_N, group_N, scale="none")
    loo = group_advantage(rewards_N, group_N, scale="none", center="loo")
    torch.testing.assert_close(mean, (len(rewards) - 1) / len(rewards) * loo)


def test_a_missing_reward_leaves_the_others_as_if_it_were_not_there():
    with_gap = group_advantage(torch.tensor([1.0, NAN, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64))
    without = group_advantage(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.int64))
    assert with_gap.tolist() == [without[0], 0.0, without[1], without[2]]


def test_scales():
    rewards_N, group_N = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    centred = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.0, 0.0])
    torch.testing.assert_close(group_advantage(rewards_N, group_N, scale="group_mean"), centred / 0.25)
    batch = group_advantage(rewards_N, group_N, scale="batch", eps=0.0)
    torch.testing.assert_close(batch, centred / rewards_N.std())
    assert not group_advantage(torch.tensor([0.0, 0.0, -1.0]), torch.zeros(3).long(), scale="group_mean").any()


def test_rewards_are_clipped_before_normalisation():
    rewards_N, group_N = torch.tensor([1e6, 0.0]), torch.zeros(2, dtype=torch.int64)
    assert preset("dr_grpo").advantages(rewards_N, group_N).tolist() == [10.0, -10.0]


def test_best_of_group():
    rewards_N, group_N = torch.tensor([3.0, 4.0, NAN, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    assert max_advantage(rewards_N, group_N).tolist() == [0.0, 4.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("name", CRITIC_FREE)
@advantages
@given(pairs=GROUPS, others=GROUPS)
def test_rollouts_of_other_batches_count_in_their_group_only(name, pairs, others):
    rewards_N, group_N = split([*pairs, *others])
    in_batch_N = torch.arange(len(rewards_N)) < len(pairs)
    objective = preset(name)
    found = objective.advantages(rewards_N, group_N, in_batch_N)[: len(pairs)]
    whole = objective.advantages(rewards_N, group_N)
    assert torch.equal(objective.advantages(rewards_N, group_N, torch.ones_like(in_batch_N)), whole)
    if objective.center == "batch":
        assert torch.equal(found, objective.advantages(*split(pairs)))
    elif objective.scale != "batch":
        assert torch.equal(found, whole[: len(pairs)])
