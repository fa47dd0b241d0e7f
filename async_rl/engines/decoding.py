"""One decode step as torch operations: the newest token of every sequence through the model, and the next one drawn.

N rows: slots [0, N). G queries of one key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from async_rl.engines.decoder import Decoder, DecoderWeights
from async_rl.engines.draw import draw, uniforms
from async_rl.engines.kv_cache import KVCache
from async_rl.engines.runs import Run
from async_rl.engines.slots import DUE, KEY, OFFSET, POSITION, STOPS, TOKEN, Slots


def decode(
    decoder: Decoder,
    weights: DecoderWeights,
    cache: KVCache,
    slots: Slots,
    runs: Sequence[Run],
    *,
    tempered: bool,
    greedy: bool,
) -> torch.Tensor:
    """Advance the slots that the runs cover by one token. Returns whether each is due: bool [N].

    runs: of the lengths after this step, so many positions there are keys for.
    tempered, greedy: a temperature other than 1, a greedy sequence occurs.
    """
    rows, longest = runs[-1].last, max(run.length for run in runs)
    position_N = slots.state[POSITION, :rows]
    places_N = slots.indices[:rows] * cache.length + position_N
    groups = (decoder.kv_heads, decoder.heads // decoder.kv_heads)
    mask = torch.empty(0)
    if any(run.ragged for run in runs):
        hidden = slots.positions[:longest] > position_N[:, None]
        mask = torch.zeros(hidden.shape, dtype=decoder.dtype, device=hidden.device)
        mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]

    def attend(layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        cache.write(layer, places_N, kv)
        attended = q.new_empty((rows, *groups, q.shape[2]))
        for run in runs:
            k, v = cache.read(layer, run.first, run.last, run.length)
            q_run = q[run.first : run.last].unflatten(1, groups)  # the queries of one key-value head are "positions"
            mask_run = None
            if run.ragged:
                mask_run = mask[run.first : run.last, :, :, : run.length].expand(-1, -1, groups[1], -1)
            attended[run.first : run.last] = F.scaled_dot_product_attention(q_run, k, v, attn_mask=mask_run)
        return attended.flatten(1)

    hidden_NC = decoder.forward(weights, slots.state[TOKEN, :rows], slots.rotations[position_N], attend)
    position_N += 1
    logits_NV = decoder.logits(weights, hidden_NC)
    return sample(slots, slots.indices[:rows], logits_NV, tempered=tempered, greedy=greedy)


def sample(
    slots: Slots, slots_N: torch.Tensor, logits_NV: torch.Tensor, *, tempered: bool, greedy: bool
) -> torch.Tensor:
    """Draw the token at each slot's position. Returns whether the host must look at the slot: bool [N]."""
    state = slots.state[:, slots_N]
    position_N = state[POSITION]
    tokens_N, logprobs_N = draw(
        logits_NV,
        uniforms(state[KEY], position_N + state[OFFSET]),
        slots.temperature[slots_N] if tempered else None,
        slots.greedy[slots_N] if greedy else None,
    )
    slots.state[TOKEN, slots_N] = tokens_N
    places_N = slots_N * slots.stride + position_N
    slots.tokens.view(-1).index_copy_(0, places_N, tokens_N.int())
    slots.logprobs.view(-1).index_copy_(0, places_N, logprobs_N)
    return (state[STOPS:] == tokens_N).any(0) | (position_N >= state[DUE])
