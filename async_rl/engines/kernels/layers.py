"""All layers of a decode step in one launch: a program per multiprocessor, which takes its share of every product and
every attention, and waits for the others in between (kernels.grid). While it waits, the weights of what comes next are
on their way.

A layer has five phases: q, k and v; attention; its output; gate, up and their product; down. Hidden states are kept in
float32, in a tensor that attention's output and down add to. One row needs no matrix units (kernels.one_row); more do
(kernels.some_rows): their q, k, v come in parts, which attention sums up, and what is added to hidden states is added
in whatever order, so that a step of the same inputs may differ in the last bits of float32.

N rows: slots [0, N). C hidden size, H heads, K key-value heads, D head size, J outputs of the gated product, S splits
of keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from async_rl.engines.decoder import Decoder, DecoderWeights
from async_rl.engines.kernels import grid, one_row, some_rows
from async_rl.engines.kernels.attention import attend_unit, keys_of, load_block

ALL = tl.constexpr(-1)
"""All phases, for all layers; else one phase of one layer, and no waiting."""
AHEAD_C, AHEAD_J = 5, 2
"""Tiles of down and of gate and up that one row's products hold in registers before their input is there."""
MOST_TILES = 16
"""Of one row's products, which are unrolled."""
BLOCK_M = 64
"""Outputs of a product of some rows that a program computes at a time."""
FIELDS = tl.constexpr(11)
NORM, QKV, QKV_BIAS, QK_NORM, OUT, OUT_BIAS, MLP_NORM, GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS = map(
    tl.constexpr, range(11)
)
"""Columns of the table of addresses."""


