"""When the engine starts a server, on a device that it shares. What it starts here only leaves a mark and ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from async_rl.engines.protocol import Snapshot
from async_rl.engines.sglang.engine import SGLangEngine
from async_rl.engines.sglang.settings import Settings
from async_rl.errors import UserError
from async_rl.wire.messages import WeightsId


def test_no_server_takes_a_shared_device_before_there_are_weights(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    settings = Settings(
        command=[sys.executable, "-c", f"open({str(mark)!r}, 'w')"],
        log=tmp_path / "log",
        scratch=tmp_path / "weights",
        off_device=True,
    )

    async def main() -> None:
        engine = SGLangEngine(settings, slots=1, vocabulary=8, context=64, shapes={})
        engine.start(lambda chunks: None)
        await engine.release()  # told to leave what it has not taken
        assert not mark.exists()
        with pytest.raises(UserError, match="the SGLang server exited with 0"):
            await engine.load_weights(Snapshot(WeightsId(0, 0), {}))
        assert mark.exists()
        with pytest.raises(UserError):
            await engine.wait_stopped()

    asyncio.run(main())
