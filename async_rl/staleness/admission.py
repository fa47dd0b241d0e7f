"""Pure: how many groups may be admitted now, and which version they need.

The capacity formula is AReaL's (arXiv 2505.24298, section 5.1), from the ledger alone. It bounds the backlog, so that a
group trained in order of admission is at most `steps_ahead` versions old; what stragglers and overtaking add to that is
bounded by the token guard (staleness.guard) and, in amount, by the budget (staleness.budget).
"""

from __future__ import annotations


def capacity(
    *,
    steps_ahead: int,
    version: int,
    per_step: int,
    consumed: int,
    running: int,
    ready: int = 0,
    max_concurrent: int | None = None,
) -> int:
    """(min(eta, depth) + v + 1) * Q - (consumed + ready + running); 0 or less = nothing may be admitted.

    All counts in one unit: groups, or slots of rollouts with per_step = Q * G. consumed: what steps have used so far,
    trained or not. What was cancelled or filtered without being used counts nowhere, so its end returns the credit.
    max_concurrent: also no more than so many running.

    >>> capacity(steps_ahead=2, version=0, per_step=4, consumed=0, running=3)
    9
    """
    backlog = (steps_ahead + version + 1) * per_step - (consumed + ready + running)
    return backlog if max_concurrent is None else min(max_concurrent - running, backlog)


def min_version(*, steps_ahead: int, groups_per_step: int, position: int) -> int:
    """The version a lease waits for at the generator, so that its tokens are at most `steps_ahead` old in their step.

    position: groups that are trained before this one if all are trained in order of admission; its step is then
    position // Q. Admission lets no group in whose version is not reached yet: the wait is for the weights to arrive.
    With steps_ahead = 0 this alone makes the run synchronous.
    """
    return max(0, position // groups_per_step - steps_ahead)
