"""Facts about estimators, by enumeration of every answer instead of sampling."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from async_rl.algorithms.baseline import bernoulli_baseline, moving_baseline
from async_rl.algorithms.batch import Normaliser, TokenBatch
from async_rl.algorithms.exact_kl import exact_kl, expected_estimate
from async_rl.algorithms.guards import guard_weights
from async_rl.algorithms.kl import kl_estimate, kl_slope
from async_rl.algorithms.objective import Objective
from async_rl.algorithms.presets import preset

enumerated = settings(max_examples=25, derandomize=True)
LOGITS = st.lists(st.floats(-2, 2), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=torch.float64))
REWARDS = st.lists(st.floats(-1, 1), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=torch.float64))
KINDS = ["k1", "k2", "k3"]


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of)[0]


@enumerated
@given(policy=LOGITS, reference=LOGITS, elsewhere=LOGITS)
def test_kl_estimators(policy, reference, elsewhere):
    policy.requires_grad_()
    exact = exact_kl(policy, reference)
    exact_grad = gradient(exact, policy)
    values = {kind: expected_estimate(policy, reference, kind) for kind in KINDS}
    grads = {kind: gradient(values[kind], policy) for kind in KINDS}
    torch.testing.assert_close(values["k1"], exact)
    torch.testing.assert_close(values["k3"], exact)
    torch.testing.assert_close(grads["k1"], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(grads["k2"], exact_grad)
    mu = torch.softmax(elsewhere, -1)
    weighted = expected_estimate(policy, reference, "k3", sampler_V=mu, ratio_weighted=True)
    torch.testing.assert_close(weighted, exact)
    torch.testing.assert_close(gradient(weighted, policy), exact_grad)


def test_k3_as_a_loss_does_not_descend_the_kl_and_needs_the_weight_elsewhere():
    policy = torch.tensor([0.3, -0.2, 0.8, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.5, 0.1, -0.4], dtype=torch.float64)
    exact = exact_kl(policy, reference)
    k3 = expected_estimate(policy, reference, "k3")
    assert (gradient(k3, policy) - gradient(exact, policy)).abs().max() > 0.02
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    assert (expected_estimate(policy, reference, "k3", sampler_V=uniform) - exact).abs() > 0.02


@pytest.mark.parametrize("bound", [None, 10.0])
@pytest.mark.parametrize("kind", KINDS)
def test_kl_slope_is_the_derivative(kind, bound):
    logp = torch.linspace(-8, -0.1, 40, dtype=torch.float64, requires_grad=True)
    reference = torch.linspace(-0.5, -6, 40, dtype=torch.float64)
    expected = gradient(kl_estimate(logp, reference, kind, bound).sum(), logp)
    torch.testing.assert_close(kl_slope(logp.detach(), reference, kind, bound), expected)


def expected_gradient(
    objective: Objective, policy: Tensor, behaviour: Tensor, proximal: Tensor, returns: Tensor
) -> Tensor:
    """E over every sequence of `len(policy)` tokens of the behaviour policy of the gradient of the objective.

    Token t of a sequence is drawn from row (t, previous token) of the [L, V, V] tables.
    """
    length, vocabulary = policy.shape[0], policy.shape[-1]
    rows = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    previous = torch.cat([torch.zeros(len(rows), 1, dtype=torch.int64), rows[:, :-1]], 1)
    steps = torch.arange(length).expand_as(rows)

    def logps(table: Tensor) -> Tensor:
        return torch.log_softmax(table, -1)[steps, previous, rows]

    mask_T, sequence_T = torch.ones(rows.numel(), dtype=torch.bool), torch.arange(len(rows)).repeat_interleave(length)
    probability_N = logps(behaviour).sum(1).exp()
    tokens = TokenBatch(
        logp_T=logps(policy).flatten(), behaviour_T=logps(behaviour).flatten(), proximal_T=logps(proximal).flatten(),
        mask_T=mask_T, sequence_T=sequence_T, advantages_N=returns * probability_N,
    )  # fmt: skip
    return -gradient(objective.loss(tokens, Normaliser(tokens=1, sequences=1)).loss, policy)


def true_gradient(policy: Tensor, returns: Tensor) -> Tensor:
    """d E_policy[return], the return of every sequence given in the same order."""
    length, vocabulary = policy.shape[0], policy.shape[-1]
    rows = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    previous = torch.cat([torch.zeros(len(rows), 1, dtype=torch.int64), rows[:, :-1]], 1)
    logp_N = torch.log_softmax(policy, -1)[torch.arange(length).expand_as(rows), previous, rows].sum(1)
    return gradient((logp_N.exp() * returns).sum(), policy)


def tables(seed: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy, behaviour, proximal = (
        torch.randn(length, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return (
        policy.requires_grad_(),
        behaviour,
        proximal,
        torch.randn(2**length, generator=generator, dtype=torch.float64),
    )


UNCLIPPED = {"clip_low": 1.0, "clip_high": float("inf"), "dual_clip": None}
UNCLIPPED |= {"guard_low": None, "guard_high": None, "veto": None}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("proximal_is", ["recomputed", "current"])
def test_one_token_unguarded_weights_are_unbiased(seed, proximal_is):
    policy, behaviour, proximal, returns = tables(seed, 1)
    proximal = policy.detach() if proximal_is == "current" else proximal
    objective = preset("async_default", guard="none", **UNCLIPPED)
    found = expected_gradient(objective, policy, behaviour, proximal, returns)
    torch.testing.assert_close(found, true_gradient(policy, returns))


@pytest.mark.parametrize("seed", range(5))
def test_two_tokens_need_the_product_of_the_sequence(seed):
    policy, behaviour, _, returns = tables(seed, 2)
    current, exact = policy.detach(), true_gradient(policy, returns)
    token_weights = preset("async_default", guard="none", **UNCLIPPED)
    by_token = expected_gradient(token_weights, policy, behaviour, current, returns)
    product = preset("async_default", guard="seq_truncate", **UNCLIPPED)
    assert (by_token - exact).abs().max() > 1e-3
    torch.testing.assert_close(expected_gradient(product, policy, behaviour, current, returns), exact)


@pytest.mark.parametrize("seed", range(5))
def test_masks_and_truncation_are_biased_but_exact_on_policy(seed):
    policy, _, _, returns = tables(seed, 1)
    current, exact = policy.detach(), true_gradient(policy, returns)
    for name in ("async_default", "tis", "cispo", "aipo", "reinforce"):
        found = expected_gradient(preset(name), policy, current, current, returns)
        torch.testing.assert_close(found, exact, msg=name)


@enumerated
@given(p=st.floats(0.05, 0.95), rewards=st.tuples(st.floats(-3, 3), st.floats(-3, 3)), b=st.floats(-5, 5))
def test_no_baseline_beats_the_optimal_one_and_all_are_unbiased(p, rewards, b):
    reward_2 = torch.tensor(rewards, dtype=torch.float64)
    found = bernoulli_baseline(p, reward_2)
    score_2 = torch.tensor([1 - p, -p], dtype=torch.float64)
    pi_2 = torch.tensor([p, 1 - p], dtype=torch.float64)
    sample_2 = score_2 * (reward_2 - b)
    torch.testing.assert_close(pi_2 @ sample_2, found.gradient, atol=1e-10, rtol=1e-7)
    assert pi_2 @ sample_2.square() - (pi_2 @ sample_2).square() >= found.variance_optimal - 1e-9
    assert found.variance_mean >= found.variance_optimal - 1e-9


def test_moving_baseline_ignores_missing_rewards():
    assert moving_baseline(1.0, torch.tensor([float("nan"), 3.0]), alpha=0.5) == 2.0
    assert moving_baseline(1.0, torch.tensor([float("nan")])) == 1.0


def test_guards_at_their_bounds():
    log_w = torch.tensor([0.5, 0.5 - 1e-4, 5.0, 5.0 + 1e-3, 1.0], dtype=torch.float64).log()
    zero, yes = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    separate = torch.arange(5)
    keep = guard_weights(log_w, zero, yes, separate, 5, guard="mask", low=0.5 - 1e-12, high=5.0 + 1e-12).keep_T
    assert keep.tolist() == [True, False, True, False, True]
    one = torch.zeros(5, dtype=torch.int64)
    assert not guard_weights(log_w, zero, yes, one, 1, guard="seq_mask", low=None, high=1.0).keep_T.any()
    geometric = guard_weights(log_w, zero, yes, one, 1, guard="geo_mask", low=1.0, high=3.0)
    assert geometric.keep_T.all()
    torch.testing.assert_close(geometric.weight_T, log_w.mean().exp().expand(5))
