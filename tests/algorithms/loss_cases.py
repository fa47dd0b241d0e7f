"""Random steps as lists of rollouts, and their packing into token batches in any order and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from async_rl.algorithms.batch import LossOutput, Normaliser, TokenBatch
from async_rl.algorithms.metrics import add_stats
from async_rl.algorithms.objective import Objective

few = settings(max_examples=15, derandomize=True)
MAX_NEW_TOKENS = 16
VERSION = 5


@dataclass(frozen=True)
class Rollout:
    """One sequence: [length] tensors and its advantage."""

    logp: Tensor
    behaviour: Tensor
    proximal: Tensor
    reference: Tensor
    entropy: Tensor
    mask: Tensor
    fresh: Tensor
    versions: Tensor
    advantage: Tensor

    @property
    def length(self) -> int:
        return len(self.logp)


@st.composite
def steps(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> list[Rollout]:
    """1 to 6 rollouts of 1 to 12 tokens; some tokens are not trainable, some stale, some ratios far off."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.01, 0.3, 1.5]))

    def rollout(length: int) -> Rollout:
        def normal(scale: float) -> Tensor:
            return scale * torch.randn(length, generator=generator, dtype=dtype)

        def often(p: float) -> Tensor:
            return torch.rand(length, generator=generator) < p

        logp = -normal(1.0).abs() - 0.1
        proximal = logp + normal(spread / 3)
        return Rollout(
            logp=logp, proximal=proximal, behaviour=proximal + normal(spread), reference=logp + normal(0.3),
            entropy=normal(1.0).abs(), mask=often(0.8), fresh=often(0.9),
            versions=torch.randint(0, VERSION + 1, (length,), generator=generator),
            advantage=torch.randn((), generator=generator, dtype=dtype),
        )  # fmt: skip

    return [rollout(length) for length in lengths]


def pack(rollouts: Sequence[Rollout]) -> TokenBatch:
    """Adjacent sequences, gradient through a leaf `logp_T`."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(rollout, name) for rollout in rollouts])

    return TokenBatch(
        logp_T=joined("logp").clone().requires_grad_(),
        behaviour_T=joined("behaviour"),
        proximal_T=joined("proximal"),
        reference_T=joined("reference"),
        entropy_T=joined("entropy"),
        mask_T=joined("mask"),
        weight_mask_T=joined("fresh"),
        versions_T=joined("versions"),
        current_version=VERSION,
        sequence_T=torch.arange(len(rollouts)).repeat_interleave(torch.tensor([r.length for r in rollouts])),
        advantages_N=torch.stack([rollout.advantage for rollout in rollouts]),
    )


def normaliser_of(rollouts: Sequence[Rollout]) -> Normaliser:
    return Normaliser(
        tokens=sum(int(r.mask.sum()) for r in rollouts),
        sequences=sum(bool(r.mask.any()) for r in rollouts),
        all_sequences=len(rollouts),
        constant=MAX_NEW_TOKENS,
    )


@dataclass(frozen=True)
class Step:
    loss: Tensor
    grads: list[Tensor]
    """Per rollout, in the order given."""
    stats: dict[str, Tensor]


def gradient_of(out: LossOutput, tokens: TokenBatch) -> Tensor:
    return torch.autograd.grad(out.loss, tokens.logp_T)[0]


def run(objective: Objective, rollouts: Sequence[Rollout], parts: Sequence[Sequence[int]] | None = None) -> Step:
    """The step computed in `parts`, each a list of rollout indices packed in that order; default one part."""
    parts = [range(len(rollouts))] if parts is None else parts
    normaliser, grads = normaliser_of(rollouts), [torch.empty(0)] * len(rollouts)
    losses, stats = [], []
    for part in parts:
        tokens = pack([rollouts[i] for i in part])
        out = objective.loss(tokens, normaliser)
        pieces = gradient_of(out, tokens).split([rollouts[i].length for i in part])
        for i, piece in zip(part, pieces, strict=True):
            grads[i] = piece
        losses.append(out.loss.detach())
        stats.append(out.stats)
    return Step(torch.stack(losses).sum(), grads, add_stats(stats))


def assert_same(a: Step, b: Step) -> None:
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-6)
    for left, right in zip(a.grads, b.grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)
    for name in a.stats:
        torch.testing.assert_close(a.stats[name], b.stats[name], rtol=1e-5, atol=1e-5)
