"""Held-out tasks before and after training: tokens back to text, and what changed.

Chat templates say who speaks between special tokens, `<|im_start|>user\\n...<|im_end|>` or
`<|start_header_id|>user<|end_header_id|>\\n\\n...`: both become turns with a role.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from async_rl.config import Model
from async_rl.telemetry.journal import Row

HEAD, TAIL = 1500, 2500
"""Characters kept of a longer text: answers stand at the end."""
ALIKE = 0.25
"""Texts less alike than this are changed as a whole; scattered common words would say nothing."""

_ROLE = re.compile(r"\s*(system|developer|user|assistant|model|tool|ipython)[ \t]*(?:\n+|$)")

Passages: TypeAlias = list[tuple[str, bool]]
"""Text, and whether it differs from the other side."""


class Shown(msgspec.Struct, frozen=True):
    """What the policy of one version made of a task."""

    text: str
    reward: float
    metrics: Mapping[str, float]
    finish_reason: str


class Pair(msgspec.Struct, frozen=True):
    """One held-out task at the first and the last evaluated version."""

    task: str
    prompt: str
    before: Shown
    after: Shown

    @property
    def gain(self) -> float:
        return self.after.reward - self.before.reward

    @property
    def passages(self) -> tuple[Passages, Passages]:
        return compare(self.before.text, self.after.text)


class Transcriber:
    """Tokens to text as a person reads it. `tokenizer` is one of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(id_ for id_, token in added.items() if token.special)}
        self._decode: Callable[..., str] = tokenizer.decode

    def text(self, tokens: Sequence[int]) -> str:
        return self._decode([token for token in tokens if token not in self._special])

    def turns(self, tokens: Sequence[int]) -> list[tuple[str, str]]:
        """(role, text) of a chat; the role is "" where the template names none."""
        turns: list[tuple[str, str]] = []
        role = ""
        for piece in self._pieces(tokens):
            match = _ROLE.match(piece)
            if match is not None:
                role, piece = match[1], piece[match.end() :]
            if piece.strip():
                turns.append((role, piece.strip()))
                role = ""
        return turns

    def prompt(self, tokens: Sequence[int]) -> str:
        """What was asked, without markup; system messages are left out, for they are the same for every task."""
        turns = [turn for turn in self.turns(tokens) if turn[0] not in ("system", "developer")]
        if len(turns) == 1:
            return turns[0][1]
        return _marked(turns) or self.text(tokens).strip()

    def completion(self, sequences: Sequence[Mapping[str, Any]]) -> str:
        """What the policy said, with what it was told in between as `[role] ...`."""
        parts: list[str] = []
        for index, sequence in enumerate(sequences):
            if index:
                parts.append("\n\n" + _marked([("next prompt", self.prompt(self._prompt_of(sequence)))]) + "\n\n")
            end = len(self._prompt_of(sequence))
            for start, stop in _joined(sequence["spans"]):
                told = self.turns(sequence["tokens"][end:start])
                parts += ["\n\n", _marked(told), "\n\n"] if told else []
                parts.append(self.text(sequence["tokens"][start:stop]))
                end = stop
        return "".join(parts)

    def pair(self, before: Row, after: Row) -> Pair:
        first = after["sequences"][:1]
        prompt = self.prompt(self._prompt_of(first[0])) if first else ""
        return Pair(str(after["task"]["id"]), shorten(prompt), self._shown(before), self._shown(after))

    def _shown(self, row: Row) -> Shown:
        text = shorten(self.completion(row["sequences"]))
        return Shown(text, row["reward"], row["metrics"], row["finish_reason"])

    def _prompt_of(self, sequence: Mapping[str, Any]) -> Sequence[int]:
        return sequence["tokens"][: min((span[0] for span in sequence["spans"]), default=len(sequence["tokens"]))]

    def _pieces(self, tokens: Sequence[int]) -> Iterable[str]:
        """Stretches between special tokens."""
        start = 0
        for index, token in enumerate([*tokens, None]):
            if token is None or token in self._special:
                if index > start:
                    yield self._decode(list(tokens[start:index]))
                start = index + 1


def transcriber(model: Model) -> Transcriber:
    """Raises UserError where the model cannot be read any more."""
    from async_rl.models.loading import load_tokenizer  # torch: only once there are samples to read

    return Transcriber(load_tokenizer(model))


def before_and_after(rows: Sequence[Row]) -> tuple[int, int, list[tuple[Row, Row]]]:
    """The first and the last version, and the rows of the tasks that both have."""
    by_version: dict[int, dict[str, Row]] = {}
    for row in rows:  # a version evaluated again, after the learner went back to a checkpoint, replaces the first time
        by_version.setdefault(row["version"], {})[row["task"]["id"]] = row
    first, last = min(by_version), max(by_version)
    return (
        first,
        last,
        [(row, by_version[last][id_]) for id_, row in by_version[first].items() if id_ in by_version[last]],
    )


def compare(before: str, after: str) -> tuple[Passages, Passages]:
    """Both texts in passages that differ or do not; word by word, or by characters where there are no words.

    >>> compare("it is 3", "it is 4")
    ([('it is ', False), ('3', True)], [('it is ', False), ('4', True)])
    """
    words = r"\S+\s*|\s+" if " " in before.strip() + after.strip() else r"[\s\S]"
    left, right = re.findall(words, before), re.findall(words, after)
    matcher = difflib.SequenceMatcher(None, left, right)  # common items of long texts are skipped
    if matcher.ratio() < ALIKE:
        return [(before, True)] if before else [], [(after, True)] if after else []
    sides: tuple[Passages, Passages] = ([], [])
    for kind, start, stop, start_after, stop_after in matcher.get_opcodes():
        for side, part in zip(sides, (left[start:stop], right[start_after:stop_after]), strict=True):
            if part:
                side.append(("".join(part), kind != "equal"))
    return sides


def shorten(text: str) -> str:
    left_out = len(text) - HEAD - TAIL
    return text if left_out <= 0 else f"{text[:HEAD]}\n[... {left_out:,} characters ...]\n{text[-TAIL:]}"


def _joined(spans: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Sampled stretches: spans of different versions that touch are one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted((span[0], span[1]) for span in spans):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _marked(turns: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"[{role or 'text'}] {text}" for role, text in turns)
