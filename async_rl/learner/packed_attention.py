"""Causal attention over sequences that lie one after the other without padding, common prompts only once.

A family is one prompt and the completions that continue it: the prompt's tokens, then each completion's. A completion
attends to the prompt and to itself; the prompt's keys, values and hidden states are computed once for all of them, and
its gradient is the sum over them, so the result is that of separate sequences. Sequences without a common prompt are
a family of prefix 0.

Completions of equal length are one block, and a block is one batched call: 512 sequences of 10 tokens are a single
kernel, 16 ragged ones are 16, and no token ever attends to padding. On CPU this is 2.5 to 4 times the padded speed for
ragged lengths. A family of few tokens is one masked matrix instead: there the calls would cost more than the products.

On a GPU in half precision all sequences of a micro-batch are one call of a variable-length kernel, and all prompts that
are continued one more (varlen.py). In fp32, which these kernels do not have, a GPU goes block by block as a CPU does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel

from async_rl.learner.families import Block, Family
from async_rl.learner.varlen import Spans, attend_spans, spans_of

NAME = "async_rl_packed"
"""Under which transformers finds the function. No mask function of this name is registered: transformers then makes no
mask at all, and the families, which arrive through the keyword arguments of the forward pass, say everything."""


DENSE_TOKENS = 1024
"""A family with a prefix of up to so many tokens is computed as one masked matrix. CPU flash attention takes 1.4 ms a
call in its backward pass however short the block: at 4 families of 200 tokens that was a third of the whole step."""


DENSE_LENGTH = 192
"""So are sequences of up to so many tokens in bfloat16 on a CPU: its flash attention takes 24 times as long at 16
tokens, twice as long at 128, forward and backward."""


def attend(query: Tensor, key: Tensor, value: Tensor, families: tuple[Family, ...], scale: float | None) -> Tensor:
    """[1, heads, T, D] queries, [1, kv heads, T, D] keys and values to [1, T, heads, D]."""
    sizes = [family.tokens for family in families]
    parts = zip(families, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    outputs = [_attend_family(family, q, k, v, scale) for family, q, k, v in parts]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)


def _attend_family(family: Family, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[tokens, heads, D]"""
    if not family.prefix:
        sizes = [block.tokens for block in family.blocks]
        parts = zip(family.blocks, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
        outputs = [_attend_block(block, q, k, v, scale) for block, q, k, v in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in fp32
    factor = float(query.shape[-1] ** -0.5) if scale is None else scale
    copies = query.shape[1] // key.shape[1]
    if family.tokens > DENSE_TOKENS and query.device.type != "cpu":
        return _attend_completions(family, query, key, value, factor)
    if family.tokens <= DENSE_TOKENS:
        scores = query.squeeze(0).unflatten(0, (-1, copies)) @ (key * factor).transpose(-1, -2).squeeze(0)[:, None]
        weights = scores.masked_fill(_hidden(family, query.device), -torch.inf).softmax(-1)  # sums are fp32 inside
        return (weights @ value.squeeze(0)[:, None]).flatten(0, 1).transpose(0, 1)
    key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    output = cast(Tensor, _SharedPrefix.apply(query, key, value, family, factor))
    return output.squeeze(0).transpose(0, 1)


@lru_cache(maxsize=64)
def _hidden(family: Family, device: torch.device) -> Tensor:
    """[tokens, tokens] bool, True where a token does not see another; the same for every layer of the model."""
    lengths = [family.prefix, *(block.length for block in family.blocks for _ in range(block.sequences))]
    owner_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sees_TT = (owner_T == 0) | (owner_T == owner_T[:, None])
    return (~sees_TT.tril()).to(device)


def _attend_completions(family: Family, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[tokens, heads, D]; any device and dtype. Every completion is given the keys and values of the prompt."""
    sizes = [family.prefix, *(block.tokens for block in family.blocks)]
    (q, *qs), (k, *ks), (v, *vs) = query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2)
    outputs = [_attend_block(Block(1, family.prefix), q, k, v, scale)]
    for block, q_b, k_b, v_b in zip(family.blocks, qs, ks, vs, strict=True):
        ours = _batched(q_b, block)
        theirs = [
            torch.cat([x.expand(block.sequences, -1, -1, -1), _batched(y, block)], 2) for x, y in ((k, k_b), (v, v_b))
        ]
        sees = torch.ones(block.length, family.prefix + block.length, dtype=torch.bool, device=query.device)
        grouped = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(
            ours, *theirs, attn_mask=sees.tril(family.prefix), scale=scale, enable_gqa=grouped
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _attend_block(block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[sequences * length, heads, D]; views of the inputs, nothing is copied."""
    grouped = query.shape[1] != key.shape[1]
    q, k, v = (_batched(x, block) for x in (query, key, value))
    if v.dtype is torch.bfloat16 and v.device.type == "cpu" and block.length <= DENSE_LENGTH:
        factor = float(q.shape[-1] ** -0.5) if scale is None else scale
        q = q.to(v.dtype).unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [n, kv heads, copies * L, D]
        scores = (q @ (k * factor).to(v.dtype).transpose(-1, -2)).unflatten(2, (-1, block.length))
        weights = scores.masked_fill(_future(block.length), -torch.inf).softmax(-1)
        return (weights.flatten(2, 3) @ v).unflatten(2, (-1, block.length)).flatten(1, 2).transpose(1, 2).flatten(0, 1)
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=256)
def _future(length: int) -> Tensor:
    """[L, L] bool, True where a token does not see another."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _batched(x: Tensor, block: Block) -> Tensor:
    """[1, heads, n * L, D] -> [n, heads, L, D]"""
    return x.squeeze(0).unflatten(1, block).transpose(0, 1)


def _flat(x: Tensor) -> Tensor:
    """[n, heads, L, D] -> [1, heads, n * L, D], and [n, heads, L] -> [1, heads, n * L]"""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _SharedPrefix(torch.autograd.Function):
    """Attention of one family, [1, heads, tokens, D] all.

    A completion's two halves (over the prompt, over itself) are computed apart and merged by their log-sum-exps. For
    the backward pass each half is given the merged output and log-sum-exp: with those, the usual flash-attention
    backward of a part yields that part's share of the exact gradient (as in Ring Attention, 2310.01889).
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, family: Family, scale: float
    ) -> Tensor:
        sizes = [family.prefix, *(block.tokens for block in family.blocks)]
        (q, *qs), (k, *ks), (v, *vs) = query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2)
        prefix, prefix_lse = _flash(q, k, v, is_causal=True, scale=scale)
        outputs, lses = [prefix], [prefix_lse]
        for block, q_b, k_b, v_b in zip(family.blocks, qs, ks, vs, strict=True):
            over, over_lse = _flash(q_b, k, v, is_causal=False, scale=scale)
            own, own_lse = (
                _flat(x) for x in _flash(*(_batched(x, block) for x in (q_b, k_b, v_b)), is_causal=True, scale=scale)
            )
            lse = torch.logaddexp(over_lse, own_lse)
            share, own_share = (over_lse - lse).exp()[..., None], (own_lse - lse).exp()[..., None]
            outputs.append((over * share + own * own_share).to(query.dtype))
            lses.append(lse)
        output, lse = torch.cat(outputs, 2), torch.cat(lses, 2)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.family, ctx.scale, ctx.sizes = family, scale, sizes
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        split = [x.split(ctx.sizes, 2) for x in (grads[0], *ctx.saved_tensors)]
        options: Any = {"dropout_p": 0.0, "scale": ctx.scale}
        first = [parts[0] for parts in split]
        grad_q, grad_k, grad_v = _flash_backward(*first, is_causal=True, **options)
        grads_q, grads_k, grads_v = [grad_q], [grad_k], [grad_v]
        for index, block in enumerate(ctx.family.blocks, 1):
            grad, q_b, k_b, v_b, out, lse = (parts[index] for parts in split)
            over = _flash_backward(grad, q_b, first[2], first[3], out, lse, is_causal=False, **options)
            own_inputs = (_batched(x, block) for x in (grad, q_b, k_b, v_b, out))
            own_lse = _batched(lse[..., None], block).squeeze(-1)
            own = [_flat(x) for x in _flash_backward(*own_inputs, own_lse, is_causal=True, **options)]
            grads_q.append(over[0] + own[0])
            grads_k[0], grads_v[0] = grads_k[0] + over[1], grads_v[0] + over[2]
            grads_k.append(own[1])
            grads_v.append(own[2])
        return torch.cat(grads_q, 2), torch.cat(grads_k, 2), torch.cat(grads_v, 2), None, None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_families: tuple[Family, ...] = (),
    packed_spans: Spans | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. Raises ValueError where someone else calls the model."""
    if packed_spans is not None:
        scale = float(query.shape[-1] ** -0.5) if scaling is None else scaling
        return attend_spans(query, key, value, packed_spans, scale), None
    if not packed_families:
        raise ValueError("packed attention was called without packed_families: use run_packed")
    return attend(query, key, value, packed_families, scaling), None


AttentionInterface.register(NAME, _attention)


def use_packed_attention(model: PreTrainedModel) -> None:
    """From now on the model reads packed sequences only, through `run_packed`. Saved configs do not mention it."""
    model.set_attn_implementation(NAME)


def run_packed(model: PreTrainedModel, input_1T: Tensor, position_1T: Tensor, families: tuple[Family, ...]) -> Tensor:
    """[T, H] hidden states after the last norm, before the head.

    Raises ValueError where a sequence is longer than a sliding window of the model: packing does not do that.
    """
    _check_windows(model, max(family.longest for family in families))
    packed: dict[str, Any] = {"packed_families": families}
    if uses_spans(model, input_1T.device):
        packed = {"packed_spans": spans_of(families, input_1T.device)}
    output = model.base_model(input_ids=input_1T, position_ids=position_1T, use_cache=False, **packed)
    return output.last_hidden_state.squeeze(0)


def uses_spans(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether products are in half precision on a GPU here: variable-length kernels are for these."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _check_windows(model: PreTrainedModel, longest: int) -> None:
    for layer in cast(nn.ModuleList, model.base_model.layers):
        window = cast(int | None, getattr(layer.self_attn, "sliding_window", None))
        if window is not None and longest > window:
            raise ValueError(f"sequences longer than the model's sliding window of {window} tokens cannot be packed")
