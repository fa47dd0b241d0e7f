"""A server of two tensor-parallel ranks: a process each, with its part of every matrix."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from async_rl.engines.sglang.update import checksums

from .conftest import Server
from .sglang_cases import make_engine, running, snapshot


@pytest.fixture
def parallel(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|0")  # it wants cores for each rank; they may be the same
    return start_server("--tp-size", "2")


@pytest.mark.timeout(300)
def test_an_update_reaches_both_ranks(parallel: Server, models: dict[int, Any], tmp_path: Path) -> None:
    """Log-probs are the learner's before and after it, and each rank holds what it holds after a load from disk."""

    def held() -> list[dict[str, str]]:
        return parallel.run(lambda client: client.checksums(60))

    async def main(load_by: str) -> None:
        async with running(make_engine(tmp_path, attach=[parallel.url], load_by=load_by, bucket_bytes=9000)) as feed:
            await feed.engine.load_weights(snapshot(models, 0))
            feed.submit(2)
            await feed.grow(1)
            await feed.engine.load_weights(snapshot(models, 1))
            feed.submit(1)
            await feed.finish()
            feed.check(models)

    try:
        asyncio.run(main("group"))
        first, second = by_group = held()
        asyncio.run(main("disk"))
        assert held() == by_group
    finally:
        parallel.kill()  # its ranks would go on asking each other whether there is something to do
    ours = checksums(snapshot(models, 1).tensors)
    qkv, norm = "model.layers.0.self_attn.qkv_proj.weight", "model.norm.weight"
    assert first[qkv] != second[qkv], "a part each"
    assert first[norm] == second[norm] == ours[norm]
