"""Log-probs and entropy of chosen tokens, without ever holding [tokens, vocabulary] for a large vocabulary.

    logits = hidden W^T / temperature,   logp = log_softmax(logits)[target],   entropy = -sum p log p

The head is applied to the trainable positions only, in chunks of rows; the backward pass computes a chunk's logits
again rather than keeping them. Where all fits into one chunk, the log-softmax is kept and nothing is computed twice.
Softmax, sums and gradients of logits are fp32, whatever the dtype of the matrix products.

`fused`, for a GPU: logits stay in the dtype of the products, and torch.compile makes one kernel of all that reads them
and one of their gradient. A row keeps its log-sum-exp, so the gradient is elementwise. Without it a GPU writes and
reads a chunk ten times in fp32, which takes longer than the products themselves. Where there is room for the logits of
all rows, they are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 23
"""Logits held at a time: 32 MB of fp32, a few copies of which the memory allocator keeps and uses again."""
GPU_ELEMENTS, FUSED_ELEMENTS = 1 << 27, 1 << 29
"""On a GPU: of fp32 with its copies, and of bfloat16 with its gradient, 2 GB each. A chunk reads the whole head and
adds to its whole gradient, so that few rows at a time would be all traffic."""


def chunk_of(device: torch.device) -> int:
    """Logits to hold at a time."""
    return GPU_ELEMENTS if device.type == "cuda" else CHUNK_ELEMENTS


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
    chunk_elements: int | None = None,
    fused: bool = False,
) -> TokenLogprobs:
    """Under the distribution that was sampled from. `dtype`: of the matrix products; None = the hidden states'."""
    fused = fused and len(target_K) > 0
    elements = chunk_elements or (FUSED_ELEMENTS if fused else chunk_of(hidden_KH.device))
    rows = max(1, elements // weight_VH.shape[0])
    head = _FusedHead if fused else _Head
    outputs = head.apply(hidden_KH, weight_VH, target_K, temperature, dtype or hidden_KH.dtype, rows)
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

        def gradient(rows: slice, hidden: Tensor, weight: Tensor) -> Tensor:
            log_p = kept if kept is not None else _log_softmax(hidden, weight, ctx.temperature)
            p = log_p.exp()
            grad = torch.zeros_like(p)
            if grad_logp_K is not None:
                grad = -p * grad_logp_K[rows, None]
                grad.scatter_add_(1, target_K[rows, None], grad_logp_K[rows, None])
            if grad_entropy_K is not None:
                grad -= p * (log_p + entropy_K[rows, None]) * grad_entropy_K[rows, None]
            return (grad / ctx.temperature if ctx.temperature != 1.0 else grad).to(ctx.dtype)

        return *_through_head(ctx, hidden_KH, weight_VH, gradient), None, None, None, None


def _through_head(
    ctx: Any, hidden_KH: Tensor, weight_VH: Tensor, gradient: Callable[[slice, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the hidden states and of the head, `ctx.rows` at a time. gradient: of the logits of these rows, from
    their hidden states and the head, both of the dtype of the products."""
    with torch.autocast(hidden_KH.device.type, enabled=False):
        hidden, weight = hidden_KH.to(ctx.dtype), weight_VH.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.rows):
            rows = slice(start, start + ctx.rows)
            grad = gradient(rows, hidden[rows], weight)
            torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
    return grad_hidden.to(hidden_KH.dtype), None if grad_weight is None else grad_weight.to(weight_VH.dtype)


def _statistics(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """[rows] float32 each: log-prob of the target, entropy, log-sum-exp."""
    x = logits.float() / temperature
    highest = x.amax(-1, keepdim=True)
    weights = (x - highest).exp()
    total = weights.sum(-1)
    lse = highest.squeeze(-1) + total.log()
    return x.gather(1, target[:, None]).squeeze(1) - lse, lse - (weights * x).sum(-1) / total, lse


def _gradient(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> Tensor:
    """Of the logits, in their dtype."""
    log_p = logits.float() / temperature - lse[:, None]
    p = log_p.exp()
    grad = torch.zeros_like(p)
    if grad_logp is not None:
        chosen = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
        grad = (chosen.float() - p) * grad_logp[:, None]
    if grad_entropy is not None:
        grad = grad - p * (log_p + entropy[:, None]) * grad_entropy[:, None]
    return (grad / temperature).to(logits.dtype)


class _FusedHead(torch.autograd.Function):
    """As _Head, from logits in the dtype of the products."""

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
        statistics = _compiled(_statistics)
        with torch.autocast(hidden_KH.device.type, enabled=False):
            hidden, weight = hidden_KH.to(dtype), weight_VH.to(dtype)
            keep = any(ctx.needs_input_grad) and _has_room(len(hidden) * len(weight) * dtype.itemsize, hidden.device)
            found: list[tuple[Tensor, Tensor, Tensor]] = []
            kept: list[Tensor] = []
            for part, target in zip(hidden.split(rows), target_K.split(rows), strict=True):
                logits = part @ weight.t()
                found.append(statistics(logits, target, temperature))
                if keep:
                    kept.append(logits)
        logp_K, entropy_K, lse_K = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(hidden_KH, weight_VH, target_K, entropy_K, lse_K, *kept)
        ctx.temperature, ctx.dtype, ctx.rows = temperature, dtype, rows
        ctx.set_materialize_grads(False)
        return logp_K, entropy_K

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grads[0] is None and grads[1] is None:
            return (None,) * 6
        hidden_KH, weight_VH, target_K, entropy_K, lse_K, *logits = ctx.saved_tensors
        compiled = _compiled(_gradient)

        def gradient(rows: slice, hidden: Tensor, weight: Tensor) -> Tensor:
            of_rows = (target_K[rows], lse_K[rows], entropy_K[rows])
            of_outputs = [None if grad is None else grad[rows] for grad in grads]
            chunk = logits[rows.start // ctx.rows] if logits else hidden @ weight.t()
            return compiled(chunk, *of_rows, *of_outputs, ctx.temperature)

        return *_through_head(ctx, hidden_KH, weight_VH, gradient), None, None, None, None


def _has_room(nbytes: int, device: torch.device) -> bool:
    """Whether a GPU could hold this twice. Only the time that a step takes depends on it."""
    if device.type != "cuda":
        return False
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 2 * nbytes <= torch.cuda.mem_get_info(device)[0] + spare


@lru_cache(maxsize=2)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """When it is first called; rows vary from batch to batch, the vocabulary does not."""
    return torch.compile(function)
