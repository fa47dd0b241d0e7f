"""Supervised fine-tuning: cross-entropy on responses, a mean over the trained tokens of the whole step.

loss = -sum log pi(token) / tokens,  both over all ranks and micro-batches: any split of the step gives the same update,
and every token counts alike, however long its sequence (a mean of means would favour short ones).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from async_rl.learner.logprobs import chunk_of
from async_rl.learner.optimisation import Stats
from async_rl.learner.packing import move
from async_rl.learner.policy import PackedPolicy
from async_rl.stages.examples import pack_rows
from async_rl.stages.trainer import Batch


class SFT:
    """A stages.trainer.Trainer."""

    def __init__(self, policy: PackedPolicy, device: torch.device) -> None:
        self.model, self.module, self._device = policy.model, policy, device

    def batch(self, batch: Batch, step: int) -> Batch:
        return batch

    def loss(self, batch: Batch, rows: Sequence[int]) -> tuple[Tensor, Stats]:
        packed = move(pack_rows(batch.examples, rows), self._device)
        if torch.is_grad_enabled():
            return -self.module(packed.tokens).logp_K.sum() / batch.trained_tokens, {}
        logp_K, hit_K = self.module.with_head(packed.tokens, partial(_judged, packed.tokens.target_K))
        return -logp_K.sum() / batch.trained_tokens, {"hits": hit_K.sum()}

    def metrics(self, batch: Batch, values: dict[str, float]) -> dict[str, float]:
        metrics = {"perplexity": math.exp(min(values["loss"], 50.0))}
        if "hits" in values:
            metrics["token_accuracy"] = values["hits"] / max(1, batch.trained_tokens)
        return metrics

    def finish(self, train: Batch) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing was started."""


def _judged(target_K: Tensor, hidden_KH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
    """[K] log-prob of each target, and whether it is the most likely token; in chunks, without gradient."""
    rows = max(1, chunk_of(hidden_KH.device) // weight_VH.shape[0])
    logps, hits = [hidden_KH.new_zeros(0, dtype=torch.float32)], [target_K.new_zeros(0, dtype=torch.bool)]
    for hidden, target in zip(hidden_KH.split(rows), target_K.split(rows), strict=True):
        logits = (hidden @ weight_VH.to(hidden.dtype).t()).float()
        logps.append(torch.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1))
        hits.append(logits.argmax(-1) == target)
    return torch.cat(logps), torch.cat(hits)
