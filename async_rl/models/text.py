"""Text to token ids and back, with an error that names what could not be encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from async_rl.errors import UserError
from async_rl.models.tool_text import check_tools, in_words, plain_messages


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the text alone, no special tokens added.

    Raises:
        UserError: naming the first character the vocabulary lacks.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception:
        missing = _first_missing(tokenizer, text)
        if missing is None:
            raise
        raise UserError(
            f"character {missing!r} in {_shorten(text)!r} is not in the vocabulary of this model: "
            "add it to model.tiny.characters"
        ) from None


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A conversation under the model's chat template, ready for the reply to be sampled. Where the template knows no
    tools, they, their calls and their results are written in words.

    Raises:
        UserError: the tokenizer has no chat template, or it refuses these messages; a message or a tool is none.
    """
    if tokenizer.chat_template is None:
        raise UserError("this model has no chat template: give a prompt as text, or train an instruct model")
    check_tools(tools)
    said = plain_messages(messages)
    knows_tools = "tools" in template_source(tokenizer)
    if not knows_tools:
        said = in_words(said, tools)
    try:
        rendered = tokenizer.apply_chat_template(
            said,
            tools=[dict(tool) for tool in tools] if tools and knows_tools else None,
            tokenize=False,
            add_generation_prompt=True,
        )
    except (TemplateError, TypeError, KeyError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(
            f"the model's chat template refuses messages of the roles {roles}: {error}; write messages that it takes"
        ) from error
    return cast(str, rendered)


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; of several by name, all of them."""
    template: Any = tokenizer.chat_template
    return template if isinstance(template, str) else "".join(dict(template or {}).values())


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of `render_chat`.

    With the tiny model, `[{"role": "user", "content": "3102="}]` becomes bos 3 1 0 2 =.

    Raises:
        UserError: the tokenizer has no chat template, or a character is not in the vocabulary.
    """
    return encode(tokenizer, render_chat(tokenizer, messages))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of token ids; special tokens leave nothing."""
    return cast(str, tokenizer.decode(list(tokens), skip_special_tokens=True))


def spell(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of token ids, special tokens written out."""
    return cast(str, tokenizer.decode(list(tokens), skip_special_tokens=False))


def _first_missing(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    for special in tokenizer.all_special_tokens:
        text = text.replace(special, "")
    for character in text:
        try:
            tokenizer.encode(character, add_special_tokens=False)
        except Exception:
            return character
    return None


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
