"""Preference training on pairs of answers: DPO, its length-normalised form, SimPO, IPO (algorithms.preference).

Both answers of a pair go through one forward pass, their prompt once. Log-probs are summed over an answer in fp64. The
loss is a mean over the pairs of the whole step. What DPO learns shows in the implied rewards beta (log pi - log ref) of
the chosen and the rejected answer: their margin, and how often it is above 0 (accuracy).

For answers that can be verified, use RL; preferences are for what cannot (docs/stages.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from async_rl.algorithms.preference import preference_loss
from async_rl.learner.optimisation import Stats
from async_rl.learner.packing import move
from async_rl.learner.policy import PackedPolicy
from async_rl.stages.config import BETA, Preference
from async_rl.stages.examples import pack_rows
from async_rl.stages.reference import Reference, summed_logprobs
from async_rl.stages.trainer import Batch


class PreferenceTrainer:
    """A stages.trainer.Trainer. Each row is a pair: the chosen answer's sequence, then the rejected one's."""

    def __init__(
        self,
        policy: PackedPolicy,
        device: torch.device,
        preference: Preference,
        reference: Reference | None,
    ) -> None:
        """reference: None for SimPO, which has none."""
        assert (reference is None) == (preference.loss == "simpo"), "SimPO loads no reference, the others need one"
        self.model, self.module, self._device = policy.model, policy, device
        self._reference = reference
        self._kind: Literal["dpo", "dpo_norm", "simpo", "ipo"] = preference.loss
        self._beta = BETA[preference.loss] if preference.beta is None else preference.beta
        self._gamma = self._beta / 2 if preference.gamma is None else preference.gamma
        self._smoothing = preference.label_smoothing

    def batch(self, batch: Batch, step: int) -> Batch:
        return batch

    def loss(self, batch: Batch, rows: Sequence[int]) -> tuple[Tensor, Stats]:
        packed = move(pack_rows(batch.examples, rows), self._device)
        logp_s = summed_logprobs(self.module, packed)
        chosen_B, rejected_B = logp_s[0::2], logp_s[1::2]
        reference_s = None if self._reference is None else self._reference(packed)
        length_s = torch.from_numpy(batch.examples.trained_S)[packed.chosen_s.cpu()].to(self._device)
        out = preference_loss(
            chosen_B,
            rejected_B,
            None if reference_s is None else reference_s[0::2],
            None if reference_s is None else reference_s[1::2],
            length_s[0::2],
            length_s[1::2],
            kind=self._kind,
            beta=self._beta,
            gamma=self._gamma,
            label_smoothing=self._smoothing,
        )
        margin_B = out.chosen_reward_B - out.rejected_reward_B
        stats: Stats = {
            "reward_chosen": out.chosen_reward_B.sum(),
            "reward_rejected": out.rejected_reward_B.sum(),
            "reward_margin": margin_B.sum(),
            "reward_accuracy": (margin_B > 0).sum(),
            "logp_chosen": chosen_B.detach().sum(),
            "logp_rejected": rejected_B.detach().sum(),
        }
        return out.loss_B.sum() / len(batch.rows), stats

    def metrics(self, batch: Batch, values: dict[str, float]) -> dict[str, float]:
        """Means over pairs; accuracy counts strictly, a tie is wrong."""
        return {name: value / len(batch.rows) for name, value in values.items() if name != "loss"}

    def finish(self, train: Batch) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing was started."""
