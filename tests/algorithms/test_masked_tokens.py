"""A token without weight has gradient exactly 0, whatever stands in its place; a NaN with weight is not hidden."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import Rollout, few, gradient_of, normaliser_of, pack, steps

from async_rl.algorithms.presets import PRESETS, preset
from async_rl.algorithms.ratios import log_ratio
from async_rl.algorithms.value_loss import value_loss
from async_rl.algorithms.whitening import masked_whiten

RUBBISH = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e30])


@pytest.mark.parametrize("name", sorted(PRESETS))
@few
@given(rollouts=steps(), rubbish=RUBBISH)
def test_rubbish_in_masked_and_stale_tokens_changes_nothing(name, rollouts, rubbish):
    objective = preset(name, entropy_coef=0.01)
    clean = pack(rollouts)
    active_T = clean.mask_T & clean.weight_mask_T
    spoiled = {
        field: getattr(clean, field).detach().where(active_T, rubbish)
        for field in ("logp_T", "behaviour_T", "proximal_T", "reference_T", "entropy_T")
    }
    dirty = dataclasses.replace(clean, **spoiled)
    dirty.logp_T.requires_grad_()
    before, after = (objective.loss(tokens, normaliser_of(rollouts)) for tokens in (clean, dirty))
    assert torch.equal(before.loss, after.loss)
    grad = gradient_of(after, dirty)
    assert torch.equal(grad, gradient_of(before, clean))
    assert not grad[~active_T].any()
    assert all(torch.isfinite(value.double()) for value in after.stats.values())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_nan_with_weight_makes_the_loss_nan(name):
    four = torch.full((4,), -1.0)
    logp = torch.tensor([-1.0, float("nan"), -1.0, -1.0])
    yes = torch.ones(4, dtype=torch.bool)
    rollout = Rollout(logp, four, four, four, -four, yes, yes, torch.zeros(4, dtype=torch.int64), torch.tensor(1.0))
    assert preset(name).loss(pack([rollout]), normaliser_of([rollout])).loss.isnan()


def test_impossible_under_both_is_ratio_one_and_the_rest_is_bounded():
    inf = float("inf")
    ratio = log_ratio(torch.tensor([-inf, -inf, -1.0, 3.0]), torch.tensor([-inf, -1.0, -inf, -50.0]))
    assert ratio.tolist() == [0.0, -20.0, 20.0, 20.0]


def test_critic_parts_ignore_masked_tokens():
    mask = torch.tensor([True, False, True])
    values = torch.tensor([1.0, float("nan"), 2.0], requires_grad=True)
    other = torch.tensor([0.5, float("inf"), 2.5])
    loss = value_loss(values, other, other, mask).loss
    loss.backward()
    assert loss.isfinite() and values.grad[1] == 0.0
    assert masked_whiten(values.detach(), mask)[1] == 0.0
