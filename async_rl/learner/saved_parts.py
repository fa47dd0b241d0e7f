"""What a checkpoint holds of every module that training changes: copied to host memory between two steps, written from
there by another thread, read again by any number of ranks.

    parts = [Part("", model, optimizer), Part("critic", critic, critic_optimizer), Part("reference", reference)]
    copies = [copy_part(part, ranks) for part in parts]  # training goes on as soon as this returns
    write_part(copies[1], Path("checkpoints/v00000100")) # -> v00000100/critic/model.safetensors, ...
    restore_part(parts[1], Path("checkpoints/v00000100"))

A part without a name is the policy; its files are those of the checkpoint itself, which makes that a model directory:

    config.json, model.safetensors ...        Hugging Face format, fp32
    adapter/                                  with LoRA: what is trained, as peft stores it (learner.lora)
    optimizer.safetensors                     "<parameter name>/<state name>"
    optimizer-00000-of-00002.safetensors ...  instead, where ranks share the parameters: each writes its own rows, and
                                              the header says which, so that any number of ranks can read them again

Weights are gathered on rank 0, because a model directory is one; the optimiser's states, twice as large, never are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from async_rl.errors import AsyncRLError
from async_rl.learner.distributed import Ranks
from async_rl.learner.lora import FOLDER, Adapters, is_adapter
from async_rl.learner.sharding import Rows, gathered, is_sharded, like, local, rows

OPTIMIZER_FILE, SHARD_FILE = "optimizer.safetensors", "optimizer-{:05d}-of-{:05d}.safetensors"
STARTS = "first_rows"
"""Key in the header of a file of states."""
REMOVE = "remove the directory to continue from an older one"


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
    adapters: Adapters | None = None
    """What is trained of it, where that is not everything: kept apart, the weights are those with them added."""

    def folder(self, checkpoint: Path) -> Path:
        return checkpoint / self.name


@dataclass(frozen=True, slots=True)
class Copy:
    """What this rank writes of a part, as of one moment, on the CPU, sharing no memory with it."""

    name: str
    weights: Weights | None
    """None: rank 0 writes them."""
    states: States | None
    """None: rank 0 writes them, or there is no optimiser."""


@dataclass(frozen=True, slots=True)
class Weights:
    config: PreTrainedConfig
    generation: GenerationConfig | None
    tensors: dict[str, Tensor]
    """In the dtype of the parameters; none where adapters alone are kept."""
    adapters: Adapters | None
    adapted: dict[str, Tensor]
    """The adapters' own."""


@dataclass(frozen=True, slots=True)
class States:
    file: str
    tensors: dict[str, Tensor]
    """By "<parameter name>/<state name>"."""
    starts: dict[str, int]
    """First row that each of them is of; 0 where it is not there."""


def copy_part(part: Part, ranks: Ranks) -> Copy:
    """On every rank, if the part is sharded; else rank 0 alone has something to copy."""
    named = list(part.model.named_parameters())
    tensors, adapted = _weights(part.adapters, named, ranks)
    weights = None
    if ranks.rank == 0:
        config = copy.deepcopy(part.model.config)
        config.architectures = [type(part.model).__name__]
        config.dtype = part.model.dtype
        generation = getattr(part.model, "generation_config", None)  # a classifier has none
        weights = Weights(config, generation, tensors, part.adapters, adapted)
    sharded = is_sharded(tensor for _, tensor in named)
    states = _states(part, ranks, sharded=sharded) if ranks.rank == 0 or sharded else None
    return Copy(part.name, weights, states)


