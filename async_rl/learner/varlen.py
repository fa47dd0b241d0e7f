"""Packed attention by variable-length kernels: one call for all sequences, a second one for what continues a prompt.

    spans = spans_of(families, device)               # once per micro-batch
    output = attend_spans(query, key, value, spans, scale)

                        queries                      keys and values
    call 1, causal      every prompt, completion     its own
    call 2, not         completions of a family      their prompt, gathered

The two halves of a completion are merged by their log-sum-exps; in the backward pass each half is given the merged
output and log-sum-exp, with which the usual flash-attention backward yields that half's share of the exact gradient (as
in Ring Attention, arXiv 2310.01889).

On a GPU the kernels are torch's flash-attention, in half precision; on a CPU its flash-attention for CPUs, sequence by
sequence: there packed_attention.attend is faster, and this is what the layout is tested with. The operator is opaque to
torch.compile, and all that changes from one micro-batch to the next reaches it as a tensor: no batch compiles anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from async_rl.learner.families import Family

aten = torch.ops.aten


class Spans(NamedTuple):
    """Where sequences lie in T."""

    starts: Tensor
    """[sequences + 1] int32: the first token of each prompt and completion, and T"""
    continued_C: Tensor
    """[C] int64: tokens of completions that have a prompt, family after family"""
    prompt_P: Tensor
    """[P] int64: tokens of those prompts"""
    continued_starts: Tensor
    """[families with a prompt + 1] int32, in C"""
    prompt_starts: Tensor
    """[families with a prompt + 1] int32, in P"""
    longest: Tensor
    """[3] int64 on the CPU: tokens of the longest sequence, of the largest family without its prompt, of the longest
    prompt"""


class Lengths(NamedTuple):
    sequences: list[int]
    """Of all prompts and completions."""
    families: list[tuple[int, int, int]]
    """(first token, tokens of the prompt, tokens of the completions) of those that have a prompt"""


def lengths_of(families: Iterable[Family]) -> Lengths:
    """
    >>> from async_rl.learner.families import Block
    >>> lengths_of((Family(0, (Block(2, 3),)), Family(5, (Block(1, 4), Block(1, 6)))))
    Lengths(sequences=[3, 3, 5, 4, 6], families=[(6, 5, 10)])
    """
    found, at = Lengths([], []), 0
    for family in families:
        own = [block.length for block in family.blocks for _ in range(block.sequences)]
        if family.prefix:
            found.sequences.append(family.prefix)
            if own:
                found.families.append((at, family.prefix, sum(own)))
        found.sequences.extend(own)
        at += family.tokens
    return found


@lru_cache(maxsize=8)
def spans_of(families: tuple[Family, ...], device: torch.device) -> Spans:
    """The same for every layer, and for the forward pass that is computed again."""
    sequences, shared = lengths_of(families)
    prompts = [prompt for _, prompt, _ in shared]
    continued = [own for _, _, own in shared]

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    def starts(lengths: Sequence[int]) -> Tensor:
        return move(torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32))

    def tokens(places: list[tuple[int, int]]) -> Tensor:
        ranges = [torch.arange(first, first + count) for first, count in places]
        return move(torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64))

    return Spans(
        starts(sequences),
        tokens([(at + prompt, own) for at, prompt, own in shared]),
        tokens([(at, prompt) for at, prompt, _ in shared]),
        starts(continued),
        starts(prompts),
        torch.tensor([max(sequences, default=0), max(continued, default=0), max(prompts, default=0)]),
    )


def attend_spans(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
    """[1, heads, T, D] queries, [1, kv heads, T, D] keys and values to [1, T, heads, D]."""
    # autocast leaves rotated queries and keys in fp32
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    output, _ = cast(tuple[Tensor, Tensor], torch.ops.async_rl.attend_spans(q, k, v, *spans, scale))
    return output.unsqueeze(0)


# --- the operator -----------------------------------------------------------------------------------------------------

_SPANS = ", ".join(f"Tensor {name}" for name in Spans._fields)


@torch.library.custom_op(
    "async_rl::attend_spans",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {_SPANS}, float scale) -> (Tensor, Tensor)",
)
def _attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """[T, heads, D], [T, kv heads, D] twice -> [T, heads, D] and the log-sum-exps of scores, [heads, T] float32."""
    spans, scale = Spans(*rest[:-1]), rest[-1]
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    longest, longest_own, longest_prompt = spans.longest.tolist()
    own = _Call(spans.starts, spans.starts, longest, longest, True, scale)
    output, lse = own.forward(query, key, value)
    if not spans.continued_C.numel():
        return output, lse
    c, p = spans.continued_C, spans.prompt_P
    over = _Call(spans.continued_starts, spans.prompt_starts, longest_own, longest_prompt, False, scale)
    over_output, over_lse = over.forward(query[c], key[p], value[p])
    own_lse = lse[:, c]
    merged = torch.logaddexp(own_lse, over_lse)
    own_share, over_share = ((half - merged).exp().t()[..., None] for half in (own_lse, over_lse))
    output[c] = (output[c] * own_share + over_output * over_share).to(output.dtype)
    lse[:, c] = merged
    return output, lse


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@torch.library.custom_op(
    "async_rl::attend_spans_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
        f"{_SPANS}, float scale) -> (Tensor, Tensor, Tensor)"
    ),
)
def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    spans, scale = Spans(*rest[:-1]), rest[-1]
    longest, longest_own, longest_prompt = spans.longest.tolist()
    grad, query, key, value = (x.contiguous() for x in (grad, query, key, value))
    own = _Call(spans.starts, spans.starts, longest, longest, True, scale)
    grad_q, grad_k, grad_v = own.backward(grad, query, key, value, output, lse)
    if spans.continued_C.numel():
        c, p = spans.continued_C, spans.prompt_P
        over = _Call(spans.continued_starts, spans.prompt_starts, longest_own, longest_prompt, False, scale)
        more = over.backward(grad[c], query[c], key[p], value[p], output[c], lse[:, c].contiguous())
        for whole, places, part in zip((grad_q, grad_k, grad_v), (c, p, p), more, strict=True):
            whole[places] += part  # no place is there twice
    return grad_q, grad_k, grad_v


@_attend_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:-1])
    ctx.scale = inputs[-1]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor, ...] = torch.ops.async_rl.attend_spans_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*grads, *[None] * (len(Spans._fields) + 1))


_attend.register_autograd(_differentiate, setup_context=_save)


# --- kernels ----------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """One call of a kernel: sequence i of the queries attends to sequence i of keys and values."""

    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    causal: bool
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[Tq, heads, D] and [heads, Tq] float32."""
        if query.is_cuda:
            output, lse, *_ = aten._flash_attention_forward(
                query, key, value, self.query_starts, self.key_starts, *self._bounds(), 0.0, self.causal, False,
                scale=self.scale,
            )  # fmt: skip
            return output, lse
        output, lse = torch.zeros_like(query), query.new_zeros((query.shape[1], query.shape[0]), dtype=torch.float32)
        for queries, keys in self._sequences():
            q, k, v = _heads_first(query[queries]), _heads_first(key[keys]), _heads_first(value[keys])
            k, v = (_repeated(x, query.shape[1]) for x in (k, v))
            attend = aten._scaled_dot_product_flash_attention_for_cpu
            found, sums = attend(q, k, v, is_causal=self.causal, scale=self.scale)
            output[queries], lse[:, queries] = found[0].transpose(0, 1), sums.view(lse[:, queries].shape)
        return output, lse

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of query, key and value."""
        if query.is_cuda:
            seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
            unused = torch.empty(0, device=query.device)
            return aten._flash_attention_backward(
                grad, query, key, value, output, lse, self.query_starts, self.key_starts, *self._bounds(), 0.0,
                self.causal, seed, unused, scale=self.scale,
            )  # fmt: skip
        grads = tuple(torch.zeros_like(x) for x in (query, key, value))
        heads, kv_heads = query.shape[1], key.shape[1]
        for queries, keys in self._sequences():
            q, k, v = _heads_first(query[queries]), _heads_first(key[keys]), _heads_first(value[keys])
            k, v = _repeated(k, heads), _repeated(v, heads)
            g, o = _heads_first(grad[queries]), _heads_first(output[queries])
            parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, o, lse[None, :, queries], 0.0, self.causal, scale=self.scale
            )
            for whole, places, part in zip(grads, (queries, keys, keys), parts, strict=True):
                summed = part[0] if whole.shape[1] == heads else part[0].unflatten(0, (kv_heads, -1)).sum(1)
                whole[places] = summed.transpose(0, 1)
        return cast(tuple[Tensor, Tensor, Tensor], grads)

    def _bounds(self) -> tuple[int, int]:
        """For a longest query of 1 the kernel would take a path for decoding, whose log-sum-exps lie otherwise."""
        return max(self.longest_query, 2), max(self.longest_key, 2)

    def _sequences(self) -> list[tuple[slice, slice]]:
        places = (starts.tolist() for starts in (self.query_starts, self.key_starts))
        queries, keys = ([slice(a, b) for a, b in pairwise(x)] for x in places)
        return list(zip(queries, keys, strict=True))


def _heads_first(x: Tensor) -> Tensor:
    """[L, heads, D] -> [1, heads, L, D]"""
    return x.transpose(0, 1).unsqueeze(0)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)
