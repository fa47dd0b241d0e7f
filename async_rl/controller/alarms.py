"""What a user should hear of while it happens: episodes that all fail, groups that are all filtered, length bias, an
engine that computes other log-probs than the learner."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from async_rl.config import Run
from async_rl.controller.mismatch_alarm import MismatchAlarm
from async_rl.errors import UserError
from async_rl.telemetry.journal import Row
from async_rl.telemetry.lengths import CohortReport

FILTERED_WARNING = 10
"""Say so when as many groups were filtered as this many steps hold, and none was trained on."""


class Alarms:
    """Counts and compares; `say` gets one line for the user."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._biased = False
        self._mismatch = MismatchAlarm(run, say)
        self.filtered_in_a_row = self.failed_in_a_row = 0
        """Groups that a filter took out since the last step; training episodes that failed since one did not."""
        self.lengths: Row | None = None
        """Of the newest complete cohort."""

    @property
    def mismatch_limit(self) -> float:
        """Nats that engine and learner may be apart on average under the same weights."""
        return self._mismatch.limits.mean

    def computes(self, role: str, name: str, dtype: str) -> None:
        """A process said in which dtype it computes log-probs."""
        self._mismatch.computes(role, name, dtype)

    @property
    def on(self) -> dict[str, bool]:
        """Those that there are, and whether the user has been told of them and they go on."""
        many = FILTERED_WARNING * self._run.rollout.groups_per_step
        return {
            "mismatch": self._mismatch.on,
            "length_bias": self._biased,
            "all_filtered": self.filtered_in_a_row >= many,
            "all_failed": self.failed_in_a_row >= max(1, self._run.failures_in_a_row // 2),
        }

    def composed(self) -> None:
        """A step has its rollouts."""
        self.filtered_in_a_row = 0

    def filtered(self) -> None:
        """A group is not trained on."""
        self.filtered_in_a_row += 1
        if self.filtered_in_a_row == FILTERED_WARNING * self._run.rollout.groups_per_step:
            self._say(f"{self.filtered_in_a_row} groups in a row had equal rewards and were filtered; no step since")

    def scored(self) -> None:
        """A training episode ended as it should."""
        self.failed_in_a_row = 0

    def failed(self, reason: str, details: str) -> None:
        """A training episode failed; `details` names the file with the tracebacks. Raises UserError when too many have
        in a row."""
        self.failed_in_a_row += 1
        if self.failed_in_a_row == self._run.failures_in_a_row:
            raise UserError(
                f"{self.failed_in_a_row} episodes in a row failed, the last one with: {reason.partition(chr(10))[0]} "
                f"(tracebacks are in {details}; environment.failures_in_a_row is the limit). The same command "
                "continues the run."
            )

    def trained(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done; what the learner says of it."""
        self._mismatch.step(step, metrics)

    def cohort(self, report: CohortReport) -> None:
        """Every rollout of a cohort has ended."""
        self.lengths = report.row()
        if report.biased and not self._biased:
            self._say(
                f"length bias in cohort {report.cohort} ({report.submitted} rollouts): what was trained on is "
                f"{report.ratio:.2f} times as long as what was submitted, with masked tokens left out "
                f"{report.weighted_ratio:.2f} times"
            )
        self._biased = report.biased
