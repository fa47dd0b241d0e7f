"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: W x + (alpha / rank) B A x, with W frozen.

    adapters = add_adapters(model, run.learner.lora, seed=run.seed, base=run.model.path)
    adapters.merged(model.named_parameters())       # W + (alpha / rank) B A, under the names of the model without them

Engines get merged weights, made on the way into the publisher's buffer, so that they know nothing of adapters. Over
HTTP only what a step changes of them travels, which is about as little as the adapters
(docs/decisions/2026-11-26-lora-travels-merged.md).
Checkpoints hold the adapters as peft stores them, and the merged model unless the recipe says otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from async_rl.config import Lora
from async_rl.errors import UserError, require

FOLDER = "adapter"
"""Of a checkpoint: adapter_config.json, adapter_model.safetensors."""
FILE = "adapter_model.safetensors"
BASE, LOW, HIGH = ".base_layer.", ".lora_A.default.", ".lora_B.default."
"""In parameters' names: W, A [rank, in], B [out, rank]; they follow each other in this order."""


class Adapters:
    """Those of one model."""

    def __init__(self, config: Any, lora: Lora) -> None:
        self._config = config
        self.scaling = lora.alpha / lora.rank
        self.save_merged = lora.save_merged

    @torch.no_grad()
    def merged(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Parameters in the model's order, each adapter added to what it adapts, in the dtype they have."""
        base: tuple[str, Tensor] | None = None
        low: Tensor | None = None
        for name, tensor in named:
            if name.endswith(BASE + "weight"):
                base = name.replace(BASE, "."), tensor
            elif LOW in name:
                low = tensor
            elif HIGH in name:
                assert base is not None and low is not None
                yield base[0], torch.addmm(base[1], tensor, low, alpha=self.scaling)
            else:
                yield name.replace(BASE, "."), tensor

    def write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """`tensors` by the model's names for them; peft and transformers read the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._config.save_pretrained(folder)
        stored = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in tensors.items()}
        save_file(stored, folder / FILE)


def is_adapter(name: str) -> bool:
    return LOW in name or HIGH in name


def add_adapters(model: PreTrainedModel, lora: Lora, *, seed: int, base: str) -> Adapters:
    """Into the linear layers that the recipe names; B is 0, so that nothing changes yet. Everything else is frozen. The
    global RNG is left as it was.

    base: where the model came from, for who loads the adapters with peft.

    Raises:
        UserError: the model has no such layer. MissingExtra.
    """
    require("peft", "lora", "training adapters (learner.lora)")
    from peft import LoraConfig, inject_adapter_in_model

    linear = sorted(
        {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    )
    known = [name for name in linear if name != "lm_head"]
    for target in lora.targets:
        if target not in known:
            raise UserError(
                f"learner.lora.targets: {target!r} is no layer of this model; write some of {', '.join(known)}"
            )
    alpha: Any = lora.alpha  # peft says int, and takes any number
    config = LoraConfig(
        r=lora.rank, lora_alpha=alpha, target_modules=lora.targets or known, lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM", base_model_name_or_path=base or None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return Adapters(config, lora)


@torch.no_grad()
def load_adapters(model: PreTrainedModel, folder: Path) -> None:
    """As `Adapters.write` stored them. Raises KeyError, OSError or a SafetensorError where they are not there."""
    stored = load_file(folder / FILE)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.copy_(stored[f"base_model.model.{name.replace('.default.', '.')}"])
