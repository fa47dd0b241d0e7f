"""Products of one row with large weights, a share of the outputs per program, without the matrix units.

    y = y + activation(norm(x) @ weight.T + bias)

The first tile of weights is loaded before x is there, and always one ahead. A row's RMS is one number, so it is
multiplied in after the product: (x * norm * rms) @ W = rms * ((x * norm) @ W).

K inputs, M outputs. Weights are [M, K], row-major. A tile is [M, chunks of K, CHUNK], so that a warp sums up whole rows
of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 256


@triton.jit
def block_of(vector, start, K: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr = CHUNK):
    """[CHUNKS, CHUNK] of a vector."""
    k = start + tl.arange(0, CHUNKS)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    return tl.load(vector + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _input(x, factors, mass, start, dtype, K: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr,
           CHUNKS: tl.constexpr, CHUNK: tl.constexpr = CHUNK):  # fmt: skip
    """A block of the input in float32, rounded to dtype, and the sum of its squares. NORM: factors are the block of the
    norm's weights. SPLITS > 1: x is [SPLITS, K], shares of an attention over parts of the keys, and `mass` their
    log-sums."""
    if SPLITS > 1:
        highest = tl.full((CHUNKS, CHUNK), float("-inf"), tl.float32)
        for s in tl.static_range(SPLITS):
            highest = tl.maximum(highest, block_of(mass + s * K, start, K, CHUNKS))
        total = tl.zeros((CHUNKS, CHUNK), tl.float32)
        v = tl.zeros((CHUNKS, CHUNK), tl.float32)
        for s in tl.static_range(SPLITS):
            share = tl.exp(block_of(mass + s * K, start, K, CHUNKS) - highest)
            v += share * block_of(x + s * K, start, K, CHUNKS)
            total += share
        v = v / total
    else:
        v = block_of(x, start, K, CHUNKS)
    squares = 0.0
    if NORM:
        squares = tl.sum(tl.sum(v * v, 1), 0)
        v *= factors
    return v.to(dtype).to(tl.float32), squares


@triton.jit
def _product(w, v):
    """[BLOCK_M]"""
    return tl.sum(tl.sum(w.to(tl.float32) * v[None, :, :], 1), 1)


@triton.jit
def _nth(weight, row, end, i: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr,
         CHUNK: tl.constexpr = CHUNK):  # fmt: skip
    """Tiles go through all of K before they go to the next rows. [BLOCK_M, CHUNKS, CHUNK]"""
    BLOCKS: tl.constexpr = (K + CHUNKS * CHUNK - 1) // (CHUNKS * CHUNK)
    FIRST_M: tl.constexpr = i // BLOCKS * BLOCK_M
    FIRST_K: tl.constexpr = i % BLOCKS * CHUNKS * CHUNK
    m = tl.arange(0, BLOCK_M)[:, None, None]
    k = tl.arange(0, CHUNKS)[None, :, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]
    inside = (m < end - row - FIRST_M) & (k < K - FIRST_K)
    return tl.load(weight + row * K + (FIRST_M * K + FIRST_K) + (m * K + k), mask=inside, other=0.0)


@triton.jit
def first_tiles(weight, row, end, AHEAD: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(AHEAD):
        tiles = tiles + (_nth(weight, row, end, i, K, BLOCK_M, CHUNKS),)  # noqa: RUF005 (Triton knows no other)
    return tiles


@triton.jit
def products(
    x, norm, factors, weight, bias_row, bias, y, mass, w, w_up, row, end, eps, M: tl.constexpr,
    K: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr, SHARE: tl.constexpr, AHEAD: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr = CHUNK,
):  # fmt: skip
    """Outputs [row, end), at most SHARE. w, w_up: their first AHEAD tiles; factors, bias_row: the first block of norm
    and bias. GATED: weight is [2M, K], gates first, and y = silu(gate) * up."""
    dtype = weight.dtype.element_ty
    up_weight = weight + M * K
    WIDTH: tl.constexpr = CHUNKS * CHUNK
    BLOCKS: tl.constexpr = (K + WIDTH - 1) // WIDTH
    TILES: tl.constexpr = (SHARE + BLOCK_M - 1) // BLOCK_M * BLOCKS
    total = tl.zeros((BLOCK_M,), tl.float32)
    up = total
    residual = total
    squares = 0.0
    if BLOCKS == 1:
        v, squares = _input(x, factors, mass, 0, dtype, K, NORM, SPLITS, CHUNKS)
    for i in tl.static_range(TILES):
        m = row + i // BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = m < end
        if i + AHEAD < TILES:
            w = w + (_nth(weight, row, end, i + AHEAD, K, BLOCK_M, CHUNKS),)  # noqa: RUF005
            if GATED:
                w_up = w_up + (_nth(up_weight, row, end, i + AHEAD, K, BLOCK_M, CHUNKS),)  # noqa: RUF005
        if RESIDUAL and i % BLOCKS == 0:
            residual = tl.load(y + m, mask=inside, other=0.0).to(tl.float32)
        if BLOCKS > 1:
            if NORM:
                factors = block_of(norm, i % BLOCKS * WIDTH, K, CHUNKS)
            v, more = _input(x, factors, mass, i % BLOCKS * WIDTH, dtype, K, NORM, SPLITS, CHUNKS)
            squares = more if i % BLOCKS == 0 else squares + more
        if i % BLOCKS == 0:
            total = tl.zeros((BLOCK_M,), tl.float32)
            up = tl.zeros((BLOCK_M,), tl.float32)
        total += _product(w[i], v)
        if GATED:
            up += _product(w_up[i], v)
        if i % BLOCKS == BLOCKS - 1:
            if NORM:
                rms = tl.rsqrt(squares / K + eps)
                total *= rms
                up *= rms
            if BIAS:
                if i < BLOCKS:
                    total += bias_row
                else:
                    total += tl.load(bias + m, mask=inside, other=0.0).to(tl.float32)
                if GATED:
                    up += tl.load(bias + M + m, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                total = total * tl.sigmoid(total) * up
            if RESIDUAL:
                total += residual
            tl.store(y + m, total.to(y.dtype.element_ty), mask=inside)
