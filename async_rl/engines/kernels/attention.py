"""Attention of one new token per row to its own slot of the KV cache: the rotation of q and k and the writing of k and
v are part of it. Lengths are read on the device, so that a recording serves all of them.

The keys of a row can be split among programs (FlashDecoding, https://pytorch.org/blog/flash-decoding/), each of which
returns its share and the logarithm of its mass (as often as the share has elements).

N rows: slots [0, N). H heads, K key-value heads, G = H / K, D head size, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _new(parts, row, place, inside, stride, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Elements of a row's q, k or v in float32: the sum of their parts."""
    places = parts + row * WIDTH + place
    total = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    for s in tl.static_range(1, PARTS):
        total += tl.load(places + s * stride, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _biased(sums, bias, place, inside, rms, BIAS: tl.constexpr):
    sums *= rms
    if BIAS:
        sums += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    return sums


@triton.jit
def _turned(re, im, norm, re_im, inside, eps, NORM: tl.constexpr, D: tl.constexpr, dtype: tl.constexpr):
    """Pairs next to each other, normed and turned: [rows, D]. `norm`: of the first of each pair."""
    if NORM:
        scale = tl.rsqrt((tl.sum(re * re, 1) + tl.sum(im * im, 1)) / D + eps)[:, None]
        re = re * scale * tl.load(norm, mask=inside, other=0.0).to(tl.float32)
        im = im * scale * tl.load(norm + 1, mask=inside, other=0.0).to(tl.float32)
    pair = 2 * tl.arange(0, D // 2)[None, :]
    cos, sin = tl.load(re_im + pair), tl.load(re_im + pair + 1)
    return tl.interleave(re * cos - im * sin, re * sin + im * cos).to(dtype)


@triton.jit
def keys_of(split, position, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The part of the old keys that a split attends to: from, to."""
    share = tl.cdiv(tl.cdiv(position, SPLITS), BLOCK) * BLOCK
    return split * share, tl.minimum((split + 1) * share, position)


@triton.jit
def load_block(slot, head, start, last, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """A block of old keys and values."""
    at = start + tl.arange(0, BLOCK)
    known = (at < last)[:, None]
    places = slot + at[:, None] * 2 * K * D + head * D + tl.arange(0, D)[None, :]
    return tl.load(places, mask=known, other=0.0), tl.load(places + K * D, mask=known, other=0.0)


@triton.jit
def attend_unit(
    k, v, parts, x, bias, norm, rotations, slot, out, mass, row, head, split, position, N, scale, eps,
    PARTS: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, key-value head and split. k, v: the first block of its old keys. C > 0: sums of parts are to be divided
    by the RMS of x, [N, C]."""
    WIDTH: tl.constexpr = (H + 2 * K) * D
    dtype: tl.constexpr = slot.dtype.element_ty
    stride = N * WIDTH
    d = tl.arange(0, D)
    g = tl.arange(0, G_PAD)
    inside_g = (g < G)[:, None]
    pair = 2 * tl.arange(0, D // 2)
    re_im = rotations + position * D
    one = tl.arange(0, 1)[:, None]
    first_split = one == split
    q_place = (head * G + g)[:, None] * D + pair[None, :]
    k_place = (H + head + one) * D + pair[None, :]
    v_place = (H + K + head + one) * D + d[None, :]
    q_re = _new(parts, row, q_place, inside_g, stride, WIDTH, PARTS)
    q_im = _new(parts, row, q_place + 1, inside_g, stride, WIDTH, PARTS)
    k_re = _new(parts, row, k_place, first_split, stride, WIDTH, PARTS)
    k_im = _new(parts, row, k_place + 1, first_split, stride, WIDTH, PARTS)
    v_new = _new(parts, row, v_place, first_split, stride, WIDTH, PARTS)
    rms = 1.0
    if C > 0:
        c = tl.arange(0, C_PAD)
        hidden = tl.load(x + row * C + c, mask=c < C, other=0.0)
        rms = tl.rsqrt(tl.sum(hidden * hidden, 0) / C + eps)
    q_re = _biased(q_re, bias, q_place, inside_g, rms, BIAS)
    q_im = _biased(q_im, bias, q_place + 1, inside_g, rms, BIAS)
    q = _turned(q_re, q_im, norm + q_place, re_im, inside_g, eps, NORM, D, dtype)
    highest = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    attended = tl.zeros((G_PAD, D), tl.float32)
    if split == 0:
        # The new key and value go from here to the cache, and need not be read back.
        k_re = _biased(k_re, bias, k_place, first_split, rms, BIAS)
        k_im = _biased(k_im, bias, k_place + 1, first_split, rms, BIAS)
        k_new = _turned(k_re, k_im, norm + k_place, re_im, first_split, eps, NORM, D, dtype)
        v_last = _biased(v_new, bias, v_place, first_split, rms, BIAS).to(dtype)
        here = slot + position * 2 * K * D
        tl.store(here + (head + one) * D + d[None, :], k_new)
        tl.store(here + (K + head + one) * D + d[None, :], v_last)
        highest = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale
        total = tl.full((G_PAD,), 1.0, tl.float32)
        attended += v_last.to(tl.float32)
    first, last = keys_of(split, position, SPLITS, BLOCK)
    for start in range(first, last, BLOCK):
        k_next, v_next = load_block(slot, head, start + BLOCK, last, K, D, BLOCK)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((start + tl.arange(0, BLOCK) < last)[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        fade = tl.exp(highest - higher)
        p = tl.exp(score - higher[:, None])
        total = total * fade + tl.sum(p, 1)
        attended = attended * fade[:, None] + tl.dot(p.to(dtype), v, input_precision="ieee")
        highest = higher
        k = k_next
        v = v_next
    heads = (split * N + row) * H + head * G + g
    empty = total == 0  # a split without keys
    total = tl.where(empty, 1.0, total)
    attended = attended / total[:, None]
    places = out + heads[:, None] * D + d[None, :]
    tl.store(places, attended.to(out.dtype.element_ty), mask=inside_g)
    if SPLITS > 1:
        log = tl.where(empty, float("-inf"), highest + tl.log(total))[:, None]
        tl.store(mass + heads[:, None] * D + d[None, :], tl.broadcast_to(log, (G_PAD, D)), mask=inside_g)


@triton.jit
def _attend(
    qkv, norm, rotations, positions, count, cache, out, mass, N, length, scale, eps,
    NORM: tl.constexpr, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row, mask=row < tl.load(count), other=0)
    slot = cache + row.to(tl.int64) * length * 2 * K * D
    first, last = keys_of(split, position, SPLITS, BLOCK)
    k, v = load_block(slot, head, first, last, K, D, BLOCK)
    attend_unit(
        k, v, qkv, qkv, qkv, norm, rotations, slot, out, mass, row, head, split, position, N, scale, eps,
        1, 0, 1, False, NORM, H, K, G, G_PAD, D, SPLITS, BLOCK,
    )  # fmt: skip


@triton.jit
def _combine(shares, mass, out, N, H: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    row, head = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    heads = (s * N + row) * H + head
    places = heads[:, None] * D + d[None, :]
    logs, parts = tl.load(mass + places), tl.load(shares + places)
    weight = tl.exp(logs - tl.max(logs, 0)[None, :])
    attended = tl.sum(weight * parts, 0) / tl.sum(weight, 0)
    tl.store(out + (row * H + head) * D + d, attended.to(out.dtype.element_ty))


def attend(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor | None,
    eps: float,
    rotations: torch.Tensor,
    positions: torch.Tensor,
    count: torch.Tensor,
    cache: torch.Tensor,
    *,
    heads: int,
    splits: int,
) -> torch.Tensor:
    """Write the new keys and values, and attend: [N, H * D]. `splits` is a power of two.

    qkv: [N, (H + 2K) * D]; qk_norm: [H + K, D]; rotations: [positions, D/2, 2] float32; cache: [slots, length, 2K, D]
    of one layer; positions: int64, of the new token; rows from `count` [1] on count as at position 0.
    """
    (rows, _), (_, length, kv_heads2, head_size) = qkv.shape, cache.shape
    kv_heads, group = kv_heads2 // 2, heads // (kv_heads2 // 2)
    out = torch.empty((rows, heads * head_size), dtype=qkv.dtype, device=qkv.device)
    shares = out
    mass = out
    if splits > 1:
        shares, mass = torch.empty((2, splits, *out.shape), dtype=torch.float32, device=qkv.device)
    _attend[(rows, kv_heads, splits)](
        qkv, qkv if qk_norm is None else qk_norm, rotations, positions, count, cache, shares, mass, rows, length,
        head_size**-0.5, eps, NORM=qk_norm is not None, H=heads, K=kv_heads, G=group,
        G_PAD=max(16, triton.next_power_of_2(group)), D=head_size, SPLITS=splits, BLOCK=64, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows, heads)](shares, mass, out, rows, H=heads, D=head_size, SPLITS=splits, num_warps=1)
    return out
