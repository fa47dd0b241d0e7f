"""The tokenizer of a real model, as episodes need it. Prompts are cached: the G members of a group ask the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from async_rl.environments.api import Message
from async_rl.models import text

CACHED_PROMPTS = 4096


class TokenizerText:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_tokens: frozenset[int]) -> None:
        self._tokenizer, self.stop_tokens = tokenizer, stop_tokens
        self._chat = lru_cache(CACHED_PROMPTS)(self._encode_chat)
        self.encode = lru_cache(CACHED_PROMPTS)(self._encode)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._chat(tuple(tuple(message.items()) for message in messages))

    def decode(self, tokens: Sequence[int]) -> str:
        return text.decode(self._tokenizer, tokens)

    def _encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(text.encode(self._tokenizer, prompt))

    def _encode_chat(self, messages: tuple[tuple[tuple[str, str], ...], ...]) -> tuple[int, ...]:
        return tuple(text.encode_chat(self._tokenizer, [dict(message) for message in messages]))
