"""Pure: how many tokens of each version are admitted and not composed yet, so that masking is known before it happens.

A token is *doomed* at the moment step v is composed without its rollout, if it was sampled by version v - eta:
whichever later step trains it, its lag will be above eta. Every masked token is doomed exactly once, long before its
rollout ends; so a budget of doomed tokens is one of masked tokens, "now or later", and no length has to be predicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

Rollout: TypeAlias = tuple[int, int]
"""(group, member)"""


@dataclass(slots=True)
class Entry:
    """One rollout."""

    tokens: dict[int, int] = field(default_factory=dict[int, int])
    """version -> tokens sampled by it"""
    total: int = 0
    decoding: bool = True


class TokenAccount:
    """Fed with what generators report; between two reports it may lag behind by what was sampled meanwhile."""

    def __init__(self, max_staleness: int) -> None:
        self._eta = max_staleness
        self._rollouts: dict[Rollout, Entry] = {}
        self._tokens = {True: Counter[int](), False: Counter[int]()}
        """Decoding or ended -> version -> tokens, above the horizon."""
        self._horizon = -1
        """Tokens of this version and older are doomed unless composed already."""
        self._late = 0
        """Doomed tokens that were reported after their version's horizon had passed."""

    def admitted(self, rollout: Rollout, tokens: Mapping[int, int] | None = None) -> None:
        """It begins, or begins again with what is left of it: `tokens` by version."""
        self.left([rollout])
        entry = self._rollouts[rollout] = Entry()
        for version, count in (tokens or {}).items():
            self._add(entry, version, count)

    def sampled(self, rollout: Rollout, total: int, version: int) -> None:
        """It has `total` tokens; those since the last report were sampled by `version`."""
        entry = self._rollouts.get(rollout)
        if entry is not None and entry.decoding and total > entry.total:
            self._add(entry, version, total - entry.total)

    def ended(self, rollout: Rollout, tokens: Mapping[int, int]) -> None:
        """It is scored, and these are its tokens by version, exactly."""
        entry = self._rollouts.get(rollout)
        if entry is None:
            return
        for version, count in list(entry.tokens.items()):
            self._add(entry, version, -count)
        entry.decoding = False
        for version, count in tokens.items():
            self._add(entry, version, count)

    def left(self, rollouts: Iterable[Rollout]) -> None:
        """They are composed, or ended without being trained on."""
        for rollout in rollouts:
            entry = self._rollouts.pop(rollout, None)
            if entry is None:
                continue
            counter = self._tokens[entry.decoding]
            for version, count in entry.tokens.items():
                if version > self._horizon:
                    counter[version] -= count

    def composed(self, step: int) -> int:
        """Step `step` was composed, and its rollouts have left. Returns the tokens that this dooms."""
        horizon = step - self._eta
        doomed, self._late = self._late, 0
        for counter in self._tokens.values():
            for version in [version for version in counter if version <= horizon]:
                doomed += counter.pop(version)
        self._horizon = max(self._horizon, horizon)
        return doomed

    def pressure(self, step: int) -> int:
        """Tokens of decoding rollouts that composing `step` now would doom."""
        horizon = step - self._eta
        return sum(count for version, count in self._tokens[True].items() if version <= horizon)

    def total(self, rollout: Rollout) -> int:
        """Tokens it has sampled, as far as reported."""
        entry = self._rollouts.get(rollout)
        return entry.total if entry is not None else 0

    def oldest(self, rollout: Rollout) -> int | None:
        """The oldest version that sampled any of its tokens, as far as reported; None: none is known."""
        entry = self._rollouts.get(rollout)
        return min(entry.tokens) if entry is not None and entry.tokens else None

    def older(self, rollout: Rollout, version: int) -> int:
        """Its tokens that are older than `version`."""
        entry = self._rollouts.get(rollout)
        return 0 if entry is None else sum(count for sampled, count in entry.tokens.items() if sampled < version)

    def longest_decoding(self, version: int) -> list[Rollout]:
        """Decoding rollouts with a token of `version` or older; most tokens first, as far as reported."""
        old = [
            (-entry.total, rollout)
            for rollout, entry in self._rollouts.items()
            if entry.decoding and entry.tokens and min(entry.tokens) <= version
        ]
        return [rollout for _, rollout in sorted(old)]

    def older_than(self, version: int) -> list[Rollout]:
        """Rollouts with a token older than `version`."""
        return [rollout for rollout in self._rollouts if self.older(rollout, version)]

    def _add(self, entry: Entry, version: int, count: int) -> None:
        entry.tokens[version] = entry.tokens.get(version, 0) + count
        entry.total += count
        if version > self._horizon:
            self._tokens[entry.decoding][version] += count
        else:
            self._late += count
