"""What training holds on its device, moved to host memory while another process has the device, and back.

                          learner on a GPU                          learner on the CPU
    parameters, buffers   copied to pinned host memory, freed       stay: the device is host memory
    optimiser state       the same                                  stays
    gradients             freed; the next step makes them anew      the same
    activations           freed already, by the backward pass       the same

The CUDA context stays. Pinned buffers are kept for the next time: pinning costs more
than copying. A module that starts off the device is built on the CPU and moved by the first `enter`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from async_rl.learner.optimisation import Optimisation
from async_rl.models.memory import give_back, held


@dataclass(frozen=True, slots=True)
class Resident:
    """A module, and what optimises it; None: nothing does."""

    module: nn.Module
    optimisation: Optimisation | None = None


class Offload:
    """Of everything that a learner process has on its device. Between two steps only."""

    def __init__(self, residents: Sequence[Resident], device: torch.device) -> None:
        self._residents, self._device = residents, device
        self._pinned: dict[int, Tensor] = {}
        """id of a tensor that lives as long as the learner -> its place in host memory"""

    def leave(self) -> int:
        """Free the device. Returns the bytes of it that this process still holds (models.memory.held)."""
        for resident in self._residents:
            if resident.optimisation is not None:
                resident.optimisation.release_gradients()
        if self._device.type == "cuda":
            for tensor in self._tensors():
                tensor.data = self._host_place(tensor).copy_(tensor.data, non_blocking=True)
            torch.cuda.synchronize(self._device)  # from here on the host reads what was copied
        give_back(self._device)
        return held(self._device)

    def enter(self) -> int:
        """Everything but gradients is on the device. Returns the bytes of it that this process holds."""
        for tensor in self._tensors():
            tensor.data = tensor.data.to(self._device, non_blocking=True)
        return held(self._device)

    def _tensors(self) -> Iterator[Tensor]:
        """Each is the same object for as long as the learner lives; what it holds changes its place."""
        for resident in self._residents:
            yield from resident.module.parameters()
            yield from resident.module.buffers()
            if resident.optimisation is not None:
                for state in resident.optimisation.optimizer.state.values():
                    yield from (value for value in state.values() if isinstance(value, Tensor))

    def _host_place(self, tensor: Tensor) -> Tensor:
        place = self._pinned.get(id(tensor))
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            place = self._pinned[id(tensor)] = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
            )
        return place
