"""A network namespace at the other end of a cable that can be pulled out: the kernel's own network. It takes root."""

from __future__ import annotations

import os
import subprocess

import pytest

NETWORK = "10.203.77"
NEAR, FAR = f"{NETWORK}.1", f"{NETWORK}.2"


class Cable:
    """Processes started with `inside` in front of their command reach this machine at NEAR, and nothing else."""

    def __init__(self) -> None:
        """Skips the test where namespaces are not permitted."""
        self._namespace = f"async-rl-{os.getpid()}"
        self.near, self.far = f"rl{os.getpid()}a", f"rl{os.getpid()}b"
        """Names of the two interfaces."""
        self.inside = ("ip", "netns", "exec", self._namespace)
        try:
            _ip("netns", "add", self._namespace)
            _ip("link", "add", self.near, "type", "veth", "peer", "name", self.far, "netns", self._namespace)
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            pytest.skip(f"not permitted here: network namespaces ({error})")
        _ip("address", "add", f"{NEAR}/30", "dev", self.near)
        _ip("link", "set", self.near, "up")
        self._far("address", "add", f"{FAR}/30", "dev", self.far)
        self._far("link", "set", "lo", "up")
        self.plug()

    def plug(self) -> None:
        self._far("link", "set", self.far, "up")

    def pull(self) -> None:
        """What is sent from now on is lost."""
        self._far("link", "set", self.far, "down")

    def close(self) -> None:
        subprocess.run(["ip", "netns", "delete", self._namespace], capture_output=True, check=False)

    def _far(self, *arguments: str) -> None:
        _ip("-n", self._namespace, *arguments)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)
