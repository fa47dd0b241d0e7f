"""A controller and a generator on two machines that share only the kernel: keys, and what others see of the run."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from async_rl.run_secrets import RunSecrets

from ..system.conftest import ROOT
from .cable import NEAR, Cable
from .conftest import Run, caught_up, stopped, works

EVERY_PROTOCOL = 3
MARKS = b"Heartbeat", b"Finished", b"generator-1"
"""What messages in clear text have in them."""


class Tap:
    """Everything that goes over an interface, as somebody on that network sees it."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_PROTOCOL))
        self._socket.bind((interface, 0))
        self._lock, self._seen = threading.Lock(), bytearray()
        self._wake, self._closed = socket.socketpair()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def seen(self) -> bytes:
        with self._lock:
            return bytes(self._seen)

    def close(self) -> None:
        self._wake.close()
        self._reading.join()
        self._socket.close()
        self._closed.close()

    def _read(self) -> None:
        while self._closed not in select.select([self._socket, self._closed], [], [])[0]:
            packet = self._socket.recv(65536)
            with self._lock:
                self._seen += packet


@pytest.fixture
def cable() -> Iterator[Cable]:
    made = Cable()
    yield made
    made.close()


class Far:
    """Processes on the other machine."""

    def __init__(self, run: Run, cable: Cable, port: int) -> None:
        self._run, self._cable, self._port = run, cable, port
        self._made: list[subprocess.Popen[str]] = []

    def generator(self, secrets: Path) -> subprocess.Popen[str]:
        command = [*self._cable.inside, sys.executable, "-m", "async_rl.cli", "serve", "generator"]
        command += ["--config", str(self._run.path / "config.json"), "--run-dir", str(self._run.path)]
        command += ["--name", "generator-1", "--connect", f"tcp://{NEAR}:{self._port}", "--secrets", str(secrets)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": self._cable.far}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._made.append(process)
        return process

    def close(self) -> None:
        for process in self._made:
            process.kill()
            process.communicate()


def says(process: subprocess.Popen[str]) -> str:
    """The one line of a generator that is not let in."""
    _, errors = process.communicate(timeout=60)
    (line,) = [line for line in errors.splitlines() if line.startswith("async-rl: ")]
    assert process.returncode == 2, errors
    return line


@pytest.mark.timeout(400)
def test_a_generator_on_another_machine(
    start: Any, ports: list[int], cable: Cable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a copy of its key and of nothing else it works, comes back after the controller has died, and who taps the
    cable reads nothing. Without that key nobody comes in, and is told so."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", cable.near)
    run = start("steps=100000", f"controller.host={NEAR}", f"controller.port={ports[0]}")
    run.rows(2)
    copied, foreign = tmp_path / "copied", RunSecrets(tmp_path / "foreign")
    copied.mkdir()
    far, tap = Far(run, cable, ports[0]), Tap(cable.near)
    try:
        assert f"{copied}/generator.key: no such file" in says(far.generator(copied))
        shutil.copy(run.path / "secrets" / "generator.key", copied)
        (copied / "generator.key").chmod(0o644)
        assert f"{copied}/generator.key: others may read it (mode 0644)" in says(far.generator(copied))
        (copied / "generator.key").chmod(0o600)
        foreign.make()
        told = says(far.generator(foreign.directory))
        assert f"the controller at tcp://{NEAR}:{ports[0]} does not know {foreign.directory}/generator.key" in told

        process = far.generator(copied)
        caught_up(run, "generator-1", run.newest_row["version"] + 2)
        works(run, "generator-1")
        run.kill(["controller"])
        assert process.wait(60) == 75, "it is told to start again"
        far.generator(copied)
        run.rows(2)
        caught_up(run, "generator-1", run.newest_row["version"] + 2)
        works(run, "generator-1")
        seen = tap.seen()
        assert b"CURVE" in seen and not [mark for mark in MARKS if mark in seen]
        stopped(run)
    finally:
        tap.close()
        far.close()
