"""Which dtype `auto` means on this machine."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import torch

from async_rl.config import Generator, Learner, Run

Section = TypeVar("Section", Generator, Learner)


def settle(run: Run) -> Run:
    """The recipe with every dtype named; every process that computes calls this first."""
    return msgspec.structs.replace(run, generator=settle_section(run.generator), learner=settle_section(run.learner))


def settle_section(section: Section) -> Section:
    """auto is bfloat16 on a GPU and on a CPU that multiplies in it (AMX, AVX512-BF16), else float32: without such
    instructions bfloat16 is emulated, and training SmolLM2-135M takes three times as long as in float32.
    """
    return msgspec.structs.replace(section, dtype=_name(section.dtype, section.device))


def _name(dtype: str, device: str) -> str:
    if dtype != "auto":
        return dtype
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    cpu = torch.cpu.get_capabilities()
    return "bfloat16" if cuda or cpu.get("amx_bf16") or cpu.get("avx512_bf16") else "float32"
