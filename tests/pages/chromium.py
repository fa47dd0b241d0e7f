"""Debian's Chromium without a window, driven by its DevTools protocol over a websocket.

    async with chromium(tmp_path) as browser:
        page = await browser.open("http://127.0.0.1:9470/")
        await page.until("document.title !== ''")
        await page.look(1280, 900)
        path.write_bytes(await page.screenshot())

`page.problems` collects what the console calls an error, exceptions nobody caught, and what the page's policy refused.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

START_S, CALL_S, WAIT_S = 60.0, 30.0, 60.0
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--remote-debugging-port=0",
    "--window-size=1280,900",
]
UNTIL = """new Promise((done) => {
  const look = () => { if (%s) { watcher.disconnect(); done(true); } };
  const watcher = new MutationObserver(look);
  watcher.observe(document, {subtree: true, childList: true, characterData: true, attributes: true});
  look();
})"""
"""Resolves when the condition holds; it is looked at when anything in the page has changed."""


class Page:
    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.problems: list[str] = []
        self.loaded = asyncio.Event()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self._browser.call(method, self._session, **parameters)

    async def run(self, expression: str, timeout_s: float = CALL_S) -> Any:
        """Value of a JavaScript expression; a promise is awaited."""
        async with asyncio.timeout(timeout_s):
            answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait for a JavaScript condition on the document."""
        try:
            await self.run(UNTIL % condition, WAIT_S)
        except TimeoutError:
            text = await self.run("document.body.innerText")
            raise AssertionError(f"after {WAIT_S:.0f} s not: {condition}\n{self.problems}\n{text}") from None

    async def text(self, selector: str) -> str:
        return await self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    async def click(self, selector: str) -> None:
        await self.run(f"document.querySelector({json.dumps(selector)}).click()")

    async def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """At this size of the window, in light or dark."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        await self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    async def screenshot(self, *, whole: bool = True) -> bytes:
        """PNG of the page from its top, all of it or what the window shows."""
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=whole, **(await self._clip(whole)))
        return base64.b64decode(answer["data"])

    async def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def happened(self, method: str, parameters: Any) -> None:
        match method:
            case "Page.loadEventFired":
                self.loaded.set()
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.problems.append(f"console: {[one.get('value') for one in parameters['args']]}")
            case "Runtime.exceptionThrown":
                self.problems.append(f"exception: {json.dumps(parameters['exceptionDetails'])[:600]}")
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.problems.append(f"log: {parameters['entry']['text']} {parameters['entry'].get('url', '')}")
            case "Page.javascriptDialogOpening":
                self.problems.append(f"dialog: {parameters['message']}")
            case _:
                pass


class Browser:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}

    async def open(self, url: str) -> Page:
        target = (await self.call("Target.createTarget", url="about:blank"))["targetId"]
        session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Runtime", "Log", "Page"):
            await page.call(f"{domain}.enable")
        await page.call("Page.navigate", url=url)
        async with asyncio.timeout(WAIT_S):
            await page.loaded.wait()
        return page

    async def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        done = self._calls[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        await self._socket.send_json(message)
        return await done

    async def read(self) -> None:
        """Until the browser closes the connection."""
        async for frame in self._socket:
            message = json.loads(frame.data)
            if "id" in message:
                done = self._calls.pop(message["id"])
                if done.done():
                    continue
                if "error" in message:
                    done.set_exception(AssertionError(message["error"]))
                else:
                    done.set_result(message["result"])
            elif message.get("sessionId") in self._pages:
                self._pages[message["sessionId"]].happened(message["method"], message["params"])


@contextlib.asynccontextmanager
async def chromium(directory: Path) -> AsyncIterator[Browser]:
    """Starts one, with a profile of its own in this directory, and ends it."""
    program = shutil.which("chromium")
    assert program is not None, "Debian's package chromium is not installed"
    process = await asyncio.create_subprocess_exec(
        program,
        *FLAGS,
        f"--user-data-dir={directory / 'profile'}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(START_S):
            while b"DevTools listening on " not in (line := await process.stderr.readline()):
                assert line, "chromium ended before it listened"
        address = line.decode().split()[-1]
        async with asyncio.TaskGroup() as tasks, aiohttp.ClientSession() as session:
            tasks.create_task(_drain(process.stderr))
            async with session.ws_connect(address, max_msg_size=0) as socket:
                browser = Browser(socket)
                reading = tasks.create_task(browser.read())
                yield browser
                reading.cancel()
            process.kill()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        pass
