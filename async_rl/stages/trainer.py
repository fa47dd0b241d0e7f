"""The seam between what a stage computes (sft, preference, reward_model, distill) and the loop that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from async_rl.learner.optimisation import Stats
from async_rl.stages.examples import Examples


@dataclass(frozen=True)
class Batch:
    """The rows of one optimiser step, or of one evaluation; the same on every rank."""

    examples: Examples
    rows: Sequence[int]

    @cached_property
    def trained_tokens(self) -> int:
        return int(self.examples.trained_S[self.examples.sequences_of(self.rows)].sum())

    @cached_property
    def read_tokens(self) -> int:
        return int(self.examples.sequences.length_S[self.examples.sequences_of(self.rows)].sum())


class Trainer(Protocol):
    """One kind of stage."""

    @property
    def module(self) -> nn.Module:
        """Whose calls are the forward passes of what is trained: the one that is spread over ranks, if any is."""
        ...

    @property
    def model(self) -> PreTrainedModel:
        """What is trained, and saved in every checkpoint."""
        ...

    def batch(self, batch: Batch, step: int) -> Batch:
        """The examples of a step or, at step -1, of an evaluation; every rank calls it with the same rows. Most kinds
        return what they are given; distillation samples responses."""
        ...

    def loss(self, batch: Batch, rows: Sequence[int]) -> tuple[Tensor, Stats]:
        """These rows' part of the loss of the whole batch, and statistics that add up. Under no_grad: evaluation."""
        ...

    def metrics(self, batch: Batch, values: dict[str, float]) -> dict[str, float]:
        """From statistics summed over the whole batch; `loss` is among them and is reported as it is."""
        ...

    def finish(self, train: Batch) -> dict[str, float]:
        """After the last step, before the model is saved: what belongs to the result (the bias of a reward model).
        train: every row that was trained on."""
        ...

    def close(self) -> None:
        """End what it started: also of a stage that was stopped, and safe to call twice."""
        ...
