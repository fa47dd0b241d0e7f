"""Matrix products of a few rows with large weights: every weight is read once, and what comes before and after is done
on the way, so that a layer is five launches.

    y = residual + activation(norm(x) @ weight.T + bias)

EARLY: a launch begins before the one before it has ended (programmatic dependent launch, Hopper and later), and waits
for its results only where it needs them: weights are on their way by then.

A row's RMS is one number, so it is multiplied in after the product: (x * norm * rms) @ W = rms * ((x * norm) @ W).

N rows, K inputs, M outputs. Weights are [M, K], row-major.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _one_row(
    x, norm, weight, bias, y, weighting, K, M, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row, without the matrix units. SPLITS > 1: x is [SPLITS, K] float32, shares of an attention over parts of the
    keys, and `weighting` [SPLITS, K / HEAD_SIZE] their log-sums."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = m < M
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    total_up = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    dtype = weight.dtype.element_ty
    if EARLY:
        gdc_launch_dependents()
    k = tl.arange(0, BLOCK_K)
    places = weight + m[:, None].to(tl.int64) * K + k[None, :]
    inside = inside_m[:, None] & (k < K)[None, :]
    w = tl.load(places, mask=inside, other=0.0)
    if GATED:
        w_up = tl.load(places + M.to(tl.int64) * K, mask=inside, other=0.0)
    if EARLY:
        gdc_wait()
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside_k = k < K
        if not ONE_BLOCK:  # the next ones are under way while these are multiplied
            inside = inside_m[:, None] & (k + BLOCK_K < K)[None, :]
            places = weight + m[:, None].to(tl.int64) * K + (k + BLOCK_K)[None, :]
            w_next = tl.load(places, mask=inside, other=0.0)
            if GATED:
                w_up_next = tl.load(places + M.to(tl.int64) * K, mask=inside, other=0.0)
        if SPLITS > 1:
            heads = K // HEAD_SIZE
            head = k // HEAD_SIZE
            highest = tl.full((BLOCK_K,), float("-inf"), tl.float32)
            for s in tl.static_range(SPLITS):
                highest = tl.maximum(highest, tl.load(weighting + s * heads + head, mask=inside_k, other=0.0))
            mass = tl.zeros((BLOCK_K,), tl.float32)
            v = tl.zeros((BLOCK_K,), tl.float32)
            for s in tl.static_range(SPLITS):
                share = tl.exp(tl.load(weighting + s * heads + head, mask=inside_k, other=0.0) - highest)
                v += share * tl.load(x + s * K + k, mask=inside_k, other=0.0)
                mass += share
            v = (v / mass).to(dtype).to(tl.float32)
        else:
            v = tl.load(x + k, mask=inside_k, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            v = (v * tl.load(norm + k, mask=inside_k, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        total += w.to(tl.float32) * v[None, :]
        if GATED:
            total_up += w_up.to(tl.float32) * v[None, :]
        if not ONE_BLOCK:
            w = w_next
            if GATED:
                w_up = w_up_next
    result = tl.sum(total, 1)
    up = tl.sum(total_up, 1)
    if NORM:
        rms = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        result *= rms
        up *= rms
    if BIAS:
        result += tl.load(bias + m, mask=inside_m, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + M + m, mask=inside_m, other=0.0).to(tl.float32)
    if GATED:
        result = result * tl.sigmoid(result) * up
    if RESIDUAL:
        result += tl.load(y + m, mask=inside_m, other=0.0).to(tl.float32)
    tl.store(y + m, result.to(y.dtype.element_ty), mask=inside_m)


@triton.jit
def _many_rows(
    x, norm, weight, bias, y, N, K, M, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_n, inside_m = n < N, m < M
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    dtype = weight.dtype.element_ty
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside_k = k < K
        places = weight + m[None, :].to(tl.int64) * K + k[:, None]
        inside = inside_m[None, :] & inside_k[:, None]
        w = tl.load(places, mask=inside, other=0.0)
        v = tl.load(x + n[:, None] * K + k[None, :], mask=inside_n[:, None] & inside_k[None, :], other=0.0)
        if NORM:
            wide = v.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            v = (wide * tl.load(norm + k, mask=inside_k, other=0.0).to(tl.float32)[None, :]).to(dtype)
        total = tl.dot(v, w, total, input_precision="ieee")
        if GATED:
            w_up = tl.load(places + M.to(tl.int64) * K, mask=inside, other=0.0)
            total_up = tl.dot(v, w_up, total_up, input_precision="ieee")
    if NORM:
        rms = tl.rsqrt(squares / K + eps)
        total *= rms[:, None]
        total_up *= rms[:, None]
    if BIAS:
        total += tl.load(bias + m, mask=inside_m, other=0.0).to(tl.float32)[None, :]
        if GATED:
            total_up += tl.load(bias + M + m, mask=inside_m, other=0.0).to(tl.float32)[None, :]
    if GATED:
        total = total * tl.sigmoid(total) * total_up
    places = y + n[:, None].to(tl.int64) * M + m[None, :]
    inside = inside_n[:, None] & inside_m[None, :]
    if RESIDUAL:
        total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, total.to(y.dtype.element_ty), mask=inside)


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y_NM: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: bool = False,
    weighting: torch.Tensor | None = None,
    early: bool = False,
) -> None:
    """Write to y.

    x: [N, K]; with `weighting`, of one row: [SPLITS, 1, K] float32, from `attention`.
    norm: [K], of an RMS norm of x.
    gated: weight is [2 * M, K], gates first: y = silu(gate) * up.
    residual: add what is in y.
    early: see EARLY above.
    """
    (rows, outputs), inputs = y_NM.shape, weight.shape[1]
    options = {"num_warps": 4, "num_stages": 3} | ({"launch_pdl": True} if early else {})
    flags = {"NORM": norm is not None, "BIAS": bias is not None, "GATED": gated, "RESIDUAL": residual, "EARLY": early}
    norm = weight if norm is None else norm  # a place that is not read
    bias = weight if bias is None else bias
    if rows == 1:
        block_k = min(triton.next_power_of_2(inputs), 1024)
        block_m = 4 if outputs < 16384 else 8
        splits = 1 if weighting is None else len(weighting)
        head_size = 1 if weighting is None else inputs // weighting.shape[-1]
        _one_row[(triton.cdiv(outputs, block_m),)](
            x, norm, weight, bias, y_NM, x if weighting is None else weighting, inputs, outputs, eps,
            **flags, SPLITS=splits, HEAD_SIZE=head_size, BLOCK_M=block_m, BLOCK_K=block_k,
            ONE_BLOCK=inputs <= block_k, **options,
        )  # fmt: skip
        return
    assert weighting is None, "shares are combined for one row only"
    block_n = min(max(16, triton.next_power_of_2(rows)), 64)
    block_m = 64 if outputs >= 16384 else 32 if outputs >= 4096 else 16
    block_k = 128 if weight.element_size() == 2 else 64
    _many_rows[(triton.cdiv(outputs, block_m), triton.cdiv(rows, block_n))](
        x, norm, weight, bias, y_NM, rows, inputs, outputs, eps,
        **flags, BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_K=block_k, **options,
    )  # fmt: skip
