"""Debian's Prometheus scrapes a real run; promtool checks what launch/ has for it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROBE_S, START_S = 0.25, 60.0
"""Prometheus pushes nothing: it is asked."""
SHARES = (
    "sum by (role) (sum by (role, cause) (rate(async_rl_role_seconds_total[10s]))"
    " / ignoring (cause) group_left sum by (role) (rate(async_rl_role_seconds_total[10s])))"
)


def promtool(*arguments: str | Path, text: str = "") -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_rules_and_the_example_are_right() -> None:
    assert "SUCCESS: 15 rules found" in promtool("check", "rules", ROOT / "launch" / "alerts.yml")
    promtool("check", "config", ROOT / "launch" / "prometheus.yml")
    promtool("test", "rules", ROOT / "tests" / "pages" / "alerts_test.yml")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_real_prometheus_scrapes_a_real_run(train: Callable[..., Any], tmp_path: Path) -> None:
    target, listen = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    url = f"http://{target}"
    started = train("steps=100000", "checkpoint.every_steps=20", f"controller.admin_port={target.partition(':')[2]}")
    started.line("step")
    config = (ROOT / "launch" / "prometheus.yml").read_text().replace("127.0.0.1:9470", target)
    config = config.replace("interval: 5s", "interval: 500ms").replace("interval: 15s", "interval: 1s")
    config = config.replace("alerts.yml", str(ROOT / "launch" / "alerts.yml"))
    (tmp_path / "prometheus.yml").write_text(config)
    with urllib.request.urlopen(url + "/metrics", timeout=20) as answer:
        assert promtool("check", "metrics", text=answer.read().decode()) == "", "no complaint about names and help"

    def ask(path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"http://{listen}{path}?{urllib.parse.urlencode(query)}", timeout=20) as answer:
            return json.load(answer)["data"]

    def values(query: str) -> dict[str, float]:
        """role or "" -> value"""
        found = ask("/api/v1/query", query=query)["result"]
        return {one["metric"].get("role", ""): float(one["value"][1]) for one in found}

    async def until(query: str) -> dict[str, float]:
        """The first answer that is not empty."""
        async with asyncio.timeout(START_S):
            while True:
                try:
                    if found := await asyncio.to_thread(values, query):
                        return found
                except OSError:  # it does not listen yet, or is not ready
                    pass
                await asyncio.sleep(PROBE_S)

    async def main() -> None:
        first = (await until("async_rl_steps_total"))[""]
        assert first > 0
        await until(f"async_rl_steps_total > {first + 20}")
        shares = await until(f"{SHARES} > 0")
        assert shares.keys() >= {"generator", "learner"}
        assert all(abs(share - 1) < 1e-6 for share in shares.values()), shares
        await until("rate(async_rl_tokens_trained_total[5s]) > 0")
        await until("histogram_quantile(0.5, rate(async_rl_step_duration_seconds_bucket[5s])) < 60")
        assert (await until("async_rl_rollouts_unaccounted"))[""] == 0
        ended = "sum(async_rl_rollouts_ended_total) + sum(async_rl_rollouts)"
        assert (await until(f"{ended} == bool sum(async_rl_rollouts_admitted_total)"))[""] == 1
        (one,) = ask("/api/v1/targets")["activeTargets"]
        assert one["health"] == "up" and not one["lastError"]
        before = (await until("async_rl_steps_total"))[""]
        started.children()["controller"].kill()
        await until("async_rl_controller_starts_total == 2")
        await until(f"async_rl_steps_total > {before}")
        for counter in ("steps_total", "tokens_trained_total", "rollouts_admitted_total", "rollouts_ended_total"):
            resets = await until(f"max(resets(async_rl_{counter}[5m]))")
            assert resets[""] == 0, f"{counter}: it is the ledger's, which the new controller has read"
        assert (await until("max(resets(async_rl_step_duration_seconds_count[5m]))"))[""] == 1
        rules = ask("/api/v1/rules")["groups"][0]["rules"]
        assert len(rules) == 15
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, [rule["lastError"] for rule in rules]

    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--web.listen-address={listen}"]
    command += [f"--storage.tsdb.path={tmp_path / 'data'}", "--log.level=warn"]
    with (tmp_path / "prometheus.log").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"GOMAXPROCS": "1"})
        try:
            asyncio.run(main())
        finally:
            process.kill()
            process.wait()
    assert "level=error" not in (tmp_path / "prometheus.log").read_text()
