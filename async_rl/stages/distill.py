"""Distillation: a student learns from a teacher with the same vocabulary (algorithms.distillation).

cross_entropy   on the teacher's text: of the data, or sampled from the teacher at every step
kl              of the two distributions at every token of a response, over the whole vocabulary: on text of the data,
                of the teacher or, on-policy, of the student itself, which is where reverse KL is right

Both are means over the response tokens of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from async_rl.engines.sampling import rollout_key
from async_rl.learner.distributed import Ranks
from async_rl.learner.frozen import Frozen
from async_rl.learner.optimisation import Stats
from async_rl.learner.packing import move
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.sharding import whole
from async_rl.learner.token_kl import token_kl
from async_rl.stages.config import StageRecipe
from async_rl.stages.examples import Examples, pack_rows
from async_rl.stages.sampler import Sampler
from async_rl.stages.templates import Tokens
from async_rl.stages.trainer import Batch


class Distillation:
    """A stages.trainer.Trainer. Where responses are sampled, the rows of the data are prompts."""

    def __init__(
        self,
        recipe: StageRecipe,
        policy: PackedPolicy,
        teacher: PackedPolicy | None,
        sampler: Sampler | None,
        ranks: Ranks,
        *,
        sharded: bool,
    ) -> None:
        """policy: the student. teacher: None for cross-entropy on the data. sampler: of the student's or the teacher's
        architecture, whichever speaks; None where nobody does. sharded: the student is; so the teacher will be."""
        self.model, self.module, self._ranks, self._seed = policy.model, policy, ranks, recipe.seed
        self._config = recipe.distill
        self._sampling_dtype: torch.dtype = getattr(torch, recipe.generator.dtype)
        self._temperature = recipe.distill.temperature if recipe.distill.loss == "kl" else 1.0
        self._teacher, self._frozen, self._sampler = teacher, None, sampler
        self._speaker = teacher if recipe.distill.responses == "teacher" else policy
        self._sharded = sharded
        if teacher is not None:
            spread_over = ranks if sharded else None
            self._frozen = Frozen(teacher, ranks.device, dtype=recipe.learner.dtype, spread_over=spread_over)

    def batch(self, batch: Batch, step: int) -> Batch:
        """Sampled by all ranks together: each a share of the prompts."""
        if self._sampler is None or self._speaker is None:
            return batch
        sequences = batch.examples.sequences
        prompts = [
            sequences.tokens_A[start : start + length].tolist()
            for start, length in zip(*(x[batch.examples.sequences_of(batch.rows)].tolist() for x in (
                sequences.start_S, sequences.length_S)), strict=True)
        ]  # fmt: skip
        completions = self._sample(prompts, step)
        rows = [
            [Tokens(prompt + said, [False] * len(prompt) + [True] * len(said))]
            for prompt, said in zip(prompts, completions, strict=True)
        ]
        return Batch(Examples.of(rows), range(len(rows)))

    def loss(self, batch: Batch, rows: Sequence[int]) -> tuple[Tensor, Stats]:
        device = self._ranks.device
        packed = move(pack_rows(batch.examples, rows), device)
        if self._config.loss == "cross_entropy":
            return -self.module(packed.tokens).logp_K.sum() / batch.trained_tokens, {}
        assert self._teacher is not None and self._frozen is not None
        with self._frozen.at_work():
            teacher_KD, teacher_VD = self._teacher.with_head(packed.tokens, self._kept)

        def kl(hidden_KH: Tensor, weight_VH: Tensor) -> Tensor:
            return token_kl(
                hidden_KH,
                weight_VH,
                teacher_KD,
                teacher_VD,
                direction=self._config.direction,
                temperature=self._temperature,
            )

        kl_K = self.module.with_head(packed.tokens, kl)
        return kl_K.sum() / batch.trained_tokens, {"kl": kl_K.detach().sum()}

    def metrics(self, batch: Batch, values: dict[str, float]) -> dict[str, float]:
        metrics = {"response_tokens": batch.trained_tokens / len(batch.rows)}
        if "kl" in values:
            metrics["kl"] = values["kl"] / batch.trained_tokens
        return metrics

    def finish(self, train: Batch) -> dict[str, float]:
        self.close()
        return {}

    def close(self) -> None:
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.close()

    def _sample(self, prompts: list[list[int]], step: int) -> list[list[int]]:
        """The same on every rank."""
        assert self._sampler is not None and self._speaker is not None
        mine = range(self._ranks.rank, len(prompts), self._ranks.size)
        limit = self._config.max_new_tokens
        said = self._sampler.sample(
            [prompts[number] for number in mine],
            self._weights(self._speaker),
            [rollout_key(rollout_key(self._seed, step + 1), number) for number in mine],
            max_new_tokens=limit,
            temperature=self._config.temperature,
        )
        together = torch.zeros(len(prompts), limit + 1, dtype=torch.int64)
        for number, tokens in zip(mine, said, strict=True):
            together[number, 0] = len(tokens)
            together[number, 1 : 1 + len(tokens)] = torch.tensor(tokens)
        self._ranks.sum(together)  # each row was filled by one rank, and is 0 on the others
        return [row[1 : 1 + row[0]] for row in cast(list[Any], together.tolist())]

    def _kept(self, hidden_KD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        """Of the teacher. The backward pass reads its head again, when one that is spread is not whole any more."""
        return hidden_KD, weight_VD.clone() if self._sharded else weight_VD

    def _weights(self, speaker: PackedPolicy) -> dict[str, Tensor]:
        """What the engine copies; every rank has one, so that the whole model comes together on each of them."""
        named = speaker.model.named_parameters()
        if not self._sharded:
            return {name: parameter.detach() for name, parameter in named}
        with self._ranks.naming("the weights that sample"):
            return {name: whole(parameter.detach().to(self._sampling_dtype)) for name, parameter in named}
