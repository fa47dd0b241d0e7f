"""The thread around the batcher: what goes wrong on it must come out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import configs, make_model, request
from transformers import LlamaConfig

from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.protocol import Snapshot
from async_rl.wire.messages import WeightsId

Real = Callable[[Any], Any]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(configs()["llama"])


def snapshot(model: Any, version: int = 0) -> Snapshot:
    return Snapshot(WeightsId(0, version), dict(model.named_parameters()))


async def posted(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns when the next command waits for the engine's thread."""
    event = asyncio.Event()
    post = engine._post

    def tell(command: Any) -> None:
        post(command)
        event.set()

    monkeypatch.setattr(engine, "_post", tell)
    await event.wait()


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "embedded-engine"]


def test_an_exception_on_the_thread_surfaces(model: Any, real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = EmbeddedEngine(model.config, slots=2)
        engine.start(lambda chunks: None)
        await engine.load_weights(snapshot(model))

        def broken(*_: Any) -> None:
            raise ArithmeticError("broken step")

        monkeypatch.setattr(engine._batcher, "_decode", broken)
        waiter = asyncio.create_task(engine.wait_stopped())
        engine.submit([request(0, (1, 2))])
        with pytest.raises(ArithmeticError, match="broken step"):
            await waiter
        with pytest.raises(RuntimeError, match="the engine has stopped") as error:
            engine.submit([request(1, (1, 2))])
        assert isinstance(error.value.__cause__, ArithmeticError)
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await engine.load_weights(snapshot(model))
        with pytest.raises(ArithmeticError):
            await engine.wait_stopped()
        await engine.stop()
        assert not engine_threads()

    real(main())


def test_a_callback_that_raises_surfaces(model: Any, real: Real) -> None:
    async def main() -> None:
        engine = EmbeddedEngine(model.config, slots=2)

        def deliver(chunks: Any) -> None:
            raise LookupError("no such episode")

        engine.start(deliver)
        await engine.load_weights(snapshot(model))
        engine.submit([request(0, (1, 2))])
        with pytest.raises(LookupError):
            await engine.wait_stopped()
        await engine.stop()

    real(main())


def test_a_load_in_progress_fails_with_the_thread(model: Any, real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = EmbeddedEngine(model.config, slots=2)
        loading = asyncio.create_task(engine.load_weights(snapshot(model)))
        await posted(engine, monkeypatch)

        def broken(*_: Any) -> None:
            raise ArithmeticError("broken swap")

        monkeypatch.setattr(engine._batcher, "swap", broken)
        engine.start(lambda chunks: None)
        with pytest.raises(RuntimeError, match="the engine stopped before the weights were live or gone"):
            await loading
        with pytest.raises(ArithmeticError):
            await engine.wait_stopped()
        await engine.stop()

    real(main())


def test_a_failed_load_leaves_the_old_weights_live(model: Any, real: Real) -> None:
    async def main() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        engine = EmbeddedEngine(model.config, slots=2)
        engine.start(lambda chunks: loop.call_soon_threadsafe(done.set) and None)
        await engine.load_weights(snapshot(model, 3))
        with pytest.raises(ValueError, match=r"the weights lack model\.embed_tokens\.weight"):
            await engine.load_weights(Snapshot(WeightsId(0, 4), {}))
        assert engine.weights == WeightsId(0, 3)
        engine.submit([request(0, (1, 2))])
        await done.wait()
        await engine.stop()

    real(main())


def test_a_cancelled_load_leaves_the_old_weights_live(model: Any, real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = EmbeddedEngine(model.config, slots=2)
        loading = asyncio.create_task(engine.load_weights(snapshot(model, 1)))
        await posted(engine, monkeypatch)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        engine.start(lambda chunks: None)
        await engine.load_weights(snapshot(model, 2))
        assert engine.weights == WeightsId(0, 2)
        await engine.stop()

    real(main())


def test_wait_stopped_can_be_abandoned(model: Any, real: Real) -> None:
    async def main() -> None:
        engine = EmbeddedEngine(model.config, slots=2)
        engine.start(lambda chunks: None)
        waiter = asyncio.create_task(engine.wait_stopped())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        await engine.load_weights(snapshot(model))
        await engine.stop()
        await engine.wait_stopped()

    real(main())


def test_stop_before_start(model: Any, real: Real) -> None:
    async def main() -> None:
        engine = EmbeddedEngine(model.config, slots=2)
        await engine.stop()
        await engine.wait_stopped()

    real(main())


def test_swaps_while_decoding_stall_for_less_than_a_step(model: Any, real: Real) -> None:
    async def main() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        chunks: list[Any] = []

        def deliver(delivered: Any) -> None:
            chunks.extend(delivered)
            if any(chunk.finish_reason for chunk in delivered):
                loop.call_soon_threadsafe(done.set)

        engine = EmbeddedEngine(model.config, slots=2)
        engine.start(deliver)
        await engine.load_weights(snapshot(model))
        engine.submit([request(0, (1, 2), 250)])
        swaps = [await engine.load_weights(snapshot(model, version)) for version in range(1, 8)]
        await done.wait()
        assert max(swap.stall_s for swap in swaps) < 0.05
        versions = [span.version for chunk in chunks for span in chunk.spans]
        assert versions == sorted(set(versions))
        await engine.stop()

    real(main())


def test_memory_is_given_back(real: Real) -> None:
    """Of the process, as its resident set: weights and KV cache leave, and come again."""
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    model = make_model(config)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    cache = 4 * 6 * 4 * 400 * 2 * 512
    """float32 x layers x sequences x positions x (keys, values) x width"""

    async def main() -> None:
        engine = EmbeddedEngine(config, slots=4, max_length=512)
        engine.start(lambda chunks: None)
        engine.submit([request(i, [i + 1] * 400, 100) for i in range(4)])
        swap = await engine.load_weights(snapshot(model))
        while len(swap.sampled) < 4:  # one prompt a step
            swap = await engine.load_weights(snapshot(model))
        left = await engine.release()
        assert swap.nbytes - left.nbytes > 0.9 * (weights + cache), (swap.nbytes, left.nbytes)
        back = await engine.load_weights(snapshot(model, 1))
        assert back.sampled == left.sampled and back.nbytes - left.nbytes > 0.9 * (weights + cache)
        await engine.stop()

    real(main())


if torch.cuda.is_available():  # there is nothing to run it on elsewhere

    def test_a_gpu_is_left_empty(model: Any, real: Real) -> None:
        async def main() -> None:
            engine = EmbeddedEngine(model.config, slots=2, device="cuda")
            assert torch.cuda.memory_allocated() == 0, "it starts off the device"
            engine.start(lambda chunks: None)
            await engine.load_weights(snapshot(model))
            engine.submit([request(i, (1, 2, i), 200) for i in range(2)])
            while len((await engine.load_weights(snapshot(model))).sampled) < 2:
                pass
            loaded = torch.cuda.memory_allocated()
            await engine.release()
            assert torch.cuda.memory_allocated() < max(loaded // 10, 80 << 20), "workspaces of cuBLAS"
            await engine.load_weights(snapshot(model, 1))
            await engine.stop()

        real(main())
