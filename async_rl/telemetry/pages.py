"""Pure: the pages of `async-rl inspect`, as plain data, and how each looks with colours (`plain`: without).

What a model, a task or a traceback says is data: it reaches a terminal without the characters that steer one.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from async_rl.telemetry.journal import EvalSummary
from async_rl.wire.messages import Task

SHOWN_REASONS = 5
SHOWN_EVALUATIONS = 12
SHOWN_TASK_CHARACTERS = 400
COLOURS = (
    *("cyan", "magenta", "yellow", "green", "blue"),
    *("bright_cyan", "bright_magenta", "bright_yellow", "bright_green", "bright_blue"),
)
"""Of versions, oldest first. The terminal decides which shades they are, so that they can be read on its background."""
BOLD, HELD, MASKED, ALARM = "bold", "dim", "reverse", "red"
KEEPING = 'controller.keep_rollouts = "sample" keeps those of one group a step, "all" those of every group'

_STEERING = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""C0 becomes its picture; C1, what reverses or ends a line and halves of characters become U+FFFD."""
_STEERING.update({0x7F: 0x2421, 0x2028: 0xFFFD, 0x2029: 0xFFFD})
for _codes in (range(0x80, 0xA0), range(0x202A, 0x202F), range(0x2066, 0x206A), range(0xD800, 0xE000)):
    _STEERING.update(dict.fromkeys(_codes, 0xFFFD))

Palette: TypeAlias = Mapping[int, str]
"""version -> colour"""
Drawing: TypeAlias = Iterator[RenderableType]


class Piece(msgspec.Struct, frozen=True):
    """Consecutive tokens of one origin. The pieces of a completion, joined, are its text."""

    text: str
    start: int
    end: int
    """Tokens [start, end) of the sequence."""
    version: int
    """-1: not sampled by the policy (tool output, the next turn of a conversation)."""
    kv_version: int
    lag: int | None
    """At the step that trained on it, or would now; None where there is no such step."""
    masked: bool
    """Over the staleness bound: weight 0."""


class SequenceText(msgspec.Struct, frozen=True):
    prompt: str
    prompt_tokens: int
    completion: list[Piece]
    """Everything after the prompt."""


class Rollout(msgspec.Struct, frozen=True):
    """A member of a group. Numbers are None until it is scored, and where it failed."""

    member: int
    state: str
    """A live state or a terminal event; `evaluated` in an evaluation."""
    reason: str = ""
    traceback: str = ""
    reward: float | None = None
    parts: dict[str, float] = {}
    metrics: dict[str, float] = {}
    finish_reason: str = ""
    tokens: int = 0
    """Sampled ones."""
    lag: tuple[int, int] | None = None
    """Of its newest and of its oldest token."""
    logprob_mean: float | None = None
    """Of the sampled tokens under the policy that sampled them, in nats."""
    logprob_min: float | None = None
    sequences: list[SequenceText] = []

    @property
    def pieces(self) -> list[Piece]:
        return [piece for sequence in self.sequences for piece in sequence.completion]

    def numbers(self) -> str:
        """Everything that is not text, in one line."""
        ended = f"{self.state} ({self.reason})" if self.reason else self.state
        if self.reward is None:
            return ended
        values = [f"{name} {value:g}" for name, value in {**self.parts, **self.metrics}.items()]
        values = [f"reward {self.reward:.3f}", *values, self.finish_reason, f"{self.tokens} tokens"]
        values += [f"lag {_extent(self.lag, 'd')}"] if self.lag is not None else []
        values += [f"log-prob mean {self.logprob_mean:.2f} min {self.logprob_min:.2f}"]
        return ", ".join(values if self.state == "evaluated" else [*values, ended])


class Readable(msgspec.Struct, frozen=True):
    """A group whose tokens are on disk."""

    group: int
    state: str
    step: int | None
    """None: no step holds it yet."""


