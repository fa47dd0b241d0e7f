"""Prompts and responses as tokens: what is trained on, where it ends."""

from __future__ import annotations

from typing import Any

import pytest

from async_rl.config import TinyModel
from async_rl.errors import UserError
from async_rl.json_lines import Message
from async_rl.models.text import encode_chat
from async_rl.models.tiny import tiny_tokenizer
from async_rl.stages.templates import Templates, Tokens

MARKED = (
    "{% for m in messages %}[{{ m['role'][0] }}:{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[a:{% endif %}"
)
"""Turns end with EOS and a line break, as in ChatML."""
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}[{{ m['content'] }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[{% endif %}"
)
TALK = [Message("user", "1"), Message("assistant", "2"), Message("user", "3"), Message("assistant", "4")]


def templates(chat_template: str | None = MARKED, **options: Any) -> tuple[Templates, Any]:
    tokenizer = tiny_tokenizer(TinyModel(characters="0123456789=[]:uast\n "))
    tokenizer.chat_template = chat_template
    return Templates(tokenizer, frozenset({2}), **options), tokenizer


def read(tokenizer: Any, tokens: Tokens) -> tuple[str, str]:
    """All of it, and what is trained on."""
    said = [token for token, trained in zip(tokens.tokens, tokens.trained, strict=True) if trained]
    return tokenizer.decode(tokens.tokens), tokenizer.decode(said)


def test_a_prompt_is_the_prompt_of_rl_and_a_response_ends_with_eos() -> None:
    made, tokenizer = templates()
    pair = made.pair("12=", "3")
    assert read(tokenizer, pair) == ("[u:12=<eos>\n[a:3<eos>", "3<eos>")
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "12="}])
    assert pair.tokens[: len(prompt)] == prompt == made.prompt("12=") == made.prompt([Message("user", "12=")])


def test_eos_is_added_where_the_template_has_none() -> None:
    made, tokenizer = templates("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert read(tokenizer, made.pair("12=", "3")) == ("<bos>12=3<eos>", "3<eos>")


def test_a_template_whose_generation_prompt_is_not_in_the_whole() -> None:
    made, tokenizer = templates(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    assert read(tokenizer, made.pair("1", "2")) == ("1:2<eos>", "2<eos>")


def test_every_turn_of_the_assistant() -> None:
    made, tokenizer = templates()
    whole, trained = read(tokenizer, made.conversation(TALK))
    assert whole == "[u:1<eos>\n[a:2<eos>\n[u:3<eos>\n[a:4<eos>" and trained == "2<eos>4<eos>"
    forgetful, _ = templates(FORGETFUL)
    with pytest.raises(UserError, match=r"rewrites earlier turns: write stage.train_on = 'last'"):
        forgetful.conversation(TALK)


def test_plain_text() -> None:
    made, tokenizer = templates(template="plain", prompt_format="[{prompt}]")
    assert read(tokenizer, made.pair("12", "3")) == ("[12]3<eos>", "3<eos>")
    assert read(tokenizer, made.text("12")) == ("12<eos>", "2<eos>"), "nothing predicts the first token"
    with pytest.raises(UserError, match="a prompt of messages needs a chat template"):
        made.prompt(TALK[:1])


def test_what_the_tokenizer_lacks() -> None:
    with pytest.raises(UserError, match=r"stage\.template = 'chat': this tokenizer has no chat template; write plain"):
        templates(None, template="chat")
    made, tokenizer = templates(None)
    assert read(tokenizer, made.pair("12=", "3")) == ("12=3<eos>", "3<eos>"), "auto is plain without a template"
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        Templates(tokenizer, frozenset())