def _weights(
    adapters: Adapters | None, named: Sequence[tuple[str, Tensor]], ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the model, adapters added, and the adapters' own; on rank 0."""
    adapted: dict[str, Tensor] = {}
    if adapters is None:
        return {name: _on_host(tensor) for name, tensor in gathered(named, ranks)}, adapted
    if not adapters.save_merged:
        own = [(name, tensor) for name, tensor in named if is_adapter(name)]
        return {}, {name: _on_host(tensor) for name, tensor in gathered(own, ranks)}

    def noticed() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in gathered(named, ranks):
            if is_adapter(name):
                adapted[name] = _on_host(tensor)
            yield name, tensor

    return {name: _on_host(tensor) for name, tensor in adapters.merged(noticed())}, adapted


def _states(part: Part, ranks: Ranks, *, sharded: bool) -> States | None:
    if part.optimizer is None:
        return None
    states = States(OPTIMIZER_FILE if not sharded else SHARD_FILE.format(ranks.rank, ranks.size), {}, {})
    for name, parameter in part.model.named_parameters():
        for key, value in part.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                states.tensors[f"{name}/{key}"] = _on_host(local(value))
                held = rows(value, ranks)
                if held is not None:
                    states.starts[f"{name}/{key}"] = held.start
    return states


def write_part(copied: Copy, checkpoint: Path) -> None:
    """Into a checkpoint directory that is still being made, perhaps by other ranks at the same time."""
    folder = checkpoint / copied.name
    folder.mkdir(parents=True, exist_ok=True)
    if copied.weights is not None:
        copied.weights.config.save_pretrained(folder)
        if copied.weights.generation is not None:
            copied.weights.generation.save_pretrained(folder)
        if copied.weights.tensors:
            save_torch_state_dict(copied.weights.tensors, folder, metadata={"format": "pt"})
        if copied.weights.adapters is not None:
            copied.weights.adapters.write(copied.weights.adapted, folder / FOLDER)
    if copied.states is not None:
        starts = {STARTS: json.dumps(copied.states.starts)} if copied.states.starts else None
        save_file(copied.states.tensors, folder / copied.states.file, starts)


def restore_part(part: Part, checkpoint: Path, ranks: Ranks) -> None:
    """The optimiser's states as they were, this rank's rows of them, however many ranks wrote them. The weights are
    loaded by who builds the model.

    Raises:
        CheckpointCorrupt: a file is missing or does not belong to this model.
    """
    if part.optimizer is None:
        return
    folder = part.folder(checkpoint)
    named = dict(part.model.named_parameters())
    saved = SavedStates(folder)
    for name, key in saved.names():
        if name not in named:
            raise CheckpointCorrupt(f"{folder}: the optimiser's states have {name!r}, which this model does not have")
        parameter = named[name]
        if key == "step":
            # AdamW keeps it on the CPU unless it is fused on a GPU
            part.optimizer.state[parameter][key] = saved.read(f"{name}/{key}").to(local(parameter).device)
        else:
            mine = saved.read(f"{name}/{key}", rows(parameter, ranks)).to(local(parameter).device)
            part.optimizer.state[parameter][key] = like(parameter, mine)


class SavedStates:
    """The states that one or more ranks wrote into a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointCorrupt where files are missing or cannot be read."""
        paths = sorted(folder.glob("optimizer*.safetensors"))
        counts = {path.stem.rpartition("-of-")[2] for path in paths}
        if not paths or counts not in ({"optimizer"}, {f"{len(paths):05d}"}):
            found = ", ".join(path.name for path in paths) or "no file"
            raise CheckpointCorrupt(f"{folder}: of the optimiser's states there is {found}; {REMOVE}")
        self._folder = folder
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        for path in paths:
            with _naming(folder):
                opened: Any = safe_open(path, "pt")
                starts = json.loads((opened.metadata() or {}).get(STARTS, "{}"))
                for key in opened.keys():  # noqa: SIM118 - not a mapping
                    self._parts.setdefault(key, []).append((starts.get(key, 0), opened))

    def names(self) -> list[tuple[str, str]]:
        """(parameter name, state name)"""
        return [(name, state) for name, _, state in (key.rpartition("/") for key in self._parts)]

    def read(self, key: str, wanted: Rows | None = None) -> Tensor:
        """The whole tensor, or some rows of it, from the files that have them."""
        with _naming(self._folder):
            pieces: list[Tensor] = []
            for start, opened in sorted(self._parts[key], key=lambda part: part[0]):
                lazy = opened.get_slice(key)
                shape = lazy.get_shape()
                if not shape:
                    return opened.get_tensor(key)
                first, last = (0, shape[0]) if wanted is None else (wanted.start - start, wanted.stop - start)
                pieces.append(lazy[max(first, 0) : min(max(last, 0), shape[0])])
            return torch.cat(pieces)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointCorrupt."""
    with _naming(path.parent):
        return load_file(path)


@contextmanager
def _naming(folder: Path) -> Generator[None]:
    """safetensors raises a type of its own."""
    try:
        yield
    except Exception as error:
        raise CheckpointCorrupt(f"{folder}: {error}; {REMOVE}") from error


@torch.no_grad()
def _on_host(tensor: Tensor) -> Tensor:
    """What training does next does not change it."""
    return tensor.detach().to("cpu", copy=True)
