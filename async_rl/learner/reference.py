"""The reference policy: the frozen model that KL keeps the trained one close to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from async_rl.config import Model, Run
from async_rl.learner.batch import StepBatch
from async_rl.learner.distributed import Ranks
from async_rl.learner.frozen import Frozen
from async_rl.learner.passes import over_step
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.sharding import local
from async_rl.models.loading import build_model

NAME = "reference"
"""Its folder in a checkpoint, where it is one: only if it is refreshed, otherwise the recipe says where it is."""


class ReferencePolicy:
    """Its log-probs are taken at the temperature of sampling, as the trained policy's are."""

    def __init__(self, run: Run, ranks: Ranks, checkpoint: Path | None) -> None:
        """checkpoint: what the run is resumed from.

        Raises:
            UserError: there is no such model.
        """
        self._refresh_steps = run.reference.refresh_steps
        source, field = (
            (Model(path=run.reference.path), "reference.path") if run.reference.path else (run.model, "model.path")
        )
        if checkpoint is not None and self.changes:
            source = Model(path=str(checkpoint / NAME))
        self.model = build_model(source, seed=run.seed, field=field)
        self._policy = PackedPolicy(self.model, temperature=run.rollout.temperature, dtype=run.learner.dtype)
        self.frozen = Frozen(
            self._policy,
            ranks.device,
            dtype=run.learner.dtype,
            offload=run.reference.offload,
            colocated=run.colocated,
            spread_over=ranks if run.learner.sharding == "full" and ranks.size > 1 else None,
        )
        self._ranks = ranks

    @property
    def changes(self) -> bool:
        """Whether it is part of a checkpoint."""
        return self._refresh_steps > 0

    def logprobs(self, step: StepBatch, abandon: Callable[[], bool]) -> Tensor:
        """[A] float32, 0 where a token is not trained on."""
        with self.frozen.at_work():
            return over_step(lambda tokens: self._policy(tokens).logp_K, step, self._ranks, abandon)

    @torch.no_grad()
    def refresh(self, policy: PackedPolicy, version: int) -> None:
        """Every so many versions, become the policy as it is now."""
        if self.changes and version % self._refresh_steps == 0:
            for mine, its in zip(self._policy.parameters(), policy.parameters(), strict=True):
                local(mine).copy_(local(its))
