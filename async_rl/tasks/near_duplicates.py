"""Pure: training problems that nearly repeat a held-out one. Kimi k1.5 (arXiv 2501.12599) removes them; how, it does
not say.

Two texts are near duplicates if they share a run of 13 words (as GPT-3's filter does, arXiv 2005.14165, Appendix C), or
if their sets of pieces of five characters have a Jaccard similarity of 0.8 or more. Case, punctuation and white space
are no difference.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from math import ceil

WORDS, CHARACTERS, SIMILAR = 13, 5, 0.8
_LATEX_SPACE = re.compile(r"\\[,;:! ]|\\q?quad(?![a-zA-Z])|[${}~]")
_NO_WORD = re.compile(r"[^\w+\-*/=<>^\\]+")


def normalise(text: str) -> str:
    r"""Lower case, words apart by one space. Signs of arithmetic stay: they are what a problem is about.

    >>> normalise("What is  $3\\,+\\,4$?  Think!"), normalise("what is 3 - 4")
    ('what is 3 + 4 think', 'what is 3 - 4')
    """
    return _NO_WORD.sub(" ", _LATEX_SPACE.sub(" ", text.lower())).strip()


class HeldOut:
    """Texts that others are compared with."""

    def __init__(self, texts: Iterable[str]) -> None:
        normal = [normalise(text) for text in texts]
        self._runs = set(chain.from_iterable(map(_runs, normal)))
        self._pieces = [_pieces(text) for text in normal]
        self._frequency = Counter(chain.from_iterable(self._pieces))
        self._by_rare_piece: dict[str, list[int]] = {}
        for number, pieces in enumerate(self._pieces):
            for piece in self._rarest(pieces):
                self._by_rare_piece.setdefault(piece, []).append(number)

    def near(self, text: str) -> bool:
        normal = normalise(text)
        if not self._runs.isdisjoint(_runs(normal)):
            return True
        pieces = _pieces(normal)
        candidates = set(chain.from_iterable(self._by_rare_piece.get(piece, ()) for piece in self._rarest(pieces)))
        return any(_similar(pieces, self._pieces[candidate]) for candidate in candidates)

    def _rarest(self, pieces: frozenset[str]) -> list[str]:
        """So many that two similar texts have one of them in common: without, either would lack more pieces of the
        other than the similarity allows (prefix filtering, Chaudhuri et al., ICDE 2006)."""
        ordered = sorted(pieces, key=lambda piece: (self._frequency.get(piece, 0), piece))
        return ordered[: len(pieces) - ceil(SIMILAR * len(pieces)) + 1]


def _runs(text: str) -> Iterable[str]:
    words = text.split(" ")
    return (" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))


def _pieces(text: str) -> frozenset[str]:
    """A text shorter than a piece is one."""
    return frozenset(text[i : i + CHARACTERS] for i in range(max(1, len(text) - CHARACTERS + 1)))


def _similar(one: frozenset[str], other: frozenset[str]) -> bool:
    shared = len(one & other)
    return shared >= SIMILAR * (len(one) + len(other) - shared)
