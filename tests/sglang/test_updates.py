"""New weights while requests are in flight: what every token was sampled by, and that nothing is lost."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from async_rl.engines.sglang import worker
from async_rl.engines.sglang.client import Load, SGLangClient
from async_rl.engines.sglang.push import Bucket, WeightPush
from async_rl.engines.sglang.update import checksums
from async_rl.weights.errors import BroadcastFailed

from .conftest import ROOT, Server
from .sglang_cases import drifting, make_engine, running, snapshot

UPDATES = 20
STALL_S = 1.0


def test_twenty_updates_under_load(server: Server, tmp_path: Path) -> None:
    """Every log-prob is the learner's under the weights its span names; no request is lost, none answered twice."""
    models = drifting(UPDATES + 1)

    async def main() -> tuple[list[float], list[int]]:
        stalls: list[float] = []
        async with running(make_engine(tmp_path, attach=[server.url], slots=12)) as feed:
            await feed.engine.load_weights(snapshot(models, 0))
            feed.submit(24)
            for version in range(1, UPDATES + 1):
                await feed.grow()
                swap = await feed.engine.load_weights(snapshot(models, version))
                assert swap.sampled, "requests were in flight"
                stalls.append(swap.stall_s)
                feed.submit(4)
            await feed.finish()
            return stalls, feed.check(models)

    stalls, mixed = asyncio.run(main())
    median = sorted(stalls)[len(stalls) // 2]
    print(f"stalls: median {median:.3f} s, longest {max(stalls):.3f} s; {len(mixed)} chunks of two versions or more")
    assert len(mixed) > UPDATES, "updates came in the middle of pieces"
    assert max(stalls) < STALL_S


@pytest.mark.parametrize("load_by", ["group", "disk"])
def test_each_way_in_gives_the_same_weights(
    server: Server, tmp_path: Path, models: dict[int, Any], load_by: str
) -> None:
    """Bit for bit, every one of them: those that the learner has."""

    async def main() -> None:
        async with running(make_engine(tmp_path, attach=[server.url], load_by=load_by, bucket_bytes=9000)) as feed:
            await feed.engine.load_weights(snapshot(models, 0))
            feed.submit(8)
            await feed.grow()
            await feed.engine.load_weights(snapshot(models, 1))
            await feed.finish()
            feed.check(models)

    asyncio.run(main())
    (found,) = server.run(lambda client: client.checksums(30))
    assert found == checksums(snapshot(models, 1).tensors)
    assert (
        found["model.norm.weight"]
        == hashlib.sha256(models[1].model.norm.weight.data.numpy().tobytes()).hexdigest()[:16]
    )


def test_the_fullest_cache_is_a_gauge(
    server: Server, another: Server, tmp_path: Path, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared at each look at a server with what they said before."""
    real, said, seen = SGLangClient.load, dict[str, float](), list[tuple[float, float, float]]()

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url, another.url])

        async def load(client: SGLangClient, timeout_s: float = 30.0) -> Load:
            if len(said) == 2:
                seen.append((min(said.values()), max(said.values()), engine.gauges()["server_cache_used"]))
            found = await real(client, timeout_s)
            said[client.url] = found.cache_used
            return found

        monkeypatch.setattr(worker, "PROBE_S", 0.02)
        monkeypatch.setattr(SGLangClient, "load", load)
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(24)
            await feed.finish()

    asyncio.run(main())
    assert any(least > 0 for least, _, _ in seen), "both had something in their cache"
    assert all(gauge == most for _, most, gauge in seen)


def test_an_update_that_breaks_off_is_mended_from_disk(
    server: Server, tmp_path: Path, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two buckets the way to the server is lost. It stays paused until all weights were read and checked."""
    real, sent = WeightPush.send, 0

    async def send(push: WeightPush, bucket: Bucket, *, version: str, flush: bool) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:
            push.drop()
            raise BroadcastFailed("cut")
        await real(push, bucket, version=version, flush=flush)

    async def main() -> None:
        engine = make_engine(tmp_path, attach=[server.url], bucket_bytes=9000)
        async with running(engine) as feed:
            await engine.load_weights(snapshot(models, 0))
            feed.submit(8)
            await feed.grow()
            monkeypatch.setattr(WeightPush, "send", send)
            await engine.load_weights(snapshot(models, 1))
            assert sent == 3
            monkeypatch.setattr(WeightPush, "send", real)
            await feed.grow()
            await engine.load_weights(snapshot(models, 2))  # in a group that is formed anew
            await feed.finish()
            feed.check(models)
            assert engine.gauges()["reloads"] == 1

    asyncio.run(main())
    assert not list(tmp_path.glob("weights/*")), "what was written for the server is gone"


def test_weights_of_another_model_are_refused(server: Server, tmp_path: Path, models: dict[int, Any]) -> None:
    async def main() -> None:
        async with running(make_engine(tmp_path, attach=[server.url])) as feed:
            await feed.engine.load_weights(snapshot(models, 0))
            wrong = snapshot(models, 1)
            norm = wrong.tensors["model.norm.weight"]
            for change, message in [
                ({"model.norm.weight": norm[:-1]}, r"model.norm.weight has shape \(47,\), this model has \(48,\)"),
                ({"model.norm.weight": None}, "the weights lack model.norm.weight"),
            ]:
                tensors = {name: tensor for name, tensor in {**wrong.tensors, **change}.items() if tensor is not None}
                with pytest.raises(ValueError, match=message):
                    await feed.engine.load_weights(type(wrong)(wrong.weights, tensors))
            feed.submit(4)
            await feed.finish()
            feed.check(models)

    asyncio.run(main())


DIES = """
    import asyncio, os, signal, sys, time
    sys.path[:0] = [{engines!r}, {root!r}]
    from pathlib import Path
    from async_rl.engines.sglang.push import WeightPush
    from async_rl.weights.group import Group
    from tests.sglang.sglang_cases import drifting, make_engine, running, snapshot

    real, sent = WeightPush.send, 0

    def die(*_):
        time.sleep({wait})
        os.kill(os.getpid(), signal.SIGKILL)

    async def send(push, bucket, *, version, flush):
        global sent
        sent += 1
        if sent == 3:
            if {wait}:
                Group.broadcast = die  # while the server waits for the bucket
            else:
                die()
        await real(push, bucket, version=version, flush=flush)

    async def main():
        models = drifting(2)
        async with running(make_engine(Path({scratch!r}), attach=[{url!r}], bucket_bytes=9000)) as feed:
            await feed.engine.load_weights(snapshot(models, 0))
            feed.submit(8)
            await feed.grow()
            WeightPush.send = send
            await feed.engine.load_weights(snapshot(models, 1))

    asyncio.run(main())
"""


@pytest.mark.parametrize("wait", [0.5, 0], ids=["within a bucket", "between two buckets"])
def test_a_generator_killed_in_an_update(server: Server, tmp_path: Path, models: dict[int, Any], wait: float) -> None:
    """The server is left paused, in a session, with half the weights. The generator that comes next mends all that."""
    engines = str(ROOT / "tests" / "engines")
    code = DIES.format(engines=engines, root=str(ROOT), wait=wait, scratch=str(tmp_path / "first"), url=server.url)
    died = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert died.returncode == -signal.SIGKILL, died.stderr

    async def main() -> None:
        async with running(make_engine(tmp_path, attach=[server.url])) as feed:
            await feed.engine.load_weights(snapshot(models, 2))
            feed.submit(8)
            await feed.finish()
            feed.check(models)

    asyncio.run(main())
