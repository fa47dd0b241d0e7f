"""The estimate beside what PyTorch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from async_rl.models.flops import attention_share


@pytest.mark.parametrize("tied", [False, True])
def test_attention_costs_what_it_is_said_to_cost(tied: bool) -> None:
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        intermediate_size=128,
        tie_word_embeddings=tied,
        attn_implementation="eager",  # multiplies the masked half too: twice the causal cost
    )
    model = LlamaForCausalLM(config)
    share = attention_share(config, model.num_parameters())

    def flops(length: int) -> int:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, length, dtype=torch.long)).logits.sum().backward()
        return counter.get_total_flops()

    long, short = flops(512), flops(128)
    assert long / short == pytest.approx(4 * (1 + 2 * share * 512) / (1 + 2 * share * 128), rel=0.02)
