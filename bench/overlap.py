"""How much of the slower role's time asynchrony hides: the same recipe, asynchronous and synchronous, in turn.

    python bench/overlap.py [RECIPE] [--steps 150] [--pairs 3] [--set section.key=value ...] [--write]

work of a role: wall seconds it spends on rollouts (engine steps, hand-over, environment code) or on training
(steps, hand-over, publishing, checkpoints). Synchronous time can at best be the sum of the two, asynchronous time the
larger: their quotient is the ideal speed-up. A synchronous run also waits for every message, commit and swap between
the two, so the measured speed-up may exceed it. Medians over the pairs, with [min, max].
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
from typing import Any

from stamp import commit

ROOT = Path(__file__).resolve().parents[1]
WAITING = ("wait_", "start")


def run(recipe: Path, directory: Path, overrides: list[str]) -> dict[str, Any]:
    sets = [argument for override in overrides for argument in ("--set", override)]
    command = [
        sys.executable,
        "-m",
        "async_rl.cli",
        "train",
        str(recipe),
        "--run-dir",
        str(directory),
        "--no-report",
        *sets,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stdout + done.stderr)
    summary = json.loads((directory / "summary.json").read_text())
    busy, idle, wall = summary["busy"], summary["idle"], summary["wall_s"]
    waiting = {role: sum(s for c, s in idle[role].items() if c.startswith(WAITING)) for role in busy}
    cpu = summary["cpu_s"]
    return {
        "wall_s": wall,
        "cpu_s": sum(cpu.values()),
        "controller_share": cpu["controller"] / sum(cpu.values()),
        "work_s": {role: (1 - waiting[role]) * wall for role in busy},
        "section": {role: busy[role] for role in busy},
        "idle": idle,
        "lag": summary["lag"],
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def text(found: dict[str, float], unit: str = "") -> str:
    return f"{found['median']:.2f}{unit} [{found['min']:.2f}, {found['max']:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=ROOT / "recipes" / "sort.toml", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results/")
    options = parser.parse_args()
    common = [*options.set, f"steps={options.steps}", "evaluation.tasks=0"]
    arms: dict[str, list[dict[str, Any]]] = {"synchronous": [], "asynchronous": []}
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(options.pairs):
            for arm, overrides in (("synchronous", ["staleness.max_staleness=0"]), ("asynchronous", [])):
                arms[arm].append(run(options.recipe, Path(scratch) / f"{arm}-{pair}", [*common, *overrides]))
                print(f"pair {pair + 1}/{options.pairs}  {arm:<12}  {arms[arm][-1]['wall_s']:.1f} s", flush=True)
    pairs = list(zip(arms["synchronous"], arms["asynchronous"], strict=True))
    ideal = [sum(sync["work_s"].values()) / max(sync["work_s"].values()) for sync, _ in pairs]
    slower = [max(one["section"], key=lambda role: one["section"][role]) for one in arms["asynchronous"]]
    figures = {
        "recipe": options.recipe.stem,
        "steps": options.steps,
        "synchronous_s": spread([sync["wall_s"] for sync, _ in pairs]),
        "asynchronous_s": spread([other["wall_s"] for _, other in pairs]),
        "speed_up": spread([sync["wall_s"] / other["wall_s"] for sync, other in pairs]),
        "ideal_speed_up": spread(ideal),
        "cpu_s_ratio": spread([sync["cpu_s"] / other["cpu_s"] for sync, other in pairs]),
        "slower_role": statistics.mode(slower),
        "slower_role_in_its_section": spread([max(one["section"].values()) for one in arms["asynchronous"]]),
        "controller_cpu_share": spread([one["controller_share"] for one in arms["asynchronous"]]),
        "mean_lag": spread([one["lag"]["mean"] for one in arms["asynchronous"]]),
    }
    print(f"{figures['recipe']}, {options.steps} steps, {options.pairs} pairs")
    print(f"  synchronous                 {text(figures['synchronous_s'], ' s')}")
    print(f"  asynchronous                {text(figures['asynchronous_s'], ' s')}")
    print(
        f"  speed-up                    {text(figures['speed_up'], 'x')}   ideal {text(figures['ideal_speed_up'], 'x')}"
    )
    print(f"  CPU seconds, sync / async   {text(figures['cpu_s_ratio'], 'x')}")
    print(f"  {figures['slower_role']} in its section    {text(figures['slower_role_in_its_section'])}")
    print(f"  controller's share of CPU   {text(figures['controller_cpu_share'])}")
    for role, causes in arms["asynchronous"][-1]["idle"].items():
        print(f"  {role} otherwise: " + ", ".join(f"{c} {share:.1%}" for c, share in sorted(causes.items())))
    if options.write:
        device = f"{platform.processor() or platform.machine()}, 2 cores"
        stamp = {"date": date.today().isoformat(), "commit": commit(), "device": device}
        path = ROOT / "bench" / "results" / f"overlap_{figures['recipe']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(stamp | figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
