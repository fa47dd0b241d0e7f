"""The tokenizer of a real model, as episodes need it. Prompts are cached: the G members of a group ask the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from async_rl.environments.api import Message, Tool
from async_rl.models import text
from async_rl.rollout.replies import END_OF_THINKING

CACHED_PROMPTS = 4096


class TokenizerText:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_tokens: frozenset[int]) -> None:
        self._tokenizer, self.stop_tokens = tokenizer, stop_tokens
        self.thinks = END_OF_THINKING in text.template_source(tokenizer)
        self.encode = lru_cache(CACHED_PROMPTS)(self._encode)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        return text.render_chat(self._tokenizer, messages, tools)

    def decode(self, tokens: Sequence[int]) -> str:
        return text.decode(self._tokenizer, tokens)

    def spell(self, tokens: Sequence[int]) -> str:
        return text.spell(self._tokenizer, tokens)

    def _encode(self, prompt: str) -> tuple[int, ...]:
        return tuple(text.encode(self._tokenizer, prompt))
