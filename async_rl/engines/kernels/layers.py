"""Runs all layers of a model for one token per row, by `kernels.phases`: one launch, and one before it.

N rows: slots [0, N). C hidden size, H heads, K key-value heads, D head size, J inner size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from async_rl.engines.decoder import Decoder, DecoderWeights
from async_rl.engines.kernels import one_row
from async_rl.engines.kernels.phases import ALL, embed, one_row_layers, some_rows_layers

AHEAD_C, AHEAD_J = 5, 2
"""Tiles of down, and of gate and up, that one row's products hold in registers before their input is there. An H200,
0.5B of bf16: (5, 2) 467 us for all layers, (2, 1) 470, (1, 1) 525."""
MOST_TILES = 16
"""Of one row's products, which are unrolled; larger models take the matrix units for one row too."""
BLOCK_M = 64
"""Outputs of a product of some rows that a program computes at a time."""
STAGES = 4
"""Tiles on their way to shared memory, where it has room; of float32 half as many."""


class Table:
    """Where the weights of every layer are, for kernels. Valid while they stay."""

    def __init__(self, weights: DecoderWeights) -> None:
        rows: list[list[int]] = []
        for layer in weights.layers:
            tensors = [
                layer.norm, layer.qkv.weight, layer.qkv.bias, layer.qk_norm, layer.out.weight, layer.out.bias,
                layer.mlp_norm, layer.gate_up.weight, layer.gate_up.bias, layer.down.weight, layer.down.bias,
            ]  # fmt: skip
            rows.append([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        self.addresses = torch.tensor(rows, dtype=torch.int64, device=weights.norm.device)
        first = weights.layers[0]
        self.inner = first.down.weight.shape[1]
        self.flags = {
            "QKV_HAS": first.qkv.bias is not None, "QK": first.qk_norm is not None,
            "OUT_HAS": first.out.bias is not None, "GATE_UP_HAS": first.gate_up.bias is not None,
            "DOWN_HAS": first.down.bias is not None,
        }  # fmt: skip


class Layers:
    """Runs all layers of a model."""

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self._decoder = decoder
        self._interpreted = device.type != "cuda"
        """By Triton, one program after the other: a launch per phase then."""
        self._programs, self._shared_bytes = 3, 0
        if not self._interpreted:
            properties: Any = torch.cuda.get_device_properties(device)
            self._programs: int = properties.multi_processor_count
            self._shared_bytes: int = properties.shared_memory_per_block_optin
        self._counter = torch.zeros(1, dtype=torch.int32, device=device)

    def __call__(
        self, table: Table, embedding: torch.Tensor, tokens_N: torch.Tensor, splits: int, rotations: torch.Tensor,
        positions: torch.Tensor, count: torch.Tensor, cache: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [N, C] float32, before the last norm.

        tokens_N, positions: int64, [N] or more; rotations: [positions, D/2, 2] float32; cache: [layers, slots, length,
        2K, D]; rows from `count` [1] on count as at position 0; splits: of the keys of a row.
        """
        d, rows, width = self._decoder, len(tokens_N), embedding.shape[1]
        sizes = self._sizes(rows, width, table.inner, splits, cache.dtype) | table.flags

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=cache.device)

        x_NC = empty(rows, width)
        embed[(rows,)](tokens_N, embedding, x_NC, self._counter, C=width, C_PAD=sizes["C_PAD"], num_warps=4)
        heads = d.heads * d.head_size
        qkv = empty(sizes.get("QKV_PARTS", 1), rows, heads + 2 * d.kv_heads * d.head_size)
        shares = empty(splits, rows, heads, dtype=cache.dtype if splits == 1 else torch.float32)
        mass, inner_NJ = empty(splits, rows, heads), empty(rows, table.inner, dtype=cache.dtype)
        kernel, phases, scratch = one_row_layers, 5, [x_NC, qkv, shares, mass, inner_NJ]
        if "ROWS" in sizes:
            kernel, phases, scratch = some_rows_layers, 6, [*scratch, empty(rows, width, dtype=cache.dtype)]
        arguments = [table.addresses, *scratch, rotations, positions, count, cache, self._counter]
        scalars = [cache.stride(0), rows, cache.shape[2], d.head_size**-0.5, d.eps]
        if self._interpreted:
            for layer in range(d.num_layers):
                for phase in range(phases):
                    kernel[(self._programs,)](*arguments, 1, *scalars, layer, **sizes, PHASE=phase)
        else:
            kernel[(self._programs,)](
                *arguments, d.num_layers, *scalars, 0, **sizes, PHASE=ALL.value, launch_cooperative_grid=True
            )
        return x_NC

    def _sizes(self, rows: int, width: int, inner: int, splits: int, dtype: torch.dtype) -> dict[str, Any]:
        """What the kernels are compiled for."""
        d, programs = self._decoder, self._programs
        heads, qkv = d.heads * d.head_size, (d.heads + 2 * d.kv_heads) * d.head_size
        wide = 2 if dtype == torch.float32 else 1
        sizes: dict[str, Any] = {
            "C": width, "J": inner, "H": d.heads, "K": d.kv_heads, "D": d.head_size, "SPLITS": splits, "BLOCK": 64,
            "PROGRAMS": programs, "C_PAD": triton.next_power_of_2(width), "num_warps": 8,
        }  # fmt: skip
        tiles = triton.cdiv(triton.cdiv(inner, programs), 8) * triton.cdiv(width, 4 // wide * one_row.CHUNK)
        if rows == 1 and tiles <= MOST_TILES:
            chunks = [min(triton.next_power_of_2(triton.cdiv(k, one_row.CHUNK)), 4 // wide) for k in (width, heads)]
            return sizes | {
                "ROWS_QKV": 16 if 8 < triton.cdiv(qkv, programs) <= 16 else 8, "ROWS_C": 8, "ROWS_J": 8,
                "CHUNKS_C": chunks[0], "CHUNKS_H": chunks[1], "CHUNKS_J": 4 // wide, "AHEAD_C": AHEAD_C,
                "AHEAD_J": AHEAD_J,
            }  # fmt: skip
        block_k = 128 // wide
        padded = max(16, triton.next_power_of_2(rows))
        stage_bytes = block_k * (2 * BLOCK_M + padded) * dtype.itemsize
        stages = max(1, min(STAGES // wide, (self._shared_bytes - 8192) // stage_bytes))
        return sizes | {
            "ROWS": padded, "QKV_PARTS": self._parts(qkv, width, block_k),
            "OUT_PARTS": self._parts(width, heads, block_k), "DOWN_PARTS": self._parts(width, inner, block_k),
            "BLOCK_M": BLOCK_M, "BLOCK_K": block_k,
            "SHARE": triton.cdiv(triton.cdiv(inner, programs), BLOCK_M) * BLOCK_M, "STAGES": stages,
        }  # fmt: skip

    def _parts(self, outputs: int, inputs: int, block_k: int) -> int:
        """Into how many parts of the inputs a product is cut, so that every program has one."""
        blocks = triton.cdiv(inputs, block_k)
        wanted = max(1, min(self._programs // triton.cdiv(outputs, BLOCK_M), blocks))
        return triton.cdiv(blocks, triton.cdiv(blocks, wanted))
