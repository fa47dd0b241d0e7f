"""Memory that is given back, so that another process of the device can have it, and how much a process holds."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch


def give_back(device: torch.device) -> None:
    """Return what was freed: on a GPU the workspaces of cuBLAS and the caching allocator's blocks, in host memory the
    free pages of the heap."""
    if device.type == "cuda":
        # Not public: where it is missing, a few MB stay.
        clear = getattr(getattr(torch, "_C"), "_cuda_clearCublasWorkspaces", None)  # noqa: B009
        if clear is not None:
            clear()
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Steps of ever different lengths leave holes between what stays: a learner of SmolLM2 grew by half within forty
    steps."""
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def held(device: torch.device) -> int:
    """Bytes of the device that this process holds: of a GPU what torch has reserved (the CUDA context, a few hundred
    MB, is not in it), of the CPU the resident set without pages that are a file's."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
