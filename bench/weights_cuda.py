"""Weights from a learner to an engine on the same GPU: how long until they sample, how long decoding stands still.

    python bench/weights.py --device cuda [--sizes 135M 500M] [--updates 10] [--write]   bench/results/weights_cuda.json

Two processes share the GPU: the parameters of the one, in fp32, go into a pinned file, take each transport that works
within one host, and are live in the other's embedded engine, which decodes 16 sequences meanwhile. Seconds of

snapshot   parameters cast, copied and laid out in the file; training stands still
live       snapshot, transport, copy to the GPU and swap together
swap, gap  how long no step ran, as in weights.py, in usual decode steps

Afterwards the engine's weights must be those of the learner, bit for bit. NCCL cannot have two ranks on one GPU: groups
are gloo's here. `raw ipc` is a yardstick: the same bytes from one GPU buffer of the learner, opened by the other
process (CUDA IPC) and copied there.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from stamp import commit
from torch.multiprocessing.reductions import reduce_tensor
from train_step_cuda import attempt
from transformers import LlamaForCausalLM
from weights import DTYPE, ROOT, WARM, Pair, _spread, config

RESULT = ROOT / "bench" / "results" / "weights_cuda.json"
ARMS = ("shared_memory", "process_group", "http")
GPU = torch.device("cuda", 0)


def updates(size: str, count: int) -> dict[str, Any]:
    with GPU:
        model = LlamaForCausalLM(config(size))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        pair = Pair(size, Path(scratch), GPU.type)
        usual = pair.start_decoding()
        found["decode_step_s"] = round(usual, 5)
        for arm in ARMS:
            found[arm] = attempt(f"{size} {arm}", lambda arm=arm: one_arm(pair, model, arm, count, usual))
            print(f"  {size:>5} {arm:<15} {json.dumps(found[arm])}", flush=True)
        found["raw ipc"] = attempt(f"{size} raw ipc", lambda: raw_ipc(pair))
        print(f"  {size:>5} {'raw ipc':<15} {json.dumps(found['raw ipc'])}", flush=True)
        attempt(f"{size} close", pair.close)
    return found


def one_arm(pair: Pair, model: LlamaForCausalLM, arm: str, count: int, usual: float) -> dict[str, Any]:
    snapshots: list[float] = []
    lives: list[float] = []
    swaps: list[float] = []
    gaps: list[float] = []
    with pair.prepared(arm):
        for update in range(WARM + count):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.001)
            torch.cuda.synchronize()
            draft = pair.draft()
            began = time.monotonic()
            pair.layout.pack(model.named_parameters(), draft.payload)
            packed = time.monotonic()
            seconds, _, swap = pair.send(arm, draft)
            live = packed + seconds
            pair.tell("pauses", (packed, live))
            longest = max(pair.reply()[2], default=0.0)
            if update >= WARM:
                snapshots.append(packed - began)
                lives.append(live - began)
                swaps.append(swap / usual)
                gaps.append(max(0.0, longest - usual) / usual)
        pair.tell("same", draft.payload.clone())
        assert pair.reply()[2], "the engine's weights are not those of the learner"
    return {
        "snapshot_s": round(statistics.median(snapshots), 4), "live_s": round(statistics.median(lives), 4),
        "GB/s": round(pair.layout.nbytes / 1e9 / statistics.median(lives), 3), "swap": _spread(swaps),
        "gap": _spread(gaps), "updates": count, "same_weights": True,
    }  # fmt: skip


def raw_ipc(pair: Pair) -> dict[str, float]:
    """Seconds of a copy by the other process, the handle opened each time."""
    buffer = pair.payload.to(GPU)
    torch.cuda.synchronize()
    taken: list[float] = []
    for _ in range(5):
        pair.tell("ipc", reduce_tensor(buffer))
        answer = pair.reply()[2]
        if isinstance(answer, str):
            raise RuntimeError(answer)
        seconds, total = answer
        assert total == int(buffer.view(torch.int16).sum(dtype=torch.int64)), "other bytes came"
        taken.append(seconds)
    return {"s": round(statistics.median(taken), 5), "GB/s": round(buffer.numel() / 1e9 / statistics.median(taken), 1)}


def main(sizes: list[str], count: int, *, write: bool) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0), "torch": torch.__version__, "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(), "dtype": str(DTYPE).removeprefix("torch."),
    }  # fmt: skip
    found |= {size: attempt(size, lambda size=size: updates(size, count)) for size in sizes}
    if write:
        RESULT.write_text(json.dumps(found, indent=2) + "\n")
