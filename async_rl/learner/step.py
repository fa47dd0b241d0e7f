"""The train step: advantages -> micro-batches (forward, loss, backward) -> reduce over ranks -> guard -> update.

Denominators are those of the whole step (all ranks, all micro-batches, before any guard), so losses and gradients of
micro-batches and ranks are summed, and any split of a step gives the same update.

The proximal policy of the decoupled objective is the one at the start of the step. A step is one mini-batch: no update
happens before its last backward pass, so the current log-probs without gradient *are* the proximal ones, exactly, and
no extra forward pass is made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from async_rl.algorithms.batch import Normaliser, TokenBatch
from async_rl.algorithms.metrics import add_stats, skip_reason, summarise
from async_rl.algorithms.objective import Objective
from async_rl.config import Optimizer, Run, Staleness
from async_rl.errors import AsyncRLError
from async_rl.learner.baselines import BaselineRows
from async_rl.learner.batch import PackedMicroBatch, StepBatch, pack
from async_rl.learner.distributed import Ranks
from async_rl.learner.gradients import FlatGradients
from async_rl.learner.logprobs import TokenLogprobs, token_logprobs
from async_rl.learner.metrics import batch_metrics
from async_rl.learner.packed_attention import run_packed, shares_prefixes, use_packed_attention


class Abandoned(AsyncRLError):
    """The step was given up between two micro-batches, because the learner stops; no weight has changed."""


class StalenessViolated(AsyncRLError):
    """A token past the staleness bound had weight in the loss: a bug, caught before the update (promise P1)."""


def never() -> bool:
    """The default of `abandon`."""
    return False


def ignored() -> None:
    """The default of `last_begins`."""


def learning_rate(optimizer: Optimizer, version: int, steps: int) -> float:
    """Of the step that starts from `version`, of `steps` in all: warm-up, stable, decay (WSD, arXiv 2404.06395).

    Linear up to the full rate at step `warmup_steps`, constant, then linear to `final_rate` of it over the last
    `decay_steps`. It depends on the version alone, so a resumed run needs no state of a schedule.
    """
    rate = optimizer.learning_rate
    if version + 1 < optimizer.warmup_steps:
        return rate * (version + 1) / optimizer.warmup_steps
    into_decay = version + 1 - (steps - optimizer.decay_steps)
    if into_decay <= 0 or optimizer.decay_steps == 0:
        return rate
    return rate * (1 - (1 - optimizer.final_rate) * min(1.0, into_decay / optimizer.decay_steps))


def normaliser(step: StepBatch, max_new_tokens: int) -> Normaliser:
    """Counted from the whole batch, which every rank holds: no communication, the same numbers everywhere."""
    return Normaliser(
        tokens=step.trainable_tokens,
        sequences=len(set(step.span_rollout_R.tolist())),
        constant=max_new_tokens,
        all_sequences=step.num_rollouts,
    )


def advantages(objective: Objective, rows: BaselineRows) -> Tensor:
    """[N] of the rollouts of the step, each relative to its baseline."""
    rewards_B, group_B = torch.from_numpy(rows.rewards_B), torch.from_numpy(rows.group_B)
    advantages_B = objective.advantages(rewards_B, group_B, torch.from_numpy(rows.in_step_B))
    return advantages_B[torch.from_numpy(rows.row_N)]


def weight_bound(staleness: Staleness) -> int:
    """The highest lag a token with weight may have. `on_stale = "off"` has none: nothing is masked nor asserted."""
    return sys.maxsize if staleness.on_stale == "off" else staleness.max_staleness


class TrainStep:
    """One optimiser step on one composed batch."""

    def __init__(
        self, run: Run, model: PreTrainedModel, optimizer: torch.optim.Optimizer, objective: Objective, ranks: Ranks
    ) -> None:
        self._run, self._model, self._optimizer, self._objective, self._ranks = run, model, optimizer, objective, ranks
        self._device = ranks.device
        self._bound = weight_bound(run.staleness)
        self._gradients = FlatGradients(model.parameters())
        model.eval()  # no dropout: log-probs must be those of the policy that sampled
        use_packed_attention(model)

    def __call__(
        self, step: StepBatch, abandon: Callable[[], bool] = never, last_begins: Callable[[], None] = ignored
    ) -> dict[str, float]:
        """Update the weights, or leave them bit for bit as they were: a skipped step says so in its metrics.

        last_begins: called when the last micro-batch of this rank begins.

        Raises:
            Abandoned: `abandon` said so on some rank; the weights have not changed.
            StalenessViolated: promise P1 does not hold; the weights have not changed.
        """
        stats, loss = self._accumulate(step, abandon, last_begins)
        self._gradients.reduce(self._ranks)
        norm = self._gradients.norm().double()
        values = self._reduce({**stats, "loss": loss})
        grad_norm = float(norm)
        if values.pop("stale_weight", 0.0) != 0.0:
            raise StalenessViolated(f"step {step.step}: tokens more than {self._bound} versions old have weight")
        metrics = batch_metrics(step, self._bound)
        metrics |= {"loss": values.pop("loss"), "grad_norm": grad_norm}
        metrics |= _equal_version_metrics(values)
        metrics |= summarise({name: torch.tensor(value) for name, value in values.items()}) if values else {}
        return metrics | self._update(step, metrics)

    def _accumulate(
        self, step: StepBatch, abandon: Callable[[], bool], last_begins: Callable[[], None]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of this rank's micro-batches into the buffer; their statistics and loss, summed."""
        self._gradients.zero()
        advantages_N = advantages(self._objective, step.baseline)
        whole = normaliser(step, self._run.rollout.max_new_tokens)
        stats: list[dict[str, Tensor]] = []
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        plan = step.plan[self._ranks.rank]
        for number, rollouts in enumerate(plan, 1):
            if self._ranks.any(abandon()):
                raise Abandoned(f"step {step.step} was abandoned; its batch stays composed and is trained on later")
            if number == len(plan):
                last_begins()
            microbatch = pack(step, rollouts, share_prompts=shares_prefixes(self._device))
            advantages_n = advantages_N[microbatch.rollout_n].to(self._device)
            part, part_stats = self._loss(microbatch.to(self._device), advantages_n, step.version, whole)
            if part.requires_grad:
                part.backward()
            loss += part.detach()
            stats.append(part_stats)
        return add_stats(stats), loss

    def _loss(
        self, microbatch: PackedMicroBatch, advantages_n: Tensor, version: int, whole: Normaliser
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar part of the step's loss, and its statistics."""
        fresh_enough_K = version - microbatch.version_K <= self._bound
        logprobs = self._logprobs(microbatch)
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
                entropy_T=entropy_K,
                versions_T=microbatch.version_K,
                current_version=version,
            ),
            whole,
        )
        stats = dict(out.stats)
        stats["stale_weight"] = out.weight_T.abs().where(~fresh_enough_K, 0.0).sum()
        stats |= _equal_version_stats(logprobs.logp_K.detach(), microbatch)
        stats.setdefault("entropy", entropy_K.detach().where(fresh_enough_K, 0.0).sum())
        return out.loss, stats

    def _logprobs(self, microbatch: PackedMicroBatch) -> TokenLogprobs:
        if not len(microbatch.target_K):
            nothing = torch.zeros(0, device=self._device)
            return TokenLogprobs(nothing, nothing)
        low = torch.bfloat16 if self._run.learner.dtype == "bfloat16" else None
        with torch.autocast(self._device.type, low) if low else nullcontext():
            hidden_TH = run_packed(self._model, microbatch.input_1T, microbatch.position_1T, microbatch.families)
        return token_logprobs(
            hidden_TH.index_select(0, microbatch.predictor_K),
            cast(nn.Linear, self._model.get_output_embeddings()).weight,
            microbatch.target_K,
            temperature=self._run.rollout.temperature,
            dtype=low,
        )

    def _reduce(self, stats: Mapping[str, Tensor]) -> dict[str, float]:
        """Sums over ranks (`*_max`: maxima) as plain numbers; one transfer from the device."""
        names = sorted(stats)
        together = torch.stack([stats[name].double() for name in names])
        highest = torch.tensor([name.endswith("_max") for name in names], device=together.device)
        if self._ranks.size > 1:
            maxima = together.clone()
            self._ranks.sum(together)
            self._ranks.maximum(maxima)
            together = torch.where(highest, maxima, together)
        return dict(zip(names, together.tolist(), strict=True))

    def _update(self, step: StepBatch, metrics: Mapping[str, float]) -> dict[str, float]:
        """The optimiser step, unless something forbids it; every rank decides the same from the same numbers."""
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        guarded = finite and ("kept_tokens" not in metrics or skip_reason(metrics) is not None)
        rate = learning_rate(self._run.optimizer, step.version, self._run.steps)
        if finite and not guarded:
            self._gradients.clip(metrics["grad_norm"], self._run.optimizer.clip_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        return {
            "learning_rate": rate,
            "skipped": float(not finite or guarded),
            "skipped_nonfinite": float(not finite),
            "skipped_guarded": float(guarded),
        }


@torch.no_grad()
def _equal_version_stats(logp_K: Tensor, microbatch: PackedMicroBatch) -> dict[str, Tensor]:
    """Where engine and learner had the same weights and no older KV, their log-probs must agree."""
    gap_K = (logp_K - microbatch.behaviour_K).abs().where(microbatch.fresh_K, 0.0)
    return {
        "equal_tokens": microbatch.fresh_K.sum(),
        "equal_gap": gap_K.sum(),
        "equal_gap_max": gap_K.max() if len(gap_K) else gap_K.sum(),
    }


def _equal_version_metrics(values: dict[str, float]) -> dict[str, float]:
    """Takes its own statistics out of `values`."""
    tokens = values.pop("equal_tokens", 0.0)
    gap, highest = values.pop("equal_gap", 0.0), values.pop("equal_gap_max", 0.0)
    return {
        "equal_version_tokens": tokens,
        "equal_version_gap": gap / tokens if tokens else 0.0,
        "equal_version_gap_max": highest,
    }
