"""Pure: token sequences as the model reads them, packed without padding, equal prompts only once.

What every stage trains on comes through here: rollouts, SFT examples, preference pairs. Axis suffixes:
    S  sequences; s those of one micro-batch
    A  all tokens, sequence after sequence
    T  tokens fed to the model in one micro-batch
    K  trainable tokens of one micro-batch
    E  tokens of one micro-batch as if nothing were shared

No line here runs once per token; what runs once per sequence is a comprehension over its fields.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_rl.learner.families import Block, Family

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Sequences:
    """Tokens, and which of them are trained on."""

    tokens_A: Int32s
    trained_A: Bools
    """The first token of a sequence is never trained on: nothing predicts it."""
    length_S: Ints
    """Tokens of each sequence, prompt included."""
    start_S: Ints
    """First token of each sequence in A."""
    fed_S: Ints
    """Tokens of each sequence the model must read: up to the one before the last trained one; 0 = none is."""
    prompt_S: Ints
    """Tokens of each sequence before the first trained one; 0 = none is trained."""

    @classmethod
    def of(cls, tokens_A: Int32s, trained_A: Bools, length_S: Ints) -> Sequences:
        start_S = np.cumsum(length_S) - length_S
        fed_S, prompt_S = np.zeros((2, len(length_S)), np.int64)
        place_K = np.flatnonzero(trained_A)
        sequence_K = np.searchsorted(start_S, place_K, side="right") - 1
        offset_K = place_K - start_S[sequence_K]
        fed_S[sequence_K] = offset_K  # places ascend: the last one of a sequence is written last
        prompt_S[sequence_K[::-1]] = offset_K[::-1]
        return cls(tokens_A, trained_A, length_S, start_S, fed_S, prompt_S)

    @classmethod
    def ending(cls, tokens_A: Int32s, length_S: Ints, prompt_S: Ints) -> Sequences:
        """Sequences that are read at their last token, as a reward model does: a token that stands for the score
        follows each, and what would predict it is at `PackedTokens.predictor_K`.

        prompt_S: tokens, at most the length, that may be fed once for several sequences (see `families`).
        """
        end_S = np.cumsum(length_S + 1) - 1
        scored_A = np.zeros(int(length_S.sum()) + len(length_S), np.bool_)
        scored_A[end_S] = True
        ended_A = np.zeros(len(scored_A), np.int32)
        ended_A[~scored_A] = tokens_A
        return dataclasses.replace(cls.of(ended_A, scored_A, length_S + 1), prompt_S=prompt_S)


T = TypeVar("T")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, for work that is queued after this. From page-locked memory: the host need not wait
    for what the GPU still has to do."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def move(packed: T, device: torch.device) -> T:
    """A dataclass with its tensors, also those of dataclasses in it, on another device; `packed` itself on the CPU."""
    if device.type == "cpu":
        return packed
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(cast(Any, packed)):
        value = getattr(packed, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = to_device(value, device)
        elif dataclasses.is_dataclass(value):
            moved[field.name] = move(value, device)
    return dataclasses.replace(cast(Any, packed), **moved)


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """What the model needs for one forward pass."""

    input_1T: Tensor
    """[1, T] int64; a prompt that several sequences of a family continue is there once"""
    position_1T: Tensor
    """[1, T] int64, counts from the first token of the sequence"""
    families: tuple[Family, ...]
    """Cover T in order. Sequences of a family are ordered by length, so that equal ones are one block."""
    predictor_K: Tensor
    """[K] int64, the position in T whose hidden state predicts the trained token; the end of a shared prompt predicts
    the first token of each of its completions"""
    target_K: Tensor
    """[K] int64, the trained token"""


@dataclass(frozen=True, slots=True)
class Packed:
    tokens: PackedTokens
    token_K: Ints
    """Which token of A each trained token is."""
    place_K: Ints
    """Which of the chosen sequences it belongs to."""


def pack_sequences(sequences: Sequences, chosen_s: Ints, family_s: Ints) -> Packed:
    """These sequences, ready for the model; those without trained tokens are left out.

    family_s: equal numbers from 1 for sequences whose prompts are the same tokens and shall be fed once; 0 for those
    that are alone (`families` finds them).
    """
    fed_s = sequences.fed_S[chosen_s]
    order = np.lexsort((fed_s, family_s))
    order = order[fed_s[order] > 0]
    sequence_s, family_s, fed_s = chosen_s[order], family_s[order], fed_s[order]

    # a family lies in T as its prompt and then what each sequence adds to it
    shared_s = np.where(family_s > 0, sequences.prompt_S[sequence_s], 0)
    leads_s = np.diff(family_s, prepend=-1) != 0
    added_s = fed_s - shared_s
    end_s = np.cumsum(added_s + np.where(leads_s, shared_s, 0))
    prompt_start_s = np.repeat(
        (end_s - added_s - shared_s)[leads_s], np.diff(np.flatnonzero(leads_s), append=len(order))
    )
    offset_E = ranges(np.zeros_like(fed_s), fed_s)
    within_E = offset_E - np.repeat(shared_s, fed_s)
    place_E = np.where(
        within_E < 0, np.repeat(prompt_start_s, fed_s) + offset_E, np.repeat(end_s - added_s, fed_s) + within_E
    )
    token_E = np.repeat(sequences.start_S[sequence_s], fed_s) + offset_E

    input_T, position_T = np.empty((2, int(end_s[-1]) if len(end_s) else 0), np.int64)
    input_T[place_E], position_T[place_E] = sequences.tokens_A[token_E], offset_E
    predictor_E = np.flatnonzero(sequences.trained_A[token_E + 1])
    token_K = token_E[predictor_E] + 1
    tokens = PackedTokens(
        input_1T=torch.from_numpy(input_T)[None],
        position_1T=torch.from_numpy(position_T)[None],
        families=_layout(shared_s[leads_s], np.flatnonzero(leads_s), added_s),
        predictor_K=torch.from_numpy(place_E[predictor_E]),
        target_K=torch.from_numpy(sequences.tokens_A[token_K].astype(np.int64)),
    )
    return Packed(tokens, token_K, np.repeat(order, fed_s)[predictor_E])


def families(sequences: Sequences, chosen_s: Ints, group_s: Ints) -> Ints:
    """Equal numbers from 1 for sequences of one group whose prompts are the same tokens; 0 for those who are alone."""
    starts, prompts = sequences.start_S[chosen_s].tolist(), sequences.prompt_S[chosen_s].tolist()
    keys = [
        (group, sequences.tokens_A[start : start + prompt].tobytes())
        for group, start, prompt in zip(group_s.tolist(), starts, prompts, strict=True)
    ]
    counts = Counter(keys)
    numbers = {key: number for number, key in enumerate((key for key in counts if counts[key] > 1 and key[1]), 1)}
    return np.fromiter((numbers.get(key, 0) for key in keys), np.int64, len(keys))


def ranges(starts: Ints, counts: Ints) -> Ints:
    """concatenate([arange(s, s + c) for s, c in zip(starts, counts)])."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def _layout(prefix_f: Ints, first_f: Ints, added_s: Ints) -> tuple[Family, ...]:
    found: list[Family] = []
    starts = first_f.tolist()
    for prefix, start, end in zip(prefix_f.tolist(), starts, [*starts[1:], len(added_s)][: len(starts)], strict=True):
        added = added_s[start:end]
        lengths, counts = np.unique(added[added > 0], return_counts=True)
        blocks = tuple(Block(int(n), int(length)) for n, length in zip(counts, lengths, strict=True))
        found.append(Family(prefix, blocks))
    return tuple(found)
