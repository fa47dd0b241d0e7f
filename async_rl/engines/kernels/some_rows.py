"""Products of up to 64 rows with large weights, on the matrix units: a tile of outputs, or a part of its inputs, per
program.

N rows, K inputs, M outputs. Weights are [M, K], row-major, and the left side: y.T = weight @ x.T.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _input(x, norm, mass, n, k, N, K: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of x transposed, in float32 or its own type; see kernels.one_row."""
    inside = (k < K)[:, None] & (n < N)[None, :]
    places = n[None, :] * K + k[:, None]
    if SPLITS > 1:
        highest = tl.full(places.shape, float("-inf"), tl.float32)
        for s in tl.static_range(SPLITS):
            highest = tl.maximum(highest, tl.load(mass + s * N * K + places, mask=inside, other=0.0))
        total = tl.zeros(places.shape, tl.float32)
        v = tl.zeros(places.shape, tl.float32)
        for s in tl.static_range(SPLITS):
            share = tl.exp(tl.load(mass + s * N * K + places, mask=inside, other=0.0) - highest)
            v += share * tl.load(x + s * N * K + places, mask=inside, other=0.0)
            total += share
        v = v / total
    else:
        v = tl.load(x + places, mask=inside, other=0.0)
    if NORM:
        v = v.to(tl.float32) * tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
    return v


@triton.jit
def parts(
    x, norm, weight, bias, y, mass, N, M: tl.constexpr,
    K: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, SPLITS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """(x * norm) @ weight.T in parts of K. ADD: they and the bias are added to y [N, M] float32, in whatever order;
    else they go to y [PARTS, N, M] float32, without the bias."""
    dtype = weight.dtype.element_ty
    tiles: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PER_PART: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS
    n = tl.arange(0, BLOCK_N)
    for unit in range(tl.program_id(0), tiles * PARTS, tl.num_programs(0)):
        part = unit // tiles
        m = (unit % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in tl.range(part * PER_PART, tl.minimum((part + 1) * PER_PART, BLOCKS), num_stages=STAGES):
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = (m < M)[:, None] & (k < K)[None, :]
            w = tl.load(weight + m[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0)
            v = _input(x, norm, mass, n, k, N, K, NORM, SPLITS)
            total = tl.dot(w, v.to(dtype), total, input_precision="ieee")
        inside = (m < M)[:, None] & (n < N)[None, :]
        places = n[None, :] * M + m[:, None]
        if ADD:
            if BIAS:  # noqa: SIM102 (one is known when it is compiled)
                if part == 0:
                    total += tl.load(bias + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
            tl.atomic_add(y + places, total, mask=inside, sem="relaxed")
        else:
            tl.store(y + part * N * M + places, total, mask=inside)


@triton.jit
def normed(x, factors, h, N, eps, C: tl.constexpr, C_PAD: tl.constexpr):
    """h = norm(x), a row per program. factors: the norm's weights, [C_PAD]."""
    c = tl.arange(0, C_PAD)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        v = tl.load(x + row * C + c, mask=c < C, other=0.0)
        v = v * tl.rsqrt(tl.sum(v * v, 0) / C + eps) * factors
        tl.store(h + row * C + c, v.to(h.dtype.element_ty), mask=c < C)


@triton.jit
def gated(
    h, weight, bias, y, N, M: tl.constexpr,
    K: tl.constexpr, BIAS: tl.constexpr, SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = silu(gate) * up: weight is [2M, K], gates first. SHARE outputs per program."""
    dtype = weight.dtype.element_ty
    end = tl.minimum((tl.program_id(0) + 1) * SHARE, M)
    up_weight = weight + M * K
    n = tl.arange(0, BLOCK_N)
    for first in range(tl.program_id(0) * SHARE, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            inside = (m < end)[:, None] & (k < K)[None, :]
            places = m[:, None].to(tl.int64) * K + k[None, :]
            w = tl.load(weight + places, mask=inside, other=0.0)
            w_up = tl.load(up_weight + places, mask=inside, other=0.0)
            v = tl.load(h + n[None, :] * K + k[:, None], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
            gate = tl.dot(w, v, gate, input_precision="ieee")
            up = tl.dot(w_up, v, up, input_precision="ieee")
        if BIAS:
            gate += tl.load(bias + m, mask=m < end, other=0.0).to(tl.float32)[:, None]
            up += tl.load(bias + M + m, mask=m < end, other=0.0).to(tl.float32)[:, None]
        inside = (m < end)[:, None] & (n < N)[None, :]
        result = gate * tl.sigmoid(gate) * up
        tl.store(y + n[None, :] * M + m[:, None], result.to(dtype), mask=inside)
