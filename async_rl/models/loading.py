"""From the recipe's `model` section to a config, a tokenizer and weights. Local files only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from async_rl.config import Model
from async_rl.errors import UserError
from async_rl.models.tiny import tiny_config, tiny_tokenizer

SUPPORTED = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""model_type -> architecture. The embedded engine knows how to run these."""


def load_config(model: Model, *, field: str = "model.path") -> PreTrainedConfig:
    """Raises UserError, in one line that names `field`, when there is no model or it is of an architecture we do not
    support."""
    if model.tiny is not None:
        return tiny_config(model.tiny)
    config: PreTrainedConfig = read(model, "config", AutoConfig.from_pretrained, field)
    check_supported(config, f"{field} = {model.path!r}")
    return config


def check_supported(config: PreTrainedConfig, where: str) -> None:
    """Raises UserError naming the architectures we support."""
    if config.model_type not in SUPPORTED:
        named = ", ".join(config.architectures or [config.model_type])
        raise UserError(f"{where}: {named} is not supported; write a model of {', '.join(SUPPORTED.values())}")


def load_tokenizer(model: Model, *, field: str = "model.path") -> PreTrainedTokenizerBase:
    if model.tiny is not None:
        return tiny_tokenizer(model.tiny)
    load_config(model, field=field)  # a wrong path is reported the same way, whatever is loaded first
    return read(model, "tokenizer", AutoTokenizer.from_pretrained, field)


def load_stop_tokens(model: Model) -> frozenset[int]:
    """Every token that ends a reply: of the tokenizer, of config.json and of generation_config.json."""
    tokenizer, config = load_tokenizer(model), load_config(model)
    found: list[Any] = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    if model.path and (Path(model.path) / "generation_config.json").is_file():
        found.append(GenerationConfig.from_pretrained(model.path, local_files_only=True).eos_token_id)
    tokens: set[int] = set()
    for ids in found:
        tokens.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(tokens)


def build_model(
    model: Model, *, seed: int, dtype: torch.dtype = torch.float32, field: str = "model.path"
) -> PreTrainedModel:
    """Weights: of the directory, or random ones that depend on `seed` alone. The global RNG is left as it was."""
    if model.tiny is not None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return LlamaForCausalLM(tiny_config(model.tiny)).to(dtype)  # pyright: ignore[reportArgumentType]
    load_config(model, field=field)
    return read(model, "weights", AutoModelForCausalLM.from_pretrained, field, dtype=dtype)


def read(model: Model, what: str, load: Callable[..., Any], field: str = "model.path", **options: Any) -> Any:
    """`load(path, **options)` from local files alone. Raises UserError naming `field`, the path and what is wrong."""
    if not model.path:
        raise UserError("model = nothing: set exactly one of path and tiny")
    instead = "write the path of a Hugging Face model directory (config.json, tokenizer.json, model.safetensors)"
    if not Path(model.path).is_dir():
        raise UserError(f"{field} = {model.path!r}: there is no such directory; {instead}")
    try:
        return load(model.path, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{field} = {model.path!r}: its {what} cannot be loaded ({reason}); {instead}") from None
