"""All layers of a decode step as one kernel: a program per multiprocessor, which takes its share of every product and
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

import triton
import triton.language as tl

from async_rl.engines.kernels import grid, one_row, some_rows
from async_rl.engines.kernels.attention import attend_unit, keys_of, load_block

ALL = tl.constexpr(-1)
"""All phases, for all layers; else one phase of one layer, and no waiting."""
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
def one_row_layers(
    table, x, qkv, shares, mass, inner, rotations, positions, count, cache, counter, layers, cache_stride, N, length,
    scale, eps, first_layer,
    C: tl.constexpr, J: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, QKV_HAS: tl.constexpr,
    QK: tl.constexpr, OUT_HAS: tl.constexpr, GATE_UP_HAS: tl.constexpr, DOWN_HAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, ROWS_QKV: tl.constexpr, ROWS_C: tl.constexpr, ROWS_J: tl.constexpr,
    CHUNKS_C: tl.constexpr, CHUNKS_H: tl.constexpr, CHUNKS_J: tl.constexpr, AHEAD_C: tl.constexpr,
    AHEAD_J: tl.constexpr, C_PAD: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """One row: five phases. PHASE: one of them, or ALL. ..._HAS: there is a bias; QK: a norm of q and k."""
    LONE: tl.constexpr = PHASE != ALL
    HD: tl.constexpr = H * D
    QKV_OUT: tl.constexpr = (H + 2 * K) * D
    dtype: tl.constexpr = cache.dtype.element_ty
    pid = tl.program_id(0)
    arrivals = 0
    in_use = tl.load(count)
    row = pid // (K * SPLITS)
    position = tl.load(positions + row, mask=row < tl.minimum(in_use, N), other=0)
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
            arrivals = _wait(counter, arrivals, LONE)
            one_row.products(
                x, mlp_norm, factors, gate_up, bias_row, gate_up_bias, inner, mass, w, w_up, j_row, j_end, eps, J,
                C, True, GATE_UP_HAS, True, False, 1, j_share, AHEAD_J, ROWS_J, CHUNKS_C,
            )  # fmt: skip
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 4:
            w = one_row.first_tiles(down, c_row, c_end, AHEAD_C, J, ROWS_C, CHUNKS_J)
            bias_row = _load(down_bias, c_m, c_end, DOWN_HAS)
            arrivals = _wait(counter, arrivals, LONE)
            one_row.products(
                inner, x, x, down, bias_row, down_bias, x, mass, w, w, c_row, c_end, eps, C,
                J, False, DOWN_HAS, False, True, 1, c_share, AHEAD_C, ROWS_C, CHUNKS_J,
            )  # fmt: skip
            _arrive(counter, LONE)


@triton.jit
def some_rows_layers(
    table, x, qkv, shares, mass, inner, h, rotations, positions, count, cache, counter, layers, cache_stride, N, length,
    scale, eps, first_layer,
    C: tl.constexpr, J: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, QKV_HAS: tl.constexpr,
    QK: tl.constexpr, OUT_HAS: tl.constexpr, GATE_UP_HAS: tl.constexpr, DOWN_HAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, QKV_PARTS: tl.constexpr, OUT_PARTS: tl.constexpr,
    DOWN_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, SHARE: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    C_PAD: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Up to ROWS rows: six phases, one of its own to norm what gate and up read. Otherwise as `one_row_layers`."""
    LONE: tl.constexpr = PHASE != ALL
    HD: tl.constexpr = H * D
    QKV_OUT: tl.constexpr = (H + 2 * K) * D
    dtype: tl.constexpr = cache.dtype.element_ty
    pid = tl.program_id(0)
    arrivals = 0
    in_use = tl.load(count)
    row = pid // (K * SPLITS)
    position = tl.load(positions + row, mask=row < tl.minimum(in_use, N), other=0)
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
            arrivals = _attend(
                counter, arrivals, qkv, x, bias, qk_norm, shares, mass, rotations, positions, in_use, position,
                cache + layer * cache_stride.to(tl.int64), N, length, scale, eps,
                QKV_PARTS, C, C_PAD, QKV_HAS, QK, H, K, D, SPLITS, BLOCK, LONE,
            )  # fmt: skip
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 2:
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
            arrivals = _wait(counter, arrivals, LONE)
            some_rows.gated(
                h, gate_up, gate_up_bias, inner, N, J, C, GATE_UP_HAS, SHARE, ROWS, BLOCK_M, BLOCK_K, STAGES
            )
            _arrive(counter, LONE)
        if PHASE == ALL or PHASE == 5:
            arrivals = _wait(counter, arrivals, LONE)
            some_rows.parts(
                inner, x, down, down_bias, x, mass, N, C,
                J, False, DOWN_HAS, True, 1, DOWN_PARTS, ROWS, BLOCK_M, BLOCK_K, STAGES,
            )  # fmt: skip
            _arrive(counter, LONE)


@triton.jit
def embed(tokens, embedding, x, counter, C: tl.constexpr, C_PAD: tl.constexpr):
    """The first hidden states, a row per program; and nobody has arrived anywhere."""
    row = tl.program_id(0)
    c = tl.arange(0, C_PAD)
    token = tl.load(tokens + row)
    hidden = tl.load(embedding + token * C + c, mask=c < C, other=0.0)
    tl.store(x + row * C + c, hidden.to(tl.float32), mask=c < C)
    if row == 0:
        tl.store(counter, 0)
