"""Keys and values of every slot, in one tensor that grows with the longest sequence seen, from nothing.

Position-major within a slot ([..., position, keys then values, head size]): a token is written in one contiguous row,
and a prompt is copied to another slot in one piece.
"""

from __future__ import annotations

import torch


class KVCache:
    """[layers, slots, length, 2K, D], zero where nothing was written yet, so that masked positions are finite."""

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        kv_heads: int,
        head_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        length: int = 64,
    ) -> None:
        """`length`: positions that the first `reserve` makes room for at least."""
        self.slots = slots
        self.max_length = max_length
        self._kv_heads = kv_heads
        self._least = min(length, max_length)
        self._store = torch.zeros((layers, slots, 0, 2 * kv_heads, head_size), dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Positions a slot can hold now."""
        return self._store.shape[2]

    @property
    def address(self) -> int:
        """Changes when `reserve` moves the store."""
        return self._store.data_ptr()

    @property
    def store(self) -> torch.Tensor:
        """[layers, slots, length, 2K, D]; no copy."""
        return self._store

    def layer(self, index: int) -> torch.Tensor:
        """[slots, length, 2K, D] of one layer; no copy."""
        return self._store[index]

    def reserve(self, length: int) -> bool:
        """Make room for `length` positions per slot; True if that moved the store."""
        if length <= self.length:
            return False
        grown = min(max(length, 2 * self.length, self._least), self.max_length)
        layers, slots, used, heads, size = self._store.shape
        store = self._store.new_zeros((layers, slots, grown, heads, size))
        store[:, :, :used] = self._store
        self._store = store
        return True

    def release(self) -> None:
        """Forget everything and hold no memory, until the next `reserve`."""
        self._store = self._store[:, :, :0].clone()

    def write(self, layer: int, places_N: torch.Tensor, kv: torch.Tensor) -> None:
        """Store kv [N, 2K, D] at places slot * length + position."""
        self._store[layer].flatten(0, 1).index_copy_(0, places_N, kv)

    def read(self, layer: int, first: int, last: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of slots [first, last) up to `length`, each [slots, K, length, D]; no copy."""
        kv = self._store[layer, first:last, :length].transpose(1, 2)
        return kv[:, : self._kv_heads], kv[:, self._kv_heads :]

    def gather(self, slot: int, length: int) -> torch.Tensor:
        """A copy of the first positions of a slot, [layers, length, 2K, D]."""
        return self._store[:, slot, :length].clone()

    def scatter(self, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Give each of the slots a copy of what `gather` returned."""
        self._store[:, slots, : kv.shape[1]] = kv.unsqueeze(1)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first `length` positions of slots onto others."""
        self._store[:, targets, :length] = self._store[:, sources, :length]
