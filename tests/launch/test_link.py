"""The key of a run directory."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from async_rl.launch.interface import sockets_of
from async_rl.launch.link import KEY, key_of

from async_rl.errors import UserError
from async_rl.telemetry.run_directory import RunDirectory


def test_all_who_come_at_once_get_the_same_key(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    with ThreadPoolExecutor(16) as nodes:
        keys = set(nodes.map(lambda _: key_of(directory), range(64)))
    assert len(keys) == 1 and len(keys.pop()) > 30
    assert stat.S_IMODE((directory.path / KEY).stat().st_mode) == 0o600
    assert [path.name for path in directory.path.iterdir()] == [KEY]
    assert key_of(RunDirectory(tmp_path / "other")) != key_of(directory)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cluster\.key: Not a directory; write a --run-dir that all nodes share"):
        key_of(RunDirectory(tmp_path / "file" / "run"))


def test_the_interface_of_an_address() -> None:
    assert sockets_of("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    assert sockets_of("192.0.2.1") == {}
