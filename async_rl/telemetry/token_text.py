"""Token ids as text in a process without torch: by `tokenizers` alone, and cut where the policy's version changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from async_rl.config import Model
from async_rl.errors import UserError
from async_rl.models.vocabulary import tiny_tokens
from async_rl.wire import messages

HEAD, TAIL = 320, 120
"""Tokens shown of a sequence that is longer than both together."""
NOT_SAMPLED = -1

Decode: TypeAlias = Callable[[Sequence[int]], str]


class Piece(NamedTuple):
    version: int
    """That sampled it; NOT_SAMPLED: prompt, tools."""
    text: str


def load_decoder(model: Model) -> Decode:
    """Special tokens stay visible. May take a second for a large vocabulary.

    Raises:
        UserError: the model has no tokenizer.json, or it cannot be read.
    """
    if model.tiny is not None:
        tokens = tiny_tokens(model.tiny)
        return lambda ids: "".join(tokens[one] for one in ids)
    from tokenizers import Tokenizer  # a fifth of a second: only where there is text to read

    path = Path(model.path) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"{path}: cannot be read ({error}): rollouts are not shown as text") from None
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def cut(decode: Decode, tokens: Sequence[int], starts: Sequence[int]) -> list[str]:
    """What `tokens` say before starts[0], from each start to the next, and after the last. A character whose tokens lie
    on both sides belongs to the second: it is complete only there.

    >>> cut(lambda ids: bytes(ids).decode(errors="replace"), [97, 0xC3, 0xA4, 98], [2, 3])
    ['a', 'ä', 'b']
    """
    text = decode(tokens)
    ends = [len(decode(tokens[:start]).rstrip("\ufffd")) for start in starts]  # half a character is U+FFFD
    return [text[begin:end] for begin, end in itertools.pairwise([0, *ends, len(text)])]


def pieces(sequence: messages.Sequence, decode: Decode) -> list[Piece]:
    """The text of a sequence by who wrote it; the middle of a long one is left out."""
    tokens: list[int] = np.frombuffer(sequence.tokens, "<i4").tolist()
    version_L = np.full(len(tokens), NOT_SAMPLED)
    for span in sequence.spans:
        version_L[span.start : span.end] = span.version
    left_out = len(tokens) - HEAD - TAIL
    if left_out <= 0:
        return _pieces(tokens, version_L.tolist(), decode)
    head = _pieces(tokens[:HEAD], version_L[:HEAD].tolist(), decode)
    tail = _pieces(tokens[-TAIL:], version_L[-TAIL:].tolist(), decode)
    return [*head, Piece(NOT_SAMPLED, f"\n[... {left_out:,} tokens ...]\n"), *tail]


def _pieces(tokens: Sequence[int], versions: Sequence[int], decode: Decode) -> list[Piece]:
    starts = [i for i in range(1, len(versions)) if versions[i] != versions[i - 1]]
    texts = cut(decode, tokens, starts)
    return [Piece(versions[start], text) for start, text in zip((0, *starts), texts, strict=True) if text]
