"""One device in turns: what turns cost, and what memory they save, beside the separate placement of the same recipe.

    python bench/colocated.py [RECIPE] [--steps 50] [--synchronous] [--set section.key=value ...] [--write]
    python bench/colocated.py --device cuda [--steps 6] [--write]

On a CPU memory is the resident set without pages of files (weights under way in /dev/shm are such pages), read every 20
ms while steps are trained: the peak of learner + generator at one moment, and of each alone. On a GPU the model is a
random-initialised one of Qwen2.5-0.5B's layers over digits, in bf16, and memory is what the whole GPU has
in use above what it had before (nvidia-smi), CUDA contexts included; `held_mib` is what each process holds in its turn.
Turn costs are medians over steps, of the steps that a turn began with.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from stamp import commit

ROOT = Path(__file__).resolve().parents[1]
LOOK_S = 0.02
ROLES = ("learner-0", "generator-0")
TURNS = ("update", "rollout", "release", "onload", "train", "offload")


GPU_SETTINGS = (
    "model.tiny.hidden_size=896", "model.tiny.intermediate_size=4864", "model.tiny.layers=24", "model.tiny.heads=14",
    "model.tiny.kv_heads=2", "generator.slots=256", "generator.device=cuda", "learner.device=cuda",
    "generator.dtype=bfloat16", "learner.dtype=bfloat16", "rollout.groups_per_step=16",
)  # fmt: skip


class GpuPeak(threading.Thread):
    """Watches the first GPU."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0", "-lms", "20"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        self.before = int(self._lines.readline()) << 20
        self.together = 0

    def run(self) -> None:
        for line in self._lines:
            if line.strip().isdecimal():
                self.together = max(self.together, (int(line) << 20) - self.before)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        self.join()


class Peak(threading.Thread):
    """Watches the services of one `train` process."""

    def __init__(self, parent: int) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self.together = 0
        self.alone = dict.fromkeys(ROLES, 0)
        self._parent = psutil.Process(parent)
        self._found: dict[str, psutil.Process] = {}

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                self._look()
            except (psutil.NoSuchProcess, psutil.ZombieProcess, KeyError, ValueError):
                self._found = {}  # a service is being started, or gone

    def _look(self) -> None:
        if len(self._found) < len(ROLES):
            for child in self._parent.children():
                command = child.cmdline()
                if "--name" in command:
                    self._found[command[command.index("--name") + 1]] = child
        anonymous = {}
        for role in ROLES:
            memory = self._found[role].memory_info()
            anonymous[role] = memory.rss - memory.shared
        self.together = max(self.together, sum(anonymous.values()))
        self.alone = {role: max(self.alone[role], anonymous[role]) for role in ROLES}


def run(recipe: Path, directory: Path, overrides: list[str], device: str) -> dict[str, Any]:
    sets = [argument for override in overrides for argument in ("--set", override)]
    command = [sys.executable, "-m", "async_rl.cli", "train", str(recipe), "--run-dir", str(directory)]
    with subprocess.Popen(
        [*command, "--no-report", *sets], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        peak = GpuPeak() if device == "cuda" else Peak(process.pid)
        peak.start()
        assert process.stdout is not None
        printed = process.stdout.read()
        peak.stop()
    if process.returncode != 0:
        sys.exit(printed)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((directory / "summary.json").read_text())
    return {
        "wall_s": summary["wall_s"],
        "reward_last": summary["reward_last"],
        "peak_mib": round(peak.together / 2**20),
        **({} if isinstance(peak, GpuPeak) else {"alone_mib": {k: round(n / 2**20) for k, n in peak.alone.items()}}),
        "busy": summary["busy"],
        "off_device": {role: causes.get("off_device", 0.0) for role, causes in summary["idle"].items()},
        "device_turn": {role: causes.get("device_turn", 0.0) for role, causes in summary["idle"].items()},
        **turns(rows),
    }


def turns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    began = [row["turns"]["seconds"] for row in rows[1:] if row.get("turns", {}).get("seconds", {}).get("update")]
    if not began:
        return {}
    seconds = {turn: statistics.median(one.get(turn, 0.0) for one in began) for turn in TURNS}
    mib = {where: round(count / 2**20) for where, count in rows[-1]["turns"]["bytes"].items()}
    return {"steps_per_turn": len(rows[1:]) / len(began), "turn_s": seconds, "held_mib": mib}


def gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", "0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=ROOT / "recipes" / "sort.toml", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--synchronous", action="store_true", help="both placements with max_staleness = 0 too")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()
    figures: dict[str, Any] = {"recipe": options.recipe.stem, "steps": options.steps, "set": options.set}
    with tempfile.TemporaryDirectory() as scratch:
        for eta in (None, 0) if options.synchronous else (None,):
            for placement in ("separate", "colocated"):
                name = placement if eta is None else f"{placement}_eta_{eta}"
                overrides = [*options.set, f"steps={options.steps}", f"placement={placement}", "evaluation.tasks=0"]
                overrides[:0] = GPU_SETTINGS if options.device == "cuda" else ()
                overrides += [] if eta is None else [f"staleness.max_staleness={eta}"]
                figures[name] = run(options.recipe, Path(scratch) / name, overrides, options.device)
                print(name, json.dumps(figures[name], indent=2), flush=True)
    if options.write:
        device, suffix = f"{platform.processor() or platform.machine()}, 2 cores", ""
        if options.device == "cuda":
            device, suffix = gpu_name(), "_cuda"
        stamp = {"date": date.today().isoformat(), "commit": commit(), "device": device}
        path = ROOT / "bench" / "results" / f"colocated_{figures['recipe']}{suffix}.json"
        path.write_text(json.dumps(stamp | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
