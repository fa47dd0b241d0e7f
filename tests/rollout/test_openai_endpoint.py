"""The OpenAI-compatible endpoint, asked by OpenAI's own client over real sockets: what it answers, what is recorded."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
import torch
from openai import (
    APIStatusError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    OpenAI,
)
from rollout_cases import Hosted, hosted, lease, weights

from async_rl.config import Model, TinyModel
from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.fake import FakeEngine
from async_rl.engines.protocol import Request, Snapshot
from async_rl.environments.api import Endpoint
from async_rl.models.loading import build_model, load_config, load_stop_tokens, load_tokenizer
from async_rl.rollout.openai_requests import Question
from async_rl.rollout.openai_server import OpenAIServer
from async_rl.rollout.policy import RecordedPolicy
from async_rl.rollout.reply import RecordedReply
from async_rl.rollout.tokenizer_text import TokenizerText
from async_rl.simulate.cluster import NumberText
from async_rl.wire.messages import RolloutResult, Segment, Task, WeightsId

Run = Callable[[Any], Any]
Agent = Callable[[Endpoint, RecordedPolicy], Awaitable[Any]]
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
TINY = Model(tiny=TinyModel(characters=PRINTABLE, hidden_size=32, layers=1, max_length=600))
USER = {"role": "user", "content": "12+3="}


@cache
def tiny_text() -> TokenizerText:
    return TokenizerText(load_tokenizer(TINY), load_stop_tokens(TINY))


@cache
def tiny_weights() -> dict[str, Any]:
    return dict(build_model(TINY, seed=1).named_parameters())


def client(endpoint: Endpoint, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0, **options)


class Said:
    """What the agents of the episodes returned, in the order in which they ended."""

    def __init__(self, agent: Agent, ignore: tuple[str, ...] = ()) -> None:
        self.agent, self.ignore = agent, ignore
        self.values: list[Any] = []

    async def episode(self, task: Task, policy: Any) -> float:
        async with policy.endpoint(ignore=self.ignore) as endpoint:
            self.values.append(await self.agent(endpoint, policy))
        return 1.0


@asynccontextmanager
async def on_tiny(said: Said) -> AsyncGenerator[Hosted]:
    engine = EmbeddedEngine(load_config(TINY), slots=8, dtype=torch.float32)
    async with hosted(said.episode, engine, tiny_text()) as running:
        await engine.load_weights(Snapshot(WeightsId(0, 0), tiny_weights()))
        yield running


def play(agent: Agent, real: Run, ignore: tuple[str, ...] = (), **options: Any) -> tuple[Any, RolloutResult]:
    """What the agent of one episode returned, and what was recorded of it."""
    said = Said(agent, ignore)

    async def main() -> RolloutResult:
        async with on_tiny(said) as running:
            await running.run(lease(max_new_tokens=24, **options))
            assert not running.failures
            return running.results[0]

    result = real(main())
    return said.values[0], result


def sampled(result: RolloutResult) -> list[list[int]]:
    """The sampled tokens of every sequence."""
    found: list[list[int]] = []
    for sequence in result.sequences:
        tokens = np.frombuffer(sequence.tokens, np.int32)
        found.append([int(t) for span in sequence.spans for t in tokens[span.start : span.end]])
    return found


def test_two_turns_through_the_client_are_one_sequence_as_sampled(real: Run) -> None:
    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> list[Any]:
        async with client(endpoint) as openai:
            messages: list[Any] = [USER]
            first = await openai.chat.completions.create(
                model=endpoint.model, messages=messages, logprobs=True, user="me", temperature=1
            )
            messages += [first.choices[0].message.model_dump(exclude_none=True), USER]
            second = await openai.chat.completions.create(
                model="whatever", messages=messages, max_completion_tokens=9, logprobs=True
            )
            return [first, second]

    replies, result = play(agent, real)
    (sequence,) = result.sequences
    assert len(sequence.spans) == 2
    text = tiny_text()
    for reply, span in zip(replies, sequence.spans, strict=True):
        tokens = np.frombuffer(sequence.tokens, np.int32)[span.start : span.end]
        choice = reply.choices[0]
        assert choice.message.content == text.decode(tokens.tolist())
        assert reply.usage.completion_tokens == len(tokens) and reply.usage.prompt_tokens == span.start
        assert [one.token for one in choice.logprobs.content] == [text.spell([int(token)]) for token in tokens]
        recorded = np.frombuffer(sequence.logprobs, np.float32)[span.start : span.end]
        assert np.allclose([one.logprob for one in choice.logprobs.content], recorded)
        assert choice.finish_reason == ("stop" if int(tokens[-1]) in text.stop_tokens else "length")
    assert replies[1].usage.completion_tokens <= 9


def test_a_stream_says_the_same_as_the_whole(real: Run) -> None:
    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> tuple[str, list[Any]]:
        async with client(endpoint) as openai:
            stream = await openai.chat.completions.create(
                model=endpoint.model, messages=[USER], stream=True, stream_options={"include_usage": True}
            )
            pieces = [piece async for piece in stream]
            text = await openai.completions.create(model=endpoint.model, prompt="12", stream=True, max_tokens=5)
            return "".join([piece.choices[0].text async for piece in text]), pieces

    (completion, pieces), result = play(agent, real)
    chat, completed = sampled(result)
    assert pieces[0].choices[0].delta.role == "assistant"
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1])
    assert said == tiny_text().decode(chat)
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]][-1] in ("stop", "length")
    assert pieces[-1].usage.completion_tokens == len(chat)
    assert completion == tiny_text().decode(completed) and len(completed) <= 5


def test_completions_take_texts_and_token_ids(real: Run) -> None:
    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> list[str]:
        async with client(endpoint) as openai:
            prompts: list[Any] = ["12", ["12"], [20, 21], [[20, 21]]]
            replies = [await openai.completions.create(model="", prompt=prompt, logprobs=1) for prompt in prompts]
            assert all(len(reply.choices[0].logprobs.tokens) for reply in replies)
            return [reply.choices[0].text for reply in replies]

    texts, result = play(agent, real)
    assert sorted(texts) == sorted(tiny_text().decode(tokens) for tokens in sampled(result))


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"temperature": 0.2}, "temperature", "temperature = 0.2: this run samples and trains at 1; leave it out"),
        ({"top_p": 0.9}, "top_p", "top_p = 0.9: it would change what the policy samples"),
        ({"n": 2}, "n", "n = 2: it would change"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias = {'5': 1}"),
        ({"response_format": {"type": "json_object"}}, "response_format", "ask for what is not sampled"),
        ({"tool_choice": "required"}, "tool_choice", "the policy cannot be made to call a tool"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens = 0: write a whole number above 0"),
        ({"stop": [""]}, "stop", "write a text or a list of texts"),
        ({"tools": [{"type": "web"}]}, None, "is no tool; write"),
        ({"messages": []}, "messages", "write a list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "neither images nor files"),
        ({"messages": [{"role": "user", "content": "ä"}]}, None, "is not in the vocabulary"),
        ({"messages": [{"role": "user", "content": "1" * 700}]}, None, "the prompt has 701 tokens"),
        ({"extra_body": {"guided_regex": "."}}, "guided_regex", "there is no such parameter here"),
    ],
)
def test_what_would_falsify_training_is_refused(
    change: dict[str, Any], param: str | None, says: str, real: Run
) -> None:
    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> BadRequestError:
        async with client(endpoint) as openai:
            with pytest.raises(BadRequestError) as caught:
                await openai.chat.completions.create(**{"model": "policy", "messages": [USER], **change})
            await policy.complete("1")
            return caught.value

    error, result = play(agent, real)
    assert (error.param, error.type) == (param, "invalid_request_error") and says in error.message
    assert error.code == ("context_length_exceeded" if "701" in says else None)
    assert len(result.sequences) == 1


def test_what_the_environment_names_is_ignored_and_evaluation_takes_any_temperature(real: Run) -> None:
    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> None:
        async with client(endpoint) as openai:
            await openai.chat.completions.create(
                model="", messages=[USER], temperature=0.2, extra_body={"top_k": 5} if policy.temperature else {}
            )

    play(agent, real, ignore=("temperature", "top_k"))
    play(agent, real, purpose="eval")


def test_a_misspelt_parameter_to_ignore_fails_the_episode(real: Run) -> None:
    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> None:
        raise AssertionError

    async def main() -> None:
        async with hosted(Said(agent, ("temprature",)).episode) as running:
            await running.run(lease())
            (reason,) = running.failures
            assert reason.startswith("ValueError: ignore = 'temprature': write some of best_of, echo")

    real(main())


def test_episodes_are_told_apart_by_their_keys(real: Run) -> None:
    endpoints: list[Endpoint] = []

    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> None:
        endpoints.append(endpoint)
        async with client(endpoint) as openai:
            assert [model.id async for model in openai.models.list()] == [endpoint.model]
            await openai.chat.completions.create(model="", messages=[{"role": "user", "content": str(policy.member)}])

    async def main() -> None:
        async with on_tiny(Said(agent)) as running:
            await running.run(lease(members=range(8)))
            for result in running.results:
                (sequence,) = result.sequences
                assert tiny_text().decode(np.frombuffer(sequence.tokens, np.int32)[:2].tolist()) == str(result.member)
            assert len({endpoint.api_key for endpoint in endpoints}) == len(endpoints) == 8
            assert len({endpoint.base_url for endpoint in endpoints}) == 1
            async with client(endpoints[0]) as openai:
                with pytest.raises(APIStatusError) as over:
                    await openai.chat.completions.create(model="", messages=[USER])
            assert (over.value.status_code, over.value.code) == (410, "episode_over")
            async with client(endpoints[0]) as openai:
                with pytest.raises(AuthenticationError) as unknown:
                    await openai.with_options(api_key="sk-guessed").models.list()
            assert unknown.value.code == "invalid_api_key"

    real(main())


def test_what_is_no_request_gets_an_error_in_the_same_form(real: Run) -> None:
    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> list[tuple[int, str]]:
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        errors: list[tuple[int, str]] = []
        async with aiohttp.ClientSession(headers=headers) as http:
            for path, body in (("/embeddings", b"{}"), ("/chat/completions", b"{"), ("/chat/completions", b"[]")):
                async with http.post(endpoint.base_url + path, data=body) as response:
                    errors.append((response.status, (await response.json())["error"]["message"]))
        await policy.complete("1")
        return errors

    errors, _ = play(agent, real)
    assert errors == [
        (404, "POST /v1/embeddings: here are /v1/chat/completions, /v1/completions and /v1/models"),
        (400, "the body is no JSON"),
        (400, "the body is no JSON object"),
    ]


class Watched(FakeEngine):
    """Says when it was asked, and when a request was taken back."""

    def __init__(self) -> None:
        super().__init__(slots=1, median_tokens=1000, sigma=0.0, seconds_per_step=0.05)
        self.asked, self.taken_back = asyncio.Event(), asyncio.Event()

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)
        self.asked.set()

    def cancel(self, request_ids: Sequence[int]) -> None:
        super().cancel(request_ids)
        self.taken_back.set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_takes_its_request_back(real: Run, stream: bool) -> None:
    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> None:
        async with client(endpoint) as openai:
            asking = asyncio.create_task(openai.completions.create(model="", prompt="1", stream=stream))
            await engine.asked.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await engine.taken_back.wait()

    async def main() -> None:
        nonlocal engine
        engine = Watched()
        async with hosted(Said(agent).episode, engine) as running:
            await engine.load_weights(weights(0))
            await running.run(lease(max_new_tokens=1000))
            assert running.failures == ["ValueError: the episode ended without asking the policy: nothing to train on"]

    engine: Watched
    real(main())


def test_an_episode_that_ends_while_its_agent_still_asks_takes_the_request_back(real: Run) -> None:
    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> asyncio.Task[int]:
        async def ask() -> int:
            async with client(endpoint) as openai:
                with pytest.raises(APIStatusError) as caught:
                    await openai.completions.create(model="", prompt="1")
            return caught.value.status_code

        asking = asyncio.create_task(ask())
        await engine.asked.wait()
        return asking

    async def main() -> None:
        nonlocal engine
        engine = Watched()
        said = Said(agent)
        async with hosted(said.episode, engine) as running:
            await engine.load_weights(weights(0))
            await running.run(lease(max_new_tokens=1000))
            assert await said.values[0] == 410
            await engine.taken_back.wait()

    engine: Watched
    real(main())


class Written(NumberText):
    """Tokens are characters, and there are thoughts."""

    thinks = True

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


class Scripted:
    """Always calls a tool, if it may."""

    temperature = 1.0

    async def answer(self, question: Question) -> RecordedReply:
        text = '<think>hm</think>Wait.<tool_call>{"name": "add", "arguments": {"a": [1, "\u00e4"]}}</tool_call>'
        tokens = [ord(character) for character in text]
        logprobs = [-0.5] * len(tokens)
        return RecordedReply(Written(), tokens, logprobs, "eos", 3, 7, False, bool(question.tools), ())


def test_tool_calls_and_thoughts_arrive_whole_and_in_a_stream(real: Run) -> None:
    asked: Any = {
        "model": "",
        "messages": [USER],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }

    async def main() -> None:
        server = OpenAIServer("127.0.0.1")
        await server.start()
        try:
            with server.open(Scripted(), ()) as endpoint:
                async with client(endpoint) as openai:
                    (choice,) = (await openai.chat.completions.create(**asked)).choices
                    stream = await openai.chat.completions.create(**asked, stream=True)
                    pieces = [piece.choices[0] async for piece in stream]
                    refrains = await openai.chat.completions.create(**asked, tool_choice="none")
        finally:
            await server.stop()
        (call,) = choice.message.tool_calls
        assert (call.id, call.function.name, json.loads(call.function.arguments)) == (
            "call_3_0",
            "add",
            {"a": [1, "ä"]},
        )
        assert (choice.message.content, choice.message.reasoning_content) == ("Wait.", "hm")
        assert choice.finish_reason == pieces[-1].finish_reason == "tool_calls"
        (streamed,) = [piece.delta for piece in pieces if piece.delta.tool_calls]
        (again,) = streamed.tool_calls
        assert (again.index, again.id, again.function) == (
            0,
            call.id,
            again.function.model_copy(update=dict(call.function)),
        )
        assert (streamed.content, streamed.reasoning_content) == ("Wait.", "hm")
        (choice,) = refrains.choices
        assert choice.message.tool_calls is None and choice.message.content.startswith("Wait.<tool_call>")

    real(main())


def test_a_bug_of_ours_fails_the_episode_and_not_only_the_request(real: Run) -> None:
    class Broken:
        temperature = None

        async def answer(self, question: Question) -> RecordedReply:
            raise ZeroDivisionError("a bug")

    async def main() -> None:
        server = OpenAIServer("127.0.0.1")
        await server.start()
        try:
            with pytest.raises(ZeroDivisionError), server.open(Broken(), ()) as endpoint:
                async with client(endpoint) as openai:
                    with pytest.raises(InternalServerError):
                        await openai.completions.create(model="", prompt="1")
        finally:
            await server.stop()

    real(main())


def test_an_agent_whose_lease_ends_while_it_asks_goes_on_under_the_next(real: Run) -> None:
    """Two of its requests are under way at once, so that one of them is recalled by the other's end."""

    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> list[str]:
        async def converse(openai: AsyncOpenAI, name: str) -> str:
            messages: list[Any] = [{"role": "user", "content": name}]
            for _ in range(2):
                reply = await openai.chat.completions.create(model="", messages=messages)
                messages += [{"role": "assistant", "content": reply.choices[0].message.content}, USER]
            return str(messages[-2]["content"])

        async with client(endpoint) as openai:
            return await asyncio.gather(converse(openai, "a"), converse(openai, "b"))

    said = Said(agent)

    async def main() -> None:
        async with on_tiny(said) as running:
            segments: list[Segment] = []
            leases = 0
            while leases == 0 or not running.results:
                await running.run(lease(max_new_tokens=24, segment_tokens=8, lease_tokens=20, segments=segments))
                assert not running.failures
                segments, leases = segments + running.segments, leases + 1
            assert leases > 2
            (result,) = running.results
            assert [len(one.spans) for one in result.sequences] == [2, 2]
            replies = [one.tokens[4 * span.start : 4 * span.end] for one in result.sequences for span in one.spans]
            for call in range(4):
                kept = b"".join(segment.tokens for segment in segments if segment.call == call)
                assert kept and sum(reply.startswith(kept) for reply in replies) == 1, "nothing is sampled twice"
            texts = [tiny_text().decode(np.frombuffer(reply, np.int32).tolist()) for reply in replies]
            assert set(said.values[-1]) <= set(texts)

    real(main())


