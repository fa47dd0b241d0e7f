"""Pure: the tokens of a tiny model, one per character, also for those who have no transformers at hand."""

from __future__ import annotations

from async_rl.config import TinyModel

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL = (PAD, BOS, EOS)
"""Ids 0, 1, 2; the characters follow in the order of `TinyModel.characters`."""


def tiny_tokens(tiny: TinyModel) -> tuple[str, ...]:
    """By id."""
    return (*SPECIAL, *tiny.characters)
