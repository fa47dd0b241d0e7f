"""The model that `make models/smollm2-135m-instruct` took out of a wheel, and sources that hold no model."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from async_rl.config import Model
from async_rl.errors import UserError
from async_rl.models.gguf import write_model_directory
from async_rl.models.loading import build_model, load_stop_tokens, load_tokenizer
from async_rl.models.text import decode, encode_chat

SMOLLM2 = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"


@pytest.fixture
def smollm2() -> Model:
    if not SMOLLM2.is_dir():
        pytest.skip("make models/smollm2-135m-instruct has not been run")
    return Model(path=str(SMOLLM2))


def test_the_model_is_whole_and_answers(smollm2: Model) -> None:
    model, tokenizer = build_model(smollm2, seed=1), load_tokenizer(smollm2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008  # the head is the embedding
    assert model.config.tie_word_embeddings and not hasattr(model.config, "quantization_config")
    question = "Solve the following multiplication: 1 * 3. Give only the result as your final answer."
    prompt = encode_chat(tokenizer, [{"role": "user", "content": question}])
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert decode(tokenizer, generated.tolist()) == "1 * 3 = 3"
    assert int(generated[-1]) in load_stop_tokens(smollm2)


def test_bfloat16_on_disk_is_read_as_it_is(smollm2: Model) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype="auto", local_files_only=True)
    assert model.dtype == torch.bfloat16


def test_sources_without_a_model_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    into = tmp_path / "models" / "new"
    with pytest.raises(UserError, match=r"missing\.gguf: there is no such file; write the path of a \.gguf file"):
        write_model_directory(tmp_path / "missing.gguf", into)
    text = tmp_path / "notes.whl"
    text.write_text("no archive")
    with pytest.raises(UserError, match=r"neither a \.gguf file nor an archive with one"):
        write_model_directory(text, into)
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("a/__init__.py", "")
    with pytest.raises(UserError, match=r"it holds 0 \.gguf files"):
        write_model_directory(tmp_path / "empty.whl", into)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(UserError, match=r"broken\.gguf: cannot be read as a GGUF model"):
        write_model_directory(tmp_path / "broken.gguf", into)
    assert not into.exists() and not list((tmp_path / "models").iterdir())
