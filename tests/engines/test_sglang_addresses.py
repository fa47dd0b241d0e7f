"""A generator whose weights come from loopback, and servers that are elsewhere."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import psutil
import pytest

from async_rl import recipes
from async_rl.engines.make import make_engine
from async_rl.engines.sglang.addresses import check_host
from async_rl.errors import UserError
from async_rl.models.loading import load_config

SORT = Path(__file__).resolve().parents[2] / "recipes" / "sort.toml"
ELSEWHERE = "http://192.0.2.7:30000"  # reserved for documentation: nobody's


def test_servers_elsewhere_cannot_reach_loopback(tmp_path: Path) -> None:
    sets = ["generator.engine=sglang", f"generator.sglang.attach=['http://127.0.0.1:9','{ELSEWHERE}']"]
    run = recipes.load(SORT, sets)
    says = rf"generator\.sglang\.host = '127\.0\.0\.1': {ELSEWHERE} is another machine"
    with pytest.raises(UserError, match=says):
        make_engine(run, load_config(run.model), tmp_path, name="generator-0")
    run = recipes.load(SORT, [*sets, "generator.sglang.load_by=disk"])
    asyncio.run(make_engine(run, load_config(run.model), tmp_path, name="generator-0").stop())


def test_servers_of_this_machine_by_any_name() -> None:
    addresses = [one.address for many in psutil.net_if_addrs().values() for one in many if one.family == socket.AF_INET]
    assert "127.0.0.1" in addresses
    urls = [f"http://{name}:30000" for name in ("localhost", "nowhere.invalid", *addresses)]
    for host in ("localhost", "127.0.0.1"):
        check_host(host, urls)
    check_host("10.0.0.4", [ELSEWHERE])