class Overview(msgspec.Struct, frozen=True):
    path: str
    environment: str
    steps_done: int
    steps: int
    wall_s: float
    reward_first: float | None
    """Means over the first and over the last three steps."""
    reward_last: float | None
    evaluations: list[EvalSummary]
    rollouts: dict[str, int]
    """As `--check` counts them."""
    reasons: dict[str, dict[str, int]]
    """terminal event -> reason -> rollouts, as `alike` counts them"""
    lag: dict[str, float]
    max_staleness: int
    masked_fraction: float
    readable: list[Readable]
    samples: list[int]
    """Versions with an evaluation that can be read."""
    tracebacks: int

    def draw(self, plain: bool) -> Drawing:
        yield _line(f"{self.path}: {self.environment}, {self.steps_done} of {self.steps} steps", BOLD)
        if self.reward_first is not None and self.reward_last is not None:
            yield _line(f"reward {self.reward_first:.3f} -> {self.reward_last:.3f}, {self.wall_s:.1f} s")
            yield _line(
                f"lag of trained tokens: mean {self.lag['mean']:.2f}, oldest {self.lag['max']:g} of "
                f"{self.max_staleness} allowed; {self.masked_fraction:.1%} of the tokens masked"
            )
        if self.evaluations:
            yield Text()
            left_out = max(0, len(self.evaluations) - SHOWN_EVALUATIONS)
            yield _evaluations([self.evaluations[0], *self.evaluations[left_out + 1 :]])
            if left_out:
                yield _line(f"({left_out} more after the first)", HELD)
        yield Text()
        yield _line("rollouts: " + ", ".join(f"{name} {count}" for name, count in self.rollouts.items() if count))
        for event, reasons in self.reasons.items():
            yield from _reasons(event, reasons)
        yield from self._what_can_be_read()
        yield Text()
        for options, what in self._commands():
            yield Text.assemble((clean(f"async-rl inspect {shlex.quote(self.path)} {options:<16}"), BOLD), f"  {what}")

    def _what_can_be_read(self) -> Drawing:
        for state in dict.fromkeys(one.state for one in self.readable):
            groups = [one for one in self.readable if one.state == state]
            steps = [one.step for one in groups if one.step is not None]
            where = f"of steps {ranges(steps)}" if steps else f"in no step yet: {ranges(one.group for one in groups)}"
            yield _line(f"groups to read: {len(groups)} {state}, {where}")
        if not self.readable:
            yield _line(f"groups to read: none ({KEEPING})")

    def _commands(self) -> Iterator[tuple[str, str]]:
        """Options and what they show; only what there is."""
        in_steps = [(one.step, -one.group) for one in self.readable if one.step is not None]
        if in_steps:
            yield f"--step {max(in_steps)[0]}", "the groups of a step"
        if self.readable:
            group = -max(in_steps)[1] if in_steps else self.readable[0].group
            yield f"--group {group}", "prompt and completions, by sampling version"
        if self.samples:
            yield "--eval --worst 3", f"held-out tasks, of versions {ranges(self.samples)}"
        if self.tracebacks:
            yield "--failures", f"{self.tracebacks} tracebacks"
        yield "--check", "whether the promises held"


class GroupLine(msgspec.Struct, frozen=True):
    """A group of a step whose tokens are on disk."""

    group: int
    task: str
    """Its id; empty if its record is gone."""
    rewards: list[float]
    tokens: list[int]
    """Sampled ones, by member."""
    lag: tuple[int, int]
    """Of its newest and of its oldest token."""
    finish_reasons: dict[str, int]
    metrics: dict[str, float]
    """Means."""
    failed: int


class StepPage(msgspec.Struct, frozen=True):
    step: int
    """Also the version it starts from."""
    state: str
    weighted_tokens: int
    masked_tokens: int
    max_staleness: int
    groups: list[GroupLine]
    gone: list[int]
    """Groups of the step whose tokens are no longer there."""

    def draw(self, plain: bool) -> Drawing:
        tokens, groups = self.weighted_tokens + self.masked_tokens, len(self.groups) + len(self.gone)
        yield _line(f"step {self.step}, {self.state}: {groups} groups, {tokens} sampled tokens", BOLD)
        if self.masked_tokens:
            yield _line(f"{self.masked_tokens} of them are over the bound of {self.max_staleness}: weight 0", ALARM)
        yield Text()
        exact = ["exact"] if any("exact" in line.metrics for line in self.groups) else []
        table = _table("group", "reward", "min..max", *exact, "tokens", "lag", "ends", "task", left=("ends", "task"))
        for line in self.groups:
            ends = ", ".join(f"{reason} {count}" for reason, count in line.finish_reasons.items())
            ends += f", failed {line.failed}" if line.failed else ""
            cells = [str(line.group), f"{sum(line.rewards) / len(line.rewards):.3f}", _extent(line.rewards, ".3f")]
            cells += [f"{line.metrics.get(name, 0.0):.2f}" for name in exact]
            cells += [_extent(line.tokens, "d"), _extent(line.lag, "d"), ends, line.task]
            table.add_row(*(_line(cell) for cell in cells))
        yield table
        if self.gone:
            yield Text()
            yield _line(f"groups whose tokens are gone: {ranges(self.gone)} ({KEEPING})", HELD)


class GroupPage(msgspec.Struct, frozen=True):
    group: int
    step: int | None
    task: Task | None
    version: int
    """Lag counts from here: the version of its step, or the learner's of now."""
    max_staleness: int
    members: list[Rollout]

    def draw(self, plain: bool) -> Drawing:
        where = f"step {self.step}" if self.step is not None else f"no step yet, lag at version {self.version}"
        yield _line(f"group {self.group}, {where}", BOLD)
        if self.task is not None:
            yield _task(self.task.id, self.task.data)
        palette = None if plain else _palette(self.members)
        yield from _legend([piece for member in self.members for piece in member.pieces], palette, self.max_staleness)
        yield Text()
        yield from _rollouts([(f"member {member.member}", member) for member in self.members], palette)


