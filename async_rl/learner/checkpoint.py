"""Checkpoints: a directory that is complete or does not exist.

    checkpoints/v00000100/
        config.json, model.safetensors, tokenizer.json ...   Hugging Face format, fp32, `from_pretrained` loads it
        optimizer.safetensors    "<parameter name>/<state name>", so that it does not depend on how ranks share the work
        rng.safetensors          state of torch's generators
        trainer.json             Position

It is written beside its place under a name that starts with a dot, flushed to disk file by file, and renamed. What a
crash leaves behind is such a dotted directory, which nothing reads and the next start removes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from async_rl.errors import AsyncRLError, UserError

FORMAT = 1
PARTIAL = ".partial-"
POSITION_FILE, OPTIMIZER_FILE, RNG_FILE = "trainer.json", "optimizer.safetensors", "rng.safetensors"
NAME = re.compile(r"v(\d{8,})")


class CheckpointCorrupt(AsyncRLError):
    """A checkpoint is there under its final name, but does not hold what it should."""


class Position(msgspec.Struct, frozen=True):
    """Where in the run the checkpoint stands."""

    version: int
    """Every step below it is included."""
    lineage: int
    """Of the weights that were saved; who continues from here opens another one."""
    ledger_position: int
    """The first step whose composed batch is not included; equal to `version`."""
    seed: int
    format: int = FORMAT


def save(
    directory: Path,
    position: Position,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write `directory/vNNNNNNNN`, durable when this returns, and remove all but the newest `keep`.

    A checkpoint of the same version is replaced: the run came here a second time.

    Raises:
        UserError: the disk is full.
    """
    final = directory / f"v{position.version:08d}"
    partial = directory / f"{PARTIAL}{final.name}-{os.getpid()}"
    with _room(final):
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with no_progress_bars():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_file(_optimizer_tensors(model, optimizer), partial / OPTIMIZER_FILE)
        save_file(_rng_tensors(), partial / RNG_FILE)
        (partial / POSITION_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(position), indent=2) + b"\n")
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        publish(partial, final)
    _keep_newest(directory, keep)
    return final


@contextmanager
def _room(final: Path) -> Generator[None]:
    """A full disk is nothing that a restart mends. safetensors and tokenizers raise types of their own."""
    try:
        yield
    except Exception as error:
        full = os.strerror(errno.ENOSPC)
        if full not in str(error):
            raise
        raise UserError(f"checkpoint {final}: {full}: free some and start again with the same command") from error


@contextmanager
def no_progress_bars() -> Generator[None]:
    """transformers draws them on stderr, in the middle of the run's own lines."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def publish(partial: Path, final: Path) -> None:
    """Give the finished directory its name. A former one of that name is moved aside first and then removed."""
    if final.exists():
        former = final.with_name(f"{PARTIAL}former-{final.name}")
        shutil.rmtree(former, ignore_errors=True)
        final.rename(former)
        partial.rename(final)
        shutil.rmtree(former, ignore_errors=True)
    else:
        partial.rename(final)
    _flush(final.parent)


def latest(directory: Path) -> tuple[Path, Position] | None:
    """The newest complete checkpoint, None where there is none.

    Raises:
        CheckpointCorrupt: its trainer.json is missing, unreadable or of another format.
    """
    found = _complete(directory)
    if not found:
        return None
    path = found[-1]
    try:
        position = msgspec.json.decode((path / POSITION_FILE).read_bytes(), type=Position)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointCorrupt(f"{path}: {POSITION_FILE} cannot be read: {error}; remove the directory") from error
    if position.format != FORMAT:
        raise CheckpointCorrupt(f"{path}: format {position.format}, this version of async_rl reads {FORMAT}")
    return path, position


def remove_partial(directory: Path) -> None:
    """Remove what crashes in the middle of `save` left. A former checkpoint whose successor never came returns."""
    for path in directory.glob(f"{PARTIAL}*"):
        final = directory / path.name.removeprefix(f"{PARTIAL}former-")
        if NAME.fullmatch(final.name) and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def restore(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Optimiser and generator states as they were; the weights are loaded by who builds the model.

    Raises:
        CheckpointCorrupt: a file is missing or does not belong to this model.
    """
    try:
        tensors, generators = load_file(path / OPTIMIZER_FILE), load_file(path / RNG_FILE)
    except Exception as error:  # safetensors raises a type of its own
        raise CheckpointCorrupt(f"{path}: {error}; remove the directory to continue from an older one") from error
    named = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, state = key.rpartition("/")
        if name not in named:
            raise CheckpointCorrupt(f"{path}: {OPTIMIZER_FILE} has {name!r}, which this model does not have")
        parameter = named[name]
        # AdamW keeps `step` on the CPU unless it is fused on a GPU; the first real step moves it where it wants it
        place = torch.device("cpu") if state == "step" and parameter.device.type == "cpu" else parameter.device
        optimizer.state[parameter][state] = tensor.to(place)
    torch.set_rng_state(generators.pop("cpu"))
    if torch.cuda.is_available() and generators:
        torch.cuda.set_rng_state_all([generators[key] for key in sorted(generators)])


def _complete(directory: Path) -> list[Path]:
    """Oldest first."""
    if not directory.is_dir():
        return []
    return sorted(
        (path for path in directory.iterdir() if NAME.fullmatch(path.name) and path.is_dir()),
        key=lambda path: int(path.name[1:]),
    )


def _keep_newest(directory: Path, keep: int) -> None:
    for path in _complete(directory)[:-keep]:
        doomed = path.with_name(
            f"{PARTIAL}old-{path.name}"
        )  # a crash while removing leaves nothing that looks complete
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _optimizer_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state: Mapping[str, Any] = optimizer.state.get(parameter, {})
        tensors |= {f"{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors


def _rng_tensors() -> dict[str, Tensor]:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{index:04d}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
