"""Attention of one new token per row to its own slot of the KV cache: the rotation of q and k and the writing of k and
v are part of it. Lengths are read on the device, so that a recording serves all of them.

The keys of a row can be split among programs (FlashDecoding, https://pytorch.org/blog/flash-decoding/), each of which
returns its share and the logarithm of its mass.

N rows: slots [0, N). H heads, K key-value heads, G = H / K, D head size, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rotated(places, norm, re_im, inside, eps, NORM: tl.constexpr, D: tl.constexpr, dtype: tl.constexpr):
    """Pairs next to each other, normed and turned: [rows, D]. `places`, `norm`: of the first of each pair."""
    re = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    im = tl.load(places + 1, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        rms = tl.rsqrt((tl.sum(re * re, 1) + tl.sum(im * im, 1)) / D + eps)[:, None]
        re = re * rms * tl.load(norm, mask=inside, other=0.0).to(tl.float32)
        im = im * rms * tl.load(norm + 1, mask=inside, other=0.0).to(tl.float32)
    pair = 2 * tl.arange(0, D // 2)[None, :]
    cos, sin = tl.load(re_im + pair), tl.load(re_im + pair + 1)
    return tl.interleave(re * cos - im * sin, re * sin + im * cos).to(dtype)


@triton.jit
def _attend(
    qkv, norm, rotations, positions, count, cache, out, mass, N, length, scale, eps,
    NORM: tl.constexpr, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = cache.dtype.element_ty
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(positions + row, mask=row < tl.load(count), other=0)
    d = tl.arange(0, D)
    g = tl.arange(0, G_PAD)
    inside_g = g < G
    new = qkv + row * (H + 2 * K) * D
    pair = 2 * tl.arange(0, D // 2)
    re_im = rotations + position * D
    q_place = (head * G + g)[:, None] * D + pair[None, :]
    q = _rotated(new + q_place, norm + q_place, re_im, inside_g[:, None], eps, NORM, D, dtype)
    slot = cache + row.to(tl.int64) * length * 2 * K * D
    highest = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    attended = tl.zeros((G_PAD, D), tl.float32)
    if split == 0:
        # The new key and value go from here to the cache, and need not be read back.
        one = tl.arange(0, 1)[:, None]
        k_place = (H + head + one) * D + pair[None, :]
        k_new = _rotated(new + k_place, norm + k_place, re_im, one == 0, eps, NORM, D, dtype)
        v_new = tl.load(new + (H + K + head + one) * D + d[None, :])
        here = slot + position * 2 * K * D
        tl.store(here + (head + one) * D + d[None, :], k_new)
        tl.store(here + (K + head + one) * D + d[None, :], v_new)
        highest = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale
        total = tl.full((G_PAD,), 1.0, tl.float32)
        attended += v_new.to(tl.float32)
    share = tl.cdiv(tl.cdiv(position, SPLITS), BLOCK) * BLOCK
    first = split * share
    last = tl.minimum(first + share, position)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        known = at < last
        places = slot + at[:, None] * 2 * K * D + head * D + d[None, :]
        k = tl.load(places, mask=known[:, None], other=0.0)
        v = tl.load(places + K * D, mask=known[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(known[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        fade = tl.exp(highest - higher)
        p = tl.exp(score - higher[:, None])
        total = total * fade + tl.sum(p, 1)
        attended = attended * fade[:, None] + tl.dot(p.to(dtype), v, input_precision="ieee")
        highest = higher
    heads = (split * N + row) * H + head * G + g
    empty = total == 0  # a split without keys
    total = tl.where(empty, 1.0, total)
    attended = attended / total[:, None]
    places = out + heads[:, None] * D + d[None, :]
    tl.store(places, attended.to(out.dtype.element_ty), mask=inside_g[:, None])
    if SPLITS > 1:
        tl.store(mass + heads, tl.where(empty, float("-inf"), highest + tl.log(total)), mask=inside_g)


@triton.jit
def _combine(shares, mass, out, N, H: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    heads = (s * N + row) * H + head
    logs = tl.load(mass + heads)
    weight = tl.exp(logs - tl.max(logs, 0))
    parts = tl.load(shares + heads[:, None] * D + d[None, :])
    attended = tl.sum(weight[:, None] * parts, 0) / tl.sum(weight, 0)
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
    early: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the new keys and values, and attend. `splits` is a power of two; early: see kernels.project.

    qkv: [N, (H + 2K) * D]; qk_norm: [H + K, D]; rotations: [positions, D/2, 2] float32; cache: [slots, length, 2K, D]
    of one layer; positions: int64, of the new token; rows from `count` [1] on count as at position 0.
    Returns what was attended to, [N, H * D], and nothing; or shares [S, N, H * D] float32 and their log-sums [S, N, H].
    """
    (rows, _), (_, length, kv_heads2, head_size) = qkv.shape, cache.shape
    kv_heads = kv_heads2 // 2
    out_dtype = qkv.dtype if splits == 1 else torch.float32
    out = torch.empty((splits, rows, heads * head_size), dtype=out_dtype, device=qkv.device)
    mass = torch.empty((splits, rows, heads), dtype=torch.float32, device=qkv.device)
    group = heads // kv_heads
    _attend[(rows, kv_heads, splits)](
        qkv, qkv if qk_norm is None else qk_norm, rotations, positions, count, cache, out, mass, rows, length,
        head_size**-0.5, eps, NORM=qk_norm is not None, H=heads, K=kv_heads, G=group,
        G_PAD=max(16, triton.next_power_of_2(group)), D=head_size, SPLITS=splits, BLOCK=64, EARLY=early, num_warps=4,
        num_stages=2, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return (out[0], mass) if splits == 1 else (out, mass)


def combine(shares: torch.Tensor, mass: torch.Tensor, dtype: torch.dtype, *, early: bool = False) -> torch.Tensor:
    """[S, N, H * D] and [S, N, H] -> [N, H * D]."""
    splits, rows, heads = mass.shape
    out = torch.empty(shares.shape[1:], dtype=dtype, device=shares.device)
    _combine[(rows, heads)](
        shares, mass, out, rows, H=heads, D=shares.shape[2] // heads, SPLITS=splits, EARLY=early, num_warps=1,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