class Sample(msgspec.Struct, frozen=True):
    task: str
    data: dict[str, Any]
    before: Rollout | None
    after: Rollout


class EvaluationPage(msgspec.Struct, frozen=True):
    version: int
    before: int | None
    """Version of the first evaluation, if that is another one."""
    summaries: list[EvalSummary]
    samples: list[Sample]
    kept: int
    """Samples there are to choose from."""

    def draw(self, plain: bool) -> Drawing:
        before = "" if self.before is None else f", and under version {self.before} before"
        yield _line(f"held-out tasks under version {self.version}{before}", BOLD)
        yield _evaluations(self.summaries)
        chosen = f"{len(self.samples)} of " if len(self.samples) < self.kept else ""
        yield _line(f"{chosen}{self.kept} tasks that were kept to be read:", HELD)
        for sample in self.samples:
            yield Text()
            yield _task(sample.task, sample.data)
            titled = [(f"version {self.before}", sample.before), (f"version {self.version}", sample.after)]
            shown = [(title, rollout) for title, rollout in titled if rollout is not None]
            yield from _rollouts(shown, None if plain else _palette([rollout for _, rollout in shown]))


class Failure(msgspec.Struct, frozen=True):
    group: int
    member: int
    reason: str
    traceback: str


class FailuresPage(msgspec.Struct, frozen=True):
    kept: int
    reasons: dict[str, int]
    """Of all that are kept, as `alike` counts them."""
    failures: list[Failure]
    """The last ones."""

    def draw(self, plain: bool) -> Drawing:
        if not self.kept:
            yield _line("no episode failed")
            return
        yield _line(f"{self.kept} tracebacks of failed episodes, the last {len(self.failures)} below", BOLD)
        yield from _reasons("failed", self.reasons)
        for failure in self.failures:
            yield Text()
            yield _line(f"group {failure.group} member {failure.member}: {failure.reason}", ALARM)
            yield _indented(_line(failure.traceback.rstrip()), plain)


class Problem(msgspec.Struct, frozen=True):
    number: int
    rate: float
    """Moving success rate."""
    rollouts: int
    task: dict[str, Any]
    """What its environment says now; empty where that cannot be loaded."""


class ProblemsPage(msgspec.Struct, frozen=True):
    """Of a run with a curriculum."""

    tried: int
    problems: list[Problem]
    """Those with the lowest success rates, hardest first."""

    def draw(self, plain: bool) -> Drawing:
        if not self.tried:
            yield _line("no problem was tried yet")
            return
        yield _line(f"{self.tried} problems were tried; the {len(self.problems)} hardest:", BOLD)
        table = _table("problem", "success", "rollouts", "task", left=("task",))
        for one in self.problems:
            task = _shown(one.task) if one.task else ""
            table.add_row(*map(_line, (str(one.number), f"{one.rate:.2f}", str(one.rollouts), task)))
        yield table


Page: TypeAlias = Overview | StepPage | GroupPage | EvaluationPage | FailuresPage | ProblemsPage


def clean(text: str) -> str:
    r"""Text without characters that steer a terminal; line feeds and tabs stay.

    >>> clean("\x1b[31mred\r")
    '␛[31mred␍'
    """
    return text.translate(_STEERING)


def alike(reasons: Iterable[str]) -> dict[str, int]:
    """How many there are of each first line, most frequent first; those that differ in numbers only are one.

    >>> alike(["request 7: too long", "no", "request 8: too long"])
    {'request 7: too long': 2, 'no': 1}
    """
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for reason in reasons:
        line = reason.strip().partition("\n")[0]
        counts[examples.setdefault(re.sub(r"\d+", "0", line), line)] += 1
    return dict(counts.most_common())


def ranges(numbers: Iterable[int]) -> str:
    """
    >>> ranges([4, 0, 1, 2])
    '0-2, 4'
    """
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        first = found.pop()[0] if found and number == found[-1][1] + 1 else number
        found.append((first, number))
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in found]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])


