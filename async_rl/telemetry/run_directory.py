"""One run on disk.

config.json       the resolved recipe            ledger/        what happened to every rollout (LMDB)
metrics.jsonl     one object per step            checkpoints/   v00000100/ ... loadable by from_pretrained
evaluations.jsonl one object per evaluation      samples.jsonl  held-out tasks and what the policy made of them
summary.json      when the run is complete       failures.jsonl tracebacks of failed episodes
plots/ report.html what a person reads           logs/          one file per process
lock              who is at work here            admin.json     where the admin endpoint listens
secrets/          keys and a token, where services need them (run_secrets.py)
memory.json       bytes of each model of the learner, by kind and device, after its first step
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from async_rl import recipes, tables
from async_rl.config import Run
from async_rl.errors import UserError
from async_rl.telemetry.exporters import Exporter
from async_rl.telemetry.files import append_lines, drop_half_a_line, read_lines, room, write_atomically
from async_rl.telemetry.journal import EvalSummary, Row

Tell = Callable[[str, Any], None]

LOCK_TIMEOUT_S = 10.0
MAX_FAILURES = 1000
"""Tracebacks kept; a run whose every episode fails should not fill the disk."""


class RunDirectory:
    """Paths, and the reading of what stands there. Making one writes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.config, self.summary, self.lock = self.path / "config.json", self.path / "summary.json", self.path / "lock"
        self.metrics, self.evaluations = self.path / "metrics.jsonl", self.path / "evaluations.jsonl"
        self.failures, self.admin = self.path / "failures.jsonl", self.path / "admin.json"
        self.memory = self.path / "memory.json"
        self.samples, self.plots, self.report = (
            self.path / "samples.jsonl",
            self.path / "plots",
            self.path / "report.html",
        )
        self.ledger, self.checkpoints, self.logs = self.path / "ledger", self.path / "checkpoints", self.path / "logs"

    def create(self, run: Run) -> None:
        """A new run directory, or the same run continued: perhaps for more steps, on other machines, with more or fewer
        generators.

        Raises:
            UserError: it cannot be written, or holds another run.
        """
        if self.config.exists():
            old = self.load_config()
            refuse_another(self.path, _elsewhere(old, run), run)
            if run.steps < old.steps:
                raise UserError(
                    f"steps = {run.steps}: {self.path} was started for {old.steps} steps; write at least that"
                )
        self.write_config(run)

    def write_config(self, run: msgspec.Struct) -> None:
        """Raises UserError where nothing can be written."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, tables.dumps(run))
        except OSError as error:
            raise UserError(
                f"run directory {self.path}: cannot be written ({error.strerror}); choose another --run-dir"
            ) from None

    def load_config(self) -> Run:
        try:
            return recipes.from_table(json.loads(self.config.read_text()))
        except OSError as error:
            raise UserError(f"{self.path} is no run directory: {self.config.name}: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{self.config} is damaged: {error}") from None

    def load_summary(self) -> Row | None:
        return json.loads(self.summary.read_text()) if self.summary.exists() else None

    def load_memory(self) -> Row:
        """Empty where the learner has not trained yet."""
        return json.loads(self.memory.read_text()) if self.memory.exists() else {}

    def load_metrics(self) -> list[Row]:
        return read_lines(self.metrics)

    def load_evaluations(self) -> list[EvalSummary]:
        return [msgspec.convert(row, EvalSummary) for row in read_lines(self.evaluations)]

    def load_samples(self) -> list[Row]:
        """Rollouts of the evaluations, as journal.sample_row makes them."""
        return read_lines(self.samples)

    def load_failures(self) -> list[Row]:
        return read_lines(self.failures)

    def is_complete(self, run: Run) -> bool:
        summary = self.load_summary()
        return summary is not None and summary["steps"] >= run.steps

    def hold(self) -> IO[str]:
        """Lock the directory for this process; keep the returned file open. From the main thread only.

        Raises:
            UserError: another controller is still at work after 10 s; it is named.
        """
        handle = self.lock.open("a+")
        previous = signal.signal(signal.SIGALRM, _give_up)
        signal.setitimer(signal.ITIMER_REAL, LOCK_TIMEOUT_S)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except TimeoutError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            handle.close()
            raise UserError(
                f"run directory {self.path} is in use by {holder}: stop it, or choose another --run-dir"
            ) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        with room(self.lock):
            handle.truncate(0)
            handle.write(f"process {os.getpid()} (started by {os.getppid()}) on {os.uname().nodename}\n")
            handle.flush()
        return handle


def _elsewhere(old: Run, new: Run) -> Run:
    """The old one, as long and at the same machines as the new one."""
    replace, controller, weights = msgspec.structs.replace, new.controller, new.weights
    return replace(
        old,
        steps=new.steps,
        generator=replace(old.generator, count=new.generator.count),
        controller=replace(
            old.controller, host=controller.host, port=controller.port, admin_port=controller.admin_port
        ),
        weights=replace(old.weights, host=weights.host, relay_port=weights.relay_port, relay_url=weights.relay_url),
    )


def refuse_another(path: Path, old: msgspec.Struct, new: msgspec.Struct) -> None:
    """Raises UserError naming what differs between the recipe a directory was started with and this one."""
    changed = tables.differences(old, new)
    if changed:
        raise UserError(
            f"run directory {path} holds a run with another recipe ({'; '.join(changed[:3])}): "
            "choose another --run-dir, or start it with the recipe it has"
        )


class DirectoryJournal:
    """The controller's journal in a run directory. Lines are flushed as they are written."""

    def __init__(self, directory: RunDirectory, tell: Tell, exporters: Sequence[Exporter] = ()) -> None:
        """tell: called with (kind, data) for whoever watches: "step", "evaluation", "pulse", "summary", "say"."""
        self._directory, self._tell, self._exporters = directory, tell, exporters
        for path in (directory.evaluations, directory.samples, directory.failures):
            drop_half_a_line(path)
        self._rows: list[Row] = read_lines(directory.metrics)
        self._evaluations = directory.load_evaluations()
        self._rewrite()
        self._metrics = directory.metrics.open("a")
        self._failures = 0

    @property
    def rows(self) -> Sequence[Row]:
        return self._rows

    @property
    def evaluations(self) -> Sequence[EvalSummary]:
        return self._evaluations

    @property
    def failures_path(self) -> str:
        return str(self._directory.failures)

    def step(self, row: Row) -> None:
        row = {**row, "timestamp": time.time()}
        self._rows.append(row)
        with room(self._directory.metrics):
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()
        for exporter in self._exporters:
            exporter.export(row["version"], row)
        self._tell("step", row)

    def evaluated(self, summary: EvalSummary, samples: Sequence[Row]) -> None:
        self._evaluations.append(summary)
        append_lines(self._directory.samples, samples)  # first: whoever sees the evaluation finds its samples
        append_lines(self._directory.evaluations, [msgspec.to_builtins(summary)])
        for exporter in self._exporters:
            exporter.export(summary.version, {"evaluation": {"reward": summary.reward, **summary.metrics}})
        self._tell("evaluation", msgspec.to_builtins(summary))

    def rewind(self, version: int) -> None:
        if all(row["step"] < version for row in self._rows):
            return
        self._rows = [row for row in self._rows if row["step"] < version]
        self._metrics.close()
        self._rewrite()
        self._metrics = self._directory.metrics.open("a")

    def failed(self, group_id: int, member: int, reason: str, traceback: str) -> None:
        self._failures += 1
        if self._failures == 1:
            self._tell("say", f"an episode failed: {reason} (tracebacks are in {self._directory.failures.name})")
        if self._failures <= MAX_FAILURES:
            row = {"group": group_id, "member": member, "reason": reason, "traceback": traceback}
            append_lines(self._directory.failures, [row])

    def summary(self, summary: Row) -> None:
        summary = {**summary, "memory": self._directory.load_memory()}
        write_atomically(self._directory.summary, json.dumps(summary, indent=2) + "\n")
        self._tell("summary", summary)

    def pulse(self, pulse: Row) -> None:
        self._tell("pulse", pulse)

    def say(self, line: str) -> None:
        self._tell("say", line)

    def close(self) -> None:
        with room(self._directory.metrics):
            self._metrics.close()
        for exporter in self._exporters:
            exporter.close()

    def _rewrite(self) -> None:
        """What was read, whole lines only: a killed process may have left half a line."""
        write_atomically(self._directory.metrics, "".join(json.dumps(row) + "\n" for row in self._rows))


def _give_up(signum: int, frame: types.FrameType | None) -> None:
    raise TimeoutError
