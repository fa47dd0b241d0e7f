"""CUDA graphs of work that is repeated with the same tensors. Needs a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Graphs:
    """One graph per key. Results must go to tensors that exist before: graphs share their temporary memory, since one
    runs after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[object, torch.cuda.CUDAGraph] = {}
        self._warm: set[object] = set()
        self._stream: torch.cuda.Stream | None = None
        self.captured = 0
        """Graphs captured so far."""
        self.capture_s = 0.0

    def __call__(self, key: object, work: Callable[[], None]) -> None:
        """Do the work: as it is the first time, recorded the second, replayed from then on."""
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._warm:
                work()
                self._warm.add(key)
                return
            graph = self._graphs[key] = self._capture(work)
        graph.replay()

    def clear(self) -> None:
        """Forget the graphs, and free their memory."""
        if self._graphs:
            torch.cuda.current_stream(self._device).synchronize()  # a replay may be under way
            for graph in self._graphs.values():
                graph.reset()
            self._graphs.clear()

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        started = time.perf_counter()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        pool = next((known.pool() for known in self._graphs.values()), None)
        with torch.cuda.stream(self._stream):
            # Other threads prepare weights meanwhile: what they do to the device is no part of this, and no error.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        self.captured += 1
        self.capture_s += time.perf_counter() - started
        return graph