def _rollouts(titled: Sequence[tuple[str, Rollout]], palette: Palette | None) -> Drawing:
    """palette None: plain. A prompt that all share is shown once."""
    plain = palette is None
    prompts = {(one.prompt, one.prompt_tokens) for _, rollout in titled for one in rollout.sequences}
    if len(prompts) == 1:
        yield from _prompt(*next(iter(prompts)), plain)
    for title, rollout in titled:
        yield _line(f"{title}: {rollout.numbers()}", BOLD)
        for sequence in rollout.sequences:
            if len(prompts) > 1:
                yield from _prompt(sequence.prompt, sequence.prompt_tokens, plain)
            yield _indented(_completion(sequence.completion, palette), plain)
            yield _line("  " + ", ".join(_origin(piece) for piece in sequence.completion if piece.version >= 0), HELD)
        if rollout.traceback:
            yield _indented(_line(rollout.traceback.rstrip(), ALARM), plain)


def _prompt(prompt: str, tokens: int, plain: bool) -> Drawing:
    yield _line(f"prompt, {tokens} tokens:")
    yield _indented(_line(prompt, HELD), plain)


def _completion(pieces: Sequence[Piece], palette: Palette | None) -> Text:
    text, last = Text(), None
    for piece in pieces:
        if palette is None and (piece.version, piece.masked) != last:
            text.append(_mark(piece))
        text.append(clean(piece.text), _style(piece, palette))
        last = (piece.version, piece.masked)
    return text


def _legend(pieces: Sequence[Piece], palette: Palette | None, bound: int) -> Drawing:
    """Every version in its colour, with its lag and how many tokens it sampled."""
    tokens: Counter[int] = Counter()
    for piece in pieces:
        tokens[piece.version] += piece.end - piece.start
    for version, piece in sorted({piece.version: piece for piece in pieces}.items()):
        over = f", over the bound of {bound}: weight 0" if piece.masked else ""
        origin = f"v{version} lag {piece.lag}" if version >= 0 else "not sampled by the policy"
        yield Text("  ").append(f"{origin}, {tokens[version]} tokens{over}", _style(piece, palette))


def _palette(rollouts: Sequence[Rollout]) -> Palette:
    versions = {piece.version for rollout in rollouts for piece in rollout.pieces if piece.version >= 0}
    return {version: COLOURS[index % len(COLOURS)] for index, version in enumerate(sorted(versions))}


def _style(piece: Piece, palette: Palette | None) -> str:
    if palette is None:
        return ""
    if piece.version < 0:
        return HELD
    return f"{palette[piece.version]} {MASKED}" if piece.masked else palette[piece.version]


def _mark(piece: Piece) -> str:
    return "⟦given⟧" if piece.version < 0 else f"⟦v{piece.version}{' masked' if piece.masked else ''}⟧"


def _origin(piece: Piece) -> str:
    lag = "" if piece.lag is None else f" lag {piece.lag}"
    cache = "" if piece.kv_version == piece.version else f" (cache v{piece.kv_version})"
    return f"{piece.start}-{piece.end} v{piece.version}{lag}{' masked' if piece.masked else ''}{cache}"


def _task(id_: str, data: Mapping[str, Any]) -> Text:
    return _line(f"task {id_}  {_shown(data)}")


def _shown(data: Mapping[str, Any]) -> str:
    shown = json.dumps(msgspec.to_builtins(data), ensure_ascii=False)
    return shown if len(shown) <= SHOWN_TASK_CHARACTERS else shown[:SHOWN_TASK_CHARACTERS] + " [...]"


def _evaluations(summaries: Sequence[EvalSummary]) -> Table:
    metrics = sorted({name for one in summaries for name in one.metrics}, key=lambda name: (name != "exact", name))
    table = _table("version", "tasks", "failed", "reward", *metrics, "tokens")
    for one in summaries:
        values = [f"{one.metrics[name]:.3f}" if name in one.metrics else "" for name in metrics]
        cells = [str(one.version), str(one.tasks), str(one.failed), f"{one.reward:.3f}", *values, str(one.tokens)]
        table.add_row(*cells)
    return table


def _table(*names: str, left: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(_line(name), justify="left" if name in left else "right", overflow="fold")
    return table


def _line(text: str, style: str = "") -> Text:
    return Text(clean(text), style)


def _indented(text: Text, plain: bool) -> RenderableType:
    """Two columns to the right, folded lines too where there is a screen to fold at."""
    if not plain:
        return Padding(text, (0, 0, 0, 2))
    return Text("\n").join(Text("  ").append_text(line) for line in text.split("\n", allow_blank=True))


def _reasons(event: str, reasons: Mapping[str, int]) -> Drawing:
    for reason, count in list(reasons.items())[:SHOWN_REASONS]:
        yield _line(f"  {event} {count}: {reason}", ALARM if event == "failed" else "")
    if len(reasons) > SHOWN_REASONS:
        yield _line(f"  {event}: {len(reasons) - SHOWN_REASONS} more kinds of reasons", HELD)


def _extent(numbers: Sequence[float], form: str) -> str:
    low, high = format(min(numbers), form), format(max(numbers), form)
    return low if low == high else f"{low}..{high}"
