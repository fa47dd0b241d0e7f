"""The rows of a data file as token sequences, ready to be packed.

Axis suffixes, besides those of learner.packing:
    N  rows
    S  sequences: a row has one (SFT) or more (both answers of a pair), next to each other
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from async_rl.errors import UserError
from async_rl.json_lines import Row
from async_rl.learner.packing import Ints, PackedTokens, Sequences, families, pack_sequences, ranges
from async_rl.stages.templates import Tokens

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Examples:
    """What a stage trains or evaluates on."""

    sequences: Sequences
    first_N: Ints
    """[N + 1] the sequences of row i are first_N[i] to first_N[i + 1]."""
    trained_S: Ints
    """Trained tokens of each sequence."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[Tokens]], *, scored: bool = False) -> Examples:
        """scored: each sequence is read at its last token, which counts as one trained token more, and its prompt is
        what comes before its response (learner.packing.Sequences.ending)."""
        flat = [one for row in rows for one in row]
        length_S = np.fromiter((len(one.tokens) for one in flat), np.int64, len(flat))
        tokens_A = np.fromiter((token for one in flat for token in one.tokens), np.int32, int(length_S.sum()))
        trained_A = np.fromiter((flag for one in flat for flag in one.trained), np.bool_, int(length_S.sum()))
        counts_N = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        sequences = Sequences.of(tokens_A, trained_A, length_S)
        if scored:
            sequences = Sequences.ending(tokens_A, length_S, sequences.prompt_S)
        return cls(
            sequences,
            np.concatenate([[0], np.cumsum(counts_N)]).astype(np.int64),
            np.fromiter((1 if scored else sum(one.trained) for one in flat), np.int64, len(flat)),
        )

    def __len__(self) -> int:
        return len(self.first_N) - 1

    def tokens_of(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each of these rows, all its sequences together, as if nothing were shared: what a plan counts."""
        row_n = np.asarray(rows, np.int64)
        first_n, last_n = self.first_N[row_n], self.first_N[row_n + 1] - 1
        starts, lengths = self.sequences.start_S, self.sequences.length_S
        return (starts[last_n] + lengths[last_n] - starts[first_n]).tolist()

    def sequences_of(self, rows: Sequence[int]) -> Ints:
        """[s] of these rows, in their order."""
        row_n = np.asarray(rows, np.int64)
        return ranges(self.first_N[row_n], self.first_N[row_n + 1] - self.first_N[row_n])


@dataclass(frozen=True, slots=True)
class PackedRows:
    """One micro-batch."""

    tokens: PackedTokens
    sequence_K: Tensor
    """[K] int64, which of `chosen_s` each trained token belongs to"""
    chosen_s: Tensor
    """[s] int64, sequences of the examples; those of a row are neighbours"""
    row_s: Tensor
    """[s] int64, which of the given rows each belongs to"""


def pack_rows(examples: Examples, rows: Sequence[int]) -> PackedRows:
    """The sequences of these rows for one forward pass; equal prompts of a row are fed once."""
    chosen_s = examples.sequences_of(rows)
    row_n = np.asarray(rows, np.int64)
    row_s = np.repeat(np.arange(len(row_n)), examples.first_N[row_n + 1] - examples.first_N[row_n])
    family_s = families(examples.sequences, chosen_s, row_s)
    packed = pack_sequences(examples.sequences, chosen_s, family_s)
    return PackedRows(
        packed.tokens,
        torch.from_numpy(packed.place_K),
        torch.from_numpy(chosen_s),
        torch.from_numpy(row_s),
    )


def tokenise(
    rows: Sequence[Row[R]],
    encode: Callable[[R], list[Tokens]],
    *,
    max_tokens: int,
    cap: int,
    too_long: Literal["error", "drop"],
    ends: int = 0,
) -> tuple[list[Row[R]], list[list[Tokens]], int]:
    """The rows that are kept, their sequences, and how many were dropped because they are too long.

    max_tokens: of one sequence. cap: of all sequences of a row, which train in one micro-batch. ends: tokens that each
    sequence takes there besides its own.

    Raises:
        UserError: a row cannot be encoded, or is too long and `too_long` is error; it is named by file and line.
    """
    kept, sequences = list[Row[R]](), list[list[Tokens]]()
    for row in rows:
        try:
            encoded = encode(row.value)
        except UserError as error:
            raise UserError(f"{row}: {error}") from None
        excess = _excess([len(one.tokens) for one in encoded], max_tokens, cap, ends)
        if excess is None:
            kept.append(row)
            sequences.append(encoded)
        elif too_long == "error":
            raise UserError(f"{row}: {excess}, or stage.too_long = 'drop'")
    if not kept:
        raise UserError(f"{rows[0].file}: every row is too long; write a larger stage.max_tokens")
    return kept, sequences, len(rows) - len(kept)


def _excess(lengths: list[int], max_tokens: int, cap: int, ends: int) -> str | None:
    total = sum(lengths) + ends * len(lengths)
    if max(lengths) > max_tokens:
        return f"{max(lengths)} tokens, and a sequence has at most {max_tokens}; raise stage.max_tokens, shorten it"
    if total > cap:
        return f"{total} tokens do not fit into learner.microbatch_tokens = {cap}; write at least {total}"
    return None
