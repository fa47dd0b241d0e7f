"""Engine and learner compared under the same weights, although the tokens of a batch are older than the weights of now.

Where generation runs ahead, hardly any token is trained by the version that sampled it. So now and then the weights of
one version are kept, until a batch brings tokens that they sampled:

    step p                 copy what is trained to host memory, p
    step p + 1, p + 2 ..   where the batch has tokens of version p, those weights take the place of today's for one
                           forward pass over a sample of it, and leave again; weights change by no bit
    step p + eta           at the latest, or once enough tokens were compared, they are dropped

It costs a copy of the weights while one is kept, and a part of a forward pass; engine and wire take no part.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_rl.config import Run
from async_rl.learner.batch import StepBatch, pack
from async_rl.learner.distributed import Ranks
from async_rl.learner.mismatch import mismatch_sums
from async_rl.learner.optimisation import Optimisation, Stats
from async_rl.learner.packing import Ints, move
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.sharding import local, spread

ENOUGH_TOKENS = 256
"""Of one version."""
SAMPLE_TOKENS = 1024
"""All ranks together score about so many in a step."""


class FormerWeights:
    """`learner.mismatch_steps` of a recipe. All ranks decide the same from the same batch."""

    def __init__(self, run: Run, policy: PackedPolicy, optimisation: Optimisation, ranks: Ranks) -> None:
        self._every, self._eta = run.learner.mismatch_steps, run.staleness.max_staleness
        self._cap = run.learner.microbatch_tokens
        self._policy, self._optimisation, self._ranks = policy, optimisation, ranks
        self._kept: list[Tensor] = []
        """Of the trained parameters in order, this rank's rows, on the host; empty: none are kept."""
        self._version = self._next = 0
        self._found = 0
        """Tokens of that version so far."""

    def __call__(self, step: StepBatch, abandon: Callable[[], bool]) -> dict[str, float]:
        """At the start of a step. Sums as of `mismatch_sums` with one lag; empty where nothing was compared.

        Raises:
            Abandoned: `abandon` said so on some rank; the weights have not changed.
        """
        sums = self._compared(step, abandon) if self._kept else {}
        if not self._kept:
            self._keep(step)
        return sums

    def _compared(self, step: StepBatch, abandon: Callable[[], bool]) -> dict[str, float]:
        """Afterwards the weights are no longer kept, unless more tokens of them are wanted and may come."""
        tokens_N = _unmixed_tokens(step, self._version)
        found = int(tokens_N.sum())
        sums = self._score(step, tokens_N, abandon) if found else {}
        self._found += found
        if self._found >= ENOUGH_TOKENS or step.version >= self._version + self._eta:
            self._kept = []
        return sums

    def _keep(self, step: StepBatch) -> None:
        """Not where the step itself has enough tokens of its version, nor where no later one can have any."""
        if self._every == 0 or self._eta == 0 or step.version < self._next:
            return
        self._version, self._next = step.version, step.version + self._every
        self._found = int(_unmixed_tokens(step, step.version).sum())
        if self._found < ENOUGH_TOKENS:
            self._kept = [mine.to("cpu", copy=True) for mine in self._trained()]

    @torch.no_grad()
    def _score(self, step: StepBatch, tokens_N: Ints, abandon: Callable[[], bool]) -> dict[str, float]:
        chosen = self._sample(step, tokens_N)
        with self._in_place():
            return self._optimisation.accumulate([partial(self._sums, step, chosen)], abandon).values

    def _sums(self, step: StepBatch, rollouts: Ints) -> tuple[Tensor, Stats]:
        microbatch = move(pack(step, rollouts.tolist()), self._ranks.device)
        logp_K = self._policy(microbatch.tokens).logp_K
        return torch.zeros((), device=logp_K.device), mismatch_sums(logp_K, microbatch, self._version, lags=1)

    def _sample(self, step: StepBatch, tokens_N: Ints) -> Ints:
        """Rollouts of this rank's share that fit into one micro-batch; perhaps none."""
        share = [index for part in step.plan[self._ranks.rank] for index in part]
        mine = np.array([index for index in share if tokens_N[index]], np.int64)
        ends = np.concatenate([[0], np.cumsum(step.sequences.length_S)])[step.first_N]
        length_N = ends[1:] - ends[:-1]
        before = np.cumsum(tokens_N[mine]) - tokens_N[mine]
        return mine[(np.cumsum(length_N[mine]) <= self._cap) & (before < SAMPLE_TOKENS / self._ranks.size)]

    @contextmanager
    def _in_place(self) -> Generator[None]:
        """The kept weights and today's change places, and back."""
        self._exchange()
        try:
            yield
        finally:
            spread(self._policy)
            self._exchange()

    def _exchange(self) -> None:
        for mine, kept in zip(self._trained(), self._kept, strict=True):
            today = mine.to("cpu", copy=True)
            mine.copy_(kept)
            kept.copy_(today)

    def _trained(self) -> list[Tensor]:
        return [local(parameter) for parameter in self._policy.parameters() if parameter.requires_grad]


def _unmixed_tokens(step: StepBatch, version: int) -> npt.NDArray[np.int64]:
    """[N] tokens of each rollout that weights of this version sampled, with no older keys and values."""
    of_version_R = step.span_unmixed_R & (step.span_version_R == version)
    tokens_N = np.bincount(step.span_rollout_R, step.span_tokens_R * of_version_R, step.num_rollouts)
    return tokens_N.astype(np.int64)
