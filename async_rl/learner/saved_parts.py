"""What a checkpoint holds of every module that training changes: copied to host memory between two steps, written from
there by another thread, read again by any number of ranks.

    parts = [Part("", model, optimizer), Part("critic", critic, critic_optimizer), Part("reference", reference)]
    copies = [copy_part(part) for part in parts]         # training goes on as soon as this returns
    write_part(copies[1], Path("checkpoints/v00000100")) # -> v00000100/critic/model.safetensors, ...
    restore_part(parts[1], Path("checkpoints/v00000100"))

A part without a name is the policy; its files are those of the checkpoint itself, which makes that a model directory:

    config.json, model.safetensors ...    Hugging Face format, fp32
    optimizer.safetensors                 "<parameter name>/<state name>", nothing of how ranks share the work
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from async_rl.errors import AsyncRLError

OPTIMIZER_FILE = "optimizer.safetensors"


class CheckpointCorrupt(AsyncRLError):
    """A checkpoint is there under its final name, but does not hold what it should."""


@dataclass(frozen=True, slots=True)
class Part:
    """A module and its optimiser."""

    name: str
    """Folder of the checkpoint, "" for the policy."""
    model: PreTrainedModel
    """Whoever builds it again loads it from `folder(checkpoint)`, with the class that `config.json` names."""
    optimizer: torch.optim.Optimizer | None = None
    """None: nothing trains it, its weights alone are kept."""

    def folder(self, checkpoint: Path) -> Path:
        return checkpoint / self.name


@dataclass(frozen=True, slots=True)
class Copy:
    """A part at one moment, on the CPU, sharing no memory with it."""

    name: str
    config: PreTrainedConfig
    generation: GenerationConfig | None
    weights: dict[str, Tensor]
    """[...] in the dtype of the parameters"""
    states: dict[str, Tensor] | None
    """Of the optimiser, by "<parameter name>/<state name>"; None where there is no optimiser."""


def copy_part(part: Part) -> Copy:
    config = copy.deepcopy(part.model.config)
    config.architectures = [type(part.model).__name__]
    config.dtype = part.model.dtype
    weights = {name: _on_host(parameter) for name, parameter in part.model.named_parameters()}
    generation = getattr(part.model, "generation_config", None)  # a classifier has none
    return Copy(part.name, config, generation, weights, _states(part))


def _states(part: Part) -> dict[str, Tensor] | None:
    if part.optimizer is None:
        return None
    states: dict[str, Tensor] = {}
    for name, parameter in part.model.named_parameters():
        state: Mapping[str, Any] = part.optimizer.state.get(parameter, {})
        states |= {f"{name}/{key}": _on_host(value) for key, value in state.items() if isinstance(value, Tensor)}
    return states


def write_part(copied: Copy, checkpoint: Path) -> None:
    """Into a checkpoint directory that is still being made."""
    folder = checkpoint / copied.name
    folder.mkdir(parents=True, exist_ok=True)
    copied.config.save_pretrained(folder)
    if copied.generation is not None:
        copied.generation.save_pretrained(folder)
    save_torch_state_dict(copied.weights, folder, metadata={"format": "pt"})
    if copied.states is not None:
        save_file(copied.states, folder / OPTIMIZER_FILE)


def restore_part(part: Part, checkpoint: Path) -> None:
    """The optimiser's states as they were; the weights are loaded by who builds the model.

    Raises:
        CheckpointCorrupt: a file is missing or does not belong to this model.
    """
    if part.optimizer is None:
        return
    folder = part.folder(checkpoint)
    named = dict(part.model.named_parameters())
    for key, tensor in read_tensors(folder / OPTIMIZER_FILE).items():
        name, _, state = key.rpartition("/")
        if name not in named:
            raise CheckpointCorrupt(f"{folder}: {OPTIMIZER_FILE} has {name!r}, which this model does not have")
        parameter = named[name]
        # AdamW keeps `step` on the CPU unless it is fused on a GPU; the first real step moves it where it wants it
        place = torch.device("cpu") if state == "step" and parameter.device.type == "cpu" else parameter.device
        part.optimizer.state[parameter][state] = tensor.to(place)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointCorrupt."""
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises a type of its own
        raise CheckpointCorrupt(
            f"{path.parent}: {error}; remove the directory to continue from an older one"
        ) from error


@torch.no_grad()
def _on_host(tensor: Tensor) -> Tensor:
    """What training does next does not change it."""
    return tensor.detach().to("cpu", copy=True)
