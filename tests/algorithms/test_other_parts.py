"""Properties of the parts outside the policy loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.algorithms.curation import long2short_pairs
from async_rl.algorithms.entropy import entropy, entropy_controller
from async_rl.algorithms.ess import ess, sequence_ess
from async_rl.algorithms.exact_kl import exact_kl
from async_rl.algorithms.gae import gae
from async_rl.algorithms.kimi import group_tau_log_z
from async_rl.algorithms.m2po import m2po_mask
from async_rl.algorithms.merge import merge_weights
from async_rl.algorithms.overoptimisation import detect_overoptimisation
from async_rl.algorithms.ppo_ptx import ppo_ptx
from async_rl.algorithms.preference import preference_loss
from async_rl.algorithms.repetition import repeat_stop
from async_rl.algorithms.reward_model import kwise_loss, pair_loss, safety_loss
from async_rl.algorithms.reward_shaping import kl_shaped_rewards
from async_rl.algorithms.sampling import keep_group, prioritized_probabilities
from async_rl.algorithms.trpo import trpo_step
from async_rl.algorithms.value_loss import value_loss
from async_rl.algorithms.versions import version_lag
from async_rl.algorithms.vtrace import vtrace
from async_rl.environments.sorting import distance, inclusion_ordering

examples = settings(max_examples=30, derandomize=True)
SEEDS = st.integers(0, 2**31)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@examples
@given(seed=SEEDS, size=st.integers(2, 8), delta=st.floats(1e-4, 0.5))
def test_trpo_stays_in_its_region_and_gains(seed, size, delta):
    logits, advantages = 2 * normal(seed, size), normal(seed + 1, size)
    found = trpo_step(logits, advantages - torch.softmax(logits, -1) @ advantages, delta=delta)
    assert found.kl_old_new <= delta
    assert found.surrogate_gain > 0
    assert exact_kl(logits, logits + found.step_V) == pytest.approx(found.kl_old_new.item())
    direction = torch.linalg.pinv(found.fisher_VV, rtol=1e-9, hermitian=True) @ found.gradient_V
    cosine = torch.nn.functional.cosine_similarity(direction, found.step_V - found.step_V.mean(), dim=0)
    assert cosine == pytest.approx(1.0, abs=1e-4)


def test_trpo_without_advantage_does_not_move():
    assert not trpo_step(torch.zeros(3), torch.zeros(3)).step_V.any()


@examples
@given(seed=SEEDS, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_gae_limits(seed, lengths):
    total = sum(lengths)
    rewards, values = normal(seed, total), normal(seed + 1, total)
    mask = torch.rand(total, generator=torch.Generator().manual_seed(seed)) < 0.7
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    advantages, returns = gae(rewards, values, mask, sequence, gamma=1.0, lam=1.0)
    for n in range(len(lengths)):
        inside = mask & (sequence == n)
        to_go = rewards[inside].flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(returns[inside], to_go)
        torch.testing.assert_close(advantages[inside], to_go - values[inside])
    assert not advantages[~mask].any() and not returns[~mask].any()


def masked_sequences(seed, lengths):
    mask = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < 0.7
    return mask, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=4)
SHARES = st.floats(0, 1)


@examples
@given(seed=SEEDS, lengths=LENGTHS, gamma=SHARES, lam=SHARES, bar=st.floats(1, 3))
def test_vtrace_on_policy_is_gae(seed, lengths, gamma, lam, bar):
    rewards, values = normal(seed, sum(lengths)), normal(seed + 1, sum(lengths))
    where, decay = masked_sequences(seed, lengths), {"gamma": gamma, "lam": lam}
    found = vtrace(rewards, values, torch.ones_like(values), *where, **decay, rho_bar=bar)
    advantages, returns = gae(rewards, values, *where, **decay)
    torch.testing.assert_close(found.advantages_T, advantages)
    torch.testing.assert_close(found.targets_T, returns)


@examples
@given(seed=SEEDS, lengths=LENGTHS, gamma=SHARES, lam=SHARES, rho_bar=st.floats(0.5, 2), c_bar=st.floats(0, 0.5))
def test_vtrace_is_equation_1_token_by_token(seed, lengths, gamma, lam, rho_bar, c_bar):
    total = sum(lengths)
    rewards, values, ratios = normal(seed, total), normal(seed + 1, total), normal(seed + 2, total).exp()
    mask, sequence = masked_sequences(seed, lengths)
    bars = {"rho_bar": rho_bar, "c_bar": c_bar}
    found = vtrace(rewards, values, ratios, mask, sequence, gamma=gamma, lam=lam, **bars)
    for n in range(len(lengths)):
        inside = mask & (sequence == n)
        r, v, ratio = (x[inside].tolist() for x in (rewards, values, ratios))
        v, end = [*v, 0.0], len(r)
        delta = [min(rho_bar, ratio[t]) * (r[t] + gamma * v[t + 1] - v[t]) for t in range(end)]
        c = [lam * min(c_bar, one) for one in ratio]
        targets = [
            v[s] + sum(gamma ** (t - s) * math.prod(c[s:t]) * delta[t] for t in range(s, end)) for s in range(end)
        ]
        after = [lam * target + (1 - lam) * value for target, value in zip([*targets[1:], 0.0], v[1:], strict=False)]
        assert found.targets_T[inside].tolist() == pytest.approx(targets)
        expected = [r[s] + gamma * after[s] - v[s] for s in range(end)]
        assert found.advantages_T[inside].tolist() == pytest.approx(expected)
    assert not any(x[~mask].any() for x in found)


def test_vtrace_of_nothing():
    empty, nobody = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert all(x.shape == (0,) for x in vtrace(empty, empty, empty, nobody.bool(), nobody))


def test_reward_shaping_puts_the_score_on_the_last_trainable_token_only():
    mask = torch.tensor([True, True, False, False, True, True, False])
    sequence = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    score = torch.tensor([1.0, float("nan"), 5.0])
    logp = torch.zeros(7)
    shaped = kl_shaped_rewards(logp, logp, score, mask, sequence, beta=0.1)
    assert shaped.rewards_T.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_value_loss_adds_up_over_micro_batches():
    values, old, returns = normal(1, 8), normal(2, 8), normal(3, 8)
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    whole = value_loss(values, old, returns, mask)
    parts = [value_loss(values[s], old[s], returns[s], mask[s], num_tokens=6) for s in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(sum(part.clip_fraction for part in parts), whole.clip_fraction)


def test_ptx_off_is_the_ppo_loss_itself():
    loss = torch.tensor(0.25)
    assert ppo_ptx(loss, torch.tensor([-1.0]), torch.tensor([True]))[1] is loss


@pytest.mark.parametrize("kind", ["dpo", "dpo_norm", "simpo", "ipo"])
def test_preference_losses_push_the_right_way(kind):
    chosen, rejected = torch.tensor([-5.0], requires_grad=True), torch.tensor([-4.0], requires_grad=True)
    reference, length = torch.tensor([-4.5]), torch.tensor([10.0])
    preference_loss(chosen, rejected, reference, reference, length, length, kind=kind).loss_B.sum().backward()
    assert chosen.grad < 0 < rejected.grad


def test_preference_loss_names_what_is_missing():
    one = torch.zeros(1)
    assert preference_loss(one, one, len_chosen_B=one + 1, len_rejected_B=one + 1, kind="simpo").loss_B.isfinite()
    with pytest.raises(ValueError, match="kind = 'dpo' needs the log-probs of the reference"):
        preference_loss(one, one)
    with pytest.raises(ValueError, match="kind = 'simpo' needs the lengths"):
        preference_loss(one, one, kind="simpo")


def test_reward_model_losses():
    assert pair_loss(torch.tensor([0.0]), torch.tensor([0.0])).accuracy == 0
    assert pair_loss(torch.tensor([-800.0]), torch.tensor([40.0])).loss_B.item() == 840.0
    assert kwise_loss(torch.tensor([1.0, 0.0]))[0] == pair_loss(torch.tensor([1.0]), torch.tensor([0.0])).loss_B[0]
    assert safety_loss(torch.tensor([3.0, 3.0]), torch.tensor([True, False])).diff() > 0


def test_entropy_with_forbidden_tokens():
    logits = torch.tensor([0.0, 0.0, -math.inf], requires_grad=True)
    value = entropy(logits)
    assert value.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_entropy_controller_moves_towards_the_target_and_stays_in_its_range():
    assert entropy_controller(0.01, 0.1, target=0.5, step=0.002) == pytest.approx(0.012)
    assert entropy_controller(0.0, 0.9, target=0.5) == 0.0


@examples
@given(seed=SEEDS, size=st.integers(1, 30), scale=st.floats(1e-6, 1e6))
def test_ess_bounds_and_scale(seed, size, scale):
    weights = normal(seed, size).exp()
    count, fraction = ess(weights)
    assert 1 - 1e-9 <= count <= size + 1e-9
    torch.testing.assert_close(ess(scale * weights)[1], fraction)


def test_ess_of_nothing_and_of_huge_sequences():
    assert ess(torch.zeros(3))[0] == 0
    log_w, sequence = torch.full((4,), 500.0), torch.tensor([0, 0, 1, 1])
    assert sequence_ess(log_w, torch.ones(4, dtype=torch.bool), sequence, 2)[0] == 2


@examples
@given(seed=SEEDS, size=st.integers(1, 20), tau=st.floats(0.001, 2.0))
def test_m2po_keeps_as_many_as_it_may(seed, size, tau):
    mask = torch.ones(size, dtype=torch.bool)
    difference = normal(seed, size)
    found = m2po_mask(difference, torch.zeros(size, dtype=torch.float64), mask, tau=tau)
    assert found.second_moment < tau
    if not found.keep_T.all():
        next_in = difference[~found.keep_T].square().min()
        kept = difference[found.keep_T].square()
        assert (kept.sum() + next_in) / (len(kept) + 1) >= tau


def test_tau_log_z_of_ragged_groups_with_a_missing_reward():
    rewards, groups = torch.tensor([1.0, 0.0, float("nan"), 0.5]), torch.tensor([4, 4, 4, 2])
    expected = 0.1 * math.log((math.exp(10) + 1) / 2)
    assert group_tau_log_z(rewards, groups).tolist() == pytest.approx([expected, expected, expected, 0.5])


def test_version_lag_without_trainable_tokens():
    lag = version_lag(torch.tensor([-1, 3]), torch.tensor([False, True]), torch.tensor([0, 1]), 2, current_version=5)
    assert (lag.head_N.tolist(), lag.max_N.tolist(), lag.num_versions_N.tolist()) == ([0, 2], [0, 2], [0, 1])


def test_merge_refuses_different_models():
    with pytest.raises(ValueError, match="different tensors: b"):
        merge_weights({"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a: shapes \(1,\) and \(2,\) differ"):
        merge_weights({"a": torch.zeros(1)}, {"a": torch.zeros(2)})


def test_the_constant_answer_hacks_the_proxy_and_raises_the_alarm():
    prompt = [3, 2, 4]
    answers = [[2, 4, 3], [2, 3, 3], [3, 3, 3], [3, 3, 3]]
    proxy, gold = ([reward(prompt, a) for a in answers] for reward in (inclusion_ordering, distance))
    assert gold == [1, 2, 1, 1]
    assert not detect_overoptimisation(proxy, gold).overoptimised  # the proxy fell as well
    assert detect_overoptimisation([0, 1, 2, 3], gold).overoptimised


def test_selection_edges():
    assert long2short_pairs([1.0, 2.0], [0, 0]) == (None, [])
    assert prioritized_probabilities([1.0, 1.0]) == [0.5, 0.5]
    assert prioritized_probabilities([1.0, 0.5], floor=0.5) == [0.5, 0.5]
    assert not keep_group([1.0, float("nan")])
    assert repeat_stop([]) == -1
    assert repeat_stop([1] * 300) == 256
