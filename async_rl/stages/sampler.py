"""Completions sampled by the embedded engine in this process, for a stage that trains on what a model says.

    with Sampler(recipe.generator, config, stop_tokens) as sampler:
        completions = sampler.sample(prompts, weights, keys, max_new_tokens=64, temperature=1.0)

The tokens depend on the weights, the prompts and the keys alone: all prompts enter the engine in one call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from async_rl import config
from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.protocol import Chunk, Request, Snapshot
from async_rl.errors import AsyncRLError, UserError
from async_rl.stages.local_engine import choose_device
from async_rl.wire.messages import WeightsId

PROGRESS_TIMEOUT_S = 300.0
"""So long may the engine take from one chunk of tokens to the next."""
CHUNK_TOKENS = 32


class SamplingStuck(AsyncRLError):
    """The engine delivers nothing any more."""


class Sampler:
    """One engine, started at the first use; `close` ends it."""

    def __init__(self, generator: config.Generator, model: PreTrainedConfig, stop: frozenset[int]) -> None:
        self._runner = asyncio.Runner()
        self._engine = EmbeddedEngine(
            model,
            slots=generator.slots,
            max_length=generator.max_length,
            dtype=getattr(torch, generator.dtype),
            device=choose_device(generator.device),
        )
        self._stop, self._loads = stop, 0
        self._news: asyncio.Queue[Sequence[Chunk]] = asyncio.Queue()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        weights: Mapping[str, Tensor],
        keys: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> list[list[int]]:
        """One completion for each prompt, in order; it ends with a stop token, or after max_new_tokens.

        weights: under Hugging Face names; copied. keys: 64 bits each, what decides the draws (engines.sampling).

        Raises:
            UserError: a prompt does not fit into the engine.
            SamplingStuck: no token came for PROGRESS_TIMEOUT_S.
        """
        requests = [
            Request(number, tuple(prompt), max_new_tokens, key, temperature, 0, self._stop, CHUNK_TOKENS)
            for number, (prompt, key) in enumerate(zip(prompts, keys, strict=True))
        ]
        return self._runner.run(self._sample(requests, weights))

    def close(self) -> None:
        self._runner.run(self._engine.stop())
        self._runner.close()

    async def _sample(self, requests: list[Request], weights: Mapping[str, Tensor]) -> list[list[int]]:
        loop = asyncio.get_running_loop()
        if not self._loads:

            def deliver(chunks: Sequence[Chunk]) -> None:
                loop.call_soon_threadsafe(self._news.put_nowait, chunks)

            self._engine.start(deliver)
        self._loads += 1
        broken = asyncio.ensure_future(self._engine.wait_stopped())
        try:
            await self._engine.load_weights(Snapshot(WeightsId(0, self._loads), weights))
            self._engine.submit(requests)
            return await self._gather(len(requests), broken)
        except ValueError as error:
            raise UserError(f"distill: the engine cannot sample: {error}") from None
        finally:
            broken.cancel()

    async def _gather(self, count: int, broken: asyncio.Future[None]) -> list[list[int]]:
        completions, running = [list[int]() for _ in range(count)], count
        while running:
            news = asyncio.ensure_future(self._news.get())
            done, _ = await asyncio.wait(
                {news, broken}, timeout=PROGRESS_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if news not in done:
                news.cancel()
                if broken in done:
                    broken.result()
                raise SamplingStuck(
                    f"the engine sampled nothing for {PROGRESS_TIMEOUT_S:.0f} s; {running} of {count} prompts wait"
                )
            for chunk in news.result():
                completions[chunk.request_id] += chunk.tokens.tolist()
                running -= chunk.finish_reason is not None
        return completions
