"""Forward + backward of every preset on 64k packed tokens, against TRL 1.16's GRPO loss on the same tensors.

    python bench/losses.py            writes bench/results/losses.json

The first run makes .venv-peers with torch and TRL. All sequences have the same length, so that TRL's padded rectangle
has not one token more than our packing, and TRL's importance ratio is computed before its clock starts. One thread.
Both sides run in one process, round about, so that a busy machine disturbs both alike; figures are medians with
quartiles.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-peers"
RESULT = ROOT / "bench" / "results" / "losses.json"
TORCH, TRL = "torch==2.13.0", "trl==1.16.*"
NUM_SEQUENCES, LENGTH, ROUNDS = 64, 1024, 40
COUNTERPARTS = {
    "async_default": "dapo_is", "areal": "dapo_is", "tis": "dapo_is", "cis": "dapo_is", "a3po": "dapo_is",
    "grpo": "grpo_kl", "r1": "grpo_kl", "r1_zero": "grpo_kl", "opsm": "grpo_opsm", "dr_grpo": "dr_grpo",
    "gspo": "gspo", "sapo": "sapo", "cispo": "cispo",
}  # fmt: skip
"""TRL's nearest loss; a preset it has nothing near to is held against `dapo`, which is not TRL's cheapest."""
EQUAL = {"dapo": {}, "dr_grpo": {}, "gspo": {}, "cispo": {}, "grpo": {}, "sapo": {"aggregation": "seq_mean_token_mean"}}
"""Presets that compute the same number as their counterpart, with these parts replaced: checked before timing."""


def main() -> None:
    if Path(sys.prefix) != VENV:
        python = ensure_peers()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        raise SystemExit(subprocess.run([python, __file__], env=environment, check=False).returncode)
    rows = measure_all()
    report(rows)


def ensure_peers() -> Path:
    """The peers' own environment. torch first and alone: another order would bring gigabytes of CUDA packages."""
    python, ready = VENV / "bin" / "python", VENV / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        for requirement in (TORCH, TRL):
            subprocess.run([python, "-m", "pip", "install", "-q", requirement, "numpy", "msgspec"], check=True)
        ready.touch()
    return python


def measure_all() -> list[dict[str, Any]]:
    import torch

    from async_rl.algorithms.presets import PRESETS

    torch.set_num_threads(1)
    data = Data()
    data.check_equal()
    rows = []
    for name in PRESETS:
        setting = COUNTERPARTS.get(name, "dapo")
        sides = {"ours": data.ours(name), "trl": data.trl(setting)}
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for side in sides.values():
            side()
        for _ in range(ROUNDS):
            for side, call in sides.items():
                times[side].append(timed(call))
        row: dict[str, Any] = {"preset": name, "counterpart": setting}
        for side, call in sides.items():
            wall = [wall for wall, _ in times[side]]
            quartiles = statistics.quantiles(wall, n=4)
            cpu = statistics.median(cpu for _, cpu in times[side])
            row[side] = {
                "ms": round(1e3 * quartiles[1], 3), "ms_quartiles": [round(1e3 * q, 3) for q in (quartiles[0],
                quartiles[2])], "cpu_ms": round(1e3 * cpu, 3), "peak_mib": round(peak_bytes(call) / 2**20, 3),
            }  # fmt: skip
        row["time_ratio"] = round(row["ours"]["ms"] / row["trl"]["ms"], 3)
        row["memory_ratio"] = round(row["ours"]["peak_mib"] / row["trl"]["peak_mib"], 3)
        print(f"{name:22} {setting:10} time {row['time_ratio']:.2f}  memory {row['memory_ratio']:.2f}", flush=True)
        rows.append(row)
    return rows


