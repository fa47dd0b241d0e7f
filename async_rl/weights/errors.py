"""Why weights did not arrive. Whatever is raised, the weights that were live before stay live.

WeightsError
├── WeightsGone         a newer set has taken their place: wait for its announcement
├── WeightsCorrupt      bytes differ from what the checksum says, or the header is none
├── WeightsMismatch     the header names other weights, or another model, than expected
├── GroupIncomplete     members of a weight group did not come in time
├── GroupSuperseded     the group was given up because a newer one is being formed
└── BroadcastFailed     a member died or hung in the middle of a transfer: a new group is needed
"""

from __future__ import annotations

from collections.abc import Sequence

from async_rl.errors import AsyncRLError


class WeightsError(AsyncRLError):
    """Base: a transfer of weights failed."""


class WeightsGone(WeightsError):
    """They were replaced before they were fetched."""


class WeightsCorrupt(WeightsError):
    """What arrived is not what was sent."""


class WeightsMismatch(WeightsError):
    """What arrived is something else than what was announced, or for another model."""


class GroupIncomplete(WeightsError):
    """Not every member came to the new group within the deadline."""

    def __init__(self, message: str, missing: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.missing = list(missing)
        """Names of those who did not come; empty where that cannot be told."""


class GroupSuperseded(WeightsError):
    """A newer group takes the place of this one."""


class BroadcastFailed(WeightsError):
    """A transfer broke off; the group cannot be used any more."""
