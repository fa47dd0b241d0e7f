"""The head of a file: a manifest that reads back, and damage that is named. Files that are read are not written."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_cases import LARGE, SMALL, drafted, packed

from async_rl.weights.checksum import BUCKET_BYTES, bucket_checksum, checksum
from async_rl.weights.errors import WeightsCorrupt
from async_rl.weights.files import WeightFiles
from async_rl.weights.header import Header
from async_rl.weights.slots import Slots, hold
from async_rl.weights.weight_file import Manifest, decode_head, encode_head
from async_rl.wire.messages import WeightsId


def manifest(version: int = 8) -> Manifest:
    payload = packed(LARGE, 1)
    buckets = [bucket_checksum(bucket) for bucket in payload.split(BUCKET_BYTES)]
    return Manifest(Header.of(WeightsId(3, version), payload, LARGE), buckets, LARGE)


def test_a_manifest_reads_back() -> None:
    wanted = manifest()
    head = encode_head(wanted)
    read = decode_head(head + b"the payload")
    assert (read.header, list(read.buckets), read.layout) == (wanted.header, list(wanted.buckets), LARGE)
    assert read.start == len(head) and read.start % 64 == 0 and read.file_bytes == len(head) + LARGE.nbytes
    assert len(encode_head(manifest(version=123456))) == len(head)
    delta = Manifest(wanted.header, wanted.buckets, LARGE, WeightsId(3, 7))
    assert decode_head(encode_head(delta)).base == WeightsId(3, 7)


HEAD = encode_head(manifest())


@settings(max_examples=200)
@given(st.integers(0, len(HEAD) - 1), st.integers(1, 255))
def test_a_damaged_head_is_corrupt_or_says_the_same(at: int, flip: int) -> None:
    """Or something that is checked later: other weights, another layout."""
    damaged = bytearray(HEAD)
    damaged[at] ^= flip
    try:
        read = decode_head(bytes(damaged))
    except WeightsCorrupt:
        return
    wanted = decode_head(HEAD)
    same = (read.header.checksum, list(read.buckets), read.start)
    assert same == (wanted.header.checksum, list(wanted.buckets), wanted.start)


@settings(max_examples=100)
@given(st.integers(0, SMALL.nbytes - 1), st.integers(1, 255))
def test_any_flipped_byte_changes_the_checksum(at: int, flip: int) -> None:
    payload = packed(SMALL, 1)
    before = checksum(payload)
    payload[at] ^= flip
    assert checksum(payload) != before


def test_buckets_that_change_places_change_the_checksum() -> None:
    payload = torch.zeros(2 * BUCKET_BYTES, dtype=torch.uint8)
    payload[0] = 1
    assert checksum(payload) != checksum(torch.cat((payload[BUCKET_BYTES:], payload[:BUCKET_BYTES])))


def written(files: WeightFiles, version: int) -> int:
    """The inode of the file."""
    return files.write(WeightsId(1, version), drafted(files, packed(SMALL, version))).path.stat().st_ino


def test_a_file_that_is_read_is_not_written(tmp_path: Path) -> None:
    files = WeightFiles(tmp_path, SMALL)
    first = files.write(WeightsId(1, 0), drafted(files, packed(SMALL, 0)))
    held = hold(first.path)
    assert held is not None
    content = first.path.read_bytes()
    inodes = {written(files, version) for version in range(1, 8)}
    assert os.fstat(held.descriptor).st_ino not in inodes and len(inodes) == 3
    assert os.pread(held.descriptor, len(content), 0) == content
    held.close()
    again = {written(files, version) for version in range(8, 14)}
    assert len(again) <= 4, "files are used again"
    files.close()


def test_without_room_nothing_is_begun(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        Slots(tmp_path, 1 << 60).take()
    assert not list(tmp_path.iterdir())


def hold_for_ever(path: str, pipe: object) -> None:
    held = hold(Path(path))
    pipe.send(held is not None)  # type: ignore[attr-defined]
    signal.pause()


@pytest.mark.processes
def test_a_reader_that_dies_gives_its_file_back(tmp_path: Path) -> None:
    files = WeightFiles(tmp_path, SMALL)
    first = files.write(WeightsId(1, 0), drafted(files, packed(SMALL, 0)))
    inode = first.path.stat().st_ino
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    reader = context.Process(target=hold_for_ever, args=(str(first.path), theirs), daemon=True)
    reader.start()
    assert ours.poll(60) and ours.recv()
    used = [written(files, version) for version in range(1, 6)]
    assert inode not in used
    reader.kill()
    reader.join()
    used = [written(files, version) for version in range(6, 12)]
    assert inode in used
    files.close()
