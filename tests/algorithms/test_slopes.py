"""The gradients are written out as formulas: here they are held to finite differences of the loss."""

import dataclasses

import pytest
import torch
from hypothesis import given
from loss_cases import few, gradient_of, normaliser_of, pack, steps

from async_rl.algorithms.objective import Objective
from async_rl.algorithms.presets import PRESETS, preset

STEP = 1e-6
# Their weight is a constant by definition (stop-gradient), so the loss has another derivative.
STOPPED = {"cispo", "aipo", "topr", "a3po"}
DIFFERENTIABLE = sorted(set(PRESETS) - STOPPED)


def assert_gradient_is_the_derivative(objective: Objective, rollouts) -> None:
    tokens, normaliser = pack(rollouts), normaliser_of(rollouts)
    found = gradient_of(objective.loss(tokens, normaliser), tokens)
    logp_T = tokens.logp_T.detach()
    for t in range(len(logp_T)):
        shift_T = torch.zeros_like(logp_T)
        shift_T[t] = STEP
        up, down = (
            objective.loss(dataclasses.replace(tokens, logp_T=logp_T + sign * shift_T), normaliser).loss
            for sign in (1, -1)
        )
        torch.testing.assert_close(found[t], (up - down) / (2 * STEP), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@few
@given(rollouts=steps(torch.float64))
def test_every_preset_without_stop_gradient(name, rollouts):
    assert_gradient_is_the_derivative(preset(name), rollouts)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("ratio_weighted", [True, False])
@few
@given(rollouts=steps(torch.float64))
def test_kl_in_the_loss(kind, ratio_weighted, rollouts):
    parts = {"kl": kind, "kl_coef": 0.3, "kl_ratio_weighted": ratio_weighted}
    assert_gradient_is_the_derivative(preset("async_default", **parts), rollouts)


@pytest.mark.parametrize("name", ["cispo", "aipo", "topr"])
@few
@given(rollouts=steps(torch.float64))
def test_stopped_weights_never_take_the_gradient_away(name, rollouts):
    tokens = pack(rollouts)
    grad = gradient_of(preset(name).loss(tokens, normaliser_of(rollouts)), tokens)
    active_T = tokens.mask_T & tokens.weight_mask_T
    assert (grad[active_T] != 0).all()
    assert torch.equal(grad[active_T].sign(), -tokens.advantages_N[tokens.sequence_T][active_T].sign())
