"""Conversations of many turns are trained on the very tokens that were sampled, as one sequence where they are one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_cases import hosted, lease

from async_rl.config import Model, TinyModel
from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.protocol import Snapshot
from async_rl.environments.api import Policy
from async_rl.models.loading import build_model, load_config, load_stop_tokens, load_tokenizer
from async_rl.rollout.conversations import Conversations
from async_rl.rollout.reply import RecordedReply
from async_rl.rollout.tokenizer_text import TokenizerText
from async_rl.wire.messages import Task, WeightsId

Run = Callable[[Any], Any]
SMOLLM2 = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"
TINY = Model(tiny=TinyModel(characters="0123456789+= ", hidden_size=32, layers=2, max_length=512))


@cache
def text_of(model: Model) -> TokenizerText:
    return TokenizerText(load_tokenizer(model), load_stop_tokens(model))


@pytest.fixture(params=["smollm2", "tiny"])
def model(request: pytest.FixtureRequest) -> Model:
    if request.param == "tiny":
        return TINY
    if not SMOLLM2.is_dir():
        pytest.skip("make models/smollm2-135m-instruct has not been run")
    return Model(path=str(SMOLLM2))


@pytest.fixture
def smollm2() -> TokenizerText:
    if not SMOLLM2.is_dir():
        pytest.skip("make models/smollm2-135m-instruct has not been run")
    return text_of(Model(path=str(SMOLLM2)))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


TURNS = st.lists(
    st.tuples(st.text("0123456789+= ", max_size=6), st.lists(st.integers(3, 15), max_size=8), st.booleans()),
    min_size=2,
    max_size=4,
)
WILD_TURNS = st.lists(
    st.tuples(st.text(max_size=12), st.lists(st.integers(0, 49151), max_size=12), st.booleans()),
    min_size=2,
    max_size=4,
)


def check_turns(text: TokenizerText, turns: list[tuple[str, list[int], bool]]) -> None:
    """Whatever was sampled, and however it would be encoded: each prompt goes on from the tokens before it."""
    conversations, messages = Conversations(text), list[dict[str, str]]()
    stop = min(text.stop_tokens)
    before: tuple[int, ...] = ()
    for question, sampled, ends in turns:
        said = [token for token in sampled if token not in text.stop_tokens] + ([stop] if ends or not sampled else [])
        messages.append(user(question))
        prompt = conversations.prompt(messages)
        assert prompt.tokens[: len(before)] == before
        conversations.said(prompt, said)
        before = prompt.tokens + tuple(said)
        messages.append(assistant(text.decode(said)))


@settings(max_examples=30)
@given(TURNS)
def test_a_tiny_conversation_is_one_sequence(turns: list[tuple[str, list[int], bool]]) -> None:
    check_turns(text_of(TINY), turns)


def test_a_real_conversation_is_one_sequence(smollm2: TokenizerText) -> None:
    @settings(max_examples=30)
    @given(WILD_TURNS)
    def check(turns: list[tuple[str, list[int], bool]]) -> None:
        check_turns(smollm2, [(question.replace("<|im_end|>", ""), said, ends) for question, said, ends in turns])

    check()


def test_what_is_between_the_turns_is_what_the_template_writes(smollm2: TokenizerText) -> None:
    """Both where the policy ended its turn itself and where it was cut off."""
    (stop,) = smollm2.stop_tokens
    odd = [*smollm2.encode("str"), *smollm2.encode("awber"), *smollm2.encode("ry")]
    assert tuple(odd) != smollm2.encode("strawberry"), "encoded again, it would be other tokens"
    for said in ([*odd, stop], odd):
        conversations = Conversations(smollm2)
        prompt = conversations.prompt([user("A fruit?")])
        conversations.said(prompt, said)
        whole = conversations.prompt([user("A fruit?"), assistant("strawberry"), user("Another?")])
        assert whole.tokens[: len(prompt.tokens) + len(odd)] == (*prompt.tokens, *odd)
        assert smollm2.spell(whole.tokens) == whole.text
        assert whole.tokens[len(prompt.tokens) + len(odd) :] == smollm2.encode(
            "<|im_end|>\n<|im_start|>user\nAnother?<|im_end|>\n<|im_start|>assistant\n"
        )


def test_an_edited_history_is_encoded_as_it_stands(smollm2: TokenizerText) -> None:
    (stop,) = smollm2.stop_tokens
    conversations = Conversations(smollm2)
    prompt = conversations.prompt([user("A fruit?")])
    conversations.said(prompt, [*smollm2.encode("straw"), *smollm2.encode("berry"), stop])
    for messages in (
        [user("A fruit?"), assistant("strawberry pie"), user("Another?")],
        [user("A fruit?"), assistant("straw"), user("Another?")],
        [user("A fruit!"), assistant("strawberry"), user("Another?")],
        [user("A fruit?"), user("Another?")],
    ):
        edited = conversations.prompt(messages)
        assert edited.tokens == smollm2.encode(edited.text)


def test_a_turn_that_ended_otherwise_than_the_template_writes_begins_anew(smollm2: TokenizerText) -> None:
    text = TokenizerText(load_tokenizer(Model(path=str(SMOLLM2))), smollm2.stop_tokens | {0})  # <|endoftext|>
    conversations = Conversations(text)
    conversations.said(conversations.prompt([user("A fruit?")]), [*text.encode("plum"), 0])
    prompt = conversations.prompt([user("A fruit?"), assistant("plum"), user("Another?")])
    assert prompt.tokens == text.encode(prompt.text)


WITH_TOOLS = """
{%- set last = namespace(user=0) -%}
{%- for m in messages if m.role == 'user' %}{% set last.user = messages.index(m) %}{% endfor -%}
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.index0 > last.user %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content | trim }}
{%- for call in m.tool_calls %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As Qwen 3 has it: thoughts only after the last question, calls in its own notation."""
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_a_loop_of_tools_keeps_thoughts_and_calls_as_they_were_sampled(smollm2: TokenizerText) -> None:
    tokenizer = load_tokenizer(Model(path=str(SMOLLM2)))
    tokenizer.chat_template = WITH_TOOLS
    text, (stop,) = TokenizerText(tokenizer, smollm2.stop_tokens), smollm2.stop_tokens
    assert text.thinks
    conversations, messages = Conversations(text), list[dict[str, Any]]([user("1+2?")])
    first = conversations.prompt(messages, [ADD])
    assert '"add"' in first.text
    odd = '<think>\n\nI add. </think> Now:<tool_call>{"arguments":  {"a": 1, "b": 2}, "name": "add"}</tool_call>\n'
    said = [*text.encode(odd), stop]
    conversations.said(first, said)
    reply = RecordedReply(text, said, [0.0] * len(said), "eos", 0, len(first.tokens), False, True, ())
    (call,) = reply.tool_calls
    assert (reply.content, reply.reasoning, call.name, call.arguments) == ("Now:", "I add.", "add", {"a": 1, "b": 2})
    messages += [reply.message, call.result("3")]
    second = conversations.prompt(messages, [ADD])
    assert second.tokens == (
        *first.tokens,
        *said,
        *text.encode("\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"),
    )
    assert odd not in second.text, "the template would write it otherwise"
    conversations.said(second, [*text.encode("3"), stop])
    edited = [
        messages[0],
        {**reply.message, "tool_calls": [{**call.message, "function": {"name": "sub", "arguments": {}}}]},
    ]
    assert conversations.prompt(edited, [ADD]).tokens == text.encode(conversations.prompt(edited, [ADD]).text)
    messages += [assistant("3"), user("2+2?")]
    third = conversations.prompt(messages, [ADD])
    assert "I add." not in third.text and third.tokens == text.encode(third.text), "without the thoughts: other text"


def test_the_latest_of_equal_turns_is_kept_and_branches_go_on_from_theirs(smollm2: TokenizerText) -> None:
    (stop,) = smollm2.stop_tokens
    conversations = Conversations(smollm2)
    first = conversations.prompt([user("A fruit?")])
    plum, kiwi = (
        [*smollm2.encode("pl"), *smollm2.encode("um"), stop],
        [*smollm2.encode("ki"), *smollm2.encode("wi"), stop],
    )
    conversations.said(first, plum)
    conversations.said(first, kiwi)
    for said, name in ((plum, "plum"), (kiwi, "kiwi")):
        prompt = conversations.prompt([user("A fruit?"), assistant(name), user("Another?")])
        assert prompt.tokens[: len(first.tokens) + len(said)] == (*first.tokens, *said)


async def two_turns(task: Task, policy: Policy) -> float:
    messages: list[dict[str, str]] = [user("12+3=")]
    reply = await policy.chat(messages, max_new_tokens=12)
    messages += [assistant(reply.text), user("4 ")]
    reply = await policy.chat(messages, max_new_tokens=12)
    messages[1] = assistant(messages[1]["content"] + "0")  # edits history
    await policy.chat(messages, max_new_tokens=5)
    return 1.0


def test_a_model_gives_what_was_recorded_of_a_conversation_the_same_log_probs(real: Run) -> None:
    async def main() -> None:
        engine = EmbeddedEngine(load_config(TINY), slots=4, dtype=torch.float32)
        async with hosted(two_turns, engine, text_of(TINY)) as running:
            model: Any = build_model(TINY, seed=1)
            await engine.load_weights(Snapshot(WeightsId(0, 0), dict(model.named_parameters())))
            await running.run(lease(members=[0, 1, 2, 3]))
            assert len(running.results) == 4 and not running.failures
            for result in running.results:
                conversation, edited = result.sequences
                assert [len(conversation.spans), len(edited.spans)] == [2, 1]
                for sequence in (conversation, edited):
                    tokens = torch.tensor(np.frombuffer(sequence.tokens, np.int32).astype(np.int64))
                    recorded = np.frombuffer(sequence.logprobs, np.float32)
                    with torch.no_grad():
                        logits = model(tokens[None]).logits[0].float()
                    recomputed = torch.log_softmax(logits[:-1], -1).gather(1, tokens[1:, None])[:, 0]
                    sampled = [i for span in sequence.spans for i in range(span.start, span.end)]
                    assert np.abs(recorded[sampled] - recomputed.numpy()[[i - 1 for i in sampled]]).max() < 1e-4
                    assert not np.delete(recorded, sampled).any()

    real(main())
