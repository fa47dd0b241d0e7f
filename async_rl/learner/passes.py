"""What a model says of every trained token of a step, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from async_rl.learner.batch import StepBatch, pack
from async_rl.learner.distributed import Ranks
from async_rl.learner.optimisation import Abandoned
from async_rl.learner.packing import PackedTokens, move


@torch.no_grad()
def over_step(
    model: Callable[[PackedTokens], Tensor], step: StepBatch, ranks: Ranks, abandon: Callable[[], bool]
) -> Tensor:
    """[A] float32 on the CPU, 0 where a token is not trained on. Each rank asks about its share; all return the whole.

    model: [K] of the trained tokens of one micro-batch.

    Raises:
        Abandoned: `abandon` said so on some rank.
    """
    found_A = torch.zeros(len(step.version_A))
    for rollouts in step.plan[ranks.rank]:
        give_up(ranks, abandon)
        packed = pack(step, rollouts)
        found_A[packed.token_K] = model(move(packed.tokens, ranks.device)).float().cpu()
    ranks.sum(found_A)
    return found_A


def give_up(ranks: Ranks, abandon: Callable[[], bool]) -> None:
    """Between two micro-batches. Raises Abandoned if some rank wants to."""
    if ranks.any(abandon()):
        raise Abandoned("the step was abandoned between two micro-batches; no weight has changed")