AGENT = """
import sys
from openai import OpenAI

with OpenAI() as openai:  # OPENAI_BASE_URL, OPENAI_API_KEY
    messages = [{"role": "user", "content": sys.argv[1]}]
    for turn in range(3):
        reply = openai.chat.completions.create(model="gpt", messages=messages)
        said = reply.choices[0].message.content
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "="}]
        print(said, flush=True)
"""


async def in_a_process(endpoint: Endpoint, policy: RecordedPolicy) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        AGENT,
        "12+3=",
        env={"OPENAI_BASE_URL": endpoint.base_url, "OPENAI_API_KEY": endpoint.api_key},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return said.decode().splitlines()


@pytest.mark.processes
def test_an_agent_in_another_process_goes_on_after_its_generator_died(real: Run) -> None:
    """It is started again, asks the same again, and gets what was recorded before it gets what is new."""
    said = Said(in_a_process)

    async def main() -> None:
        async with on_tiny(said) as running:
            asked = lease(max_new_tokens=24, segment_tokens=8)
            await running.run(asked)
            assert not running.failures
            (whole,), segments = running.results, running.segments
            (sequence,) = whole.sequences
            assert len(sequence.spans) == 3 and {segment.call for segment in segments} >= {0, 1}
            cut = next(i for i, segment in enumerate(segments) if segment.call == 1) + 1
            await running.run(msgspec.structs.replace(asked, segments=segments[:cut]))
            (resumed,) = running.results
            assert resumed.sequences[0].tokens == sequence.tokens
            assert running.segments == segments[cut:]
            assert said.values[0] == said.values[1]

    real(main())


def test_a_blocking_client_in_a_thread_and_tools(real: Run) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}

    async def agent(endpoint: Endpoint, policy: RecordedPolicy) -> Any:
        def ask() -> Any:
            with OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as openai:
                return openai.chat.completions.create(
                    model="",
                    tools=[tool],  # pyright: ignore[reportArgumentType]
                    messages=[
                        {"role": "user", "content": "1+1"},
                        {
                            "role": "assistant",
                            "content": None,
                            "tool_calls": [
                                {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
                            ],
                        },
                        {"role": "tool", "tool_call_id": "a", "content": "2"},
                    ],
                )

        return await asyncio.to_thread(ask)

    reply, result = play(agent, real)
    (sequence,) = result.sequences
    prompt = tiny_text().decode(np.frombuffer(sequence.tokens, np.int32)[: sequence.spans[0].start].tolist())
    assert json.dumps(tool["function"]) in prompt
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><tool_response>\n2\n</tool_response>' in prompt
    assert reply.choices[0].message.content
