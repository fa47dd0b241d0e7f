"""What a call of the policy returned; text is decoded and read when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from async_rl.environments.api import ToolCall
from async_rl.rollout.conversations import Text
from async_rl.rollout.replies import Said, read_reply
from async_rl.rollout.stop_text import before_stop
from async_rl.wire.messages import FinishReason


class NoRoom(ValueError):
    """The prompt is as long as what the engine can hold."""


@dataclass(frozen=True)
class RecordedReply:
    decoder: Text
    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    call: int
    """Its number in the episode."""
    prompt_tokens: int
    opens_thoughts: bool
    """The prompt ended among thoughts."""
    tools: bool
    """There were tools to call."""
    stop: tuple[str, ...]
    """Texts that end a reply, and are no part of it."""

    @property
    def text(self) -> str:
        return self._text

    @property
    def content(self) -> str:
        return self._said.content

    @property
    def reasoning(self) -> str | None:
        return self._said.reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [
            ToolCall(f"call_{self.call}_{number}", called.name, called.arguments)
            for number, called in enumerate(self._said.calls)
        ]

    @property
    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.message for call in self.tool_calls]
        return message

    @cached_property
    def _text(self) -> str:
        return before_stop(self.decoder.decode(self.tokens), self.stop)

    @cached_property
    def _said(self) -> Said:
        return read_reply(self.text, thinks=self.decoder.thinks, opened=self.opens_thoughts, tools=self.tools)
