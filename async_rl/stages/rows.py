"""Pure: the rows that stages train on, each read and checked by a function of its own (json_lines.read)."""

from __future__ import annotations

from typing import Any

import msgspec

from async_rl.json_lines import Message, Prompt, Wrong, check_prompt, convert, filled, short


class PromptResponse(msgspec.Struct, frozen=True):
    """SFT, distillation, reference answers of a reward model."""

    prompt: Prompt
    response: str


class Conversation(msgspec.Struct, frozen=True):
    """SFT."""

    messages: list[Message]


class Text(msgspec.Struct, frozen=True):
    """SFT on plain text: every token of it is trained on."""

    text: str


class Pair(msgspec.Struct, frozen=True):
    """Preference, reward model."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    """Reward model only: by how much the scores should differ."""


class Ranked(msgspec.Struct, frozen=True):
    """Reward model: K answers of one prompt."""

    prompt: Prompt
    responses: list[str]
    ranking: list[int]
    """Numbers of the responses, from 0, best first."""


class OnlyPrompt(msgspec.Struct, frozen=True):
    """Distillation, where the responses are sampled."""

    prompt: Prompt


SFTRow = PromptResponse | Conversation | Text
RewardRow = Pair | Ranked


def sft_row(row: dict[str, Any]) -> SFTRow:
    """{"prompt", "response"}, {"messages"} or {"text"}."""
    if "messages" in row:
        conversation = convert(row, Conversation)
        roles = [message.role for message in conversation.messages]
        if "assistant" not in roles:
            raise Wrong(f"messages = {short(roles)}: none is of the assistant; there is nothing to train on")
        if roles[-1] != "assistant":
            raise Wrong(f"messages = {short(roles)}: the last one is of the {roles[-1]}; write the reply after it")
        return conversation
    if "text" in row:
        text = convert(row, Text)
        filled("text", text.text)
        return text
    if "prompt" not in row and "response" not in row:
        known = short(sorted(row))
        raise Wrong(f"fields = {known}: write prompt and response, or messages, or text")
    return prompt_response_row(row)


def prompt_response_row(row: dict[str, Any]) -> PromptResponse:
    """{"prompt", "response"}"""
    found = convert(row, PromptResponse)
    check_prompt(found.prompt)
    filled("response", found.response)
    return found


def preference_row(row: dict[str, Any]) -> Pair:
    """{"prompt", "chosen", "rejected"}"""
    pair = convert(row, Pair)
    check_prompt(pair.prompt)
    filled("chosen", pair.chosen)
    filled("rejected", pair.rejected)
    if pair.chosen == pair.rejected:
        raise Wrong(f"rejected = {short(pair.rejected)}: it equals chosen; leave the row out")
    if pair.margin < 0:
        raise Wrong(f"margin = {pair.margin}: write 0 or more, or exchange chosen and rejected")
    return pair


def reward_row(row: dict[str, Any]) -> RewardRow:
    """A pair, or {"prompt", "responses", "ranking"}"""
    if "responses" not in row:
        return preference_row(row)
    ranked = convert(row, Ranked)
    check_prompt(ranked.prompt)
    count = len(ranked.responses)
    if count < 2:
        raise Wrong(f"responses = {short(ranked.responses)}: write at least two")
    for number, response in enumerate(ranked.responses):
        filled(f"responses[{number}]", response)
    if sorted(ranked.ranking) != list(range(count)):
        raise Wrong(f"ranking = {ranked.ranking}: write each number from 0 to {count - 1} once, best first")
    return ranked


def prompt_row(row: dict[str, Any]) -> OnlyPrompt:
    """{"prompt"}"""
    found = convert(row, OnlyPrompt)
    check_prompt(found.prompt)
    return found
