"""One view of a run in the terminal, redrawn in place.

    with viewer(run, directory, name="sort") as watch:
        complete = local.train(run, directory, watch)

Without a terminal `watch` prints plain lines (telemetry.progress).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from async_rl.config import Run
from async_rl.telemetry.journal import EDGE_STEPS, Row
from async_rl.telemetry.progress import Progress, cause_words, one_line, stage_words
from async_rl.telemetry.run_directory import RunDirectory, Tell

REFRESH_HZ = 4
RECENT_STEPS = 10
"""The lags shown are those of so many steps."""
PACE_STEPS = 20
"""The time left is judged by so many steps."""
LAG_ROWS = 5
"""A wider staleness bound is shown in ranges."""
MESSAGES = 2
CAUSES_SHOWN = 2
LABEL_WIDTH = 15
ROLE_WIDTH, WIDE_ROLE_WIDTH = 42, 68
MEDIUM, WIDE = 80, 110
"""Columns from which on there is room for more words, and for a bar of what a role does."""
BUSY_BAR, MAX_BAR = 25, 60
ESS_LOW = 0.5
"""As algorithms.metrics warns."""
UNKNOWN = "-"
Bounds = tuple[float, float]
UNIT: Bounds = (0.0, 1.0)


class Glyphs(msgspec.Struct, frozen=True):
    levels: str
    """Of a sparkline, low to high."""
    eighths: str
    """The last cell of a bar, from nearly empty to full."""
    track: str
    done: str
    left: str
    cut: str


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "▏▎▍▌▋▊▉█", "░", "━", "─", "…")
ASCII = Glyphs("_.:-=+*#", "#", ".", "=", "-", "..")


@contextlib.contextmanager
def viewer(run: Run, directory: RunDirectory, *, name: str = "", plain: bool = False) -> Generator[Tell]:
    """Yields `watch(kind, data)`. However it ends, the terminal is restored and the last frame stays; after a complete
    run one sentence follows.

    Args:
        name: of the recipe.
        plain: lines, also on a terminal.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that cannot be printed does not end a run
    progress, console = Progress(run), Console(highlight=False)

    def tell(kind: str, data: Any) -> None:
        line = progress.line(kind, data, time.monotonic())
        if line is not None:
            print(line, flush=True)

    if plain or not sys.stdout.isatty() or not console.is_interactive:  # FORCE_COLOR makes no terminal of a pipe
        yield tell
        return
    view, last = View(run, directory, name, glyphs=glyphs(console.encoding)), list[tuple[str, Any]]()

    def watch(kind: str, data: Any) -> None:
        for message in view.watch(kind, data):
            console.print(message)
        if kind in ("summary", "report"):
            last.append((kind, data))

    with Live(view, console=console, refresh_per_second=REFRESH_HZ, vertical_overflow="crop"):
        try:
            yield watch
        except Exception:
            view.end("failed")
            raise
        finally:
            view.end("stopped")
    for kind, data in last:
        console.print(Text(progress.line(kind, data, time.monotonic()) or ""))


def glyphs(encoding: str) -> Glyphs:
    """Those that the encoding has."""
    try:
        "".join(msgspec.structs.astuple(UNICODE)).encode(encoding)
    except UnicodeEncodeError:
        return ASCII
    return UNICODE


