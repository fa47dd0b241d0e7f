"""`async-rl report`: what a run did, as plots and one HTML file that needs nothing else, from the run directory alone.

write_report(RunDirectory(Path("runs/sort")))  # at the end of a run, or while it is at work

Everything that comes from data (prompts, completions, tracebacks, the recipe) is text to the template, never markup.
"""

from __future__ import annotations

import base64
import importlib.metadata
import math
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec

from async_rl import config, tables
from async_rl.config import Model, Run
from async_rl.errors import LedgerCorrupt, MissingExtra, UserError
from async_rl.ledger import inspection
from async_rl.telemetry import plots, samples
from async_rl.telemetry.agreement import limit_of
from async_rl.telemetry.files import write_atomically
from async_rl.telemetry.journal import EDGE_STEPS, EvalSummary, Row, summarise
from async_rl.telemetry.plots import Plot
from async_rl.telemetry.run_directory import RunDirectory
from async_rl.telemetry.samples import Pair
from async_rl.units import size

TEMPLATE = "report.html.jinja"
MAX_TRACEBACKS = 5
SHORT_TEXT = 60
"""Characters; samples that are all shorter stand several in a line."""
EQUAL = 1e-9
"""Rewards this close are the same."""
PACKAGES = ("async-rl", "torch", "transformers", "numpy", "msgspec", "pyzmq", "lmdb", "safetensors", "matplotlib")

