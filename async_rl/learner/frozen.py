"""Models that are only asked: no gradients, no optimiser, and on the GPU only while they are at work if so wished."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

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
        self, module: nn.Module, device: torch.device, *, dtype: str, offload: bool = False,
        precise: Collection[nn.Module] = (), colocated: bool = False, spread_over: Ranks | None = None,
    ) -> None:  # fmt: skip
        """dtype: of the matrix products. offload: keep the weights in host memory between uses of a GPU, not where
        they are sharded. precise: parts that stay in fp32 whatever the dtype. colocated: it starts off the device, and
        learner.offload moves it. spread_over: shard it; a module that has `shard`, as policies and scalars do."""
        module.requires_grad_(False)
        self.module, self._device = module, device
        self._parked = offload and device.type == "cuda" and spread_over is None
        self.moves_with_turns = colocated and not self._parked
        if spread_over is not None:
            cast(PackedPolicy | PackedScalar, module).shard(spread_over)
            return
        if dtype == "bfloat16":
            _lower_matrices(module, precise)
        if self._parked:
            for parameter in module.parameters():
                parameter.data = parameter.data.cpu().pin_memory()
            for buffer in module.buffers():
                buffer.data = buffer.data.to(device)
        elif not self.moves_with_turns:
            module.to(device)

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
