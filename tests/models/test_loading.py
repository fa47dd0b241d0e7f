from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from async_rl.config import Model
from async_rl.errors import UserError
from async_rl.models.loading import build_model, load_config, load_stop_tokens, load_tokenizer

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}


@pytest.mark.parametrize("load", [load_config, load_tokenizer, lambda model: build_model(model, seed=1)])
def test_wrong_paths_are_named_in_one_line(load, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(
        UserError, match=r"model\.path = .*missing': there is no such directory; write the path"
    ) as error:
        load(Model(path=str(missing)))
    assert "\n" not in str(error.value)
    with pytest.raises(
        UserError, match=r"model\.path = .*: its config cannot be loaded \(.*\); write the path"
    ) as error:
        load(Model(path=str(tmp_path)))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="model = nothing: set exactly one of path and tiny"):
        load(Model())


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(UserError, match="GPT2LMHeadModel is not supported; write a model of LlamaForCausalLM, Qwen2"):
        load_config(Model(path=str(tmp_path)))


def test_a_directory_without_weights_or_tokenizer(tmp_path: Path) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.path = .*: its weights cannot be loaded"):
        build_model(Model(path=str(tmp_path)), seed=1)
    with pytest.raises(UserError, match=r"model\.path = .*: its tokenizer cannot be loaded"):
        load_tokenizer(Model(path=str(tmp_path)))


def test_every_stop_token_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, eos_token_id=3))
    model.generation_config.eos_token_id = [3, 5]
    model.save_pretrained(tmp_path)

    class Tokenizer:
        eos_token_id = 7

    monkeypatch.setattr("async_rl.models.loading.load_tokenizer", lambda _: Tokenizer())
    assert load_stop_tokens(Model(path=str(tmp_path))) == {3, 5, 7}
