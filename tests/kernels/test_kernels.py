"""The kernels of a decode step, in Triton's interpreter: no GPU, but Triton, which `make test-kernels` installs. Its
matrix products do not know bfloat16, so this is float32."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import numpy as np
import pytest
import torch

from ..engines.engine_cases import configs, finish, make_batcher, make_model, prompts, request, run, swap

pytest.importorskip("triton")

from async_rl.engines.fused import Fused
from async_rl.engines.static_steps import StaticSteps

SIZES = {"hidden_size": 64, "head_dim": 16}


def few_rows(batcher: object, rows: int) -> None:
    steps = batcher._steps  # type: ignore[attr-defined]
    assert isinstance(steps, StaticSteps) and isinstance(steps._fused, Fused)
    steps._fused.few_rows = rows


@pytest.mark.parametrize("rows", [0, 64], ids=["cublas", "kernels"])
@pytest.mark.parametrize("name", list(configs()))
def test_equals_eager_steps(name: str, rows: int) -> None:
    config = configs()[name]
    for key, value in SIZES.items():
        setattr(config, key, value)
    model = make_model(config)
    temperatures = (1.0, 0.0, 0.7)
    requests = [
        request(i, prompt, 3 + i % 3, temperature=temperatures[i % 3], stop=frozenset(range(i % 3)))
        for i, prompt in enumerate([*prompts(4, longest=90), tuple(range(50)) * 3])
    ]
    eager = run(make_batcher(model, slots=3), requests)
    batcher = make_batcher(model, slots=3, steps="fused")
    few_rows(batcher, rows)
    fused = run(batcher, requests)
    for one in requests:
        assert fused[one.id].tokens.tolist() == eager[one.id].tokens.tolist()
        assert fused[one.id].finish_reason == eager[one.id].finish_reason
        assert np.abs(fused[one.id].logprobs - eager[one.id].logprobs).max() < 5e-5


@pytest.mark.parametrize("vocabulary", [4096, 4900])
def test_a_vocabulary_and_an_intermediate_size_of_several_blocks(vocabulary: int) -> None:
    config = configs()["qwen2"]
    config.vocab_size, config.hidden_size, config.head_dim = vocabulary, 64, 16
    config.intermediate_size = vocabulary // 4
    model = make_model(config)
    requests = [request(i, (1, 2, 3 + i), 4, temperature=0.0 if i == 2 else 1.0) for i in range(3)]
    requests[0] = request(0, (1, 2, 3), 6)  # alone at the end
    eager, fused = (run(make_batcher(model, slots=3, steps=kind), requests) for kind in ("eager", "fused"))
    for one in requests:
        assert fused[one.id].tokens.tolist() == eager[one.id].tokens.tolist()
        assert np.abs(fused[one.id].logprobs - eager[one.id].logprobs).max() < 5e-5


def test_a_swap_in_mid_sequence() -> None:
    config = configs()["llama"]
    config.hidden_size, config.head_dim = 64, 16
    before, after = make_model(config, seed=1), make_model(config, seed=2)
    requests = [request(i, prompt, 6) for i, prompt in enumerate(prompts(2, seed=3))]
    found = []
    for kind in ("eager", "fused"):
        batcher = make_batcher(before, slots=2, steps=kind)
        batcher.submit(requests)
        batcher.step()
        swap(batcher, after, 1)
        found.append(finish(batcher))
    eager, fused = found
    for one in requests:
        assert fused[one.id].spans == eager[one.id].spans and len(fused[one.id].spans) == 2
        assert fused[one.id].tokens.tolist() == eager[one.id].tokens.tolist()
        assert torch.allclose(torch.tensor(fused[one.id].logprobs), torch.tensor(eager[one.id].logprobs), atol=5e-5)
