"""Attention as variable-length kernels want it equals attention block by block: outputs and gradients, in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from async_rl.learner import packed_attention
from async_rl.learner.families import Block, Family
from async_rl.learner.packed_attention import attend
from async_rl.learner.varlen import attend_spans, lengths_of, spans_of

ALONE = (Family(0, (Block(2, 3), Block(1, 4))), Family(0, (Block(1, 1),)))
SHARED = (
    Family(5, (Block(1, 1), Block(3, 4))), Family(0, (Block(2, 3),)), Family(2, ()), Family(7, (Block(2, 2),)),
)  # fmt: skip
CPU = torch.device("cpu")


def drawn(families: tuple[Family, ...], heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Query, key, value, and the gradient of the output."""
    tokens = sum(family.tokens for family in families)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, 8), (1, kv_heads, tokens, 8), (1, kv_heads, tokens, 8), (1, tokens, heads, 8)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def grads(attention: object, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    output = attention(q, k, v)  # type: ignore[operator]
    output.backward(inputs[3])
    return [output.detach(), *[x.grad for x in (q, k, v) if x.grad is not None]]


@pytest.mark.parametrize("families", [ALONE, SHARED], ids=["alone", "shared"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
@pytest.mark.parametrize("scale", [8**-0.5, 0.3])
def test_spans_equal_blocks(families: tuple[Family, ...], heads: int, kv_heads: int, scale: float) -> None:
    inputs = drawn(families, heads, kv_heads)
    spans = spans_of(families, CPU)
    found = grads(lambda q, k, v: attend_spans(q, k, v, spans, scale), inputs)
    expected = grads(lambda q, k, v: attend(q, k, v, families, scale), inputs)
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_completions_with_a_copy_of_their_prompt_equal_blocks() -> None:
    """What a GPU computes in fp32 for families too large for one masked matrix."""
    family, inputs = SHARED[0], drawn(SHARED[:1], 4, 2)
    found = grads(lambda q, k, v: packed_attention._attend_completions(family, q, k, v, 0.3)[None], inputs)
    expected = grads(lambda q, k, v: attend(q, k, v, (family,), 0.3), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_where_sequences_lie() -> None:
    assert lengths_of(SHARED).sequences == [5, 1, 4, 4, 4, 3, 3, 2, 7, 2, 2]
    spans = spans_of(SHARED, CPU)
    assert spans.starts.tolist() == [0, 5, 6, 10, 14, 18, 21, 24, 26, 33, 35, 37]
    assert spans.continued_C.tolist() == [*range(5, 18), *range(33, 37)]
    assert spans.prompt_P.tolist() == [*range(5), *range(26, 33)]
    assert spans.continued_starts.tolist() == [0, 13, 17] and spans.prompt_starts.tolist() == [0, 5, 12]
    assert spans.longest.tolist() == [7, 13, 7]
    assert spans_of(ALONE, CPU).continued_C.numel() == 0


def test_the_operator_says_the_truth_about_itself() -> None:
    """Shapes and strides for torch.compile, no input changed, gradients registered."""
    q, k, v = (x.squeeze(0).transpose(0, 1).requires_grad_() for x in drawn(SHARED, 4, 2)[:3])
    torch.library.opcheck(torch.ops.async_rl.attend_spans.default, (q, k, v, *spans_of(SHARED, CPU), 0.3))
