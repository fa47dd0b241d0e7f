"""Pure: texts that end a reply. The engine knows stop tokens only, so what it samples is looked at piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from async_rl.rollout.conversations import Text

LOOK_EVERY_TOKENS = 16
"""So many tokens at most are sampled in vain beyond a stop."""


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Up to the first of these texts; all of it if none occurs.

    >>> before_stop("Think.\\nObservation: 3", ["\\nObservation:"])
    'Think.'
    """
    found = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(found)] if found else text


def tokens_to_stop(text: Text, tokens: Sequence[int], stop: Sequence[str]) -> int | None:
    """After how many tokens one of the texts is there whole; None: it is not."""

    def stopped(count: int) -> bool:
        decoded = text.decode(tokens[:count])
        return any(one in decoded for one in stop)

    if not stop or not stopped(len(tokens)):
        return None
    low, high = 0, len(tokens)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if stopped(middle) else (middle, high)
    return high
