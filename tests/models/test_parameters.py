from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from async_rl.models.parameters import Layout

SMALL = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}


def model(*, tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_moved_once(tied: bool) -> None:
    names = [entry.name for entry in Layout.of(model(tied=tied)).entries]
    assert ("lm_head.weight" in names) is not tied
    assert names[0] == "model.embed_tokens.weight"
    assert len(names) == len(set(names))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_config_and_model_agree(dtype: torch.dtype | None) -> None:
    one = model(tied=True)
    assert Layout.of(one, dtype=dtype) == Layout.of(one.config, dtype=dtype)
    assert Layout.of(one, dtype=dtype).fingerprint == Layout.of(one.config, dtype=dtype).fingerprint
    assert Layout.of(one).fingerprint != Layout.of(one, dtype=torch.bfloat16).fingerprint
    assert all(p.device.type == "cpu" for p in one.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_then_view(dtype: torch.dtype) -> None:
    one = model(tied=False)
    layout = Layout.of(one, dtype=dtype)
    buffer = torch.full((layout.nbytes,), 255, dtype=torch.uint8)
    layout.pack(one.named_parameters(), buffer)
    views = layout.views(buffer)
    for name, parameter in one.named_parameters():
        assert torch.equal(views[name], parameter.to(dtype)), name
    views["model.norm.weight"].fill_(7)
    assert (layout.views(buffer)["model.norm.weight"] == 7).all()  # no copy


def test_tensors_lie_without_gaps_each_aligned_to_its_dtype() -> None:
    shapes = [
        ("a", (3,), torch.bfloat16),
        ("b", (5,), torch.float32),
        ("c", (1,), torch.uint8),
        ("d", (), torch.float64),
    ]
    layout = Layout.pack_up(shapes)
    assert [entry.name for entry in layout.entries] == ["d", "b", "a", "c"]
    ends = [entry.offset + entry.nbytes for entry in layout.entries]
    assert [entry.offset for entry in layout.entries] == [0, *ends[:-1]] and layout.nbytes == ends[-1] == 35
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in layout.entries) and layout.width == 1
    assert set(layout.views(torch.zeros(35, dtype=torch.uint8))) == {"a", "b", "c", "d"}


def test_equal_weights_give_equal_buffers() -> None:
    one = model(tied=True)
    layout = Layout.of(one)
    first, second = torch.full((layout.nbytes,), 1, dtype=torch.uint8), torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.pack(one.named_parameters(), first)
    layout.pack(one.state_dict().items(), second)  # with the tied head, which is left out
    assert torch.equal(first, second)


def test_what_does_not_fit_is_named() -> None:
    one = model(tied=True)
    layout = Layout.of(one)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    named = dict(one.named_parameters())
    with pytest.raises(ValueError, match=r"1 tensors .* not given, the first is model\.norm\.weight"):
        layout.pack([pair for pair in named.items() if pair[0] != "model.norm.weight"], buffer)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: shape \(3,\), the layout has \(16,\)"):
        layout.pack({**named, "model.norm.weight": torch.zeros(3)}.items(), buffer)
    with pytest.raises(ValueError, match=r"uint8 is needed"):
        layout.views(buffer[1:])


def test_qwen3_has_its_norms() -> None:
    names = {entry.name for entry in Layout.of(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)).entries}
    assert "model.layers.1.self_attn.q_norm.weight" in names