_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Control characters as pictures of themselves: a completion may hold anything."""


class Report(msgspec.Struct, frozen=True):
    """What was written."""

    html: Path
    plots: list[Path]
    sentence: str
    missing: list[str]
    """What the report could not show, and why."""


class Change(NamedTuple):
    """A key figure before and after."""

    name: str
    before: str
    after: str
    change: str = ""
    verdict: str = ""
    """better, worse, or nothing where neither can be said."""


def write_report(directory: RunDirectory) -> Report:
    """Plots as PNG and report.html, also of a run that is not complete or has just begun.

    Raises:
        UserError: there is no run in the directory, or it cannot be written.
    """
    run, rows = directory.load_config(), directory.load_metrics()
    done = rows[-1]["version"] if rows else 0
    evaluations = _evaluations(directory, done)
    summary = _summary(directory.load_summary(), rows, evaluations)
    sentence, failures = one_sentence(summary, run), directory.load_failures()
    missing: list[str] = []
    if not rows:
        missing.append("No step has been trained yet.")
    if not evaluations:
        missing.append("There has been no evaluation on held-out tasks.")
    drawn: list[Plot] = []
    try:
        drawn = plots.draw(rows, evaluations, run, plots.shares_by_cause(summary["busy"], summary["idle"]))
    except MissingExtra as error:
        missing.append(f"No plots: {error}")
    view = {
        "name": directory.path.name,
        "sentence": sentence,
        "subject": f"{_model(run.model)} on {run.environment.name}",
        "written": _clock(time.time()),
        "last_step": _clock(rows[-1]["timestamp"]) if rows and "timestamp" in rows[-1] else "",
        "done": done,
        "run": run,
        "changes": _changes(rows, evaluations),
        "facts": _facts(rows, summary, run) + _memory(directory.load_memory()),
        "plots": [(plot, base64.b64encode(plot.png).decode()) for plot in drawn],
        "samples": _samples(directory, run, done, missing),
        "differences": _differences(run),
        "recipe": tables.dumps(run),
        "failures": len(failures),
        "reasons": Counter(failure["reason"] for failure in failures).most_common(),
        "tracebacks": failures[:MAX_TRACEBACKS],
        "promises": _promises(directory, run, missing),
        "packages": _packages(),
        "missing": missing,
    }
    try:
        written = write_plots(directory.plots, drawn)
        write_atomically(directory.report, _page(view))
    except OSError as error:
        raise UserError(f"the report of {directory.path} cannot be written ({error.strerror})") from None
    return Report(directory.report, written, sentence, missing)


def one_sentence(summary: Row, run: Run) -> str:
    """What came of a run, from its summary row.

    held-out greedy exact 0.33 -> 0.81 on 30 tasks, 40 steps, 201 s, lag mean 1.2 (bound 4)
    """
    before, after = summary["eval_before"], summary["eval_after"]
    steps, last = summary["steps"], after or before
    if last is None:
        parts = [f"training reward {summary['reward_first']:.2f} -> {summary['reward_last']:.2f}"] if steps else []
    else:
        measure = "exact" if "exact" in last else "reward"
        values = [f"{one[measure]:.2f}" for one in (before, after) if one is not None]
        failed = f" ({last['failed']} failed)" if last["failed"] else ""
        parts = [f"held-out greedy {measure} {' -> '.join(values)} on {last['tasks']} tasks{failed}"]
        if after is not None and after.get("version", steps) != steps:
            parts[0] += f" at step {after['version']}"
    of = "" if steps >= run.steps else f" of {run.steps}"
    parts += [f"{steps}{of} steps", f"{summary['wall_s']:.0f} s"]
    if steps:
        parts.append(f"lag mean {summary['lag']['mean']:.1f} (bound {run.staleness.max_staleness})")
    return ", ".join(parts)


def _evaluations(directory: RunDirectory, done: int) -> list[EvalSummary]:
    """One a version, by version; what was evaluated before the learner went back to a checkpoint does not count."""
    by_version = {one.version: one for one in directory.load_evaluations() if one.version <= done}
    return [by_version[version] for version in sorted(by_version)]


def _summary(saved: Row | None, rows: Sequence[Row], evaluations: Sequence[EvalSummary]) -> Row:
    """summary.json where it is of these rows, else the same from what there is; evaluations as they are."""
    last = rows[-1] if rows else {"busy": {}, "idle": {}}
    if saved is None or saved["steps"] != len(rows):
        saved = summarise(rows, evaluations, busy=last["busy"], idle=last["idle"], cpu={}, versions={})

    def plain(of: EvalSummary) -> Row:
        return {**of.metrics, "reward": of.reward, "tasks": of.tasks, "failed": of.failed, "version": of.version}

    before = plain(evaluations[0]) if evaluations else None
    return saved | {"eval_before": before, "eval_after": plain(evaluations[-1]) if len(evaluations) > 1 else None}


def _changes(rows: Sequence[Row], evaluations: Sequence[EvalSummary]) -> list[Change]:
    """Held-out figures of the first and the last evaluation; training figures over the first and the last steps."""
    changes: list[Change] = []
    names = plots.metric_names(rows, evaluations)
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        for name in [name for name in (*names, "reward") if name == "reward" or name in last.metrics]:
            values = [one.reward if name == "reward" else one.metrics.get(name, math.nan) for one in (first, last)]
            errors = ["", ""]
            if name == "exact":
                errors = [f" ± {_standard_error(value, one)}" for value, one in zip(values, (first, last), strict=True)]
            changes.append(
                _change(f"held-out greedy {name}", *values, better=name in ("exact", "reward"), after=errors)
            )
    edges = (rows[:EDGE_STEPS], rows[-EDGE_STEPS:])
    named = {"reward": "training reward"}
    named |= {f"train_{name}": f"training {name}" for name in names}
    named |= {
        "completion_length_mean": "completion length, tokens",
        "entropy": "entropy, nats",
        "mismatch_k3": "mismatch KL (k3), nats",
        "kl_k3": "KL to the reference (k3), nats",
        "ess_frac": "effective sample size, share of tokens",
        "grad_norm": "gradient norm",
    }
    for key, name in named.items():
        values = [[row[key] for row in edge if key in row] for edge in edges]
        if all(values):
            means = [sum(edge) / len(edge) for edge in values]
            changes.append(_change(name, *means, better=key in ("reward", "train_exact")))
    return changes


def _change(name: str, first: float, last: float, *, better: bool, after: Sequence[str] = ("", "")) -> Change:
    difference = last - first
    verdict = ("better" if difference > 0 else "worse") if better and abs(difference) > EQUAL else ""
    change = f"{'+' if difference > 0 else ''}{_number(difference)}" if abs(difference) > EQUAL else "same"
    return Change(name, _number(first) + after[0], _number(last) + after[1], change, verdict)


def _standard_error(share: float, evaluation: EvalSummary) -> str:
    """Of a share of tasks, by the choice of the tasks alone. Two of each outcome are added (Agresti and Coull 1998):
    none of 30 is not certainly none."""
    tasks = evaluation.tasks - evaluation.failed
    share = min(1.0, max(0.0, (share * tasks + 2) / (tasks + 4)))
    return f"{math.sqrt(share * (1 - share) / (tasks + 4)):.2f}"


def _facts(rows: Sequence[Row], summary: Row, run: Run) -> list[tuple[str, str]]:
    lag, wall_s = summary["lag"], summary["wall_s"]
    facts = [("steps", f"{summary['steps']:,} of {run.steps:,}")]
    if not rows:
        return facts
    skipped = sum(row.get("skipped", 0.0) for row in rows)
    facts += [
        ("wall time", f"{wall_s:.0f} s"),
        ("rollouts trained on", f"{summary['samples']:,.0f}"),
        ("tokens trained on", f"{summary['tokens']:,}, {summary['tokens'] / max(wall_s, 1e-9):,.0f} a second"),
        ("tokens per CPU second", f"{summary['tokens_per_cpu_s']:,.0f}"),
        ("lag of tokens with weight", f"mean {lag['mean']:.2f}, 95th percentile {lag['p95']}, max {lag['max']}"),
        ("bound of the lag (eta)", str(run.staleness.max_staleness)),
        ("tokens masked for their lag", f"{summary['masked_fraction']:.2%}"),
        ("steps skipped", f"{skipped:.0f}"),
        *_agreement(rows, run),
    ]
    if "weights_changed" in summary:
        facts.append(("weights that a step changes", f"{summary['weights_changed']:.1%}"))
    return facts + [(f"{role} at work", f"{share:.1%} of its time") for role, share in summary["busy"].items()]


def _agreement(rows: Sequence[Row], run: Run) -> list[tuple[str, str]]:
    """Nothing where engine and learner were never compared under the same weights."""
    compared = [row for row in rows if row.get("equal_version_tokens")]
    if not compared:
        return []
    tokens = sum(row["equal_version_tokens"] for row in compared)
    gap = sum(row["equal_version_tokens"] * row["equal_version_gap"] for row in compared) / tokens
    limit = limit_of(rows, run)
    said = f"{gap:.2g} nats apart on average over {tokens:,.0f} tokens (limit {limit:g})"
    return [("log-probs of engine and learner under the same weights", said)]


def _memory(memory: Row) -> list[tuple[str, str]]:
    """One line for each model of the learner: memory of the critic: weights 1.2 MiB, gradients 1.2 MiB ... on cpu."""
    lines: list[tuple[str, str]] = []
    for role, kinds in memory.items():
        held = [f"{kind} {size(count)} on {device}" for kind, by in kinds.items() for device, count in by.items()]
        lines.append((f"memory of the {role.replace('_', ' ')}, a learner rank", ", ".join(held)))
    return lines


def _samples(directory: RunDirectory, run: Run, done: int, missing: list[str]) -> Row | None:
    """Gained, lost and unchanged pairs, by how much."""
    rows = [row for row in directory.load_samples() if row["version"] <= done]
    if not rows:
        missing.append("No samples: no evaluation has written samples.jsonl.")
        return None
    first, last, found = samples.before_and_after(rows)
    try:
        transcriber = samples.transcriber(run.model)
    except UserError as error:
        missing.append(f"No samples: {error}")
        return None
    pairs = [transcriber.pair(before, after) for before, after in found]
    gained = sorted((pair for pair in pairs if pair.gain > EQUAL), key=lambda pair: -pair.gain)
    lost = sorted((pair for pair in pairs if pair.gain < -EQUAL), key=lambda pair: pair.gain)
    same = [pair for pair in pairs if abs(pair.gain) <= EQUAL]
    groups: list[tuple[str, list[Pair]]] = [("Gained", gained), ("Lost", lost), ("Unchanged", same)]
    texts = [text for pair in pairs for text in (pair.prompt, pair.before.text, pair.after.text)]
    return {
        "first": first,
        "last": last,
        "groups": [(name, group) for name, group in groups if group],
        "short": all(len(text) <= SHORT_TEXT for text in texts),
    }


def _differences(run: Run) -> list[str]:
    """What the recipe sets: the fields without a default, then `field: default -> value`."""
    tiny = None if run.model.tiny is None else config.TinyModel(characters=run.model.tiny.characters)
    defaults = Run(
        steps=run.steps,
        model=Model(path=run.model.path, tiny=tiny),
        environment=config.Environment(name=run.environment.name),
    )
    changed = tables.differences(defaults, run)  # an empty table that was filled is named by what is in it
    return [
        f"steps: {run.steps}",
        f"model: {_model(run.model)}",
        f"environment.name: {run.environment.name}",
        *(line for line in changed if not any(other.startswith(line.partition(":")[0] + ".") for other in changed)),
    ]


def _promises(directory: RunDirectory, run: Run, missing: list[str]) -> Row | None:
    bound = run.staleness.max_staleness
    try:
        counted = inspection.inspect(directory.ledger, max_staleness=bound)
    except (UserError, LedgerCorrupt) as error:
        missing.append(f"Promises not counted: {error}")
        return None
    kept = [
        (
            f"no token older than {bound} versions had weight in a gradient",
            "over_eta",
            "tokens in steps over the bound",
        ),
        ("every rollout ended in one way, or is still alive", "lost", "rollouts lost"),
        ("nothing ended or was trained on twice", "duplicates", "second endings"),
    ]
    return {"holds": inspection.holds(counted), "counted": counted, "kept": kept}


def _packages() -> list[tuple[str, str]]:
    versions = [("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            versions.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            versions.append((name, "not installed"))
    return versions


def _page(view: Mapping[str, Any]) -> str:
    """ASCII, so that no locale and no lone surrogate of a completion can spoil the file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters["number"] = _number
    page = environment.get_template(TEMPLATE).render(view)
    return page.encode("ascii", "xmlcharrefreplace").decode()


def _visible(value: object) -> object:
    return value.translate(_VISIBLE) if isinstance(value, str) else value


def write_plots(directory: Path, drawn: Sequence[Plot]) -> list[Path]:
    if drawn:
        directory.mkdir(exist_ok=True)
    written: list[Path] = []
    for plot in drawn:
        path = directory / f"{plot.name}.png"
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(plot.png)
        written.append(partial.replace(path))
    return written


def _model(model: Model) -> str:
    if model.tiny is None:
        return Path(model.path).name
    return f"a tiny Llama ({model.tiny.layers} layers of {model.tiny.hidden_size})"


def _number(value: float) -> str:
    """Three figures: 0.331, 12.4, 1,024."""
    if not math.isfinite(value):
        return "n/a"
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _clock(timestamp: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(timestamp))
