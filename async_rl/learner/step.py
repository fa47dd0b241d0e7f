"""The RL train step: a composed batch -> rewards, advantages -> losses of micro-batches -> staleness check -> update.

    reward model   scores whole rollouts                     forward passes, without gradients: what they say of
    reference      log-probs of the trained tokens           the whole step is there before any loss is
    critic         values of the trained tokens
    policy         their log-probs, for V-trace alone
    critic         value loss       -> gradients             GAE, V-trace, whitening need all values of the step, which
    policy         objective        -> gradients             are the critic's old ones
    both           update

The proximal policy of the decoupled objective is the one at the start of the step. A step is one mini-batch: no update
happens before its last backward pass, so the current log-probs without gradient *are* the proximal ones, exactly, and
no extra forward pass is made for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from async_rl.algorithms.batch import Normaliser, TokenBatch
from async_rl.algorithms.metrics import skip_reason, summarise
from async_rl.algorithms.objective import Objective
from async_rl.config import Run, Staleness
from async_rl.errors import AsyncRLError
from async_rl.learner.batch import StepBatch, pack
from async_rl.learner.distributed import Ranks
from async_rl.learner.former_weights import FormerWeights
from async_rl.learner.metrics import batch_metrics
from async_rl.learner.mismatch import MAX_LAGS, mismatch_metrics, mismatch_sums
from async_rl.learner.optimisation import Optimisation, Stats, ignored, never
from async_rl.learner.packing import move, to_device
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.roles import Estimates, Roles


class StalenessViolated(AsyncRLError):
    """A token past the staleness bound had weight in the loss: a bug, caught before the update (promise P1)."""


def normaliser(step: StepBatch, max_new_tokens: int) -> Normaliser:
    """Counted from the whole batch, which every rank holds: no communication, the same numbers everywhere."""
    return Normaliser(
        tokens=step.trainable_tokens,
        sequences=len(set(step.span_rollout_R.tolist())),
        constant=max_new_tokens,
        all_sequences=step.num_rollouts,
    )


def weight_bound(staleness: Staleness) -> int:
    """The highest lag a token with weight may have. `on_stale = "off"` has none: nothing is masked nor asserted."""
    return sys.maxsize if staleness.on_stale == "off" else staleness.max_staleness


class TrainStep:
    """One optimiser step on one composed batch: of the policy, and of the critic where there is one."""

    def __init__(
        self,
        run: Run,
        policy: PackedPolicy,
        optimisation: Optimisation,
        objective: Objective,
        ranks: Ranks,
        roles: Roles,
    ) -> None:
        self._run, self._policy, self._optimisation, self._objective = run, policy, optimisation, objective
        self._ranks, self._device, self._roles = ranks, ranks.device, roles
        self._bound = weight_bound(run.staleness)
        self._lags = min(run.staleness.max_staleness + 1, MAX_LAGS)
        self._former = FormerWeights(run, policy, optimisation, ranks)

    def __call__(
        self, step: StepBatch, abandon: Callable[[], bool] = never, last_begins: Callable[[], None] = ignored
    ) -> dict[str, float]:
        """Update the weights, or leave them bit for bit as they were: a skipped step says so in its metrics.

        last_begins: called when the last micro-batch of this rank begins.

        Raises:
            Abandoned: `abandon` said so on some rank; the weights have not changed.
            StalenessViolated: promise P1 does not hold; the weights have not changed.
        """
        former = self._former(step, abandon)
        step, rewards = self._roles.rewarded(step, abandon)
        estimates = self._roles.estimates(step, self._bound, self._policy, abandon)
        whole = normaliser(step, self._run.rollout.max_new_tokens)
        critic, valued = self._roles.critic, estimates.critic
        critic_totals = None if critic is None or valued is None else critic.accumulate(step, valued, abandon)
        losses = [partial(self._loss, step, rollouts, estimates, whole) for rollouts in step.plan[self._ranks.rank]]
        totals = self._optimisation.accumulate(losses, abandon, last_begins)
        values = dict(totals.values)
        if values.pop("stale_weight", 0.0) != 0.0:
            raise StalenessViolated(f"step {step.step}: tokens more than {self._bound} versions old have weight")
        metrics = batch_metrics(step, self._bound) | {"loss": totals.loss, "grad_norm": totals.grad_norm}
        metrics |= rewards | estimates.metrics | mismatch_metrics(values, self._lags, former)
        metrics |= summarise({name: torch.tensor(value) for name, value in values.items()}) if values else {}
        allowed = "kept_tokens" in metrics and skip_reason(metrics) is None
        if critic is not None and valued is not None and critic_totals is not None:
            metrics |= critic.update(step, valued, critic_totals)
        metrics |= self._optimisation.update(step.version, totals, allowed=allowed)
        self._roles.steer(estimates)
        return metrics

    def _loss(
        self, step: StepBatch, rollouts: list[int], estimates: Estimates, whole: Normaliser
    ) -> tuple[Tensor, Stats]:
        """Scalar part of the step's loss, and its statistics."""
        microbatch = pack(step, rollouts)
        advantages_n = to_device(estimates.advantages_N[microbatch.rollout_n], self._device)
        per_token = (estimates.critic.advantages_A if estimates.critic else None, estimates.reference_A)
        advantages_K, reference_K = (
            None if x_A is None else to_device(x_A[microbatch.token_K], self._device) for x_A in per_token
        )
        microbatch = move(microbatch, self._device)
        fresh_enough_K = step.version - microbatch.version_K <= self._bound
        logprobs = self._policy(microbatch.tokens)
        with_entropy = self._objective.entropy_coef != 0
        entropy_K = logprobs.entropy_K if with_entropy else logprobs.entropy_K.detach()
        out = self._objective.loss(
            TokenBatch(
                logp_T=logprobs.logp_K,
                behaviour_T=microbatch.behaviour_K,
                mask_T=torch.ones_like(fresh_enough_K),
                weight_mask_T=fresh_enough_K,
                sequence_T=microbatch.sample_K,
                advantages_N=advantages_n,
                advantages_T=advantages_K,
                reference_T=reference_K,
                entropy_T=entropy_K,
                versions_T=microbatch.version_K,
                current_version=step.version,
            ),
            whole,
        )
        stats = dict(out.stats)
        stats["stale_weight"] = out.weight_T.abs().where(~fresh_enough_K, 0.0).sum()
        stats |= mismatch_sums(logprobs.logp_K, microbatch, step.version, self._lags)
        stats.setdefault("entropy", entropy_K.detach().where(fresh_enough_K, 0.0).sum())
        return out.loss, stats
