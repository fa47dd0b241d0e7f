"""The dashboard in a real Chromium: the numbers of a run, without a reload, without a problem in the console."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from async_rl.models.vocabulary import tiny_tokens
from async_rl.telemetry.reading import Recent
from async_rl.wire.messages import Sequence, TrainRollout, VersionSpan
from tests.pages.chromium import Page, chromium
from tests.pages.pages_cases import HOSTILE, recipe, served

LIVE = "document.querySelector('#link').textContent === 'live'"
STEP = "Number((document.querySelector('#times').textContent.match(/step ([0-9]+)/) || [0, 0])[1])"
CARDS = """JSON.stringify([...document.querySelectorAll('.card')]
  .map((one) => [one.offsetLeft, one.offsetTop, one.offsetWidth, one.offsetHeight]))"""
WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
PERCENTS = """[...document.querySelectorAll('.role')]
  .map((role) => [...role.innerText.matchAll(/([0-9]+) %/g)].reduce((sum, found) => sum + Number(found[1]), 0))"""
NAMELESS = """[...document.querySelectorAll('button, [role=img], [role=region], [role=log], progress, section, table')]
  .filter((one) => {
    const by = document.getElementById(one.getAttribute('aria-labelledby'));
    return !(one.getAttribute('aria-label') || by?.innerText || one.innerText || one.caption?.innerText);
  }).map((one) => one.outerHTML.slice(0, 80))"""
MADE = "document.querySelectorAll('main img, main script, main b[onmouseover], h1 i').length"


def whole(main: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(110):
            await main

    asyncio.run(bounded())


async def post(url: str, path: str) -> Any:
    def call() -> Any:
        with urllib.request.urlopen(urllib.request.Request(url + path, method="POST"), timeout=20) as answer:
            return json.load(answer)

    return await asyncio.to_thread(call)


async def status(url: str) -> Any:
    def call() -> Any:
        with urllib.request.urlopen(url + "/status", timeout=20) as answer:
            return json.load(answer)

    return await asyncio.to_thread(call)


def test_a_real_run_is_seen_and_steered(train: Callable[..., Any], tmp_path: Path) -> None:
    started = train("steps=100000", "evaluation.every_steps=40")
    printed = started.line("dashboard: ")
    url = json.loads((tmp_path / "run" / "admin.json").read_text())["url"]
    assert printed.split()[1].rstrip("/") == url

    async def main() -> None:
        async with chromium(tmp_path) as browser:
            page = await browser.open(url + "/")
            await page.run("window.unchanged = true")
            await page.until(f"{LIVE} && {STEP} >= 3")
            seen = await page.run(STEP)
            await page.until(f"{STEP} >= {seen + 5}")
            await page.until("document.querySelectorAll('.sample').length > 1")
            assert "=" in await page.text("#samples"), "prompts of the sort recipe"

            await page.click("#pause")
            await page.until("document.querySelector('#pause').textContent === 'Resume'")
            assert (await status(url))["paused"] and await page.text("#announce") == "paused"
            await page.until(f"{STEP} === {(await settled(url))}")
            now = await status(url)
            assert (await page.text("#stage")).startswith("paused at step ")
            row = now["last"]
            assert (await page.text("#reward-now")) == f"{row['reward']:.3f}"
            assert f"effective sample size\t{row['ess_frac'] * 100:.0f} %" in await page.text("#health")
            name, state, version, *_ = (await page.text("#generators")).split("\t")
            assert (name, state, version) == ("generator-0", "samples", str(now["step"]))
            assert await page.run(PERCENTS) == [100, 100]
            assert await page.text("#ledger-sum") == "every one accounted for"

            evaluations = await page.run("state.evaluations.length")
            await page.click("#evaluate")
            await page.until(f"state.evaluations.length === {evaluations + 1}")
            await says(page, "#reward-legend", f"at step {now['step']}")
            await page.until("!document.querySelector('#evaluate').disabled")
            await page.click("#pause")
            await page.until(f"{STEP} > {now['step']}")

            assert await page.run("window.unchanged"), "all this without a reload"
            assert page.problems == []
            await page.click("#stop")
            assert await page.text("#stop") == "Really stop?" and (await status(url))["step"], "not at the first click"
            await page.click("#stop")
            await page.until("document.querySelector('#stage').textContent.startsWith('stopped at step ')")
            await page.until("document.querySelector('#link').textContent.startsWith('ended ')")
            assert await page.run("[...document.querySelectorAll('.controls button')].every((b) => b.disabled)")

    whole(main())
    code, _, errors = started.end(20)
    assert code == 130, errors


async def settled(url: str) -> int:
    """The step at which a paused run stands still: what was admitted is trained on, an evaluation later nothing is."""
    while True:
        before = (await status(url))["step"]
        await post(url, "/evaluate")
        if (await status(url))["step"] == before:
            return before


@pytest.mark.parametrize("generators", [1, 200])
def test_any_number_of_generators_in_any_window(generators: int, tmp_path: Path) -> None:
    async def main() -> None:
        async with chromium(tmp_path) as browser, served(recipe(generators), tmp_path / "crowd", step_s=0.1) as run:
            page = await browser.open(run.url + "/")
            await page.until(
                f"{LIVE} && {STEP} > 4 && document.querySelectorAll('#generators tr').length === {generators}"
            )
            await page.until("document.querySelectorAll('.sample').length === 12")
            for width in (360, 800, 1280, 1920):
                for dark in (False, True):
                    await page.look(width, 900, dark=dark)
                    assert not await page.run(WIDER), f"{width} px: it scrolls sideways"
                colors = await page.run("getComputedStyle(document.body).backgroundColor")
                assert colors == "rgb(20, 23, 26)", "dark where the system is"
            await page.look(1280, 900)
            seen = await page.run(STEP)
            before = await page.run(CARDS)
            await page.until(f"{STEP} > {seen + 3}")
            assert await page.run(CARDS) == before, "nothing jumps when numbers change"
            assert await page.run(NAMELESS) == []
            assert page.problems == []

    whole(main())


async def says(page: Page, selector: str, text: str) -> None:
    await page.until(f"document.querySelector({json.dumps(selector)}).textContent.includes({json.dumps(text)})")


def test_hostile_text_is_text(tmp_path: Path) -> None:
    """Completions are what a model makes up; messages and names may quote what it made up."""

    async def main() -> None:
        run = recipe(1)
        assert run.model.tiny is not None
        ids = {token: number for number, token in enumerate(tiny_tokens(run.model.tiny))}
        tokens = np.array([ids[one] for one in HOSTILE], np.int32).tobytes()
        sequence = Sequence(tokens, b"\0" * len(tokens), [VersionSpan(3, len(HOSTILE), 0, 0)])
        named = "<b onmouseover=alert(1)>generator</b>-{}"
        async with chromium(tmp_path) as browser, served(run, tmp_path / "<i>run", step_s=0.1, names=named) as run_:
            page = await browser.open(run_.url + "/")
            await page.until(f"{LIVE} && {STEP} > 1")
            run_.journal.say(HOSTILE)
            run_.controller.recent.append(Recent(1 << 30, TrainRollout(7, 0, 0.0, [sequence])))
            await says(page, "#messages", "<script>")
            await says(page, "#samples", HOSTILE)
            await says(page, "#generators", named.format(0))
            await says(page, "#name", "<i>run")
            assert (
                await page.run("document.querySelectorAll('main img, main script, main b[onmouseover], h1 i').length")
                == 0
            )
            assert await page.run("document.title") == "<i>run: async_rl"
            assert page.problems == []

    whole(main())


def test_a_run_that_asks_for_its_token(tmp_path: Path) -> None:
    """A browser keeps what it was told for this address, for the page and for what the page asks."""

    async def main() -> None:
        async with chromium(tmp_path) as browser, served(recipe(1), tmp_path / "run", step_s=0.1, token="t0ken") as run:
            page = await browser.open(run.url.replace("//", "//me:t0ken@") + "/")
            await page.until(f"{LIVE} && {STEP} > 1")
            await page.click("#pause")
            await page.until("document.querySelector('#pause').textContent === 'Resume'")
            assert page.problems == []

    whole(main())


def test_a_run_that_has_not_begun_and_one_that_is_gone(tmp_path: Path) -> None:
    async def main() -> None:
        async with chromium(tmp_path) as browser:
            async with served(recipe(1), tmp_path / "run", learner=False) as run:
                page = await browser.open(run.url + "/")
                await page.until(
                    f"{LIVE} && document.querySelector('#generators').innerText.includes('no weights yet')"
                )
                assert await page.text("#stage") == "loading the model"
                assert "no step yet" in await page.text("#reward-chart")
                assert "not known before the first batch" in await page.text("#waits")
                assert page.problems == []
            await page.until("document.querySelector('#link').textContent.startsWith('ended ')")

    whole(main())


def test_a_controller_that_was_killed_is_lost_and_found_again(train: Callable[..., Any], tmp_path: Path) -> None:
    """It is started again, and listens where it did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = train("steps=100000", "checkpoint.every_steps=5", f"controller.admin_port={port}")
    url = f"http://127.0.0.1:{port}"
    started.line("step")

    async def main() -> None:
        async with chromium(tmp_path) as browser:
            page = await browser.open(url + "/")
            await page.until(f"{LIVE} && {STEP} > 1")
            started.children()["controller"].kill()
            await page.until("document.querySelector('#link').textContent.startsWith('connection lost, last news ')")
            assert await page.run("document.querySelector('#stop').disabled")
            seen = await page.run(STEP)
            await page.until(f"{LIVE} && {STEP} > {seen}")
            assert not await page.run("document.querySelector('#stop').disabled")
            assert await page.run(
                "state.rows.every((row, index) => index === 0 || row.version > state.rows[index - 1].version)"
            )

    whole(main())
