"""A judge behind a real HTTP endpoint that says what a test wants it to say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web
from judges import Says, endpoint

from async_rl import rewards
from async_rl.errors import GradingFailed, UserError
from async_rl.rewards import judge

Real = Callable[[Coroutine[Any, Any, Any]], Any]


def replies(*answers: str | web.Response) -> Says:
    left = list(answers)
    return lambda _: left.pop(0)


def test_a_score_is_read_from_the_last_json(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "key-8731")

    async def main() -> None:
        says = replies(
            'It says {"score": 10}, but no. {"score": 7.5}', 'fine\n```json\n{"score": 0, "why": {"a": 1}}\n```'
        )
        async with endpoint(says) as (url, came):
            asked = rewards.Judge(url, "m", key_env="JUDGE_KEY", rubric="Be strict.")
            good = await asked.score("Why {x}?", "Because.", reference="It is so.")
            assert (float(good), good.reason) == (0.75, "judged") and good.detail.startswith("It says")
            assert await asked.score("Why?", "No.") == 0.0
            first, second = (request["messages"][0]["content"] for request in came)
            assert "Be strict." in first and "Why {x}?" in first and "<reference>\nIt is so." in first
            assert "<reference>" not in second
            assert came[0]["authorization"] == "Bearer key-8731" and came[0]["temperature"] == 0.0

    real(main())


def test_the_order_of_two_answers_is_drawn_and_taken_back(real: Real) -> None:
    def prefers_the_good_one(asked: str) -> str:
        return '{"better": "%s"}' % ("A" if asked.index("good") < asked.index("bad") else "B")

    async def main() -> None:
        async with endpoint(prefers_the_good_one) as (url, came):
            asked = rewards.Judge(url, "m")
            for n in range(12):
                assert await asked.compare(f"question {n}", "good", "bad") == 1.0
                assert await asked.compare(f"question {n}", "bad", "good") == 0.0
            first = [request["messages"][0]["content"] for request in came[::2]]
            assert 0 < sum(text.index("good") < text.index("bad") for text in first) < 12
        async with endpoint(replies('{"better": "Tie"}')) as (url, _):
            assert await rewards.Judge(url, "m").compare("q", "a", "b") == 0.5

    real(main())


def test_without_a_verdict_it_is_asked_once_more_and_then_there_is_none(real: Real) -> None:
    async def main() -> None:
        for nonsense in (
            "It is good.",
            '{"score": 11}',
            '{"score": "7"}',
            '{"score": true}',
            '{"score": NaN}',
            "{" * 5000,
        ):
            async with endpoint(replies(nonsense, '{"score": 5}')) as (url, came):
                assert await rewards.Judge(url, "m").score("q", "a") == 0.5
                assert len(came) == 2
        async with endpoint(replies("good", "very good")) as (url, _):
            with pytest.raises(GradingFailed, match="wrote no verdict, twice; at last: 'very good'"):
                await rewards.Judge(url, "m").score("q", "a")

    real(main())


def test_an_endpoint_that_is_busy_is_asked_again_and_one_that_refuses_is_not(
    real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "FIRST_PAUSE_S", 0.001)

    async def main() -> None:
        async with endpoint(replies(web.Response(status=503), web.Response(status=429), '{"score": 5}')) as (url, came):
            assert await rewards.Judge(url, "m").score("q", "a") == 0.5
            assert len(came) == 3
        async with endpoint(replies(web.Response(status=404, text="no such model"))) as (url, _):
            with pytest.raises(UserError, match="answers 404: no such model"):
                await rewards.Judge(url, "m").score("q", "a")
        async with endpoint(replies(web.json_response({"answer": 1}))) as (url, _):
            with pytest.raises(UserError, match="answers no chat completion"):
                await rewards.Judge(url, "m").score("q", "a")
        with pytest.raises(GradingFailed, match=r"gave no verdict within 0\.05 s"):
            await rewards.Judge("http://127.0.0.1:9/v1", "m", deadline_s=0.05).score("q", "a")

    real(main())


def test_few_are_at_the_endpoint_at_a_time(real: Real) -> None:
    async def main() -> None:
        async with endpoint(lambda _: '{"score": 10}') as (url, came):
            asked = rewards.Judge(url, "m", at_once=2)
            assert await asyncio.gather(*(asked.score("q", str(n)) for n in range(8))) == [1.0] * 8
            assert len(came) == 8

    real(main())


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UserError, match="url = 'localhost': write the URL"):
        rewards.Judge("localhost", "m")
    with pytest.raises(UserError, match="key_env = 'NO_SUCH': there is no such environment variable"):
        rewards.Judge("http://x/v1", "m", key_env="NO_SUCH")
