"""Tiny models of every supported architecture, requests, and what transformers says they should give."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from async_rl.engines.batcher import Batcher
from async_rl.engines.make_steps import Kind
from async_rl.engines.protocol import Chunk, Request
from async_rl.engines.sampling import rollout_key
from async_rl.wire.messages import WeightsId

VOCABULARY = 53
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


STEPS: ContextVar[Kind] = ContextVar("steps", default="eager")
"""How batchers of `make_batcher` compute their decode steps."""


def configs() -> dict[str, PreTrainedConfig]:
    return {
        "llama": LlamaConfig(**SMALL),
        "llama3_rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
        "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
        "qwen2_yarn": Qwen2Config(**SMALL, rope_parameters=YARN),
        "qwen3": Qwen3Config(**SMALL, head_dim=16),
    }


def make_model(config: PreTrainedConfig, seed: int = 0) -> Any:
    """Random weights, large enough that greedy completions do not repeat themselves at once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = None
    return model


def make_batcher(model: Any, *, slots: int = 4, version: int = 0, **options: Any) -> Batcher:
    batcher = Batcher(
        model.config,
        slots=slots,
        max_length=options.pop("max_length", 200),
        dtype=options.pop("dtype", torch.float32),
        device=torch.device("cpu"),
        steps=options.pop("steps", STEPS.get()),
        **options,
    )
    swap(batcher, model, version)
    return batcher


def swap(batcher: Batcher, model: Any, version: int) -> None:
    batcher.swap(WeightsId(0, version), batcher.prepare(dict(model.named_parameters())))


def prompts(count: int, *, seed: int = 0, longest: int = 40) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))) for _ in range(count)]


def request(request_id: int, prompt: Sequence[int], max_new_tokens: int = 12, **options: Any) -> Request:
    key = options.pop("key", rollout_key(1, request_id))
    return Request(id=request_id, prompt=tuple(prompt), max_new_tokens=max_new_tokens, key=key, **options)


def run(batcher: Batcher, requests: Sequence[Request]) -> dict[int, Chunk]:
    """Every request to its end; one chunk each."""
    for one in requests:
        batcher.check(one)
    batcher.submit(requests)
    return finish(batcher)


def finish(batcher: Batcher) -> dict[int, Chunk]:
    chunks: dict[int, Chunk] = {}
    while batcher.has_work:
        for chunk in batcher.step():
            assert chunk.request_id not in chunks
            chunks[chunk.request_id] = chunk
    return chunks


def finish_in_pieces(batcher: Batcher) -> dict[int, list[Chunk]]:
    """As `finish`, where a request comes in many chunks; each covers its tokens."""
    pieces: dict[int, list[Chunk]] = defaultdict(list)
    while batcher.has_work:
        for chunk in batcher.step():
            assert_covers(chunk)
            pieces[chunk.request_id].append(chunk)
    return pieces


def assert_covers(chunk: Chunk) -> None:
    """Spans are ordered, disjoint, non-empty and cover the chunk."""
    position = 0
    for span in chunk.spans:
        assert span.start == position < span.end
        position = span.end
    assert position == len(chunk.tokens) == len(chunk.logprobs)


@torch.no_grad()
def generate(model: Any, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy, by transformers."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def recompute(model: Any, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the tokens after the prompt, by one forward pass of transformers."""
    ids = torch.tensor([[*prompt, *tokens]])
    logprobs = (model(ids).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]


@torch.no_grad()
def generate_over_swap(before: Any, after: Any, prompt: Sequence[int], count: int, swap_at: int) -> list[int]:
    """Greedy tokens when the first `swap_at` come from one model and the rest from another over the first one's KV."""
    cache = DynamicCache(config=before.config)
    tokens: list[int] = []
    ids = torch.tensor([list(prompt)])
    for position in range(count):
        model = before if position < swap_at else after
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens
