"""Reward models: one number for an answer, higher for the better one (algorithms.reward_model).

A language model with a scalar head (learner.scalar) reads prompt and answer and is asked at the last token, the EOS
that ends the answer. All answers to a prompt are one row and one element of the loss, which is a mean over the rows of
the whole step. At the end the mean score of reference answers (the best ones of the training rows, or
`reward_model.references`) becomes the bias that is subtracted, and is stored in the config of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from async_rl.algorithms.reward_model import kwise_loss, pair_loss
from async_rl.batching.plan import plan
from async_rl.learner.distributed import Ranks
from async_rl.learner.optimisation import Stats
from async_rl.learner.packing import move
from async_rl.learner.scalar import PackedScalar
from async_rl.learner.sharding import spread
from async_rl.stages.examples import Examples, pack_rows
from async_rl.stages.trainer import Batch


class RewardModelTrainer:
    """A stages.trainer.Trainer. The answers of a row stand in order, best first."""

    def __init__(
        self,
        scalar: PackedScalar,
        ranks: Ranks,
        margin_N: Sequence[float],
        references: Callable[[], Examples | None],
        *,
        cap: int,
    ) -> None:
        """margin_N: by how much the two scores of a pair should differ; not used for rankings. references: rows whose
        first answers have mean score 0 in the end; None = those that were trained on. cap: tokens of a micro-batch."""
        self.model, self.module, self._ranks, self._cap = scalar.model, scalar, ranks, cap
        self._margin_N = torch.tensor(margin_N, dtype=torch.float32)
        self._references = references

    def batch(self, batch: Batch, step: int) -> Batch:
        return batch

    def loss(self, batch: Batch, rows: Sequence[int]) -> tuple[Tensor, Stats]:
        score_s, row_s = self._scores(batch.examples, rows)
        loss = score_s[:0].sum()  # 0; it depends on the parameters also where there is no row
        right, margin = score_s.new_zeros(()), score_s.new_zeros(())
        for number, row in enumerate(rows):
            ranked_K = score_s[row_s == number]
            if len(ranked_K) == 2:
                pair = pair_loss(ranked_K[:1], ranked_K[1:], self._margin_N[row].item())
                loss = loss + pair.loss_B.sum()
            else:
                loss = loss + kwise_loss(ranked_K)[0]
            best, worst = torch.triu_indices(len(ranked_K), len(ranked_K), 1, device=ranked_K.device).unbind()
            with torch.no_grad():
                difference = ranked_K[best] - ranked_K[worst]
                right, margin = right + (difference > 0).float().mean(), margin + difference.mean()
        stats: Stats = {"accuracy": right, "margin": margin, "score": score_s.detach().sum()}
        return loss / len(batch.rows), stats

    def metrics(self, batch: Batch, values: dict[str, float]) -> dict[str, float]:
        """accuracy: share of a row's pairs in the right order, strictly, a mean over rows; score: over answers."""
        answers = len(batch.examples.sequences_of(batch.rows))
        metrics = {name: values[name] / len(batch.rows) for name in ("accuracy", "margin")}
        return metrics | {"score": values["score"] / answers}

    @torch.no_grad()
    def finish(self, train: Batch) -> dict[str, float]:
        """The bias, from the first answer of every row of the references."""
        references = self._references()
        examples, rows = (train.examples, train.rows) if references is None else (references, range(len(references)))
        total = torch.zeros(2, dtype=torch.float64, device=self._ranks.device)
        planned = plan(examples.tokens_of(rows), ranks=self._ranks.size, cap=self._cap)
        for places in planned[self._ranks.rank]:
            score_s, row_s = self._scores(examples, [rows[place] for place in places])
            first_s = torch.from_numpy(np.diff(row_s.cpu().numpy(), prepend=-1) != 0).to(score_s.device)
            total += torch.stack([score_s[first_s].double().sum(), first_s.sum().double()])
        spread(self.module)
        self._ranks.sum(total)
        self.module.bias = float(total[0] / total[1])
        return {"bias": self.module.bias, "references": int(total[1])}

    def close(self) -> None:
        """Nothing was started."""

    def _scores(self, examples: Examples, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[s] float32 score of every answer of these rows, without bias, and which row it belongs to."""
        device = self._ranks.device
        packed = move(pack_rows(examples, rows), device)
        score_K = self.module(packed.tokens)  # one a sequence, in the order in which they were packed
        return score_K.new_zeros(len(packed.chosen_s)).index_copy(0, packed.sequence_K, score_K), packed.row_s
