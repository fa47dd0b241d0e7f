"""Pure: a reply of the policy in OpenAI's forms, whole or as the pieces of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from async_rl.rollout.openai_requests import Question
from async_rl.rollout.reply import RecordedReply

MODEL = "policy"


@dataclass(frozen=True, slots=True)
class Answer:
    """To one request.

    Args:
        created: Unix time, seconds.
    """

    question: Question
    reply: RecordedReply
    created: int

    def chat(self) -> dict[str, Any]:
        choice = {"index": 0, "message": self._message(), "finish_reason": self._reason(), "logprobs": self._logprobs()}
        return {**self._head("chatcmpl", "chat.completion"), "choices": [choice], "usage": self._usage()}

    def completion(self) -> dict[str, Any]:
        return {**self._head("cmpl", "text_completion"), "choices": [self._text()], "usage": self._usage()}

    def chat_stream(self) -> Iterator[dict[str, Any]]:
        """The reply is there as a whole when it is there: role, reply, end."""
        head = self._head("chatcmpl", "chat.completion.chunk")
        message = self._message()
        for number, call in enumerate(message.get("tool_calls", ())):
            call["index"] = number
        role = {"role": message.pop("role"), "content": ""}
        pieces = [(role, None, None), (message, self._logprobs(), None), ({}, None, self._reason())]
        for delta, logprobs, reason in pieces:
            yield {**head, "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}
        if self.question.usage_in_stream:
            yield {**head, "choices": [], "usage": self._usage()}

    def completion_stream(self) -> Iterator[dict[str, Any]]:
        head = self._head("cmpl", "text_completion")
        yield {**head, "choices": [self._text()]}
        if self.question.usage_in_stream:
            yield {**head, "choices": [], "usage": self._usage()}

    def _head(self, kind: str, form: str) -> dict[str, Any]:
        return {"id": f"{kind}-{self.reply.call}", "object": form, "created": self.created, "model": MODEL}

    def _text(self) -> dict[str, Any]:
        logprobs = None
        if self.question.logprobs:
            tokens = [self.reply.decoder.spell([token]) for token in self.reply.tokens]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": self.reply.logprobs,
                "top_logprobs": None,
                "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
            }
        return {"index": 0, "text": self.reply.text, "finish_reason": self._reason(), "logprobs": logprobs}

    def _message(self) -> dict[str, Any]:
        message = {**self.reply.message, "refusal": None}
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if "tool_calls" in message and not message["content"]:
            message["content"] = None
        return message

    def _reason(self) -> str:
        if self.reply.tool_calls:
            return "tool_calls"
        return "stop" if self.reply.finish_reason in ("eos", "stop") else "length"

    def _logprobs(self) -> dict[str, Any] | None:
        """Of every sampled token, the one that ends the turn included."""
        if not self.question.logprobs:
            return None
        content: list[dict[str, Any]] = []
        for token, logprob in zip(self.reply.tokens, self.reply.logprobs, strict=True):
            spelt = self.reply.decoder.spell([token])
            content.append({"token": spelt, "logprob": logprob, "bytes": list(spelt.encode()), "top_logprobs": []})
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, int]:
        prompt, sampled = self.reply.prompt_tokens, len(self.reply.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}
