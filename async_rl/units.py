"""Pure: numbers as a person reads them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes, as a person reads them.

    >>> size(3 << 29)
    '1.5 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
