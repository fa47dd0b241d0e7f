"""What comes back from a device, so that the device never waits for the host: the flags of a step are read while the
next one runs, and tokens are copied on a stream of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Protocol

import torch


class Flags(Protocol):
    def read(self) -> list[int]:
        """Indices of the flags that are set; waits for the step that set them. Repeats itself."""
        ...


class Readback(Protocol):
    def flags(self, due_N: torch.Tensor) -> Flags:
        """Copy the flags of the step just launched to the host. Two copies can be under way."""
        ...

    def mark(self) -> None:
        """`aside` waits for what has been launched up to now."""
        ...

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Copies in it do not wait for what was launched after the mark."""
        ...

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """For another thread: work in it delays no step. It is done at the end."""
        ...


class HostFlags:
    def __init__(self, due_N: torch.Tensor) -> None:
        self._due_N = due_N

    def read(self) -> list[int]:
        return self._due_N.nonzero().flatten().tolist()


class HostReadback:
    """The device is the host."""

    def flags(self, due_N: torch.Tensor) -> Flags:
        return HostFlags(due_N.clone())

    def mark(self) -> None:
        pass

    @contextlib.contextmanager
    def aside(self) -> Generator[None]:
        yield

    @contextlib.contextmanager
    def apart(self) -> Generator[None]:
        yield


class CudaFlags:
    def __init__(self, place_N: torch.Tensor, event: torch.cuda.Event) -> None:
        self._place_N, self._event = place_N, event
        self._found: list[int] | None = None

    def read(self) -> list[int]:
        if self._found is None:
            self._event.synchronize()
            self._found = self._place_N.nonzero().flatten().tolist()
        return self._found


class CudaReadback:
    """Steps are launched on the current stream of the engine's thread."""

    def __init__(self, device: torch.device, slots: int) -> None:
        self._device = device
        self._aside = torch.cuda.Stream(device)
        self._places = [torch.empty(slots, dtype=torch.bool, pin_memory=True) for _ in range(2)]
        self._mark: torch.cuda.Event | None = None

    def flags(self, due_N: torch.Tensor) -> Flags:
        self._places.reverse()
        place_N = self._places[0][: len(due_N)]
        place_N.copy_(due_N, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return CudaFlags(place_N, event)

    def mark(self) -> None:
        self._mark = torch.cuda.Event()
        self._mark.record(torch.cuda.current_stream(self._device))

    @contextlib.contextmanager
    def aside(self) -> Generator[None]:
        if self._mark is not None:
            self._aside.wait_event(self._mark)
        with torch.cuda.stream(self._aside):
            yield

    @contextlib.contextmanager
    def apart(self) -> Generator[None]:
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def make_readback(device: torch.device, slots: int) -> Readback:
    return CudaReadback(device, slots) if device.type == "cuda" else HostReadback()
