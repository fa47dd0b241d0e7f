"""Pure: a MicroBatches message as flat arrays, and the packed tensors of each of its micro-batches.

Axis suffixes of this package, besides those of learner.packing:
    N  rollouts of the step, in the order of the message; n of one micro-batch
    S  sequences of the step (a rollout has one or more)
    R  version spans of the step
    B  rows of the groups that advantages are relative to (learner.baselines)
    K  trainable tokens of one micro-batch: what the objective calls T
    H  hidden size, V vocabulary

No line here runs once per token; what runs once per sequence is a comprehension over its fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_rl.errors import ProtocolError
from async_rl.learner.baselines import BaselineRows, baseline_rows
from async_rl.learner.packing import Bools, Ints, PackedTokens, Sequences, families, pack_sequences, ranges
from async_rl.wire.messages import MicroBatches, TrainRollout


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Everything one optimiser step trains on, identical on every rank."""

    step: int
    version: int
    """v_train: lag of a token = version - its version."""
    plan: list[list[list[int]]]
    """[ranks][micro-batches] -> indices of rollouts."""
    rewards_N: npt.NDArray[np.float32]
    """NaN = missing."""
    baseline: BaselineRows
    """What the rewards are compared with."""
    group_N: Ints
    first_N: Ints
    """[N + 1] the sequences of rollout i are first_N[i] to first_N[i + 1]."""
    sequences: Sequences
    """A token is trained on if it has a version."""
    behaviour_A: npt.NDArray[np.float32]
    version_A: Ints
    """-1 where the policy did not sample the token: such a token is never trained on."""
    unmixed_A: Bools
    """Sampled with no keys and values older than its version: under the weights of its version the learner must come
    to the same log-prob as the engine."""
    span_rollout_R: Ints
    span_tokens_R: Ints
    span_version_R: Ints
    span_unmixed_R: Bools

    @property
    def num_rollouts(self) -> int:
        return len(self.rewards_N)

    @property
    def trainable_tokens(self) -> int:
        return int(self.span_tokens_R.sum())


@dataclass(frozen=True, slots=True)
class PackedMicroBatch:
    """One forward and backward pass."""

    tokens: PackedTokens
    token_K: Tensor
    """[K] int64, which of axis A each trained token is"""
    behaviour_K: Tensor
    """[K] float32"""
    version_K: Tensor
    """[K] int64, at least 0"""
    unmixed_K: Tensor
    """[K] bool, see StepBatch.unmixed_A"""
    sample_K: Tensor
    """[K] int64, which of `rollout_n` the token belongs to"""
    rollout_n: Tensor
    """[n] int64, rollouts of the step"""


def flatten(message: MicroBatches, ranks: int = 1) -> StepBatch:
    """The message as arrays.

    Raises:
        ProtocolError: a sequence, a span or the plan contradicts the wire contract; names the rollout.
    """
    rollouts = message.rollouts
    sequences = [sequence for rollout in rollouts for sequence in rollout.sequences]
    counts_N = np.fromiter((len(rollout.sequences) for rollout in rollouts), np.int64, len(rollouts))
    rollout_S = np.repeat(np.arange(len(rollouts)), counts_N)
    bytes_S = np.fromiter((len(s.tokens) for s in sequences), np.int64, len(sequences))
    logprob_bytes_S = np.fromiter((len(s.logprobs) for s in sequences), np.int64, len(sequences))
    _refuse(rollouts, rollout_S, (bytes_S % 4 != 0) | (bytes_S != logprob_bytes_S), "unequal tokens and logprobs")
    length_S = bytes_S // 4
    spans_R5 = np.array(
        [(i, p.start, p.end, p.version, p.kv_version) for i, s in enumerate(sequences) for p in s.spans], np.int64
    ).reshape(-1, 5)
    sequence_R, begin_R, end_R, version_R, kv_version_R = spans_R5.T
    _check_spans(message, rollout_S, length_S, spans_R5)
    _check_baselines(rollouts)
    _check_plan(message, ranks)

    start_S = np.cumsum(length_S) - length_S
    sampled_A = ranges(start_S[sequence_R] + begin_R, end_R - begin_R)
    version_A = np.full(int(length_S.sum()), -1, np.int64)
    version_A[sampled_A] = np.repeat(version_R, end_R - begin_R)
    unmixed_A = np.zeros(len(version_A), np.bool_)
    unmixed_A[sampled_A] = np.repeat(kv_version_R == version_R, end_R - begin_R)
    tokens_A = np.frombuffer(b"".join([s.tokens for s in sequences]), "<i4")
    return StepBatch(
        step=message.step,
        version=message.version,
        plan=message.plan,
        rewards_N=np.fromiter((rollout.reward for rollout in rollouts), np.float32, len(rollouts)),
        baseline=baseline_rows(rollouts),
        group_N=np.fromiter((rollout.group_id for rollout in rollouts), np.int64, len(rollouts)),
        first_N=np.concatenate([[0], np.cumsum(counts_N)]),
        sequences=Sequences.of(tokens_A, version_A >= 0, length_S),
        behaviour_A=np.frombuffer(b"".join([s.logprobs for s in sequences]), "<f4"),
        version_A=version_A,
        unmixed_A=unmixed_A,
        span_rollout_R=rollout_S[sequence_R],
        span_tokens_R=end_R - begin_R,
        span_version_R=version_R,
        span_unmixed_R=kv_version_R == version_R,
    )


