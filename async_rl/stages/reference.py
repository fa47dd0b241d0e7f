"""The frozen model that DPO compares with: its log-probs of every answer, computed once and kept, or step by step.

cached     one forward pass over the data before training, then the model is let go: [S] numbers stay, also on disk, so
           that a stage that continues does not need the model again
per_step   the model stays in memory, and every micro-batch costs one more forward pass
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from async_rl.batching.plan import plan
from async_rl.learner import checkpoint
from async_rl.learner.distributed import Ranks
from async_rl.learner.frozen import Frozen
from async_rl.learner.packing import move
from async_rl.learner.passes import give_up
from async_rl.learner.policy import PackedPolicy
from async_rl.stages.examples import Examples, PackedRows, pack_rows

NAME = "logp"


class Reference(Protocol):
    def __call__(self, packed: PackedRows) -> Tensor:
        """[s] float64, log-probs summed over the trained tokens of each sequence, without gradient."""
        ...


class PerStep:
    """The model, beside the one that is trained."""

    def __init__(self, model: PreTrainedModel, ranks: Ranks, *, dtype: str, sharded: bool = False) -> None:
        """sharded: spread it over the ranks, as what is trained is."""
        self._policy = PackedPolicy(model, dtype=dtype)
        self._frozen = Frozen(self._policy, ranks.device, dtype=dtype, spread_over=ranks if sharded else None)

    def __call__(self, packed: PackedRows) -> Tensor:
        with self._frozen.at_work():
            return summed_logprobs(self._policy, packed)


class Cached:
    """What the model once said of every sequence of the data."""

    def __init__(self, logp_S: Tensor, device: torch.device) -> None:
        self.logp_S = logp_S.to(device)

    def __call__(self, packed: PackedRows) -> Tensor:
        return self.logp_S[packed.chosen_s]


def cached(
    file: Path,
    build: Callable[[], PreTrainedModel],
    examples: Examples,
    ranks: Ranks,
    *,
    dtype: str,
    sharded: bool,
    cap: int,
    stopping: Callable[[], bool],
) -> Cached:
    """From the file of an earlier start; else the ranks compute them together and the first one writes the file.

    build: the model, called only if it is needed.

    Raises:
        Abandoned: it was asked to stop.
    """
    if file.exists():
        return Cached(load_file(file)[NAME], ranks.device)
    reference = PerStep(build(), ranks, dtype=dtype, sharded=sharded)
    logp_S = torch.zeros(len(examples.sequences.length_S), dtype=torch.float64, device=ranks.device)
    rows = range(len(examples))
    for places in plan(examples.tokens_of(rows), ranks=ranks.size, cap=cap)[ranks.rank]:
        give_up(ranks, stopping)
        packed = move(pack_rows(examples, places), ranks.device)
        logp_S[packed.chosen_s] = reference(packed)
    ranks.sum(logp_S)  # each sequence was computed by one rank, and is 0 on the others
    if ranks.rank == 0:
        partial = file.with_name(f"{checkpoint.PARTIAL}{file.name}")
        save_file({NAME: logp_S.cpu()}, partial)
        partial.replace(file)
    return Cached(logp_S, ranks.device)


def summed_logprobs(policy: PackedPolicy, packed: PackedRows) -> Tensor:
    """[s] float64, over the trained tokens of each sequence."""
    logp_K = policy(packed.tokens).logp_K.double()
    return torch.zeros(len(packed.chosen_s), dtype=torch.float64, device=logp_K.device).index_add(
        0, packed.sequence_K, logp_K
    )
