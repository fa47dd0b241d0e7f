"""Pure: what a person sees of a run, one plain line an event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAMPLE_EVERY_S = 2.0
"""Progress lines come at most so often, whatever a step takes."""


class Progress:
    """Feed it events; it says which lines to print. `now` is any clock in seconds."""

    def __init__(self, steps: int) -> None:
        self._steps, self._printed = steps, float("-inf")

    def line(self, kind: str, data: Any, now: float) -> str | None:
        """The line for this event, or None."""
        match kind:
            case "step":
                last = data["version"] >= self._steps
                if now - self._printed < SAMPLE_EVERY_S and not last:
                    return None
                self._printed = now
                return step_line(data, self._steps)
            case "evaluation":
                metrics = "  ".join(f"{name} {value:.3f}" for name, value in data["metrics"].items())
                return f"evaluation at step {data['version']}: reward {data['reward']:.3f}  {metrics}"
            case "say":
                return str(data)
            case "summary":
                return summary_line(data)
            case _:
                return None


def step_line(row: Mapping[str, Any], steps: int) -> str:
    """One step: how far, how good, how fast, how stale, who waits."""
    idle = {
        f"{role} {cause}": share
        for role, causes in row["idle"].items()
        for cause, share in causes.items()
        if cause.startswith("wait")
    }
    waits = max(idle, key=lambda name: idle[name]) if idle else ""
    waiting = f"  {waits.replace('_', ' ')} {idle[waits]:.0%}" if waits else ""
    exact = f"  exact {row['train_exact']:.2f}" if "train_exact" in row else ""
    return (
        f"step {row['version']:>{len(str(steps))}}/{steps}  {row['wall_s']:6.1f} s  reward {row['reward']:.3f}{exact}"
        f"  lag {row['lag']['mean']:.1f} (max {row['lag']['max']})  ess {row.get('ess_frac', 0.0):.2f}"
        f"  masked {row['masked_fraction']:.1%}  {row['tokens_per_cpu_s']:.0f} tokens/cpu-s"
        f"  ready {row['ready']} running {row['running']}{waiting}"
    )


def summary_line(summary: Mapping[str, Any]) -> str:
    before, after = summary["eval_before"], summary["eval_after"]
    parts = [f"complete: {summary['steps']} steps in {summary['wall_s']:.1f} s"]
    parts.append(f"reward {summary['reward_first']:.3f} -> {summary['reward_last']:.3f}")
    if before is not None and after is not None:
        measure = "exact" if "exact" in after else "reward"
        parts.append(f"held-out greedy {measure} {before[measure]:.3f} -> {after[measure]:.3f}")
    return ", ".join(parts)
