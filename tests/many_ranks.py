"""Work of several ranks, each in a process of its own, over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def in_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(rank, *arguments)` in a process for each rank, under the variables torchrun sets; what each returned."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes, ends = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_in_rank, args=(rank, size, port, theirs, work, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    try:
        results = [end.recv() for end in ends]
    finally:
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0] * size
    return results


def _in_rank(
    rank: int, size: int, port: int, results: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    results.send(work(rank, *arguments))
