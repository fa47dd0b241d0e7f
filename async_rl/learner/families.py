"""Pure: how packed sequences lie, common prompts only once.

A family is one prompt and the completions that continue it: the prompt's tokens, then each completion's. Sequences
without a common prompt are a family of prefix 0. Completions of equal length are one block.
"""

from __future__ import annotations

from typing import NamedTuple


class Block(NamedTuple):
    """`sequences` consecutive sequences of `length` tokens each."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class Family(NamedTuple):
    """`prefix` tokens that all sequences of the blocks continue, then the blocks."""

    prefix: int
    blocks: tuple[Block, ...]

    @property
    def tokens(self) -> int:
        return self.prefix + sum(block.tokens for block in self.blocks)

    @property
    def longest(self) -> int:
        return self.prefix + max((block.length for block in self.blocks), default=0)
