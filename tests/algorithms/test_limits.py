"""What the asynchronous objective becomes at its limits, and when nothing is left of it."""

import dataclasses

import pytest
import torch
from hypothesis import given
from loss_cases import assert_same, few, gradient_of, normaliser_of, pack, run, steps

from async_rl.algorithms.metrics import skip_reason, summarise
from async_rl.algorithms.presets import PRESETS, preset


@few
@given(rollouts=steps())
def test_proximal_equal_to_behaviour_is_ppo(rollouts):
    rollouts = [dataclasses.replace(rollout, proximal=rollout.behaviour) for rollout in rollouts]
    plain = preset("async_default", old="behaviour", guard="none", veto=None)
    decoupled, ppo = run(preset("async_default"), rollouts), run(plain, rollouts)
    assert_same(decoupled, dataclasses.replace(ppo, stats=decoupled.stats))


@few
@given(rollouts=steps(torch.float64))
def test_proximal_equal_to_current_is_truncated_reinforce(rollouts):
    tokens = dataclasses.replace(pack(rollouts), proximal_T=None)
    grad = gradient_of(preset("tis").loss(tokens, normaliser_of(rollouts)), tokens)
    weight = (tokens.logp_T - tokens.behaviour_T).exp().clamp(max=2.0)
    active = tokens.mask_T & tokens.weight_mask_T
    expected = -weight * tokens.advantages_N[tokens.sequence_T] / max(tokens.mask_T.sum(), 1)
    torch.testing.assert_close(grad, expected.where(active, 0.0).detach())


@few
@given(rollouts=steps(torch.float64))
def test_without_guard_and_clip_the_weight_is_current_over_behaviour(rollouts):
    objective = preset("areal", guard="none", guard_high=None, clip_low=1.0, clip_high=float("inf"))
    tokens = pack(rollouts)
    grad = gradient_of(objective.loss(tokens, normaliser_of(rollouts)), tokens)
    weight = (tokens.logp_T - tokens.behaviour_T).exp()
    expected = -weight * tokens.advantages_N[tokens.sequence_T] / max(tokens.mask_T.sum(), 1)
    torch.testing.assert_close(grad, expected.where(tokens.mask_T & tokens.weight_mask_T, 0.0).detach())


@few
@given(rollouts=steps(torch.float64))
def test_on_policy_every_critic_free_gradient_is_the_policy_gradient(rollouts):
    rollouts = [dataclasses.replace(r, behaviour=r.logp, proximal=r.logp) for r in rollouts]
    tokens = pack(rollouts)
    expected = -tokens.advantages_N[tokens.sequence_T] / max(tokens.mask_T.sum(), 1)
    expected = expected.where(tokens.mask_T & tokens.weight_mask_T, 0.0)
    for name in ("async_default", "tis", "cis", "a3po", "grpo", "dapo", "sapo", "cispo", "aipo", "reinforce", "dppo"):
        objective = preset(name, kl="none", kl_coef=0.0, aggregation="token_mean")
        tokens = pack(rollouts)
        out = objective.loss(tokens, normaliser_of(rollouts))
        torch.testing.assert_close(gradient_of(out, tokens), expected, msg=name)


@pytest.mark.parametrize("name", sorted(PRESETS))
@few
@given(rollouts=steps())
def test_nothing_left_is_exactly_zero_and_skipped(name, rollouts):
    stale = [dataclasses.replace(rollout, fresh=torch.zeros_like(rollout.fresh)) for rollout in rollouts]
    step = run(preset(name, entropy_coef=0.01), stale)
    assert step.loss == 0.0
    assert not any(grad.any() for grad in step.grads)
    assert skip_reason(summarise(step.stats)) == "every token was guarded"


@few
@given(rollouts=steps())
def test_everything_guarded_is_exactly_zero_and_skipped(rollouts):
    far = [dataclasses.replace(rollout, proximal=rollout.behaviour + 3.0) for rollout in rollouts]
    step = run(preset("async_default", kl="k3", kl_coef=0.1, entropy_coef=0.01), far)
    assert step.loss == 0.0
    assert not any(grad.any() for grad in step.grads)
    assert skip_reason(summarise(step.stats)) == "every token was guarded"


@few
@given(rollouts=steps())
def test_one_catastrophic_token_removes_its_sequence_only(rollouts):
    first = rollouts[0]
    rollouts = [dataclasses.replace(r, behaviour=r.proximal, mask=torch.ones_like(r.mask)) for r in rollouts]
    rollouts = [dataclasses.replace(r, fresh=torch.ones_like(r.fresh)) for r in rollouts]
    broken = rollouts[0].behaviour.clone()
    broken[-1] = broken[-1] + 12.0
    rollouts[0] = dataclasses.replace(rollouts[0], behaviour=broken)
    stats = run(preset("async_default"), rollouts).stats
    assert stats["active"] - stats["kept"] == first.length


@few
@given(rollouts=steps())
def test_stale_tokens_keep_their_place_in_the_denominator(rollouts):
    step = run(preset("async_default"), rollouts)
    tokens, trained = sum(int(r.mask.sum()) for r in rollouts), sum(int((r.mask & r.fresh).sum()) for r in rollouts)
    metrics = summarise(step.stats)
    assert metrics["tokens"] == tokens
    assert metrics["stale_fraction"] == pytest.approx((tokens - trained) / max(tokens, 1))
    assert sum(float(grad.where(~r.fresh, 0.0).abs().sum()) for grad, r in zip(step.grads, rollouts, strict=True)) == 0
