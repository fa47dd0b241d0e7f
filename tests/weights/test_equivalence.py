"""Whatever way weights travel, the engine computes the same bits as with weights that never left the process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from async_rl.engines.batcher import Batcher
from async_rl.engines.protocol import Request, Snapshot
from async_rl.models.parameters import Layout
from async_rl.weights.distribution import Distribution
from async_rl.weights.files import WeightFiles
from async_rl.weights.process_group import ProcessGroupReceiver, ProcessGroupSender
from async_rl.weights.publisher import Publisher
from async_rl.weights.receiver import Receiver
from async_rl.wire.messages import WeightGroup, WeightsId

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def trained() -> tuple[LlamaForCausalLM, list[dict[str, torch.Tensor]]]:
    """A model, and its parameters before and after one step."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(0, 64, (4, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return model, [before, {name: p.detach().clone() for name, p in model.named_parameters()}]


def outputs(snapshot: Snapshot, dtype: torch.dtype) -> list[tuple[int, bytes, bytes, int]]:
    """Tokens and log-probs of some sampled completions, bit by bit, with the version that sampled them."""
    batcher = Batcher(CONFIG, slots=8, max_length=48, dtype=dtype, device=torch.device("cpu"))
    batcher.swap(snapshot.weights, batcher.prepare(snapshot.tensors))
    batcher.submit([Request(i, (1 + i, 5, 9 + i % 2), 20, key=i) for i in range(8)])
    said: list[tuple[int, bytes, bytes, int]] = []
    while batcher.has_work:
        for chunk in batcher.step():
            versions = {span.version for span in chunk.spans}
            said.append((chunk.request_id, chunk.tokens.tobytes(), chunk.logprobs.tobytes(), versions.pop()))
            assert not versions
    return sorted(said)


class Ends:
    """Both ends of a transport in one process."""

    def __init__(self, transport: str, path: Path, layout: Layout) -> None:
        self.group = ProcessGroupSender(layout) if transport == "process_group" else None
        files = WeightFiles(path, layout, full_every=9 if transport == "delta" else 1)
        self.sender = Distribution(
            files,
            mapped=transport == "shared_memory",
            group=self.group,
            relay=transport != "shared_memory",
        )
        self.announced: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def told(message: Any) -> None:
            loop.call_soon_threadsafe(self.announced.put_nowait, message)

        self.publisher = Publisher(self.sender, told, told)
        member = ProcessGroupReceiver("generator-0", layout) if self.group else None
        self.receiver = Receiver(layout, member)
        self.transport = "http" if transport == "delta" else transport

    async def carry(self, layout: Layout, version: int, parameters: dict[str, torch.Tensor]) -> Snapshot:
        self.publisher.publish(WeightsId(0, version), lambda out: layout.pack(parameters.items(), out))
        while (announce := await self.announced.get()).transport != self.transport:
            pass
        return await self.receiver.fetch(announce)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transport", ["shared_memory", "process_group", "http", "delta"])
def test_one_step_gives_the_same_bits(real: Any, tmp_path: Path, transport: str, dtype: torch.dtype) -> None:
    model, versions = trained()
    layout = Layout.of(model, dtype=dtype)
    direct = [
        outputs(Snapshot(WeightsId(0, v), {n: p.to(dtype) for n, p in named.items()}), dtype)
        for v, named in enumerate(versions)
    ]
    assert [said[:3] for said in direct[0]] != [said[:3] for said in direct[1]], "the step changed nothing"

    async def main() -> None:
        ends = Ends(transport, tmp_path, layout)
        if ends.group is not None:
            members = WeightGroup(1, ["generator-0"], ends.publisher.store)
            ends.publisher.regroup(members)
            await ends.receiver.regroup(members)
        for version, named in enumerate(versions):
            snapshot = await ends.carry(layout, version, named)
            assert snapshot.weights == WeightsId(0, version)
            assert outputs(snapshot, dtype) == direct[version]
        if transport == "delta" and dtype == torch.bfloat16:
            assert ends.receiver.statistics()["deltas"] == 1
        ends.receiver.close()
        await asyncio.to_thread(ends.publisher.close)

    real(main())
