"""Nodes with addresses of their own: network namespaces on one bridge, whose cables can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import SCRIPT, SORT, held, sets

ROLLOUTS = 64


class Network:
    """Hosts 1 and 2 at 10.77.0.1 and .2. The file system is one, and so is the kernel."""

    def __init__(self) -> None:
        self._tag = f"arl{os.getpid()}"
        try:
            self._make()
        except subprocess.CalledProcessError:
            self.close()
            raise

    def _make(self) -> None:
        self._ip("netns", "add", self._name("wan"))
        wan = self._name("wan")
        self._ip("-n", wan, "link", "add", "br0", "type", "bridge")
        self._ip("-n", wan, "link", "set", "br0", "up")
        for host in (1, 2):
            name = self._name(host)
            self._ip("netns", "add", name)
            self._ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"w{host}", "netns", wan)
            self._ip("-n", name, "addr", "add", f"10.77.0.{host}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "eth0", "up")
            self._ip("-n", name, "link", "set", "lo", "up")
            self._ip("-n", wan, "link", "set", f"w{host}", "master", "br0", "up")

    def at(self, host: int, *command: object) -> list[object]:
        """The command that runs this one at a host."""
        return ["ip", "netns", "exec", self._name(host), *command]

    def cut(self, host: int) -> None:
        self._ip("-n", self._name("wan"), "link", "set", f"w{host}", "down")

    def heal(self, host: int) -> None:
        self._ip("-n", self._name("wan"), "link", "set", f"w{host}", "up")

    def close(self) -> None:
        for name in ("wan", 1, 2):
            subprocess.run(["ip", "netns", "del", self._name(name)], capture_output=True)

    def _name(self, host: object) -> str:
        return f"{self._tag}-{host}"

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and ip (iproute2)")
    try:
        made = Network()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr}")
    yield made
    made.close()


def test_two_machines_with_keys_and_a_cable_that_is_cut(network: Network, shell: Any, tmp_path: Path) -> None:
    recipe = ["steps=300", "learner.ranks=2", "generator.count=2", 'weights.transport="process_group"']

    def node(rank: int) -> Any:
        command = [SCRIPT, SORT, "--run-dir", tmp_path / "run", "--no-report", "--learner-nodes", "2", *sets(*recipe)]
        return shell(
            *network.at(rank + 1, *command),
            NNODES="2",
            NODE_RANK=str(rank),
            MASTER_ADDR="10.77.0.1",
            MASTER_PORT="29400",
        )

    head, other = node(0), node(1)
    head.line(" ess ")
    network.cut(2)
    head.line("node 1 is gone")
    other.line("the head is gone")
    network.heal(2)
    head.line("node 1 is back")
    head.line("the learner continues from step")
    assert (head.end(), other.end()) == (0, 0), f"{head}{other}"
    held(tmp_path / "run", 300 * ROLLOUTS)
