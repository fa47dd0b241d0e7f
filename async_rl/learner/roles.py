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
from async_rl.learner.estimates import CriticEstimates, critic_estimates, group_advantages, kl_penalty
from async_rl.learner.offload import Resident
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.reference import ReferencePolicy
from async_rl.learner.reward_model import RewardModel
from async_rl.learner.saved_parts import Part


@dataclass(frozen=True, slots=True)
class Estimates:
    """What the losses of a step compare with, the same on every rank."""

    advantages_N: Tensor
    """[N]; 0 where a critic gives them per token."""
    reference_A: Tensor | None
    critic: CriticEstimates | None
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
        self._run, self._objective = run, objective
        self.reference = ReferencePolicy(run, ranks, checkpoint) if objective.needs_reference else None
        self.critic = Critic(run, ranks, checkpoint) if objective.needs_critic else None
        self.reward_model = RewardModel(run, ranks, tokenizer) if run.reward_model.path else None

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

    def estimates(self, step: StepBatch, bound: int, abandon: Callable[[], bool]) -> Estimates:
        """bound: the highest lag a token with weight may have. Raises Abandoned."""
        objective, metrics = self._objective, dict[str, float]()
        reference_A = None if self.reference is None else self.reference.logprobs(step, abandon)
        penalty_N: Tensor | None = None
        if reference_A is not None and objective.kl_in == "reward":
            penalty_N = kl_penalty(objective, step, reference_A)
            metrics["kl_penalty"] = float(penalty_N.mean()) if len(penalty_N) else 0.0
        if self.critic is None:
            advantages_N = group_advantages(objective, step.baseline, penalty_N)
            return Estimates(advantages_N, reference_A, None, metrics)
        values_A = self.critic.values(step, abandon)
        valued = critic_estimates(objective, self._run.critic, step, values_A, reference_A, bound)
        return Estimates(torch.zeros(step.num_rollouts), reference_A, valued, metrics)

    def after_step(self, policy: PackedPolicy, version: int) -> None:
        """`version`: of the policy now."""
        if self.reference is not None:
            self.reference.refresh(policy, version)
