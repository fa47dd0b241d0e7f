"""Parameters under their Hugging Face names, and their places in one contiguous buffer: what weight transports move.

layout = Layout.of(model, dtype=torch.bfloat16)         # learner; Layout.of(config, ...) where no weights are yet
buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
layout.pack(model.named_parameters(), buffer)
layout.views(buffer)["model.norm.weight"]               # no copy
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in the buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Bytes from the start of the buffer."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies. Both ends compute it from the same config and dtype: compare `fingerprint`.

    Tensors lie without gaps, wide dtypes first, so that each is aligned to its own: the layout of a safetensors file.
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, model: PreTrainedModel | PreTrainedConfig, *, dtype: torch.dtype | None = None) -> Layout:
        """Parameters in the model's own order, a tied one once; all of them as `dtype` where one is given."""
        if isinstance(model, PreTrainedConfig):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(model)
        return cls.pack_up((name, tuple(p.shape), dtype or p.dtype) for name, p in model.named_parameters())

    @classmethod
    def pack_up(cls, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> Layout:
        """Of (name, shape, dtype); the order is kept among those of equal width."""
        entries: list[Entry] = []
        offset = 0
        for name, shape, dtype in sorted(tensors, key=lambda tensor: -tensor[2].itemsize):
            entries.append(Entry(name, shape, dtype, offset))
            offset += entries[-1].nbytes
        return cls(tuple(entries))

    @cached_property
    def nbytes(self) -> int:
        """Size of the buffer."""
        last = self.entries[-1]
        return last.offset + last.nbytes

    @cached_property
    def width(self) -> int:
        """Bytes of the narrowest dtype: the buffer is a whole number of elements of this width."""
        return min(entry.dtype.itemsize for entry in self.entries)

    @cached_property
    def fingerprint(self) -> int:
        """CRC-32 of names, shapes, dtypes and offsets."""
        return zlib.crc32(repr([(e.name, e.shape, str(e.dtype), e.offset) for e in self.entries]).encode())

    @torch.no_grad()
    def pack(self, named: Iterable[tuple[str, torch.Tensor]], out: torch.Tensor) -> None:
        """Copy the tensors into `out` ([nbytes] uint8, any device), cast to the layout's dtypes.

        Names the layout does not have (a tied head) are left out. Equal weights give equal buffers.

        Raises:
            ValueError: a tensor is missing or has another shape, or `out` is too small.
        """
        views = self.views(out)
        stream: torch.cuda.Stream | None = None
        for name, tensor in named:
            view = views.pop(name, None)
            if view is None:
                continue
            if view.shape != tensor.shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}, the layout has {tuple(view.shape)}")
            if tensor.is_cuda:  # cast there: torch would move the wide numbers and cast them on the host
                stream = torch.cuda.current_stream(tensor.device)
                view.copy_(tensor.to(view.dtype), non_blocking=True)
            else:
                view.copy_(tensor)
        if stream is not None:
            stream.synchronize()
        if views:
            raise ValueError(f"{len(views)} tensors of the layout were not given, the first is {next(iter(views))}")

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> tensor that shares memory with `buffer` ([nbytes] uint8 or more)."""
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() < self.nbytes:
            raise ValueError(f"a buffer of {self.nbytes} uint8 is needed, not {tuple(buffer.shape)} {buffer.dtype}")
        return {e.name: buffer[e.offset : e.offset + e.nbytes].view(e.dtype).view(e.shape) for e in self.entries}