class Data:
    """The same tensors for both sides: rollouts a few versions old, ratios mostly near 1."""

    def __init__(self) -> None:
        import torch
        from peers.trl_grpo import trl_inputs

        generator = torch.Generator().manual_seed(1)
        shape = (NUM_SEQUENCES, LENGTH)

        def normal(scale: float) -> Any:
            return scale * torch.randn(shape, generator=generator)

        self.logp = -normal(1.0).abs()
        self.proximal, self.reference = self.logp + normal(0.1), self.logp + normal(0.2)
        self.behaviour, self.entropy = self.proximal + normal(0.1), normal(1.0).abs()
        self.advantages = torch.randn(NUM_SEQUENCES, generator=generator)
        self.mask = torch.ones(shape, dtype=torch.bool)
        self.versions = torch.randint(0, 5, shape, generator=generator)
        ratio = (self.proximal - self.behaviour).exp()
        ratio = ratio.masked_fill((ratio < 0.5) | (ratio > 5.0), 0.0)
        self.trl_old = {True: self.proximal, False: self.behaviour}
        self.inputs = {
            decoupled: trl_inputs(self.mask, old, self.reference, self.advantages, ratio)
            for decoupled, old in self.trl_old.items()
        }

    def ours(self, name: str, **parts: Any) -> Callable[[], tuple[Any, Any]]:
        import torch

        from async_rl.algorithms.batch import Normaliser, TokenBatch
        from async_rl.algorithms.presets import preset

        objective = preset(name, **parts)
        mask_T = self.mask.flatten()
        sequence_T = torch.arange(NUM_SEQUENCES).repeat_interleave(LENGTH)
        normaliser = Normaliser.of(mask_T, sequence_T, NUM_SEQUENCES, LENGTH)
        fixed = {
            "behaviour_T": self.behaviour.flatten(), "proximal_T": self.proximal.flatten(), "mask_T": mask_T,
            "reference_T": self.reference.flatten() if objective.needs_reference else None,
            "entropy_T": self.entropy.flatten(), "versions_T": self.versions.flatten(), "current_version": 5,
            "sequence_T": sequence_T, "advantages_N": self.advantages,
        }  # fmt: skip

        def call() -> tuple[Any, Any]:
            logp_T = self.logp.flatten().requires_grad_()
            logp_T.grad = None
            out = objective.loss(TokenBatch(logp_T=logp_T, **fixed), normaliser)
            out.loss.backward()
            return out.loss.detach(), logp_T.grad

        return call

    def trl(self, setting: str) -> Callable[[], tuple[Any, Any]]:
        from peers.trl_grpo import TRLLoss

        loss_of, inputs = TRLLoss(setting, LENGTH), self.inputs[setting == "dapo_is"]

        def call() -> tuple[Any, Any]:
            logp_BL = self.logp.detach().requires_grad_()
            logp_BL.grad = None
            loss = loss_of(inputs, logp_BL, self.entropy)
            loss.backward()
            return loss.detach(), logp_BL.grad.flatten()

        return call

    def check_equal(self) -> None:
        import torch

        for name, parts in EQUAL.items():
            loss, grad = self.ours(name, **parts)()
            other, other_grad = self.trl(COUNTERPARTS.get(name, "dapo"))()
            torch.testing.assert_close(loss, other, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
            torch.testing.assert_close(grad, other_grad, rtol=1e-4, atol=1e-8)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    gc.disable()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    gc.enable()
    return seconds


def peak_bytes(call: Callable[[], object]) -> int:
    """Highest sum of live tensor allocations made by the call, from torch's own allocation events."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def report(rows: list[dict[str, Any]]) -> None:
    import torch
    import trl

    RESULT.parent.mkdir(exist_ok=True)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    head = {
        "what": "forward + backward of one loss, 64 sequences x 1024 tokens, fp32, one thread",
        "date": datetime.now(UTC).date().isoformat(), "commit": commit.stdout.strip() if commit.returncode == 0 else
        None, "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {cpu_name()}", "python":
        platform.python_version(), "torch": torch.__version__, "trl": trl.__version__, "rounds": ROUNDS,
    }  # fmt: skip
    RESULT.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
