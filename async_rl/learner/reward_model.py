"""A reward model as the reward: forward passes only, over whole rollouts, before anything is compared with anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from async_rl.config import Model, Run
from async_rl.errors import UserError
from async_rl.learner.batch import StepBatch
from async_rl.learner.distributed import Ranks
from async_rl.learner.frozen import Frozen
from async_rl.learner.packing import Sequences, families, move, pack_sequences, ranges
from async_rl.learner.passes import give_up
from async_rl.learner.scalar import CLASSIFIER, PackedScalar
from async_rl.models.loading import load_config, load_tokenizer


class RewardModel:
    """Reads the tokens of the policy: both must have one tokenizer."""

    def __init__(self, run: Run, ranks: Ranks, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError: there is no such model, or it has another tokenizer than the policy."""
        source, field = Model(path=run.reward_model.path), "reward_model.path"
        architectures = load_config(source, field=field).architectures or [""]
        if not architectures[0].endswith(CLASSIFIER):
            raise UserError(
                f"reward_model.path = {source.path!r}: {architectures[0]} has no scalar head; "
                "write a directory that reward-model training has made"
            )
        if load_tokenizer(source, field=field).get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"reward_model.path = {source.path!r}: its tokenizer is not the policy's; "
                "write a reward model that was trained with the policy's"
            )
        self.module = PackedScalar.load(source, seed=run.seed, dtype=run.learner.dtype, field=field)
        self.frozen = Frozen(
            self.module,
            ranks.device,
            dtype=run.learner.dtype,
            offload=run.reward_model.offload,
            precise=(self.module.head,),
            colocated=run.colocated,
            spread_over=ranks if run.learner.sharding == "full" and ranks.size > 1 else None,
        )
        self._config, self._ranks = run.reward_model, ranks

    def reward(self, step: StepBatch, abandon: Callable[[], bool]) -> tuple[StepBatch, dict[str, float]]:
        """The step with `weight * (score - bias)` added to its rewards, or in their place, and the parts as metrics.

        A member of a baseline that is not in the step has no score: it leaves the baseline (NaN).
        """
        with self.frozen.at_work():
            scores_N = self._scores(step, abandon).numpy()
        rewards_N = np.float32(self._config.weight) * scores_N
        if not self._config.replaces:
            rewards_N = step.rewards_N + rewards_N
        rewards_B = np.full_like(step.baseline.rewards_B, np.nan)
        rewards_B[step.baseline.row_N] = rewards_N
        metrics = {
            "reward_model": float(scores_N.mean()) if len(scores_N) else 0.0,
            "reward_model_std": float(scores_N.std()) if len(scores_N) else 0.0,
            "reward_environment": float(np.nanmean(step.rewards_N)) if not np.isnan(step.rewards_N).all() else 0.0,
        }
        baseline = dataclasses.replace(step.baseline, rewards_B=rewards_B)
        return dataclasses.replace(step, rewards_N=rewards_N, baseline=baseline), metrics

    @torch.no_grad()
    def _scores(self, step: StepBatch, abandon: Callable[[], bool]) -> Tensor:
        """[N] float32: of the last sequence of each rollout, read at its last token. The same on every rank."""
        device = self._ranks.device
        ends = _last_sequences(step)
        scores_N = torch.zeros(step.num_rollouts)
        for rollouts in step.plan[self._ranks.rank]:
            give_up(self._ranks, abandon)
            chosen = np.asarray(rollouts, np.int64)
            packed = pack_sequences(ends, chosen, families(ends, chosen, step.group_N[chosen]))
            scores_N[chosen[packed.place_K]] = self.module.score(move(packed.tokens, device)).cpu()
        self._ranks.sum(scores_N)
        return scores_N


def _last_sequences(step: StepBatch) -> Sequences:
    """[N] What a rollout ends with: the others are what led to it."""
    last_N = step.first_N[1:] - 1
    sequences = step.sequences
    length_N = sequences.length_S[last_N]
    tokens_A: Any = sequences.tokens_A[ranges(sequences.start_S[last_N], length_N)]
    return Sequences.ending(tokens_A, length_N, sequences.prompt_S[last_N])