def pack(step: StepBatch, rollouts: Sequence[int], *, share_prompts: bool = True) -> PackedMicroBatch:
    """The tokens of these rollouts, ready for the model. Rollouts without trainable tokens are allowed.

    share_prompts: equal prompts of one group are fed once.
    """
    rollout_n = np.asarray(rollouts, np.int64)
    counts_n = step.first_N[rollout_n + 1] - step.first_N[rollout_n]
    sequence_s = ranges(step.first_N[rollout_n], counts_n)
    sample_s = np.repeat(np.arange(len(rollout_n)), counts_n)
    group_s = step.group_N[rollout_n][sample_s]
    family_s = families(step.sequences, sequence_s, group_s) if share_prompts else np.zeros_like(sequence_s)
    packed = pack_sequences(step.sequences, sequence_s, family_s)
    return PackedMicroBatch(
        tokens=packed.tokens,
        token_K=torch.from_numpy(packed.token_K),
        behaviour_K=torch.from_numpy(step.behaviour_A[packed.token_K]),
        version_K=torch.from_numpy(step.version_A[packed.token_K]),
        unmixed_K=torch.from_numpy(step.unmixed_A[packed.token_K]),
        sample_K=torch.from_numpy(sample_s[packed.place_K]),
        rollout_n=torch.from_numpy(rollout_n),
    )


def _refuse(rollouts: list[TrainRollout], rollout_X: Ints, bad_X: Bools, why: str) -> None:
    if bad_X.any():
        rollout = rollouts[rollout_X[int(np.argmax(bad_X))]]
        raise ProtocolError(f"rollout {rollout.member} of group {rollout.group_id}: {why}")


def _check_spans(message: MicroBatches, rollout_S: Ints, length_S: Ints, spans_R5: Ints) -> None:
    sequence_R, begin_R, end_R, version_R, _ = spans_R5.T
    rollout_R = rollout_S[sequence_R]
    outside_R = (begin_R < 1) | (end_R <= begin_R) | (end_R > length_S[sequence_R])
    _refuse(message.rollouts, rollout_R, outside_R, "a span is empty or not within tokens [1, L)")
    overlaps_R = np.zeros(len(spans_R5), np.bool_)
    overlaps_R[1:] = (sequence_R[1:] == sequence_R[:-1]) & (begin_R[1:] < end_R[:-1])
    _refuse(message.rollouts, rollout_R, overlaps_R, "spans overlap or are out of order")
    future_R = (version_R < 0) | (version_R > message.version)
    _refuse(message.rollouts, rollout_R, future_R, f"a span has a version outside [0, {message.version}]")


def _check_baselines(rollouts: list[TrainRollout]) -> None:
    own_N = np.array([rollout.baseline.get(rollout.member, rollout.reward) for rollout in rollouts])
    reward_N = np.array([rollout.reward for rollout in rollouts])
    other_N = (own_N != reward_N) & ~(np.isnan(own_N) & np.isnan(reward_N))
    _refuse(rollouts, np.arange(len(rollouts)), other_N, "its baseline holds another reward of its own")
    identities = {(rollout.group_id, rollout.member) for rollout in rollouts}
    if len(identities) < len(rollouts):
        raise ProtocolError("a rollout is in the batch twice")


def _check_plan(message: MicroBatches, ranks: int) -> None:
    if len(message.plan) != ranks:
        raise ProtocolError(f"the plan of step {message.step} is for {len(message.plan)} ranks, there are {ranks}")
    if len({len(microbatches) for microbatches in message.plan}) > 1:
        raise ProtocolError(f"the plan of step {message.step} gives ranks unequal numbers of micro-batches")
    planned = sorted(index for microbatches in message.plan for microbatch in microbatches for index in microbatch)
    if planned != list(range(len(message.rollouts))):
        raise ProtocolError(f"the plan of step {message.step} does not contain every rollout exactly once")
