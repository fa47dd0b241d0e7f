"""What looking at a run costs its controller: a scrape of /metrics, and an event of the dashboard.

The real controller on fake generators in real time, read when it has heard of all of them: median of 20. The reading
holds up the controller's loop, the text is written in a thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from async_rl.telemetry import dashboard
from async_rl.telemetry.exposition import exposition
from async_rl.telemetry.feed import encode
from bench.stamp import commit
from tests.pages.pages_cases import recipe, served

ROOT = Path(__file__).resolve().parents[1]
HEARD_S = 15.0
"""Heartbeats come every second; a step takes one."""
GENERATORS = (1, 10, 100, 1000)
REPEATS = 20


def median_ms(work: Callable[[], Any]) -> float:
    def once() -> float:
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3

    return round(statistics.median(once() for _ in range(REPEATS)), 2)


async def measure(generators: int, directory: Path) -> dict[str, float]:
    run = recipe(generators, generator={"slots": 8, "count": generators})
    async with served(run, directory, step_s=1.0) as here:
        controller = here.controller
        await asyncio.sleep(HEARD_S)
        assert here.journal.rows and len(controller.reading().generators) == generators
        reading, groups = controller.reading("run"), controller.oldest_groups(40)

        def status() -> bytes:
            return encode("update", dashboard.status(reading, groups, len(groups), {}, stopping=False))

        page = exposition(reading)
        return {
            "generators": generators,
            "reading_ms": median_ms(controller.reading),
            "exposition_ms": median_ms(lambda: exposition(reading)),
            "exposition_lines": page.count(b"\n"),
            "exposition_bytes": len(page),
            "groups_ms": median_ms(lambda: controller.oldest_groups(40)),
            "event_ms": median_ms(status),
            "event_bytes": len(status()),
        }


def main() -> None:
    logging.disable(logging.WARNING)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        for count in GENERATORS:
            rows.append(asyncio.run(measure(count, Path(directory) / str(count))))
            print(json.dumps(rows[-1]), flush=True)
    if "--write" in sys.argv:
        device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        stamp = {"date": date.today().isoformat(), "commit": commit(), "device": device}
        (ROOT / "bench" / "results" / "scrape.json").write_text(json.dumps({**stamp, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
