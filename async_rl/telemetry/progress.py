"""Pure: what a person sees of a run without a terminal, one plain line an event; and the words for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from async_rl.config import Run

SAMPLE_EVERY_S = 2.0
"""Lines of steps come at most so often, whatever a step takes."""
QUIET_S = 15.0
"""After so long without a line, one says where the stage is."""

CAUSES = {
    "engine_step": "samples",
    "train_step": "trains",
    "wait_lease": "admission closed (staleness bound)",
    "wait_weights": "waits for newer weights",
    "wait_batch": "waits for a batch",
    "environment": "environment code",
    "publish": "publishes weights",
    "checkpoint": "saves a checkpoint",
    "hand_over": "hands work over",
    "off_device": "the other role has the device",
    "device_turn": "takes or leaves the device",
    "start": "starts",
}
"""What a role does with its time (telemetry.usage) -> words."""


class Progress:
    """Feed it events; it says which lines to print. `now` is any clock in seconds."""

    def __init__(self, run: Run) -> None:
        self._run, self._stage = run, ""
        self._stepped = self._spoke = float("-inf")

    def line(self, kind: str, data: Any, now: float) -> str | None:
        """The line for this event, or None."""
        line = self._line(kind, data, now)
        if line is not None:
            self._spoke = now
        return line

    def _line(self, kind: str, data: Any, now: float) -> str | None:
        match kind:
            case "step":
                if now - self._stepped < SAMPLE_EVERY_S and data["version"] < self._run.steps:
                    return None
                self._stepped = now
                return step_line(data, self._run.steps)
            case "evaluation":
                metrics = "  ".join(f"{name} {value:.3f}" for name, value in data["metrics"].items())
                return f"evaluation at step {data['version']}: reward {data['reward']:.3f}  {metrics}"
            case "say":
                return one_line(data)
            case "summary":
                return summary_line(data)
            case "report":
                return f"report: {data}"
            case "dashboard":
                return f"dashboard: {data}"
            case "pulse":
                stage = stage_of(data, self._run)
                if stage != self._stage:
                    self._stage = stage
                    return self._begins(stage, data)
                return stage_words(data, self._run) if now - self._spoke >= QUIET_S else None
            case _:
                return None

    def _begins(self, stage: str, pulse: Mapping[str, Any]) -> str:
        match stage:
            case "evaluation":
                return f"evaluating {pulse['total']} held-out tasks"
            case "training":
                run = self._run
                return f"training from step {pulse['version'] + 1} of {run.steps}, {run.step_rollouts} rollouts a step"
            case _:
                return stage_words(pulse, self._run)


def stage_of(pulse: Mapping[str, Any], run: Run) -> str:
    """An evaluation that runs beside the training is no stage of its own."""
    beside = pulse["stage"] == "evaluation" and 0 < pulse["version"] < run.steps
    return "training" if beside else pulse["stage"]


def stage_words(pulse: Mapping[str, Any], run: Run) -> str:
    """Where the run is, for someone who sees one for the first time."""
    version: int = pulse["version"]
    match stage_of(pulse, run):
        case "starting":
            return "loading the model"
        case "evaluation":
            edge = "end" if version >= run.steps else "start"
            return f"evaluating the {edge}: {pulse['done']} of {pulse['total']} tasks"
        case "training":
            needed = run.step_rollouts
            step = min(version + 1, run.steps)
            return f"step {step} of {run.steps}: {min(pulse['ready'], needed)} of {needed} rollouts ready"
        case "saving":
            return "saving the last checkpoint"
        case stage:
            return stage


def cause_words(cause: str) -> str:
    return CAUSES.get(cause, cause.replace("_", " "))


def one_line(text: str) -> str:
    """Messages may quote what user code raised: line breaks and escape sequences do not reach the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def step_line(row: Mapping[str, Any], steps: int) -> str:
    """One step: how far, how good, how fast, how stale, who waits."""
    idle = [(share, role, cause) for role, causes in row["idle"].items() for cause, share in causes.items()]
    share, role, cause = max(idle, default=(0.0, "", ""))
    waiting = f"  {role} {share:.0%} {cause_words(cause)}" if share else ""
    exact = f"  exact {row['train_exact']:.2f}" if "train_exact" in row else ""
    ess = f"{row['ess_frac']:.2f}" if "ess_frac" in row else "-"
    return (
        f"step {row['version']:>{len(str(steps))}}/{steps}  {row['wall_s']:6.1f} s  reward {row['reward']:.3f}{exact}"
        f"  lag {row['lag']['mean']:.1f} (max {row['lag']['max']})  ess {ess}"
        f"  masked {row['masked_fraction']:.1%}  {row['tokens_per_cpu_s']:.0f} tokens/cpu-s"
        f"  ready {row['ready']} running {row['running']}{waiting}"
    )


def summary_line(summary: Mapping[str, Any]) -> str:
    before, after = summary["eval_before"], summary["eval_after"]
    parts = [f"complete: {summary['steps']} steps in {summary['wall_s']:.1f} s"]
    if before is not None and after is not None:
        measure = "exact" if "exact" in after else "reward"
        parts.append(
            f"held-out greedy {measure} {before[measure]:.3f} -> {after[measure]:.3f} ({after['tasks']} tasks)"
        )
    parts.append(f"reward {summary['reward_first']:.3f} -> {summary['reward_last']:.3f}")
    if "weights_changed" in summary:
        parts.append(f"a step changes {summary['weights_changed']:.1%} of the weights")
    return ", ".join(parts)
