"""Models that are only asked: no gradients, no optimiser, and on the GPU only while they are at work if so wished."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager

import torch
from torch import nn

from async_rl.config import Run
from async_rl.learner.distributed import Ranks
from async_rl.learner.policy import PackedPolicy
from async_rl.learner.scalar import PackedScalar
from async_rl.learner.sharding import spread


class Frozen:
    """`with frozen.at_work(): module(...)`. The module is on `device` then, its gradients are off always.

    Under bfloat16 autocast its matrices are kept in bfloat16: autocast would round them in every pass, so outputs are
    the same bit for bit, in half the memory. What autocast leaves alone (embeddings, norms) stays in fp32. Under
    `learner.sharding = "full"` it is spread over the ranks as what is trained is.
    """

    def __init__(
        self, module: PackedPolicy | PackedScalar, run: Run, ranks: Ranks, *, offload: bool,
        precise: Collection[nn.Module] = (),
    ) -> None:  # fmt: skip
        """offload: keep the weights in host memory between uses of a GPU; of no use where they are sharded. precise:
        parts that stay in fp32 whatever the dtype."""
        module.requires_grad_(False)
        self.module, self._device = module, ranks.device
        sharded = run.learner.sharding == "full" and ranks.size > 1
        self._parked = offload and self._device.type == "cuda" and not sharded
        self.moves_with_turns = run.colocated and not self._parked
        """It starts off the device, and learner.offload moves it."""
        if sharded:
            module.shard(ranks)
            return
        if run.learner.dtype == "bfloat16":
            _lower_matrices(module, precise)
        if self._parked:
            for parameter in module.parameters():
                parameter.data = parameter.data.cpu().pin_memory()
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self._device)
        elif not self.moves_with_turns:
            module.to(self._device)

    @contextmanager
    def at_work(self) -> Generator[None]:
        with torch.no_grad():
            if not self._parked:
                try:
                    yield
                finally:
                    spread(self.module)
                return
            homes = [parameter.data for parameter in self.module.parameters()]
            for parameter, home in zip(self.module.parameters(), homes, strict=True):
                parameter.data = home.to(self._device, non_blocking=True)
            try:
                yield
            finally:  # nothing has changed there: the copy on the GPU is let go
                for parameter, home in zip(self.module.parameters(), homes, strict=True):
                    parameter.data = home


def _lower_matrices(module: nn.Module, precise: Collection[nn.Module]) -> None:
    """Those that only a matrix product reads: not one that is an embedding too."""
    embeddings = {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}
    for part in module.modules():
        if isinstance(part, nn.Linear) and part not in precise and part.weight not in embeddings:
            part.to(torch.bfloat16)
