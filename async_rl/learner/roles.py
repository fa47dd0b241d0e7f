"""The models beside the policy: which of them a recipe needs, and what they say of a step before it is trained on.

    policy         trained           samples the rollouts, gradients and optimiser in learner.optimisation
    critic         trained           where advantages are a critic's (`ppo`)
    reference      frozen            where the objective has a KL (`grpo`, `ppo`, `r1`, `rloo` ...)
    reward model   frozen            where the recipe names one

What a recipe does not need is not built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from async_rl.algorithms.objective import Objective
from async_rl.config import Run
from async_rl.learner import critic, reference
from async_rl.learner.batch import StepBatch
from async_rl.learner.critic import Critic
from async_rl.learner.distributed import Ranks
from async_rl.learner.estimates import CriticEstimates, critic_estimates, group_advantages, rollout_kl
from async_rl.learner.kl_coefficient import KLCoefficient, mean
from async_rl.learner.offload import Resident
from async_rl.learner.passes import over_step
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.reference import ReferencePolicy
from async_rl.learner.reward_model import RewardModel
from async_rl.learner.saved_parts import Part
from async_rl.learner.sharding import spread


@dataclass(frozen=True, slots=True)
class Estimates:
    """What the losses of a step compare with, the same on every rank."""

    advantages_N: Tensor
    """[N]; 0 where a critic gives them per token."""
    reference_A: Tensor | None
    critic: CriticEstimates | None
    kl_N: Tensor | None
    """[N] nats of each rollout, where the KL is in the reward."""
    metrics: dict[str, float]


class Roles:
    def __init__(
        self,
        run: Run,
        objective: Objective,
        ranks: Ranks,
        tokenizer: PreTrainedTokenizerBase,
        checkpoint: Path | None = None,
    ) -> None:
        """checkpoint: what the run is resumed from. Raises UserError naming the path that is wrong."""
        self._run, self._objective, self._ranks = run, objective, ranks
        self.reference = ReferencePolicy(run, ranks, checkpoint) if objective.needs_reference else None
        self.critic = Critic(run, ranks, checkpoint) if objective.needs_critic else None
        self.reward_model = RewardModel(run, ranks, tokenizer) if run.reward_model.path else None
        self.kl_coefficient = KLCoefficient(objective)

    def parts(self) -> list[Part]:
        """What a checkpoint holds of them: what training changes. The others are where the recipe says."""
        parts: list[Part] = []
        if self.critic is not None:
            parts.append(Part(critic.NAME, self.critic.module.model, self.critic.optimisation.optimizer))
        if self.reference is not None and self.reference.changes:
            parts.append(Part(reference.NAME, self.reference.model))
        return parts

    def residents(self) -> list[Resident]:
        """What is on the device between two steps, where that is shared (learner.offload)."""
        found = [] if self.critic is None else [Resident(self.critic.module, self.critic.optimisation)]
        frozen = [one.frozen for one in (self.reference, self.reward_model) if one is not None]
        return found + [Resident(one.module) for one in frozen if one.moves_with_turns]

    def rewarded(self, step: StepBatch, abandon: Callable[[], bool]) -> tuple[StepBatch, dict[str, float]]:
        """The step with the rewards it is trained on, and metrics. Raises Abandoned."""
        return (step, {}) if self.reward_model is None else self.reward_model.reward(step, abandon)

    def estimates(self, step: StepBatch, bound: int, policy: PackedPolicy, abandon: Callable[[], bool]) -> Estimates:
        """bound: the highest lag a token with weight may have. policy: before its update. Raises Abandoned."""
        objective, metrics = self._objective, dict[str, float]()
        reference_A = None if self.reference is None else self.reference.logprobs(step, abandon)
        kl_N: Tensor | None = None
        kl_coef = self.kl_coefficient.value
        if reference_A is not None and objective.kl_in == "reward":
            kl_N = rollout_kl(step, reference_A)
            kl = mean(kl_N) if len(kl_N) else 0.0
            metrics = {"kl_coef": kl_coef, "kl_rollout": kl, "kl_penalty": kl_coef * kl}
        if self.critic is None:
            advantages_N = group_advantages(objective, step.baseline, None if kl_N is None else kl_coef * kl_N)
            return Estimates(advantages_N, reference_A, None, kl_N, metrics)
        current_A = self._current(policy, step, abandon) if objective.needs_current else None
        values_A = self.critic.values(step, abandon)
        valued = critic_estimates(
            objective, self._run.critic, step, values_A, reference_A, current_A, kl_coef=kl_coef, bound=bound
        )
        if valued.rho_A is not None and valued.active_A.any():
            metrics["vtrace_rho"] = float(valued.rho_A[valued.active_A].mean())
        return Estimates(torch.zeros(step.num_rollouts), reference_A, valued, kl_N, metrics)

    def _current(self, policy: PackedPolicy, step: StepBatch, abandon: Callable[[], bool]) -> Tensor:
        """[A] float32, 0 where a token is not trained on."""
        try:
            return over_step(lambda tokens: policy(tokens).logp_K, step, self._ranks, abandon)
        finally:
            spread(policy)

    def steer(self, estimates: Estimates) -> None:
        """Once a step is done for good, also where its update was skipped: an abandoned one is trained on again."""
        if estimates.kl_N is not None:
            self.kl_coefficient.update(estimates.kl_N)

    def after_step(self, policy: PackedPolicy, version: int) -> None:
        """`version`: of the policy now."""
        if self.reference is not None:
            self.reference.refresh(policy, version)
