from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from async_rl.engines.linear import can_pack, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_equals_torch(dtype: torch.dtype, biased: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(33, 48, generator=generator).to(dtype)
    bias = torch.randn(33, generator=generator).to(dtype) if biased else None
    x = torch.randn(rows, 48, generator=generator).to(dtype)
    with torch.inference_mode():
        result = linear(weight, bias)(x)
    assert torch.allclose(result.float(), F.linear(x, weight, bias).float(), rtol=2e-2, atol=2e-2)


def test_only_bfloat16_on_a_cpu_is_packed() -> None:
    assert not can_pack(torch.zeros(2, 2))
    assert not can_pack(torch.zeros(2, 2, dtype=torch.bfloat16, device="meta"))
