"""Pure: a MicroBatches message as flat arrays, and the packed tensors of each of its micro-batches.

Axis suffixes of this package:
    N  rollouts of the step, in the order of the message; n of one micro-batch
    S  sequences of the step (a rollout has one or more)
    A  all tokens of the step, sequence after sequence
    R  version spans of the step
    B  rows of the groups that advantages are relative to (learner.baselines)
    T  tokens fed to the model in one micro-batch, packed without padding
    K  trainable tokens of one micro-batch: what the objective calls T
    H  hidden size, V vocabulary

No line here runs once per token; what runs once per sequence is a comprehension over its fields.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_rl.errors import ProtocolError
from async_rl.learner.baselines import BaselineRows, baseline_rows
from async_rl.learner.packed_attention import Block, Family
from async_rl.wire.messages import MicroBatches, TrainRollout

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


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
    tokens_A: npt.NDArray[np.int32]
    behaviour_A: npt.NDArray[np.float32]
    version_A: Ints
    """-1 where the policy did not sample the token: such a token is never trained on."""
    fresh_A: Bools
    """Sampled under `version` itself, with no older KV: engine and learner must agree on its log-prob."""
    start_S: Ints
    """First token of each sequence in A."""
    length_S: Ints
    """Tokens of each sequence, prompt included."""
    fed_S: Ints
    """Tokens of each sequence the model must read: up to the one before the last trainable token; 0 = none."""
    prompt_S: Ints
    """Tokens of each sequence before the first trainable one; 0 = none is trainable."""
    span_rollout_R: Ints
    span_tokens_R: Ints
    span_version_R: Ints

    @property
    def num_rollouts(self) -> int:
        return len(self.rewards_N)

    @property
    def trainable_tokens(self) -> int:
        return int(self.span_tokens_R.sum())


@dataclass(frozen=True, slots=True)
class PackedMicroBatch:
    """One forward and backward pass. Sequences of a family are ordered by length, so that equal ones are one block."""

    input_1T: Tensor
    """[1, T] int64; a prompt that several sequences of a group continue is there once"""
    position_1T: Tensor
    """[1, T] int64, counts from the first token of the sequence"""
    families: tuple[Family, ...]
    """Cover T in order."""
    predictor_K: Tensor
    """[K] int64, the position in T whose hidden state predicts the trainable token; the end of a shared prompt predicts
    the first token of each of its completions"""
    target_K: Tensor
    """[K] int64, the trainable token"""
    behaviour_K: Tensor
    """[K] float32"""
    version_K: Tensor
    """[K] int64, at least 0"""
    fresh_K: Tensor
    """[K] bool, see StepBatch.fresh_A"""
    sample_K: Tensor
    """[K] int64, which of `rollout_n` the token belongs to"""
    rollout_n: Tensor
    """[n] int64, rollouts of the step"""

    def to(self, device: torch.device) -> PackedMicroBatch:
        if device.type == "cpu":
            return self
        moved = {
            name: value.to(device, non_blocking=True)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return PackedMicroBatch(families=self.families, **moved)


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
    sampled_A = _ranges(start_S[sequence_R] + begin_R, end_R - begin_R)
    version_A = np.full(int(length_S.sum()), -1, np.int64)
    version_A[sampled_A] = np.repeat(version_R, end_R - begin_R)
    fresh_A = np.zeros(len(version_A), np.bool_)
    fresh_A[sampled_A] = np.repeat((version_R == message.version) & (kv_version_R == version_R), end_R - begin_R)
    fed_S = np.zeros_like(length_S)
    np.maximum.at(fed_S, sequence_R, end_R - 1)
    prompt_S = np.zeros_like(length_S)
    prompt_S[sequence_R[::-1]] = begin_R[::-1]  # spans are in order: the first one is written last
    return StepBatch(
        step=message.step,
        version=message.version,
        plan=message.plan,
        rewards_N=np.fromiter((rollout.reward for rollout in rollouts), np.float32, len(rollouts)),
        baseline=baseline_rows(rollouts),
        group_N=np.fromiter((rollout.group_id for rollout in rollouts), np.int64, len(rollouts)),
        first_N=np.concatenate([[0], np.cumsum(counts_N)]),
        tokens_A=np.frombuffer(b"".join([s.tokens for s in sequences]), "<i4"),
        behaviour_A=np.frombuffer(b"".join([s.logprobs for s in sequences]), "<f4"),
        version_A=version_A,
        fresh_A=fresh_A,
        start_S=start_S,
        length_S=length_S,
        fed_S=fed_S,
        prompt_S=prompt_S,
        span_rollout_R=rollout_S[sequence_R],
        span_tokens_R=end_R - begin_R,
        span_version_R=version_R,
    )


def pack(step: StepBatch, rollouts: Sequences[int], *, share_prompts: bool = True) -> PackedMicroBatch:
    """The tokens of these rollouts, ready for the model. Rollouts without trainable tokens are allowed.

    share_prompts: equal prompts of one group are fed once.
    """
    rollout_n = np.asarray(rollouts, np.int64)
    counts_n = step.first_N[rollout_n + 1] - step.first_N[rollout_n]
    sequence_s = _ranges(step.first_N[rollout_n], counts_n)
    sample_s = np.repeat(np.arange(len(rollout_n)), counts_n)
    family_s = _families(step, sequence_s, step.group_N[rollout_n][sample_s], share_prompts)
    fed_s = step.fed_S[sequence_s]
    order = np.lexsort((fed_s, family_s))
    order = order[fed_s[order] > 0]
    sequence_s, sample_s, family_s, fed_s = sequence_s[order], sample_s[order], family_s[order], fed_s[order]

    # a family lies in T as its prompt and then what each sequence adds to it; E: tokens as if nothing were shared
    shared_s = np.where(family_s > 0, step.prompt_S[sequence_s], 0)
    leads_s = np.diff(family_s, prepend=-1) != 0
    added_s = fed_s - shared_s
    end_s = np.cumsum(added_s + np.where(leads_s, shared_s, 0))
    prompt_start_s = np.repeat(
        (end_s - added_s - shared_s)[leads_s], np.diff(np.flatnonzero(leads_s), append=len(order))
    )
    offset_E = _ranges(np.zeros_like(fed_s), fed_s)
    within_E = offset_E - np.repeat(shared_s, fed_s)
    place_E = np.where(
        within_E < 0, np.repeat(prompt_start_s, fed_s) + offset_E, np.repeat(end_s - added_s, fed_s) + within_E
    )
    token_E = np.repeat(step.start_S[sequence_s], fed_s) + offset_E

    input_T, position_T = np.empty((2, int(end_s[-1]) if len(end_s) else 0), np.int64)
    input_T[place_E], position_T[place_E] = step.tokens_A[token_E], offset_E
    predictor_E = np.flatnonzero(step.version_A[token_E + 1] >= 0)
    target_K = token_E[predictor_E] + 1
    return PackedMicroBatch(
        input_1T=torch.from_numpy(input_T)[None],
        position_1T=torch.from_numpy(position_T)[None],
        families=_layout(shared_s[leads_s], np.flatnonzero(leads_s), added_s),
        predictor_K=torch.from_numpy(place_E[predictor_E]),
        target_K=torch.from_numpy(step.tokens_A[target_K].astype(np.int64)),
        behaviour_K=torch.from_numpy(step.behaviour_A[target_K]),
        version_K=torch.from_numpy(step.version_A[target_K]),
        fresh_K=torch.from_numpy(step.fresh_A[target_K]),
        sample_K=torch.from_numpy(np.repeat(sample_s, fed_s)[predictor_E]),
        rollout_n=torch.from_numpy(rollout_n),
    )


def _families(step: StepBatch, sequence_s: Ints, group_s: Ints, share_prompts: bool) -> Ints:
    """Equal numbers from 1 for sequences of a group whose prompts are the same tokens; 0 for those who are alone."""
    if not share_prompts:
        return np.zeros_like(sequence_s)
    starts, prompts = step.start_S[sequence_s].tolist(), step.prompt_S[sequence_s].tolist()
    keys = [
        (group, step.tokens_A[start : start + prompt].tobytes())
        for group, start, prompt in zip(group_s.tolist(), starts, prompts, strict=True)
    ]
    counts = Counter(keys)
    numbers = {key: number for number, key in enumerate((key for key in counts if counts[key] > 1 and key[1]), 1)}
    return np.fromiter((numbers.get(key, 0) for key in keys), np.int64, len(keys))


def _layout(prefix_f: Ints, first_f: Ints, added_s: Ints) -> tuple[Family, ...]:
    families: list[Family] = []
    starts = first_f.tolist()
    for prefix, start, end in zip(prefix_f.tolist(), starts, [*starts[1:], len(added_s)][: len(starts)], strict=True):
        added = added_s[start:end]
        lengths, counts = np.unique(added[added > 0], return_counts=True)
        blocks = tuple(Block(int(n), int(length)) for n, length in zip(counts, lengths, strict=True))
        families.append(Family(prefix, blocks))
    return tuple(families)


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """concatenate([arange(s, s + c) for s, c in zip(starts, counts)])."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


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
