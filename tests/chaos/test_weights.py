"""Faults while weights travel: members and learners that die in a broadcast, a network that is cut and healed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from async_rl.telemetry.run_directory import RunDirectory

from ..system.conftest import ROOT
from ..weights.proxy import Proxy
from .cable import NEAR, Cable
from .conftest import Run, caught_up, stopped, works
from .faults import BroadcastDeaths, Moment
from .recomputation import KEPT, check_logprobs

GROUP = ["weights.transport=process_group", "generator.count=2", "weights.timeout_s=20"]
LARGER = ["model.tiny.intermediate_size=12288", "rollout.groups_per_step=4"]
"""20 MB: two buckets."""
TOLERANCE = 1e-4
CUT_S = 10.0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["generator-1", "learner-0"])
def test_killed_in_a_broadcast(start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, victim: str) -> None:
    """Within a bucket, and between two: nobody else has to start again, whoever can goes on meanwhile, the one that
    comes back is used again, and every token was sampled by the weights it names."""
    deaths = BroadcastDeaths(monkeypatch, tmp_path / "first", [victim])
    run = start("steps=100000", *GROUP, *LARGER, *KEPT)
    run.rows(2)
    others = {name: process.pid for name, process in run.children().items() if name != victim}
    died_at: list[int] = []
    for moment in get_args(Moment):
        caught_up(run, "generator-1", run.rows(1)["version"])
        comes_back = deaths.order(victim, moment)
        run.line(f"{victim} died (SIGKILL)")
        comes_back.wait()
        died_at.append(run.newest_row["version"])
        if victim != "learner-0":
            caught_up(run, "generator-0", died_at[-1] + 3)
        comes_back.end()
        for generator in ("generator-0", "generator-1"):
            caught_up(run, generator, died_at[-1] + 4)
        works(run, "generator-1")
    assert {name: process.pid for name, process in run.children().items() if name != victim} == others
    stopped(run)
    checked = check_logprobs(RunDirectory(run.path), atol=TOLERANCE)
    print(f"died at {died_at}; {sum(checked.values())} tokens of {len(checked)} versions agree with the learner")
    for version in died_at:
        assert checked.keys() & {version - 1, version} and checked.keys() & {version + 1, version + 2, version + 3}


@pytest.mark.timeout(300)
def test_a_member_that_hangs_does_not_hold_up_the_others(start: Any, rng: random.Random) -> None:
    """Ten seconds without a turn, in a group: what a cut cable looks like to everybody else. What it held goes to the
    others, and they have new weights, before it is back."""
    run = start("steps=100000", "controller.heartbeat_timeout_s=4", *GROUP)
    run.rows(rng.randrange(3, 20))
    hanging = run.children()["generator-1"]
    hanging.suspend()
    before, began = run.version_at("generator-0"), time.monotonic()
    caught_up(run, "generator-0", before + 5)
    moved = time.monotonic() - began
    time.sleep(max(0.0, CUT_S - moved))
    hanging.resume()
    caught_up(run, "generator-1", run.version_at("generator-0"))
    works(run, "generator-1")
    print(f"5 versions in {moved:.1f} s, back at {run.version_at('generator-1')}", flush=True)
    stopped(run)


class FarGenerator:
    """generator-1, on the other side of a network that can be cut: of proxies, or of a cable, over which only the
    training stream needs a proxy (the controller listens on loopback)."""

    def __init__(self, run: Run, ports: list[int], cable: Cable | None = None) -> None:
        self._run = run
        self._inside = () if cable is None else cable.inside
        self._environment = os.environ | ({} if cable is None else {"GLOO_SOCKET_IFNAME": cable.far})
        self._host = "127.0.0.1" if cable is None else NEAR
        self.networks = [Proxy(("127.0.0.1", port), self._host) for port in ports]
        recipe = json.loads((run.path / "config.json").read_text())
        if cable is None:
            recipe["weights"]["relay_url"] = self.networks[1].url
        self._config = run.path / "far" / "config.json"
        self._config.parent.mkdir()
        self._config.write_text(json.dumps(recipe))
        self.processes: list[subprocess.Popen[str]] = []
        self.start()

    def start(self) -> None:
        command = [
            *self._inside,
            sys.executable,
            "-m",
            "async_rl.cli",
            "serve",
            "generator",
            "--config",
            str(self._config),
        ]
        command += ["--run-dir", str(self._run.path), "--name", "generator-1"]
        command += ["--connect", f"tcp://{self._host}:{self.networks[0].port}"]
        log = (self._run.path / "logs" / "far.log").open("a")
        self.processes.append(
            subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, text=True)
        )
        log.close()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for network in self.networks:
            network.close()


@pytest.fixture
def far() -> Iterator[list[FarGenerator]]:
    made: list[FarGenerator] = []
    yield made
    for one in made:
        one.close()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("patience_s", [3, 60], ids=["given up", "waited for"])
def test_a_network_that_is_cut_for_ten_seconds(
    start: Any, far: list[FarGenerator], ports: list[int], patience_s: int
) -> None:
    """Of one of two generators: the other goes on, and the first is used again."""
    run = start(
        "steps=100000",
        "weights.transport=http",
        f"controller.heartbeat_timeout_s={patience_s}",
        f"controller.port={ports[0]}",
        f"weights.relay_port={ports[1]}",
    )
    run.rows(2)
    far.append(FarGenerator(run, ports))
    caught_up(run, "generator-1", 3)
    for network in far[0].networks:
        network.cut()
    before, began = run.version_at("generator-0"), time.monotonic()
    if patience_s < CUT_S:  # what it held goes to the other one
        caught_up(run, "generator-0", before + 5)
    time.sleep(max(0.0, CUT_S - (time.monotonic() - began)))
    for network in far[0].networks:
        network.heal()
    if patience_s < CUT_S:  # it was given up, is told so, and starts again as its launcher would
        assert far[0].processes[-1].wait(60) == 75
        far[0].start()
    caught_up(run, "generator-1", run.version_at("generator-0"))
    works(run, "generator-1")
    stopped(run)


@pytest.fixture
def cable() -> Iterator[Cable]:
    made = Cable()
    yield made
    made.close()


@pytest.mark.timeout(400)
def test_a_cable_that_is_pulled_out_for_ten_seconds(
    start: Any, far: list[FarGenerator], ports: list[int], cable: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything of one of two members of the weight group is cut, the broadcast as well: the other one goes on with
    new weights, and the first comes back to the group, without a wrong version in any token."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", cable.near)
    run = start(
        "steps=100000",
        "weights.transport=process_group",
        f"weights.host={NEAR}",
        "controller.heartbeat_timeout_s=60",
        f"controller.port={ports[0]}",
        *LARGER,
        *KEPT,
    )
    run.rows(2)
    far.append(FarGenerator(run, ports[:1], cable))
    caught_up(run, "generator-1", 3)
    cable.pull()
    before, began = run.version_at("generator-0"), time.monotonic()
    caught_up(run, "generator-0", before + 3, within=CUT_S)
    moved = time.monotonic() - began
    assert run.version_at("generator-1") <= before + 1, "it was not cut"
    time.sleep(max(0.0, CUT_S - moved))
    cable.plug()
    caught_up(run, "generator-1", run.version_at("generator-0"))
    works(run, "generator-1")
    print(f"3 versions in {moved:.1f} s, back at {run.version_at('generator-1')}", flush=True)
    stopped(run)
    checked = check_logprobs(RunDirectory(run.path), atol=TOLERANCE)
    print(f"{sum(checked.values())} tokens of {len(checked)} versions agree with the learner")
