"""`engines.draw` and the bookkeeping of a step as two kernels: blocks of the vocabulary are summed up, then one program
a row finds the block and the token in it, and writes what the slot has to know.

N rows: slots [0, N). V vocabulary, B blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from async_rl.engines import sampling
from async_rl.engines.slots import DUE, KEY, OFFSET, POSITION, STOPS, TOKEN, Slots

BLOCK = 2048


@triton.jit
def _sum_blocks(logits, temperatures, highest, sums, best, V, blocks, BLOCK: tl.constexpr):
    """Largest logit of a block, the sum of exp(logit - largest), and where the largest is."""
    row, block = tl.program_id(0), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    x = x / tl.load(temperatures + row)
    largest = tl.max(x, 0)
    tl.store(highest + row * blocks + block, largest)
    tl.store(sums + row * blocks + block, tl.sum(tl.exp(x - largest), 0))
    tl.store(best + row * blocks + block, tl.min(tl.where(x == largest, v, V), 0))


@triton.jit
def _uniform(key, counter, GOLDEN: tl.constexpr, MULTIPLY_1: tl.constexpr, MULTIPLY_2: tl.constexpr):
    """engines.sampling.uniform."""
    z = key.to(tl.uint64, bitcast=True) + (counter + 1).to(tl.uint64, bitcast=True) * GOLDEN
    z = (z ^ (z >> 30)) * MULTIPLY_1
    z = (z ^ (z >> 27)) * MULTIPLY_2
    z = z ^ (z >> 31)
    return (z >> 11).to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _draw(
    logits, temperatures, greedy, highest, sums, best, state, count, tokens, logprobs, due, V, blocks, slots, stride,
    stops, GOLDEN: tl.constexpr, MULTIPLY_1: tl.constexpr, MULTIPLY_2: tl.constexpr, TOKEN: tl.constexpr,
    POSITION: tl.constexpr, KEY: tl.constexpr, OFFSET: tl.constexpr, DUE: tl.constexpr, STOPS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS_PAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    active = row < tl.load(count)
    position = tl.load(state + POSITION * slots + row, mask=active, other=0) + 1
    counter = position + tl.load(state + OFFSET * slots + row)
    u = _uniform(tl.load(state + KEY * slots + row), counter, GOLDEN, MULTIPLY_1, MULTIPLY_2)
    b = tl.arange(0, BLOCKS_PAD)
    inside = b < blocks
    largest_b = tl.load(highest + row * blocks + b, mask=inside, other=float("-inf"))
    largest = tl.max(largest_b, 0)
    mass_b = (tl.load(sums + row * blocks + b, mask=inside, other=0.0) * tl.exp(largest_b - largest)).to(tl.float64)
    cumulated_b = tl.cumsum(mass_b, 0)
    total = tl.max(cumulated_b, 0)
    # "< total": rounding may make the threshold the total; the last block, and token, of any mass is meant then.
    block = tl.sum(((cumulated_b <= u * total) & (cumulated_b < total)).to(tl.int32), 0)
    block = tl.minimum(block, blocks - 1)
    mass = tl.sum(tl.where(b == block, mass_b, 0.0), 0)
    below = tl.max(tl.where(b < block, cumulated_b, 0.0), 0)
    within = (u * total - below) / mass
    i = tl.arange(0, BLOCK)
    v = block * BLOCK + i
    row_logits = logits + row.to(tl.int64) * V
    temperature = tl.load(temperatures + row)
    x = tl.load(row_logits + v, mask=v < V, other=float("-inf")).to(tl.float32) / temperature
    cumulated = tl.cumsum(tl.exp(x - largest).to(tl.float64), 0)
    total_here = tl.max(cumulated, 0)
    found = tl.sum(((cumulated <= within * total_here) & (cumulated < total_here)).to(tl.int32), 0)
    token = tl.minimum(block * BLOCK + found, V - 1)
    likeliest = tl.min(tl.where(largest_b == largest, tl.load(best + row * blocks + b, mask=inside, other=V), V), 0)
    token = tl.where(tl.load(greedy + row) != 0, tl.minimum(likeliest, V - 1), token)
    drawn = tl.load(row_logits + token).to(tl.float32) / temperature
    tl.store(state + TOKEN * slots + row, token.to(tl.int64), mask=active)
    tl.store(state + POSITION * slots + row, position, mask=active)
    place = row.to(tl.int64) * stride + position
    tl.store(tokens + place, token.to(tl.int32), mask=active)
    tl.store(logprobs + place, drawn - largest - tl.log(total.to(tl.float32)), mask=active)
    looked_at = position >= tl.load(state + DUE * slots + row)
    for s in range(stops):
        looked_at |= tl.load(state + (STOPS + s) * slots + row) == token
    tl.store(due + row, looked_at.to(tl.int8))


def draw(slots: Slots, logits_NV: torch.Tensor, count: torch.Tensor, due: torch.Tensor) -> None:
    """Draw the next token of every slot and advance it; set its flag in `due`, bool [N or more]. Slots from `count` [1]
    on stay as they are."""
    rows, vocabulary = logits_NV.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    highest, sums = torch.empty((2, rows, blocks), dtype=torch.float32, device=logits_NV.device)
    best = torch.empty((rows, blocks), dtype=torch.int32, device=logits_NV.device)
    temperatures = slots.temperature
    _sum_blocks[(rows, blocks)](
        logits_NV, temperatures, highest, sums, best, vocabulary, blocks, BLOCK=BLOCK, num_warps=4
    )
    _draw[(rows,)](
        logits_NV, temperatures, slots.greedy.view(torch.int8), highest, sums, best, slots.state, count, slots.tokens,
        slots.logprobs, due.view(torch.int8), vocabulary, blocks, slots.count, slots.stride, slots.stops,
        GOLDEN=sampling.GOLDEN, MULTIPLY_1=sampling.MULTIPLY_1, MULTIPLY_2=sampling.MULTIPLY_2, TOKEN=TOKEN,
        POSITION=POSITION, KEY=KEY, OFFSET=OFFSET, DUE=DUE, STOPS=STOPS, BLOCK=BLOCK,
        BLOCKS_PAD=triton.next_power_of_2(blocks), num_warps=4,
    )  # fmt: skip
