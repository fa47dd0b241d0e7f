"""Checkpoints: a directory that is complete or does not exist.

    checkpoints/v00000100/
        config.json, model.safetensors, tokenizer.json ...   Hugging Face format, fp32, `from_pretrained` loads it
        optimizer.safetensors    see learner.saved_parts, also for the folders of further parts
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
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from async_rl.errors import UserError
from async_rl.learner.distributed import Ranks
from async_rl.learner.saved_parts import (
    CheckpointCorrupt,
    Copy,
    Part,
    copy_part,
    read_tensors,
    restore_part,
    write_part,
)

FORMAT = 1
PARTIAL = ".partial-"
POSITION_FILE, RNG_FILE = "trainer.json", "rng.safetensors"
NAME = re.compile(r"v(\d{8,})")


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
    kl_coef: float | None = None
    """Of the KL in the reward from here on, where it adapts (learner.kl_coefficient)."""


@dataclass(frozen=True, slots=True)
class Content:
    """A checkpoint in host memory: training may go on, and any thread may write it."""

    position: Position
    copies: list[Copy]
    generators: dict[str, Tensor]
    """State of torch's random generators: cpu, and the one of this rank's GPU."""
    tokenizer: PreTrainedTokenizerBase


def take(position: Position, parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> Content:
    """Copy everything this rank writes, between two steps; all ranks do it where a part is sharded."""
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    return Content(position, [copy_part(part, ranks) for part in parts], generators, tokenizer)


def prepare(directory: Path, version: int) -> None:
    """Rank 0, before any rank writes."""
    partial = _partial(directory, version)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def write(directory: Path, content: Content, ranks: Ranks) -> None:
    """This rank's files of `directory/vNNNNNNNN`, which has not got its name yet.

    Raises:
        UserError: the disk is full.
    """
    partial = _partial(directory, content.position.version)
    with _room(_final(directory, content.position.version)):
        for copied in content.copies:
            write_part(copied, partial)
            if ranks.rank > 0 and copied.states is not None:
                _flush(partial / copied.name / copied.states.file)
        if ranks.rank == 0:
            content.tokenizer.save_pretrained(partial)
            save_file(content.generators, partial / RNG_FILE)
            position = msgspec.json.format(msgspec.json.encode(content.position), indent=2)
            (partial / POSITION_FILE).write_bytes(position + b"\n")


def finish(directory: Path, version: int) -> Path:
    """Rank 0, after all ranks have written: everything is flushed to disk, then the directory gets its name.

    A checkpoint of the same version is replaced: the run came here a second time.

    Raises:
        UserError: the disk is full.
    """
    partial, final = _partial(directory, version), _final(directory, version)
    with _room(final):
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        publish(partial, final)
    return final


def save(
    directory: Path,
    position: Position,
    parts: Sequence[Part],
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks,
    *,
    keep: int,
) -> Path:
    """All of it at once, for parts that are not sharded, on rank 0; durable when it returns. Where they are, or where
    training goes on meanwhile, see learner.checkpoint_writer.

    Raises:
        UserError: the disk is full.
    """
    prepare(directory, position.version)
    write(directory, take(position, parts, tokenizer, ranks), ranks)
    path = finish(directory, position.version)
    prune(directory, keep)
    return path


def _final(directory: Path, version: int) -> Path:
    return directory / f"v{version:08d}"


def _partial(directory: Path, version: int) -> Path:
    return directory / f"{PARTIAL}{_final(directory, version).name}"


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
    found = checkpoints(directory)
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


def restore(path: Path, parts: Sequence[Part], ranks: Ranks) -> None:
    """Optimiser and generator states as they were; the weights are loaded by who builds the models.

    Raises:
        CheckpointCorrupt: a file is missing or does not belong to these parts.
    """
    generators = read_tensors(path / RNG_FILE)
    for part in parts:
        restore_part(part, path, ranks)
    torch.set_rng_state(generators["cpu"])
    if torch.cuda.is_available() and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"])


def prune(directory: Path, keep: int, spared: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` and the versions in `spared`."""
    for path in checkpoints(directory)[:-keep]:
        if int(path.name[1:]) in spared:
            continue
        doomed = path.with_name(f"{PARTIAL}old-{path.name}")  # a crash in the middle leaves nothing that looks complete
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    if not directory.is_dir():
        return []
    return sorted(
        (path for path in directory.iterdir() if NAME.fullmatch(path.name) and path.is_dir()),
        key=lambda path: int(path.name[1:]),
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