@triton.jit
def _pointer(address, dtype: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _at(table, layer, FIELD: tl.constexpr, dtype: tl.constexpr):
    return _pointer(tl.load(table + layer * FIELDS + FIELD), dtype)


@triton.jit
def _arrive(counter, LONE: tl.constexpr):
    if not LONE:
        grid.arrive(counter)


@triton.jit
def _wait(counter, arrivals, LONE: tl.constexpr):
    """Returns how many have arrived at the next one."""
    if not LONE:
        grid.wait(counter, arrivals)
    return arrivals + tl.num_programs(0)


@triton.jit
def _load(vector, places, end, THERE: tl.constexpr):
    """Of a bias, in float32; zeros if there is none."""
    if THERE:
        return tl.load(vector + places, mask=places < end, other=0.0).to(tl.float32)
    else:
        return tl.zeros(places.shape, tl.float32)


@triton.jit
def _attend(
    counter, arrivals, parts, x, bias, norm, shares, mass, rotations, positions, in_use, position, cache, N, length,
    scale, eps, PARTS: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, BIAS: tl.constexpr,
    QK: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    LONE: tl.constexpr,
):  # fmt: skip
    """position: of this program's first row."""
    G: tl.constexpr = H // K
    G_PAD: tl.constexpr = max(16, triton.next_power_of_2(H // K))
    units = N * K * SPLITS
    unit = tl.program_id(0)
    row, head, split = unit // (K * SPLITS), unit // SPLITS % K, unit % SPLITS
    slot = cache + row * (length.to(tl.int64) * 2 * K * D)
    first, last = keys_of(split, position, SPLITS, BLOCK)
    k, v = load_block(slot, head, first, last, K, D, BLOCK)
    arrivals = _wait(counter, arrivals, LONE)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row, head, split = unit // (K * SPLITS), unit // SPLITS % K, unit % SPLITS
        slot = cache + row * (length.to(tl.int64) * 2 * K * D)
        attend_unit(
            k, v, parts, x, bias, norm, rotations, slot, shares, mass, row, head, split, position, N, scale, eps,
            PARTS, C, C_PAD, BIAS, QK, H, K, G, G_PAD, D, SPLITS, BLOCK,
        )  # fmt: skip
        following = unit + tl.num_programs(0)
        row, head, split = following // (K * SPLITS), following // SPLITS % K, following % SPLITS
        position = tl.load(positions + row, mask=(following < units) & (row < in_use), other=0)
        slot = cache + row * (length.to(tl.int64) * 2 * K * D)
        first, last = keys_of(split, position, SPLITS, BLOCK)
        k, v = load_block(slot, head, first, last, K, D, BLOCK)
    return arrivals


@triton.jit
def _one(
    table, x, qkv, shares, mass, h, inner, rotations, positions, count, cache, counter, layers, cache_stride, N, length,
    scale, eps, first_layer,
    C: tl.constexpr, J: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, QKV_HAS: tl.constexpr,
    QK: tl.constexpr, OUT_HAS: tl.constexpr, GATE_UP_HAS: tl.constexpr, DOWN_HAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, ROWS_QKV: tl.constexpr, ROWS_C: tl.constexpr, ROWS_J: tl.constexpr,
    CHUNKS_C: tl.constexpr, CHUNKS_H: tl.constexpr, CHUNKS_J: tl.constexpr, AHEAD_C: tl.constexpr,
    AHEAD_J: tl.constexpr,
    C_PAD: tl.constexpr, FETCH: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """One row."""
    LONE: tl.constexpr = PHASE != ALL
    HD: tl.constexpr = H * D
    QKV_OUT: tl.constexpr = (H + 2 * K) * D
    dtype: tl.constexpr = cache.dtype.element_ty
    pid = tl.program_id(0)
    arrivals = 0
    in_use = tl.load(count)
    row = pid // (K * SPLITS)
    position = tl.load(positions + row, mask=row < tl.minimum(in_use, N), other=0)
    first_key, last_key = keys_of(pid % SPLITS, position, SPLITS, BLOCK)
    qkv_share: tl.constexpr = (QKV_OUT + PROGRAMS - 1) // PROGRAMS
    qkv_row, qkv_end = pid * qkv_share, tl.minimum((pid + 1) * qkv_share, QKV_OUT)
    c_share: tl.constexpr = (C + PROGRAMS - 1) // PROGRAMS
    c_row, c_end = pid * c_share, tl.minimum((pid + 1) * c_share, C)
    j_share: tl.constexpr = (J + PROGRAMS - 1) // PROGRAMS
    j_row, j_end = pid * j_share, tl.minimum((pid + 1) * j_share, J)
    qkv_m, c_m, j_m = qkv_row + tl.arange(0, ROWS_QKV), c_row + tl.arange(0, ROWS_C), j_row + tl.arange(0, ROWS_J)
    last_layer = first_layer + layers - 1
    qkv_address = tl.load(table + first_layer * FIELDS + QKV)
    norm_address = tl.load(table + first_layer * FIELDS + NORM)
    bias_address = tl.load(table + first_layer * FIELDS + QKV_BIAS)
    for layer in range(first_layer, first_layer + layers):
        out_weight, out_bias = _at(table, layer, OUT, dtype), _at(table, layer, OUT_BIAS, dtype)
        mlp_norm, qk_norm = _at(table, layer, MLP_NORM, dtype), _at(table, layer, QK_NORM, dtype)
        gate_up, gate_up_bias = _at(table, layer, GATE_UP, dtype), _at(table, layer, GATE_UP_BIAS, dtype)
        down, down_bias = _at(table, layer, DOWN, dtype), _at(table, layer, DOWN_BIAS, dtype)
        layer_cache = cache + layer * cache_stride.to(tl.int64)
        if PHASE == ALL or PHASE == 0:
            weight, norm = _pointer(qkv_address, dtype), _pointer(norm_address, dtype)
            bias = _pointer(bias_address, dtype)
            w = one_row.first_tiles(weight, qkv_row, qkv_end, 1, C, ROWS_QKV, CHUNKS_C)
            factors = one_row.block_of(norm, 0, C, CHUNKS_C)
            bias_row = _load(bias, qkv_m, qkv_end, QKV_HAS)
            if FETCH and not LONE:
                head = pid // SPLITS % K
                keys = layer_cache + row * (length.to(tl.int64) * 2 * K * D) + head * D
                grid.prefetch_tile(keys, first_key, tl.minimum(first_key + BLOCK, last_key), 0, 2 * K * D, BLOCK, D)
                grid.prefetch_tile(
                    keys + K * D, first_key, tl.minimum(first_key + BLOCK, last_key), 0, 2 * K * D, BLOCK, D
                )
                grid.prefetch_rows(out_weight, c_row, c_end, HD)
                if FETCH > 1:
                    grid.prefetch_rows(gate_up, j_row, j_end, C)
                    grid.prefetch_rows(gate_up + J * C, j_row, j_end, C)
            arrivals = _wait(counter, arrivals, LONE)
            one_row.products(
                x, norm, factors, weight, bias_row, bias, qkv, mass, w, w, qkv_row, qkv_end, eps, QKV_OUT,
                C, True, QKV_HAS, False, False, 1, qkv_share, 1, ROWS_QKV, CHUNKS_C,
            )  # fmt: skip
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 1:
            arrivals = _attend(
                counter, arrivals, qkv, x, qkv, qk_norm, shares, mass, rotations, positions, in_use, position,
                layer_cache, N, length, scale, eps,
                1, 0, C_PAD, False, QK, H, K, D, SPLITS, BLOCK, LONE,
            )  # fmt: skip
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 2:
            w = one_row.first_tiles(out_weight, c_row, c_end, 1, HD, ROWS_C, CHUNKS_H)
            bias_row = _load(out_bias, c_m, c_end, OUT_HAS)
            if FETCH == 1 and not LONE:
                grid.prefetch_rows(gate_up, j_row, j_end, C)
                grid.prefetch_rows(gate_up + J * C, j_row, j_end, C)
            arrivals = _wait(counter, arrivals, LONE)
            one_row.products(
                shares, x, x, out_weight, bias_row, out_bias, x, mass, w, w, c_row, c_end, eps, C,
                HD, False, OUT_HAS, False, True, SPLITS, c_share, 1, ROWS_C, CHUNKS_H,
            )  # fmt: skip
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 3:
            following = tl.minimum(layer + 1, last_layer)
            qkv_address = tl.load(table + following * FIELDS + QKV)
            norm_address = tl.load(table + following * FIELDS + NORM)
            bias_address = tl.load(table + following * FIELDS + QKV_BIAS)
            w = one_row.first_tiles(gate_up, j_row, j_end, AHEAD_J, C, ROWS_J, CHUNKS_C)
            w_up = one_row.first_tiles(gate_up + J * C, j_row, j_end, AHEAD_J, C, ROWS_J, CHUNKS_C)
            factors = one_row.block_of(mlp_norm, 0, C, CHUNKS_C)
            bias_row = _load(gate_up_bias, j_m, j_end, GATE_UP_HAS)
            if FETCH and not LONE:
                grid.prefetch_rows(down, c_row, c_end, J)
            arrivals = _wait(counter, arrivals, LONE)
            one_row.products(
                x, mlp_norm, factors, gate_up, bias_row, gate_up_bias, inner, mass, w, w_up, j_row, j_end, eps, J,
                C, True, GATE_UP_HAS, True, False, 1, j_share, AHEAD_J, ROWS_J, CHUNKS_C,
            )  # fmt: skip
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 4:
            w = one_row.first_tiles(down, c_row, c_end, AHEAD_C, J, ROWS_C, CHUNKS_J)
            bias_row = _load(down_bias, c_m, c_end, DOWN_HAS)
            if FETCH and not LONE:
                grid.prefetch_rows(_pointer(qkv_address, dtype), qkv_row, qkv_end, C)
            arrivals = _wait(counter, arrivals, LONE)
            one_row.products(
                inner, x, x, down, bias_row, down_bias, x, mass, w, w, c_row, c_end, eps, C,
                J, False, DOWN_HAS, False, True, 1, c_share, AHEAD_C, ROWS_C, CHUNKS_J,
            )  # fmt: skip
            _arrive(counter, LONE)


@triton.jit
def _fetch_part(weight, M: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_K: tl.constexpr, LONE: tl.constexpr, FETCH: tl.constexpr):  # fmt: skip
    """What this program multiplies first in `some_rows.parts`, to L2."""
    if FETCH and not LONE:
        BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
        WIDE: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS * BLOCK_K
        TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
        part = tl.program_id(0) // TILES
        if part < PARTS:
            grid.prefetch_tile(weight, tl.program_id(0) % TILES * BLOCK_M, M, part * WIDE, K, BLOCK_M, WIDE)


@triton.jit
def _some(
    table, x, qkv, shares, mass, h, inner, rotations, positions, count, cache, counter, layers, cache_stride, N, length,
    scale, eps, first_layer,
    C: tl.constexpr, J: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, QKV_HAS: tl.constexpr,
    QK: tl.constexpr, OUT_HAS: tl.constexpr, GATE_UP_HAS: tl.constexpr, DOWN_HAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, QKV_PARTS: tl.constexpr, OUT_PARTS: tl.constexpr,
    DOWN_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, SHARE: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    C_PAD: tl.constexpr, FETCH: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Up to ROWS rows."""
    LONE: tl.constexpr = PHASE != ALL
    HD: tl.constexpr = H * D
    QKV_OUT: tl.constexpr = (H + 2 * K) * D
    dtype: tl.constexpr = cache.dtype.element_ty
    pid = tl.program_id(0)
    arrivals = 0
    in_use = tl.load(count)
    row = pid // (K * SPLITS)
    position = tl.load(positions + row, mask=row < tl.minimum(in_use, N), other=0)
    j_row, j_end = tl.minimum(pid * SHARE, J), tl.minimum((pid + 1) * SHARE, J)
    last_layer = first_layer + layers - 1
    qkv_address = tl.load(table + first_layer * FIELDS + QKV)
    norm_address = tl.load(table + first_layer * FIELDS + NORM)
    bias_address = tl.load(table + first_layer * FIELDS + QKV_BIAS)
    c = tl.arange(0, C_PAD)
    for layer in range(first_layer, first_layer + layers):
        out_weight, out_bias = _at(table, layer, OUT, dtype), _at(table, layer, OUT_BIAS, dtype)
        mlp_norm, qk_norm = _at(table, layer, MLP_NORM, dtype), _at(table, layer, QK_NORM, dtype)
        gate_up, gate_up_bias = _at(table, layer, GATE_UP, dtype), _at(table, layer, GATE_UP_BIAS, dtype)
        down, down_bias = _at(table, layer, DOWN, dtype), _at(table, layer, DOWN_BIAS, dtype)
        weight, norm = _pointer(qkv_address, dtype), _pointer(norm_address, dtype)
        bias = _pointer(bias_address, dtype)
        if PHASE == ALL or PHASE == 0:
            arrivals = _wait(counter, arrivals, LONE)
            some_rows.parts(
                x, norm, weight, weight, qkv, mass, N, QKV_OUT,
                C, True, False, False, 1, QKV_PARTS, ROWS, BLOCK_M, BLOCK_K,
                STAGES if C > QKV_PARTS * BLOCK_K else 1,
            )  # fmt: skip
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 1:
            _fetch_part(out_weight, C, OUT_PARTS, HD, BLOCK_M, BLOCK_K, LONE, FETCH)
            arrivals = _attend(
                counter, arrivals, qkv, x, bias, qk_norm, shares, mass, rotations, positions, in_use, position,
                cache + layer * cache_stride.to(tl.int64), N, length, scale, eps,
                QKV_PARTS, C, C_PAD, QKV_HAS, QK, H, K, D, SPLITS, BLOCK, LONE,
            )  # fmt: skip
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 2:
            if FETCH and not LONE:
                grid.prefetch_rows(gate_up, j_row, j_end, C)
                grid.prefetch_rows(gate_up + J * C, j_row, j_end, C)
            arrivals = _wait(counter, arrivals, LONE)
            some_rows.parts(
                shares, x, out_weight, out_bias, x, mass, N, C,
                HD, False, OUT_HAS, True, SPLITS, OUT_PARTS, ROWS, BLOCK_M, BLOCK_K,
                STAGES if HD > OUT_PARTS * BLOCK_K else 1,
            )  # fmt: skip
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 3:
            factors = tl.load(mlp_norm + c, mask=c < C, other=0.0).to(tl.float32)
            arrivals = _wait(counter, arrivals, LONE)
            some_rows.normed(x, factors, h, N, eps, C, C_PAD)
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 4:
            following = tl.minimum(layer + 1, last_layer)
            qkv_address = tl.load(table + following * FIELDS + QKV)
            norm_address = tl.load(table + following * FIELDS + NORM)
            bias_address = tl.load(table + following * FIELDS + QKV_BIAS)
            _fetch_part(down, C, DOWN_PARTS, J, BLOCK_M, BLOCK_K, LONE, FETCH)
            arrivals = _wait(counter, arrivals, LONE)
            some_rows.gated(
                h, gate_up, gate_up_bias, inner, N, J, C, GATE_UP_HAS, SHARE, ROWS, BLOCK_M, BLOCK_K, STAGES
            )
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 5:
            _fetch_part(_pointer(qkv_address, dtype), QKV_OUT, QKV_PARTS, C, BLOCK_M, BLOCK_K, LONE, FETCH)
            arrivals = _wait(counter, arrivals, LONE)
            some_rows.parts(
                inner, x, down, down_bias, x, mass, N, C,
                J, False, DOWN_HAS, True, 1, DOWN_PARTS, ROWS, BLOCK_M, BLOCK_K, STAGES,
            )  # fmt: skip
            _arrive(counter, LONE)


@triton.jit
def _embed(tokens, embedding, x, counter, C: tl.constexpr, C_PAD: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, C_PAD)
    token = tl.load(tokens + row)
    hidden = tl.load(embedding + token * C + c, mask=c < C, other=0.0)
    tl.store(x + row * C + c, hidden.to(tl.float32), mask=c < C)
    if row == 0:
        tl.store(counter, 0)


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
        self._programs, self._fetch = 3, 0
        if not self._interpreted:
            self._programs = torch.cuda.get_device_properties(device).multi_processor_count
            self._fetch = 0
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
        _embed[(rows,)](tokens_N, embedding, x_NC, self._counter, C=width, C_PAD=sizes["C_PAD"], num_warps=4)
        heads = d.heads * d.head_size
        qkv = empty(sizes.get("QKV_PARTS", 1), rows, heads + 2 * d.kv_heads * d.head_size)
        shares = empty(splits, rows, heads, dtype=cache.dtype if splits == 1 else torch.float32)
        mass, h_NC = empty(splits, rows, heads), empty(rows, width, dtype=cache.dtype)
        inner_NJ = empty(rows, table.inner, dtype=cache.dtype)
        arguments = [
            table.addresses, x_NC, qkv, shares, mass, h_NC, inner_NJ, rotations, positions, count, cache, self._counter
        ]  # fmt: skip
        scalars = [cache.stride(0), rows, cache.shape[2], d.head_size**-0.5, d.eps]
        kernel, phases = (_one, 5) if "ROWS_C" in sizes else (_some, 6)
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
            "PROGRAMS": programs, "C_PAD": triton.next_power_of_2(width), "FETCH": self._fetch, "num_warps": 8,
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
        return sizes | {
            "ROWS": max(16, triton.next_power_of_2(rows)), "QKV_PARTS": self._parts(qkv, width, block_k),
            "OUT_PARTS": self._parts(width, heads, block_k), "DOWN_PARTS": self._parts(width, inner, block_k),
            "BLOCK_M": BLOCK_M, "SHARE": BLOCK_M, "BLOCK_K": block_k, "STAGES": 4 if wide == 1 else 2,
        }  # fmt: skip

    def _parts(self, outputs: int, inputs: int, block_k: int) -> int:
        """Into how many parts of the inputs a product is cut, so that every program has one."""
        blocks = triton.cdiv(inputs, block_k)
        wanted = max(1, min(self._programs // triton.cdiv(outputs, BLOCK_M), blocks))
        return triton.cdiv(blocks, triton.cdiv(blocks, wanted))
