"""The embedded engine in this process, and weights for it straight from a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from async_rl.config import Run
from async_rl.engines.embedded import EmbeddedEngine
from async_rl.engines.protocol import Snapshot
from async_rl.errors import UserError
from async_rl.wire.messages import WeightsId

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def make_engine(run: Run, config: PreTrainedConfig, *, slots: int, dtype: str | None = None) -> EmbeddedEngine:
    """What a generator of this recipe would run, with as many slots as there is use for.

    Raises:
        UserError: there is no such device, or the engine does not run this architecture.
    """
    return EmbeddedEngine(
        config,
        slots=min(slots, run.generator.slots),
        max_length=run.generator.max_length,
        dtype=getattr(torch, dtype or run.generator.dtype),
        device=choose_device(run.generator.device),
    )


def choose_device(device: str) -> torch.device:
    """Raises UserError where there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    gpus = torch.cuda.device_count()
    if chosen is None or (chosen.type == "cuda" and (chosen.index or 0) >= gpus):
        raise UserError(f"generator.device = {device!r}: this machine has {gpus} GPUs; write auto, cpu or cuda:N")
    return chosen


def map_weights(directory: Path, weights: WeightsId) -> Snapshot:
    """The weights of a Hugging Face directory. They are mapped, not read: whoever copies them holds the only copy.

    Raises:
        UserError: there are no safetensors files, or one cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        index = directory / INDEX
        files = {WEIGHTS}
        if index.is_file():
            files = set(json.loads(index.read_text())["weight_map"].values())
        for file in sorted(files):
            tensors |= load_file(directory / file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{directory}: its weights cannot be loaded ({error}); write a directory with {WEIGHTS}"
        ) from None
    return Snapshot(weights, tensors)
