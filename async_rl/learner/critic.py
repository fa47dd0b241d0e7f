"""The critic: a value network that shares nothing with the policy, and an optimiser of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from async_rl.algorithms.value_loss import value_loss
from async_rl.config import Model, Run
from async_rl.learner.batch import StepBatch, pack
from async_rl.learner.distributed import Ranks
from async_rl.learner.estimates import CriticEstimates, explained_variance
from async_rl.learner.optimisation import Optimisation, Stats, Totals, never
from async_rl.learner.packing import move, to_device
from async_rl.learner.passes import over_step
from async_rl.learner.scalar import PackedScalar
from async_rl.learner.sharding import spread

NAME = "critic"
"""Its folder in a checkpoint."""


class Critic:
    """V of the state in which each trained token was sampled."""

    def __init__(self, run: Run, ranks: Ranks, checkpoint: Path | None) -> None:
        """checkpoint: what the run is resumed from.

        Raises:
            UserError: there is no such model.
        """
        source, field = _source(run)
        if checkpoint is not None:
            source = Model(path=str(checkpoint / NAME))
        dtype = run.learner.dtype
        self.module = PackedScalar.load(source, seed=run.seed, head="zero", dtype=dtype, field=field)
        if run.learner.activation_checkpointing:
            self.module.recompute_layers()
        if run.learner.sharding == "full" and ranks.size > 1:
            self.module.shard(ranks)
        elif not run.colocated:  # else it starts off the device
            self.module.to(ranks.device)
        self.optimisation = Optimisation(self.module.parameters(), run.critic.optimizer, run.steps, ranks)
        self._config, self._ranks = run.critic, ranks

    def values(self, step: StepBatch, abandon: Callable[[], bool]) -> Tensor:
        """[A] float32, 0 where a token is not trained on."""
        try:
            return over_step(self.module, step, self._ranks, abandon)
        finally:
            spread(self.module)

    def accumulate(self, step: StepBatch, estimates: CriticEstimates, abandon: Callable[[], bool]) -> Totals:
        """Gradients of the step's value loss; the weights stay until `update`. Raises Abandoned."""
        losses = [partial(self._loss, step, rollouts, estimates) for rollouts in step.plan[self._ranks.rank]]
        return self.optimisation.accumulate(losses, abandon)

    def update(self, step: StepBatch, estimates: CriticEstimates, totals: Totals) -> dict[str, float]:
        """The optimiser's steps, one an epoch, unless a number is not finite, and the critic's metrics.

        It does not stop in between: the first of them has changed the weights.
        """
        first, done = totals, self.optimisation.update(step.version, totals)
        for _ in range(1, self._config.epochs):
            totals = self.accumulate(step, estimates, never)
            done = self.optimisation.update(step.version, totals)
        active = estimates.active_A
        return {
            "value_loss": first.values.get("value_loss", 0.0),
            "value_clip_fraction": totals.values.get("value_clip_fraction", 0.0),
            "explained_variance": explained_variance(estimates),
            "value_mean": float(estimates.values_A[active].mean()) if active.any() else 0.0,
            "return_mean": float(estimates.returns_A[active].mean()) if active.any() else 0.0,
            "critic_grad_norm": first.grad_norm,
            "critic_learning_rate": done["learning_rate"],
            "critic_skipped": done["skipped"],
        }

    def _loss(self, step: StepBatch, rollouts: list[int], estimates: CriticEstimates) -> tuple[Tensor, Stats]:
        packed = pack(step, rollouts)
        device = self._ranks.device
        old_K, returns_K, active_K = (
            to_device(x_A[packed.token_K], device)
            for x_A in (estimates.values_A, estimates.returns_A, estimates.active_A)
        )
        values_K = self.module(move(packed.tokens, device))
        loss, clipped = value_loss(
            values_K, old_K, returns_K, active_K, clip=self._config.clip, num_tokens=step.trainable_tokens
        )
        return self._config.coef * loss, {"value_loss": loss.detach(), "value_clip_fraction": clipped.detach()}


def _source(run: Run) -> tuple[Model, str]:
    """Where a new critic's weights come from, and the field of the recipe that says so."""
    if run.critic.path:
        return Model(path=run.critic.path), "critic.path"
    if run.critic.init == "reward_model":
        return Model(path=run.reward_model.path), "reward_model.path"
    return run.model, "model.path"
