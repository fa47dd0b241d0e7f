"""Prompts and responses as tokens: under the tokenizer's chat template, or as plain text. Responses end with EOS, which
is trained on, and with nothing after it.

The prompt is tokenised apart from the response, as in RL, where the policy continues the tokens of the prompt: so a
model that is trained here and then there reads the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from async_rl.errors import UserError
from async_rl.json_lines import Message, Prompt
from async_rl.models.text import encode


class Tokens(NamedTuple):
    """One sequence."""

    tokens: list[int]
    trained: list[bool]
    """The same length."""


class Templates:
    """Raises UserError at once where the tokenizer lacks what the recipe asks for."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_tokens: frozenset[int],
        *,
        template: Literal["auto", "chat", "plain"] = "auto",
        prompt_format: str = "{prompt}",
    ) -> None:
        """stop_tokens: what ends a reply of this model, EOS among them."""
        self._tokenizer, self._stop, self._format = tokenizer, stop_tokens, prompt_format
        if template == "chat" and tokenizer.chat_template is None:
            raise UserError("stage.template = 'chat': this tokenizer has no chat template; write plain")
        self._chat = tokenizer.chat_template is not None and template != "plain"
        if tokenizer.eos_token_id is None:
            raise UserError("model: its tokenizer has no EOS token, so no response could end; give it one")
        self._eos = cast(int, tokenizer.eos_token_id)
        begins = tokenizer("")["input_ids"]
        self._begin = begins[:1] if begins[:1] == [tokenizer.bos_token_id] else []

    def prompt(self, prompt: Prompt) -> list[int]:
        """What the policy would continue."""
        if self._chat:
            return encode(self._tokenizer, self._render(_messages(prompt), ready=True))
        if not isinstance(prompt, str):
            raise UserError("stage.template = 'plain': a prompt of messages needs a chat template; write a text")
        return self._begin + encode(self._tokenizer, self._format.replace("{prompt}", prompt))

    def response(self, prompt: Prompt, response: str) -> list[int]:
        """Ends with EOS, or the token that ends a turn in this chat template."""
        if not self._chat:
            return self._ended(encode(self._tokenizer, response))
        messages = _messages(prompt)
        before = self._render(messages, ready=True)
        whole = self._render([*messages, Message("assistant", response)], ready=False)
        rest = whole[len(before) :] if whole.startswith(before) else response
        return self._ended(encode(self._tokenizer, rest))

    def conversation(self, messages: Sequence[Message]) -> Tokens:
        """Every turn of the assistant is trained on, the text between them is not.

        Raises:
            UserError: the template shows earlier turns in another way once later ones follow.
        """
        tokens, trained, so_far = list[int](), list[bool](), ""
        turns = [number for number, message in enumerate(messages) if message.role == "assistant"]
        for number in turns:
            before = self._render(messages[:number], ready=True)
            whole = self._render(messages[: number + 1], ready=False)
            if not self._chat or not before.startswith(so_far) or not whole.startswith(before):
                raise UserError("the chat template of this model rewrites earlier turns: write stage.train_on = 'last'")
            read = encode(self._tokenizer, before[len(so_far) :])
            said = encode(self._tokenizer, whole[len(before) :])
            end = next((place + 1 for place, token in enumerate(said) if token in self._stop), len(said))
            if end == len(said) and number == turns[-1]:
                said = self._ended(said)
                end = len(said)
            tokens += read + said
            trained += [False] * len(read) + [True] * end + [False] * (len(said) - end)
            so_far = whole
        last = max(place for place, one in enumerate(trained) if one) + 1
        return Tokens(tokens[:last], trained[:last])

    def text(self, text: str) -> Tokens:
        """Plain text, every token trained on that something precedes."""
        tokens = self._begin + self._ended(encode(self._tokenizer, text))
        return Tokens(tokens, [False] + [True] * (len(tokens) - 1))

    def pair(self, prompt: Prompt, response: str) -> Tokens:
        """Prompt and response, the response trained on."""
        before, after = self.prompt(prompt), self.response(prompt, response)
        return Tokens(before + after, [False] * len(before) + [True] * len(after))

    def _ended(self, tokens: list[int]) -> list[int]:
        """Up to the first token that ends a reply; EOS is appended where there is none."""
        end = next((place + 1 for place, token in enumerate(tokens) if token in self._stop), None)
        return [*tokens, self._eos] if end is None else tokens[:end]

    def _render(self, messages: Sequence[Message], *, ready: bool) -> str:
        plain = [{"role": message.role, "content": message.content} for message in messages]
        return cast(str, self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=ready))


def _messages(prompt: Prompt) -> list[Message]:
    return [Message("user", prompt)] if isinstance(prompt, str) else prompt
