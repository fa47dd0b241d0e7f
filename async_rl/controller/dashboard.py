"""The dashboard's end of the controller: the page, and the events that keep it up to date.

GET  /           one page, without any data of the run
GET  /events     server-sent events: `start` with everything, then an `update` with what is new
"""

from __future__ import annotations

import asyncio
from collections import deque

from aiohttp import web

from async_rl.controller.controller import Controller
from async_rl.errors import UserError
from async_rl.telemetry import dashboard
from async_rl.telemetry.feed import Feed
from async_rl.telemetry.journal import Row
from async_rl.telemetry.reading import Recent
from async_rl.telemetry.token_text import Decode, load_decoder

MAX_GROUPS = 40
MAX_SAMPLES = 12
SAMPLES_INTERVAL_S = 1.0
"""Rollouts are replaced no more often: a person wants to read them."""


class Dashboard:
    """One per controller; add its routes to the admin endpoint. name: of the run."""

    def __init__(self, controller: Controller, feed: Feed, name: str) -> None:
        self._controller, self._feed, self._name = controller, feed, name
        self._loop = asyncio.get_running_loop()
        self._page = dashboard.page()
        self._decode: Decode | None = None
        self._no_samples = ""
        """Why."""
        self._loading = asyncio.Lock()
        self._sampled, self._sampled_at = -1, float("-inf")
        """Step of the newest rollouts that were shown, and when."""
        self._samples: deque[Row] = deque(maxlen=MAX_SAMPLES)
        self._former: Row | None = None
        feed.look = self._look

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/", self._show), web.get("/events", self._events)]

    async def close(self, app: web.Application) -> None:
        """Browsers are told how it ended before they lose the connection."""
        controller = self._controller
        sentence = f"stopped at step {controller.version} of {controller.run_config.steps}: the same command continues"
        self._feed.close(sentence if controller.stopping else "")

    async def _show(self, request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": self._page.policy, "Cache-Control": "no-cache"}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return web.Response(body=self._page.body, content_type="text/html", charset="utf-8", headers=headers)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        async with self._loading:
            if self._decode is None and not self._no_samples:
                await self._load()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        try:
            async for event in self._feed.events(self._start):
                await response.write(event)
        except ConnectionError:
            pass  # the browser is gone
        return response

    async def _load(self) -> None:
        try:
            self._decode = await asyncio.to_thread(load_decoder, self._controller.run_config.model)
        except UserError as error:
            self._no_samples = str(error)

    def _start(self) -> Row:
        journal = self._controller.journal
        self._read_samples()
        return {
            "run": dashboard.about(self._controller.run_config, self._name, self._no_samples),
            "evaluations": dashboard.evaluations(journal.evaluations),
            "messages": list(self._feed.messages),
            "rows": dashboard.history(journal.rows),
            "samples": list(self._samples),
            "new_evaluations": [],
            "said": [],
            "ended": self._feed.ended,
            "status": self._status(),
        }

    def _look(self, rows: list[Row]) -> Row:
        found = dashboard.points(rows, self._former)
        self._former = rows[-1] if rows else self._former
        now = self._loop.time()
        changed = now - self._sampled_at >= SAMPLES_INTERVAL_S and self._read_samples()
        self._sampled_at = now if changed else self._sampled_at
        return {"rows": found, "samples": list(self._samples) if changed else [], "status": self._status()}

    def _status(self) -> Row:
        controller = self._controller
        groups = controller.oldest_groups(MAX_GROUPS)
        return dashboard.status(
            controller.reading(self._name),
            groups,
            controller.num_waiting,
            self._feed.pulse,
            stopping=controller.stopping,
        )

    def _read_samples(self) -> bool:
        """Newest first. Returns whether there are other ones than before."""
        if self._decode is None:
            return False
        new: list[Recent] = [one for one in self._controller.recent if one.step > self._sampled]
        for one in new:
            self._samples.appendleft(dashboard.sample(one, self._decode))
        self._sampled = max((one.step for one in new), default=self._sampled)
        return bool(new)
