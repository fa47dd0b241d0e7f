"""The learner's side of the numerics check: what it computes for tokens that an engine sampled.

K sampled tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from async_rl.algorithms.mismatch import mismatch
from async_rl.batching.plan import plan
from async_rl.config import Run
from async_rl.doctor.diagnosis import Draws, Gap
from async_rl.learner.batch import flatten, pack
from async_rl.learner.checkpoint import no_progress_bars
from async_rl.learner.distributed import choose_device
from async_rl.learner.logprobs import token_logprobs
from async_rl.learner.packing import move
from async_rl.learner.policy import PackedPolicy
from async_rl.models.loading import build_model
from async_rl.stages.episodes import Group
from async_rl.wire.messages import MicroBatches, TrainRollout, VersionSpan
from async_rl.wire.messages import Sequence as WireSequence

BAND = (0.8, 1.25)
TEMPERATURES = (0.25, 4.0)
FIT_TOKENS = 512
"""A temperature is fitted to so many tokens, evenly chosen, and then tried on all."""
FIT_STEPS = 30
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
CHUNK_ELEMENTS = 1 << 23
"""Probabilities held at a time."""
SLACK = 3.0
"""One token may differ by so many times the tolerance of the mean."""
FIRST, LATER = 0, 1


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Sampled tokens with the learner's hidden states, from which log-probs at any temperature follow."""

    hidden_KH: Tensor
    weight_VH: Tensor
    target_K: Tensor
    engine_K: Tensor
    """The engine's log-probs."""
    first_K: Tensor
    """Sampled right after tokens that the policy did not sample: computed by a prefill."""
    low: torch.dtype | None

    def logprobs(self, temperature: float) -> Tensor:
        return token_logprobs(
            self.hidden_KH, self.weight_VH, self.target_K, temperature=temperature, dtype=self.low
        ).logp_K

    def gap(self, logp_K: Tensor, mask_K: Tensor | None = None) -> Gap:
        """Over the tokens of the mask."""
        chosen_K = torch.ones_like(self.first_K) if mask_K is None else mask_K
        tokens = int(chosen_K.sum())
        if tokens == 0:
            return Gap(0, 0.0, 0.0, 0.0, 0.0)
        whole = mismatch(logp_K, self.engine_K, chosen_K)
        difference_K = (logp_K - self.engine_K)[chosen_K]
        low, high = (math.log(bound) for bound in BAND)
        return Gap(
            tokens=tokens,
            mean=float(whole.abs_difference),
            max=float(difference_K.abs().max()),
            k3=float(whole.k3),
            outside=float(((difference_K < low) | (difference_K > high)).double().mean()),
        )

    def closest_temperature(self) -> float:
        """At which log-probs differ least from the engine's."""
        some = self._some()
        found = _minimum(lambda t: float((some.logprobs(t) - some.engine_K).abs().mean()))
        near = [found, round(found, 2)]
        return min(near, key=lambda t: float((some.logprobs(t) - some.engine_K).abs().mean()))

    def likeliest_temperature(self) -> float:
        """Under which these tokens are most likely, whatever log-probs the engine gave them."""
        some = self._some()
        return _minimum(lambda t: -float(some.logprobs(t).mean()))

    def places(self, temperature: float) -> tuple[Tensor, Tensor]:
        """[K] float64, where each token lies in its distribution, likeliest first, at random within its own share: if
        it was drawn from it, that is uniform on [0, 1] and independent (the probability integral transform). And [K]
        the mass of the likelier tokens, without chance."""
        uniforms_K = torch.from_numpy(np.random.default_rng(0).random(len(self.target_K))).to(self.target_K.device)
        places: list[Tensor] = []
        above: list[Tensor] = []
        for p, rows in self._distributions(temperature):
            own = p.gather(1, self.target_K[rows, None])
            likelier, tied = (p.where(where, 0.0).sum(-1, dtype=torch.float64) for where in (p > own, p == own))
            places.append(likelier + uniforms_K[rows] * tied)
            above.append(likelier)
        return torch.cat(places), torch.cat(above)

    def draws(self, temperature: float) -> Draws:
        places_K, above_K = self.places(temperature)
        places_K, highest = places_K.sort().values, above_K.max()
        n = len(places_K)
        steps = torch.arange(n + 1, dtype=torch.float64, device=places_K.device) / n
        distance = torch.maximum(steps[1:] - places_K, places_K - steps[:-1]).max()
        expected = sum(float(_beyond(p, highest).sum()) for p, _ in self._distributions(temperature))
        return Draws(temperature, float(distance) * math.sqrt(n), math.exp(-expected))

    def renormalised(self, logp_K: Tensor, temperature: float, tolerance: float) -> float:
        """Share of tokens that lie within the likeliest ones of mass p_learner / p_engine: all of them do if the engine
        cuts the distribution off there and renormalises."""
        mass_K = (logp_K - self.engine_K).double()
        fits_K = (mass_K <= SLACK * tolerance) & (self.places(temperature)[0] <= (mass_K + SLACK * tolerance).exp())
        return float(fits_K.double().mean())

    def _distributions(self, temperature: float) -> Iterator[tuple[Tensor, slice]]:
        """Probabilities of the whole vocabulary, float32, for some tokens after the other."""
        dtype = self.low or self.hidden_KH.dtype
        hidden_KH, weight = self.hidden_KH.to(dtype), self.weight_VH.to(dtype)
        count = max(1, CHUNK_ELEMENTS // len(weight))
        for start in range(0, len(hidden_KH), count):
            rows = slice(start, start + count)
            yield ((hidden_KH[rows] @ weight.t()).float() / temperature).softmax(-1), rows

    def _some(self) -> Recomputed:
        step = max(1, len(self.target_K) // FIT_TOKENS)
        tensors = (self.target_K[::step], self.engine_K[::step], self.first_K[::step])
        return Recomputed(self.hidden_KH[::step], self.weight_VH, *tensors, self.low)


class Recomputation:
    """The model of the recipe as the learner runs it."""

    def __init__(self, run: Run) -> None:
        """Raises UserError where model or device are wrong."""
        self._run = run
        self._device = choose_device(run.learner.device)
        with no_progress_bars():
            self.model = build_model(run.model, seed=run.seed, dtype=torch.float32)
        self.model.to(self._device)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def __call__(self, groups: Sequence[Group], dtype: str) -> Recomputed:
        """Packed as for training, computed in `dtype`.

        Raises:
            UserError: a rollout does not fit into a micro-batch.
        """
        rollouts = [
            TrainRollout(group.lease.group_id, result.member, 0.0, [_marked(one) for one in result.sequences])
            for group in groups
            for result in group.results
        ]
        lengths = [sum(len(sequence.tokens) // 4 for sequence in rollout.sequences) for rollout in rollouts]
        of_group = [rollout.group_id for rollout in rollouts]
        planned = plan(lengths, ranks=1, cap=self._run.learner.microbatch_tokens, groups=of_group)
        step = flatten(MicroBatches(LATER, LATER, rollouts, planned))
        low = torch.bfloat16 if dtype == "bfloat16" else None
        parts = [move(pack(step, chosen), self._device) for chosen in planned[0] if chosen]
        policy = PackedPolicy(self.model, dtype=dtype)
        return Recomputed(
            hidden_KH=torch.cat([policy.hidden(part.tokens) for part in parts]),
            weight_VH=cast(nn.Linear, self.model.get_output_embeddings()).weight.detach(),
            target_K=torch.cat([part.tokens.target_K for part in parts]),
            engine_K=torch.cat([part.behaviour_K for part in parts]),
            first_K=torch.cat([part.version_K == FIRST for part in parts]),
            low=low,
        )

    @contextmanager
    def scaled(self, name: str, factor: float) -> Generator[None]:
        """One parameter multiplied, for as long as the context lasts."""
        parameter = self.model.get_parameter(name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(factor)
        try:
            yield
        finally:
            with torch.no_grad():
                parameter.copy_(kept)


def _marked(sequence: WireSequence) -> WireSequence:
    """With versions that tell the first tokens after a prompt from later ones: packing carries them along."""
    spans: list[VersionSpan] = []
    end = -1
    for span in sequence.spans:
        start = span.start
        if start != end:
            spans.append(VersionSpan(start, start + 1, FIRST, FIRST))
            start += 1
        if start < span.end:
            spans.append(VersionSpan(start, span.end, LATER, LATER))
        end = span.end
    return WireSequence(sequence.tokens, sequence.logprobs, spans)


def _beyond(p_NV: Tensor, mass: Tensor) -> Tensor:
    """[N] how probable tokens are that have more than this mass of likelier ones."""
    # numpy sorts 16 times as fast as torch on a CPU
    sorted_NV = torch.from_numpy(np.sort(p_NV.cpu().numpy())).flip(-1).to(p_NV.device)
    above_NV = sorted_NV.cumsum(-1, dtype=torch.float64) - sorted_NV
    last_N1 = (above_NV <= mass).sum(-1, keepdim=True) - 1
    return p_NV.where(p_NV < sorted_NV.gather(1, last_N1), 0.0).sum(-1, dtype=torch.float64)


def _minimum(of: Callable[[float], float]) -> float:
    """Temperature with the smallest value, by golden section on its logarithm."""
    low, high = (math.log(bound) for bound in TEMPERATURES)
    inner = [high - GOLDEN_RATIO * (high - low), low + GOLDEN_RATIO * (high - low)]
    values = [of(math.exp(point)) for point in inner]
    for _ in range(FIT_STEPS):
        if values[0] < values[1]:
            high = inner[1]
            inner = [high - GOLDEN_RATIO * (high - low), inner[0]]
            values = [of(math.exp(inner[0])), values[0]]
        else:
            low = inner[0]
            inner = [inner[1], low + GOLDEN_RATIO * (high - low)]
            values = [values[1], of(math.exp(inner[1]))]
    return math.exp((low + high) / 2)
