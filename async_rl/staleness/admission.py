"""Pure: how many groups may be admitted now, and which version they need.

The capacity formula is AReaL's (arXiv 2505.24298, section 5.1), in groups and from the ledger alone. It bounds the
backlog, so that a group trained in order of admission is at most `steps_ahead` versions old; what stragglers and
overtaking add to that is bounded by the token guard (staleness.guard).
"""

from __future__ import annotations


def capacity(
    *,
    steps_ahead: int,
    version: int,
    groups_per_step: int,
    consumed: int,
    running: int,
    ready: int = 0,
    max_concurrent: int | None = None,
) -> int:
    """(min(eta, depth) + v + 1) * Q - (consumed + ready + running), in groups; 0 or less = none may be admitted.

    consumed: groups composed so far, trained or not. Groups that were cancelled, filtered or failed count nowhere, so
    their end returns the credit. max_concurrent: also no more than so many running; in a run, credit sees to that.

    >>> capacity(steps_ahead=2, version=0, groups_per_step=4, consumed=0, running=3)
    9
    """
    backlog = (steps_ahead + version + 1) * groups_per_step - (consumed + ready + running)
    return backlog if max_concurrent is None else min(max_concurrent - running, backlog)


def min_version(*, max_staleness: int, groups_per_step: int, position: int) -> int:
    """The oldest version whose tokens may still be trained on when the group at `position` has its turn.

    position: groups that are trained before this one if all are trained in order of admission. Its step is then
    position // Q, and a token sampled under an older version than step - eta would have no weight.
    """
    return max(0, position // groups_per_step - max_staleness)
