"""Log-probs and entropy of chosen tokens, without ever holding [tokens, vocabulary] for a large vocabulary.

    logits = hidden W^T / temperature,   logp = log_softmax(logits)[target],   entropy = -sum p log p

The head is applied to the trainable positions only, in chunks of rows; the backward pass computes a chunk's logits
again rather than keeping them. Where all fits into one chunk, the log-softmax is kept and nothing is computed twice.
Softmax, sums and gradients of logits are fp32, whatever the dtype of the matrix products.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 23
"""Logits held at a time: 32 MB of fp32, a few copies of which the memory allocator keeps and uses again."""


class TokenLogprobs(NamedTuple):
    logp_K: Tensor
    """[K] float32, with gradient"""
    entropy_K: Tensor
    """[K] float32, with gradient; detach it where it only serves as a metric, which spares its backward pass"""


def token_logprobs(
    hidden_KH: Tensor,
    weight_VH: Tensor,
    target_K: Tensor,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenLogprobs:
    """Under the distribution that was sampled from. `dtype`: of the matrix products; None = the hidden states'."""
    rows = max(1, chunk_elements // weight_VH.shape[0])
    outputs = _Head.apply(hidden_KH, weight_VH, target_K, temperature, dtype or hidden_KH.dtype, rows)
    return TokenLogprobs(*cast(tuple[Tensor, Tensor], outputs))


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits = logits / temperature
    return torch.log_softmax(logits, -1)


class _Head(torch.autograd.Function):
    """d logp / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_KH: Tensor,
        weight_VH: Tensor,
        target_K: Tensor,
        temperature: float,
        dtype: torch.dtype,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden_KH.device.type, enabled=False):
            hidden, weight = hidden_KH.to(dtype), weight_VH.to(dtype)
            logps: list[Tensor] = []
            entropies: list[Tensor] = []
            kept: Tensor | None = None
            for part, target in zip(hidden.split(rows), target_K.split(rows), strict=True):
                log_p = _log_softmax(part, weight, temperature)
                logps.append(log_p.gather(1, target[:, None]).squeeze(1))
                entropies.append(-torch.linalg.vecdot(log_p.exp(), log_p))
                kept = log_p
        whole = kept is not None and len(kept) == len(target_K)
        logp_K, entropy_K = torch.cat(logps), torch.cat(entropies)
        ctx.save_for_backward(hidden_KH, weight_VH, target_K, entropy_K, kept if whole else None)
        ctx.temperature, ctx.dtype, ctx.rows = temperature, dtype, rows
        ctx.set_materialize_grads(False)
        return logp_K, entropy_K

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_logp_K, grad_entropy_K = grads
        hidden_KH, weight_VH, target_K, entropy_K, kept = ctx.saved_tensors
        if grad_logp_K is None and grad_entropy_K is None:
            return (None,) * 6
        with torch.autocast(hidden_KH.device.type, enabled=False):
            hidden, weight = hidden_KH.to(ctx.dtype), weight_VH.to(ctx.dtype)
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for start in range(0, len(target_K), ctx.rows):
                rows = slice(start, start + ctx.rows)
                log_p = kept if kept is not None else _log_softmax(hidden[rows], weight, ctx.temperature)
                p = log_p.exp()
                grad = torch.zeros_like(p)
                if grad_logp_K is not None:
                    grad = -p * grad_logp_K[rows, None]
                    grad.scatter_add_(1, target_K[rows, None], grad_logp_K[rows, None])
                if grad_entropy_K is not None:
                    grad -= p * (log_p + entropy_K[rows, None]) * grad_entropy_K[rows, None]
                grad = (grad / ctx.temperature if ctx.temperature != 1.0 else grad).to(ctx.dtype)
                grad_hidden[rows] = grad @ weight
                if grad_weight is not None:
                    grad_weight += grad.t() @ hidden[rows]
        grad_weight = None if grad_weight is None else grad_weight.to(weight_VH.dtype)
        return grad_hidden.to(hidden_KH.dtype), grad_weight, None, None, None, None
