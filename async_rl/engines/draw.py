"""From logits to tokens: one uniform per token, inverse of the cumulative distribution.

N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from async_rl.engines import sampling

BLOCK = 128
"""Tokens in one block of a large vocabulary."""


def uniforms(keys_N: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """`sampling.uniform` for int64 tensors (keys as `signed`), float64 [N]. int64 products wrap, as they must."""
    z = keys_N + (positions_N + 1) * signed(sampling.GOLDEN)
    z = (z ^ _shift(z, sampling.SHIFT_1)) * signed(sampling.MULTIPLY_1)
    z = (z ^ _shift(z, sampling.SHIFT_2)) * signed(sampling.MULTIPLY_2)
    z = z ^ _shift(z, sampling.SHIFT_3)
    return _shift(z, 64 - sampling.UNIFORM_BITS).double() * 2.0**-sampling.UNIFORM_BITS


def signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= sampling.MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right: torch's own repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def draw(
    logits_NV: torch.Tensor,
    uniforms_N: torch.Tensor,
    temperature_N: torch.Tensor | None = None,
    greedy_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (int64 [N]) and their natural log-probs (float32 [N]).

    Logits are divided by the temperature (None: 1), and the log-prob is of that distribution. Greedy rows (None: none)
    take the largest logit; give them temperature 1, and the log-prob says how likely that token was.

    The token is the first whose cumulative probability exceeds u times the total: a token of probability 0 is never
    drawn, and rounding of the total does not matter.
    """
    if temperature_N is not None:
        logits_NV = logits_NV / temperature_N[:, None]
    highest_N1 = logits_NV.amax(-1, keepdim=True)
    tokens_N, total_N = _invert((logits_NV - highest_N1).exp_(), uniforms_N)
    if greedy_N is not None:
        tokens_N = torch.where(greedy_N, logits_NV.argmax(-1), tokens_N)
    relative_N1 = logits_NV.gather(1, tokens_N[:, None]) - highest_N1
    return tokens_N, (relative_N1.squeeze(1) - total_N.log()).float()


def _invert(weights_NV: torch.Tensor, uniforms_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The token at u * total of the cumulated weights, and the total.

    A large vocabulary is cut into blocks: first the block is found, then the token in it. There is less to cumulate.
    """
    rows, vocabulary = weights_NV.shape
    if vocabulary <= 2 * BLOCK:
        tokens_N, total_N, _ = _search(weights_NV.cumsum(-1, dtype=torch.float64), uniforms_N)
        return tokens_N, total_N
    if vocabulary % BLOCK:
        weights_NV = F.pad(weights_NV, (0, -vocabulary % BLOCK))
    weights_NBb = weights_NV.view(rows, -1, BLOCK)
    block_N, total_N, within_N = _search(weights_NBb.sum(-1).cumsum(-1, dtype=torch.float64), uniforms_N)
    weights_Nb = weights_NBb[torch.arange(rows, device=weights_NV.device), block_N]
    tokens_N, _, _ = _search(weights_Nb.cumsum(-1, dtype=torch.float64), within_N)
    return block_N * BLOCK + tokens_N, total_N


def _search(cumulative_NX: torch.Tensor, uniforms_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index of the first entry above u * total; the total; where between the entry before and this one it lies."""
    total_N = cumulative_NX[:, -1]
    threshold_N1 = (uniforms_N * total_N).unsqueeze(1)
    index_N1 = torch.searchsorted(cumulative_NX, threshold_N1, right=True)
    above_N1 = cumulative_NX.gather(1, index_N1)
    below_N1 = torch.where(index_N1 > 0, cumulative_NX.gather(1, (index_N1 - 1).clamp_(min=0)), 0.0)
    within_N1 = (threshold_N1 - below_N1) / (above_N1 - below_N1)
    return index_N1.squeeze(1), total_N, within_N1.squeeze(1).clamp_(max=1 - 2.0**-sampling.UNIFORM_BITS)
