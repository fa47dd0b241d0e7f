"""What prioritized sampling is worth where most problems are easy: held-out exact match by step, beside uniform.

    python bench/curriculum.py [--steps 300] [--seeds 3] [--write]

The sort recipe on bench/mixed_sorting.py (80 % of the problems have two digits, 5 % have four; held out are the long
ones). Same model, same number of rollouts, steps and seeds in both arms. exact: mean over the seeds, with [min, max].
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from stamp import commit

ROOT = Path(__file__).resolve().parents[1]
ARMS = {"uniform": [], "prioritized": ["curriculum.sampling=prioritized"]}


def run(directory: Path, seed: int, steps: int, overrides: list[str]) -> dict[int, float]:
    """step -> held-out exact match"""
    sets = [
        f"steps={steps}",
        f"seed={seed}",
        "environment.name=mixed_sorting",
        f"environment.module={ROOT / 'bench' / 'mixed_sorting.py'}",
        "environment.options={}",
        "evaluation.tasks=220",
        f"evaluation.every_steps={steps // 6}",
        *overrides,
    ]
    flags = [part for one in sets for part in ("--set", one)]
    command = [sys.executable, "-m", "async_rl.cli", "train", str(ROOT / "recipes" / "sort.toml"), "--no-report"]
    done = subprocess.run([*command, "--run-dir", str(directory), *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    lines = (directory / "evaluations.jsonl").read_text().splitlines()
    return {row["version"]: row["metrics"]["exact"] for row in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()
    found: dict[str, list[dict[int, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(1, options.seeds + 1):
            for arm, overrides in ARMS.items():
                found[arm].append(run(Path(scratch) / f"{arm}-{seed}", seed, options.steps, overrides))
    steps = sorted(found["uniform"][0])
    exact = {
        arm: {step: [one[step] for one in runs] for step in steps if all(step in one for one in runs)}
        for arm, runs in found.items()
    }
    print(
        f"held-out exact match, {options.seeds} seeds: mean [min, max]\n{'step':>6}" + "".join(f"{a:>24}" for a in ARMS)
    )
    for step in steps:
        cells = [f"{statistics.mean(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for v in (exact[arm][step] for arm in ARMS)]
        print(f"{step:>6}" + "".join(f"{cell:>24}" for cell in cells))
    if options.write:
        device = f"{platform.processor() or platform.machine()}, 2 cores"
        stamp = {"date": date.today().isoformat(), "commit": commit(), "device": device}
        path = ROOT / "bench" / "results" / "curriculum_sorting.json"
        path.write_text(json.dumps(stamp | {"heldout_exact": exact}, indent=2) + "\n")


if __name__ == "__main__":
    main()