class View:
    """What is known of a run, and its drawing. One thread feeds it, another draws it."""

    def __init__(
        self,
        run: Run,
        directory: RunDirectory,
        name: str = "",
        *,
        glyphs: Glyphs = UNICODE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._glyphs, self._clock = run, glyphs, clock
        self._name, self._path = one_line(name), one_line(_short_path(directory.path))
        self._rows: list[Row] = directory.load_metrics()
        self._evaluations: list[Row] = [msgspec.to_builtins(one) for one in directory.load_evaluations()]
        self._pulse: Row | None = None
        self._messages: list[Text] = []
        self._started = self._stepped = clock()
        self._ended: float | None = None
        self._end = self._url = ""
        """How it ended; where the dashboard is while it goes on."""
        self._lock = threading.Lock()

    def watch(self, kind: str, data: Any) -> list[Text]:
        """Takes an event in. Returns messages that no longer have a place in the view."""
        with self._lock:
            match kind:
                case "step":
                    while self._rows and self._rows[-1]["step"] >= data["step"]:  # a learner started again
                        self._rows.pop()
                    self._rows.append(data)
                    self._stepped = self._clock()
                    if self._pulse is not None:
                        self._pulse = {**self._pulse, "version": data["version"]}
                case "evaluation":
                    self._evaluations.append(data)
                case "pulse":
                    self._pulse = data
                case "summary":
                    self._end = "complete"
                case "dashboard":
                    self._url = data
                case "say":
                    at = _duration(self._clock() - self._started)
                    self._messages.append(Text.assemble((f"{at}  ", "dim"), one_line(data)))
                case _:
                    pass
            gone, self._messages = self._messages[:-MESSAGES], self._messages[-MESSAGES:]
            return gone

    def end(self, how: str) -> None:
        """The frame stands still from now on. how: "stopped", "failed"; what was said first counts."""
        with self._lock:
            if self._ended is None:
                self._ended, self._end = self._clock(), self._end or how

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n").join(self.lines(options.max_width, console.height))

    def lines(self, width: int, height: int = 50) -> list[Text]:
        """One frame. What a low terminal has no room for is left out of the middle; the last frame has everything."""
        with self._lock:
            top, middle, bottom = self._top(width), self._middle(width), self._bottom()
        room = height - len(top) - len(bottom)
        if self._ended is None and room < len(middle):
            middle = [line for line in middle if line.plain][: max(0, room)]
        return [self._fitted(line, width) for line in (*top, *middle, *bottom)]

    def _fitted(self, line: Text, width: int) -> Text:
        line.no_wrap = True
        if line.cell_len > width:
            line.truncate(max(0, width - len(self._glyphs.cut)))
            line.append(self._glyphs.cut)
        return line

    # --- how far ----------------------------------------------------------------------------------------------

    def _top(self, width: int) -> list[Text]:
        now = self._clock() if self._ended is None else self._ended
        times = f"{_duration(now - self._started)} elapsed"
        if self._ended is None and self._version < self._run.steps:
            times += f", {self._left(now)} left"
        room = width - len(times) - 2
        title = self._fitted(Text(self._name + "  " if self._name else "", "bold"), room)
        title.append(_tail(self._path, room - title.cell_len, self._glyphs.cut), "dim")
        title.append(" " * (width - title.cell_len - len(times)) + times)
        filled = min(width, round(self._version / self._run.steps * width))
        return [
            title,
            Text(self._stage(), "bold green" if self._end == "complete" else "bold"),
            Text.assemble((self._glyphs.done * filled, "green"), (self._glyphs.left * (width - filled), "dim")),
        ]

    @property
    def _version(self) -> int:
        """Steps that are done."""
        return self._rows[-1]["version"] if self._rows else 0

    def _stage(self) -> str:
        if self._ended is not None:
            return f"{self._end}: {self._version} of {self._run.steps} steps"
        return "loading the model" if self._pulse is None else stage_words(self._pulse, self._run)

    def _left(self, now: float) -> str:
        """The time to the last step, by the pace of late."""
        if not self._rows:
            return UNKNOWN
        recent = self._rows[-PACE_STEPS - 1 :]
        begin = recent[0]["wall_s"] if len(recent) > PACE_STEPS else 0.0
        pace = (recent[-1]["wall_s"] - begin) / min(PACE_STEPS, len(recent))
        return f"about {_duration((self._run.steps - self._version) * pace - min(pace, now - self._stepped))}"

    # --- how good, how fast, how stale ------------------------------------------------------------------------

    def _middle(self, width: int) -> list[Text]:
        return [Text(), *self._measures(width), Text(), *self._roles_and_lags(width), Text(), self._counts(width)]

    def _measures(self, width: int) -> list[Text]:
        row = self._rows[-1] if self._rows else {}
        lines = [self._measure("reward", "reward", width, "green")]
        if not row or "train_exact" in row:
            lines.append(self._measure("exact match", "train_exact", width, "cyan", UNIT))
        if self._run.evaluation.tasks or self._evaluations:
            lines.append(self._heldout(width))
        optional = (("entropy", "entropy"), ("KL to reference", "kl_k3"))
        return lines + [self._measure(label, name, width, "yellow") for label, name in optional if name in row]

    def _measure(self, label: str, name: str, width: int, style: str, bounds: Bounds | None = None) -> Text:
        values = [row[name] for row in self._rows if name in row]
        line = _change(label, _mean(values[:EDGE_STEPS]), _mean(values[-EDGE_STEPS:]))
        return line.append(sparkline(values, width - line.cell_len, self._glyphs.levels, bounds), style)

    def _heldout(self, width: int) -> Text:
        if not self._evaluations:
            return _change("held-out", None, None)
        last, exact = self._evaluations[-1], any("exact" in one["metrics"] for one in self._evaluations)
        scores = [one["metrics"].get("exact", math.nan) if exact else one["reward"] for one in self._evaluations]
        before = [score for one, score in zip(self._evaluations, scores, strict=True) if one["version"] == 0]
        now = scores[-1] if last["version"] > 0 else None
        line = _change("held-out exact" if exact else "held-out reward", before[-1] if before else None, now)
        note = f"  step {last['version']}"
        note += f", {last['tasks']} tasks" if width >= MEDIUM else ""
        note += f", {last['failed']} failed" if last["failed"] else ""
        room = width - line.cell_len - len(note)
        line.append(sparkline(scores, room, self._glyphs.levels, UNIT if exact else None), "magenta")
        return line.append(note, "dim")

    def _roles_and_lags(self, width: int) -> list[Text]:
        """Side by side: what each role does with its time, and how old the tokens are."""
        column = (WIDE_ROLE_WIDTH if width >= WIDE else ROLE_WIDTH) + 2
        left = [Text("who waits for what", "dim"), *self._role("generator", width), *self._role("learner", width)]
        right = [Text("lag of tokens" if width < MEDIUM else f"lag of tokens, last {RECENT_STEPS} steps", "dim")]
        right += self._lags(width - column, width)
        pairs = itertools.zip_longest(left, right, fillvalue=Text())
        return [Text.assemble(one, " " * (column - one.cell_len), other) for one, other in pairs]

    def _role(self, role: str, width: int) -> list[Text]:
        """Its busy share and rate, then the causes of most of its idle time."""
        row = self._rows[-1] if self._rows else {}
        busy, rate = row.get("busy", {}).get(role), row.get("tokens_per_s", {}).get(role)
        line = Text(f"{role:<11}")
        if width >= WIDE:
            drawn = bar(busy or 0.0, BUSY_BAR, self._glyphs.eighths)
            line.append(drawn, "green").append(self._glyphs.track * (BUSY_BAR - len(drawn)), "dim").append(" ")
        line.append(f"{_percent(busy):>5} busy", "bold").append(f"{_thousands(rate):>9} tokens/s")
        idle = row.get("idle", {}).get(role, {})
        causes = sorted(idle, key=lambda cause: -idle[cause])[:CAUSES_SHOWN]
        found = [Text(f"{_percent(idle[cause]):>6}  {cause_words(cause)}") for cause in causes]
        return [line, *found, *[Text()] * (CAUSES_SHOWN - len(found))]

    def _lags(self, room: int, width: int) -> list[Text]:
        """A bar for each lag up to the bound, and one for the tokens over it, which are masked."""
        bound = self._run.staleness.max_staleness
        tokens = Counter[int]()
        for row in self._rows[-RECENT_STEPS:]:
            tokens.update({int(lag): count for lag, count in row["lag"].get("tokens", {}).items()})
        size = math.ceil((bound + 1) / LAG_ROWS)
        ranges = [range(lag, min(lag + size, bound + 1)) for lag in range(0, bound + 1, size)]
        counts = [(_range(lags), sum(tokens[lag] for lag in lags)) for lags in ranges]
        counts.append((f">{bound}", sum(count for lag, count in tokens.items() if lag > bound)))
        labels, word = max(len(label) for label, _ in counts), " masked" if width >= MEDIUM else ""
        cells = min(MAX_BAR, max(1, room - labels - 8 - len(word)))
        found: list[Text] = []
        for label, count in counts:
            share = count / tokens.total() if tokens else None
            over = label == counts[-1][0]
            style = "bold red" if over and count else "blue" if count else "dim"
            drawn = bar(share or 0.0, cells, self._glyphs.eighths)
            line = Text(f"{label:>{labels}} ", "" if count else "dim").append(f"{drawn:<{cells}}", style)
            found.append(line.append(f" {_percent(share):>6}{word if over else ''}", style if over else ""))
        return found

    def _counts(self, width: int) -> Text:
        row = self._rows[-1] if self._rows else {}
        now, ess = self._pulse or row, row.get("ess_frac")
        line = Text("ESS " if width < MEDIUM else "effective sample size ")
        line.append(_percent(ess), "bold yellow" if ess is not None and ess < ESS_LOW else "bold")
        line.append(f"   rollouts: {now.get('ready', UNKNOWN)} ready, {now.get('running', UNKNOWN)} running")
        return line

    # --- what else --------------------------------------------------------------------------------------------

    def _bottom(self) -> list[Text]:
        hint = {"": "Ctrl-C stops, the same command continues", "stopped": "the same command continues"}.get(self._end)
        if self._url and not self._end:
            hint = f"{hint}   {self._url}"
        return [*([Text(hint, "dim")] if hint else []), *(message.copy() for message in self._messages)]


def sparkline(values: Sequence[float], width: int, levels: str, bounds: Bounds | None = None) -> str:
    """One character a value; means of neighbours where there are more values than `width`.

    Args:
        bounds: values of the lowest and the highest level; default: those of the values.

    >>> sparkline([0.0, 1.0, 2.0, 3.0], 8, "_-=#")
    '_-=#'
    >>> sparkline([0.0, 1.0, 2.0, 3.0], 2, "_-=#", (0.0, 3.0))
    '_#'
    """
    values = [value for value in values if math.isfinite(value)]
    if not values or width < 1:
        return ""
    if len(values) > width:
        edges = [i * len(values) // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = bounds or (min(values), max(values))
    top = len(levels) - 1
    steps = [(value - low) / (high - low) * len(levels) if high > low else 0.0 for value in values]
    return "".join(levels[min(top, max(0, int(step)))] for step in steps)


def bar(share: float, width: int, eighths: str) -> str:
    """`share` of `width` cells; never nothing for something.

    >>> bar(0.5, 4, "▏▎▍▌▋▊▉█"), bar(0.0, 4, "#"), bar(0.001, 4, "#")
    ('██', '', '#')
    """
    parts = round(min(1.0, share) * width * len(eighths)) or math.ceil(min(1.0, share))
    full, rest = divmod(parts, len(eighths))
    return eighths[-1] * full + (eighths[rest - 1] if rest else "")


def _change(label: str, first: float | None, now: float | None) -> Text:
    line = Text(f"{label:<{LABEL_WIDTH}} {_figure(first):>7} -> ")
    return line.append(f"{_figure(now):>7}", "bold").append("  ")


def _figure(value: float | None) -> str:
    """At most 7 characters."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    size = abs(value)
    if size >= 1e6 or 0 < size < 0.0005:
        return f"{value:.0e}"
    return f"{value:.{3 if size < 10 else 1 if size < 1000 else 0}f}"


def _percent(share: float | None) -> str:
    if share is None:
        return UNKNOWN
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{100 * share:.{1 if 0 < share < 0.01 else 0}f} %"


def _thousands(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            return f"{value / size:.{1 if value < 99.95 * size else 0}f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    """5 -> 0:05, 3725 -> 1:02:05"""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _range(lags: range) -> str:
    return str(lags[0]) if len(lags) == 1 else f"{lags[0]}-{lags[-1]}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _short_path(path: Path) -> str:
    """As someone who stands here would write it."""
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _tail(text: str, width: int, cut: str) -> str:
    if cell_len(text) <= width:
        return text
    while text and cell_len(cut + text) > width:
        text = text[1:]
    return cut + text if text else ""
