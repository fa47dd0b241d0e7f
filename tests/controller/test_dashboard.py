"""The admin endpoint in front of the real controller, over real HTTP: the page, its events, and metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from async_rl.telemetry import dashboard
from tests.pages.pages_cases import HOSTILE, recipe, served

Real = Callable[[Any], Any]


async def event(answer: aiohttp.ClientResponse) -> tuple[str, Any]:
    lines = [(await answer.content.readline()).decode() for _ in range(3)]
    return lines[0].strip().removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))


def test_the_page_is_one_file_that_runs_nothing_else() -> None:
    body, policy = dashboard.page()
    text = body.decode()
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
    assert text.count("<script") == text.count("<style") == 1 and "/*js*/" not in text
    assert not re.search(r"\son\w+=|javascript:|https?://(?!www\.w3\.org/2000/svg)", text), "no handler, no other host"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|DOMParser", text)


def test_events_tell_the_run_from_its_start_to_its_end(real: Real, tmp_path: Path) -> None:
    async def main() -> None:
        run = recipe(
            2,
            rollout={"groups_per_step": 2, "group_size": 4, "max_new_tokens": 400},
            simulate={"mean_tokens": 160.0, "sigma": 0.5, "block_tokens": 16},
        )
        answer: aiohttp.ClientResponse
        async with aiohttp.ClientSession() as session:
            async with served(run, tmp_path / HOSTILE[:20].replace("/", ""), step_s=0.01) as run_:
                page = await session.get(run_.url + "/")
                assert page.headers["Content-Type"] == "text/html; charset=utf-8"
                assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
                answer = await session.get(run_.url + "/events")
                assert answer.headers["Content-Type"] == "text/event-stream"
                kind, start = await event(answer)
                assert kind == "start" and start["run"]["max_staleness"] == 4 and not start["run"]["samples"]
                rows, samples, said = start["rows"], start["samples"], []
                run_.journal.say(HOSTILE)
                while len(rows) < 20 or not samples or not said:
                    kind, update = await event(answer)
                    assert kind == "update"
                    rows, samples, said = rows + update["rows"], update["samples"] or samples, said + update["said"]
                    status = update["status"]
                    ended = sum(status["ledger"][name] for name in ("trained", "filtered", "failed", "cancelled"))
                    assert status["ledger"]["admitted"] == ended + sum(status["alive"].values())
                assert [row["version"] for row in rows] == list(range(1, len(rows) + 1)), "every step, once"
                by_version = {row["version"]: row for row in run_.journal.rows}
                assert all(row["reward"] == by_version[row["version"]]["reward"] for row in rows)
                assert {one["name"] for one in status["generators"]} == {"generator-0", "generator-1"}
                assert all(version >= -1 for one in samples for version, _ in one["pieces"])
                late = await session.get(run_.url + "/events")
                assert len((await event(late))[1]["rows"]) >= 20, "who comes late is told everything"
                metrics = await session.get(run_.url + "/metrics")
                assert "async_rl_rollouts_unaccounted 0.0" in await metrics.text()
                assert (await (await session.post(run_.url + "/pause")).json()) == {"paused": True}
                refused = await session.post(run_.url + "/evaluate")
                assert refused.status == 409 and "evaluation.tasks = 0" in (await refused.json())["error"]
            last: Any = {}
            while line := await answer.content.readline():
                if line.startswith(b"data: "):
                    last = json.loads(line.removeprefix(b"data: "))
            assert last["ended"].startswith("stopped at step ") and last["status"]["stopping"]

    real(main())


def test_a_model_without_a_tokenizer_file_costs_the_samples_and_nothing_else(real: Real, tmp_path: Path) -> None:
    async def main() -> None:
        lost = recipe(1, model={"path": str(tmp_path)})
        async with served(lost, tmp_path / "run", learner=False) as run, aiohttp.ClientSession() as session:
            async with session.get(run.url + "/events") as answer:
                _, start = await event(answer)
            assert "tokenizer.json: cannot be read" in start["run"]["samples"] and start["samples"] == []

    real(main())
