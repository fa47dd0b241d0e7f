"""A cohort is followed to its end, and what is missing in what was trained on shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.telemetry.lengths import CohortReport, LengthCohorts

GROUPS, SIZE = 4, 3

lengths_GM = st.lists(st.lists(st.integers(1, 60), min_size=SIZE, max_size=SIZE), min_size=GROUPS, max_size=GROUPS)


def follow(
    lengths: Sequence[Sequence[int]],
    *,
    drop: Callable[[int], bool] = lambda tokens: False,
    masked: Callable[[int], int] = lambda tokens: 0,
    first: int = 0,
    first_group: int = 0,
) -> list[CohortReport]:
    """Groups from `first` on, one after the other; `drop` and `masked` by length."""
    cohorts = LengthCohorts(GROUPS, SIZE, first_group)
    reports: list[CohortReport | None] = []
    for group_id, group in enumerate(lengths, start=first):
        for member, tokens in enumerate(group):
            cohorts.scored(group_id, member, tokens)
            if drop(tokens):
                reports.append(cohorts.ended(group_id, [member], "cancelled"))
            else:
                cohorts.composed(group_id, member, masked(tokens))
                reports.append(cohorts.ended(group_id, [member], "trained"))
    return [report for report in reports if report is not None]


@given(lengths_GM)
def test_all_of_it_trained_is_exactly_without_bias(lengths: list[list[int]]) -> None:
    (report,) = follow(lengths)
    assert report.ratio == report.weighted_ratio == 1.0 and report.ks == 0.0 and not report.biased
    assert report.submitted == report.trained == GROUPS * SIZE
    assert set(report.masked_by_decile) == {0.0} and report.fully_masked == 0


def test_dropping_the_long_ones_is_seen() -> None:
    lengths = [[10, 20, 30]] * 3 + [[10, 20, 300]]
    (report,) = follow(lengths, drop=lambda tokens: tokens > 100)
    assert report.submitted == 12 and report.trained == 11
    assert report.ratio == pytest.approx((210 / 11) / (510 / 12)) and report.biased
    assert report.ks == pytest.approx(1 / 12), "one of twelve is missing at the long end"


def test_dropping_the_short_ones_is_seen_too() -> None:
    (report,) = follow([[10, 20, 90]] * 4, drop=lambda tokens: tokens == 10)
    assert report.ratio == pytest.approx(55 / 40) and report.biased


def test_withdrawing_long_ones_before_their_end_is_seen() -> None:
    """Their length is not known, but it is not less than what they had."""
    cohorts = LengthCohorts(2, 2)
    for group_id in (0, 1):
        cohorts.scored(group_id, 0, 10)
        cohorts.composed(group_id, 0, 0)
        assert cohorts.ended(group_id, [0], "trained") is None
    cohorts.withdrawn(0, 1, 90)
    cohorts.withdrawn(1, 1, 0)  # it never began
    assert cohorts.ended(0, [1], "cancelled") is None
    report = cohorts.ended(1, [1], "cancelled")
    assert report is not None and (report.submitted, report.trained) == (3, 2)
    assert report.ratio == pytest.approx(10 / (110 / 3)) and report.biased


def test_a_withdrawn_rollout_that_had_ended_keeps_its_length() -> None:
    cohorts = LengthCohorts(1, 2)
    cohorts.scored(0, 0, 30)
    cohorts.scored(0, 1, 30)
    cohorts.withdrawn(0, 0, 12)
    assert cohorts.ended(0, [0], "cancelled") is None
    report = cohorts.ended(0, [1], "trained")
    assert report is not None and report.ratio == 1.0


def test_masking_long_ones_is_seen_and_shown_where() -> None:
    lengths = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 100]]
    (report,) = follow(lengths, masked=lambda tokens: 50 if tokens == 100 else 0)
    assert report.ratio == 1.0 and report.ks == 0.0
    assert report.weighted_ratio == pytest.approx(1 - 50 / 166) and report.biased
    assert report.masked_by_decile == [0.0] * 9 + [0.5]
    assert report.fully_masked == 0


def test_fully_masked_rollouts_are_counted() -> None:
    (report,) = follow([[10, 10, 10]] * 4, masked=lambda tokens: tokens)
    assert report.fully_masked == 12 and report.weighted_ratio == 0.0 and report.biased


@pytest.mark.parametrize(("masked", "biased"), [(4, False), (6, True)])
def test_five_per_cent_are_tolerated(masked: int, biased: bool) -> None:
    lengths = [[100, 100, 100]] * 4
    (report,) = follow(lengths, masked=lambda tokens: masked)
    assert report.weighted_ratio == pytest.approx(1 - masked / 100) and report.biased is biased


@given(lengths_GM, st.integers(1, 60))
def test_the_distance_of_distributions_is_that_of_the_definition(lengths: list[list[int]], cut: int) -> None:
    submitted = [tokens for group in lengths for tokens in group]
    trained = [tokens for tokens in submitted if tokens <= cut]
    reports = follow(lengths, drop=lambda tokens: tokens > cut)
    if not trained:
        assert reports == []
        return
    expected = max(
        abs(sum(x <= at for x in submitted) / len(submitted) - sum(x <= at for x in trained) / len(trained))
        for at in range(61)
    )
    assert reports[0].ks == pytest.approx(expected)
    assert reports[0].ratio == pytest.approx((sum(trained) / len(trained)) / (sum(submitted) / len(submitted)))


def test_filtered_groups_stand_apart() -> None:
    """They were chosen for their rewards: long ones among them are no bias of ours."""
    cohorts = LengthCohorts(2, 2)
    for member in range(2):
        cohorts.scored(0, member, 1000)
        cohorts.scored(1, member, 10)
        cohorts.composed(1, member, 0)
    assert cohorts.ended(0, [0, 1], "filtered") is None
    report = cohorts.ended(1, [0, 1], "trained")
    assert report is not None and report.submitted == report.trained == 2 and report.ratio == 1.0


def test_a_cohort_of_nothing_but_filtered_groups_says_nothing() -> None:
    cohorts = LengthCohorts(1, 2)
    cohorts.scored(0, 0, 10)
    cohorts.scored(0, 1, 10)
    assert cohorts.ended(0, [0, 1], "filtered") is None


def test_failed_members_end_a_cohort_without_a_length() -> None:
    cohorts = LengthCohorts(1, 3)
    for member in range(2):
        cohorts.scored(0, member, 10)
    assert cohorts.ended(0, [2], "failed") is None
    report = cohorts.ended(0, [0, 1], "trained")
    assert report is not None and report.submitted == report.trained == 2


def test_a_cohort_is_reported_when_its_last_rollout_ends() -> None:
    """Not before: what is still on its way is the long part. Others may end meanwhile."""
    cohorts = LengthCohorts(2, 1)
    for group_id in range(4):
        cohorts.scored(group_id, 0, 10 + group_id)
    assert cohorts.ended(0, [0], "trained") is None
    assert cohorts.ended(2, [0], "trained") is None
    second = cohorts.ended(3, [0], "trained")
    assert second is not None and second.cohort == 1
    first = cohorts.ended(1, [0], "trained")
    assert first is not None and first.cohort == 0


def test_a_cohort_that_is_not_followed_to_its_end_is_void() -> None:
    cohorts = LengthCohorts(2, 1)
    cohorts.scored(0, 0, 10)
    assert cohorts.ended(0, [0], "trained") is None
    assert cohorts.ended(1, [0], "cancelled", followed=False) is None, "the run is over before the rollout is"


@pytest.mark.parametrize(("first_group", "reported"), [(0, [0, 1, 2]), (1, [1, 2]), (4, [1, 2]), (5, [2]), (99, [])])
def test_groups_of_an_earlier_controller_are_left_out(first_group: int, reported: list[int]) -> None:
    """What it knew of them is gone, and with them their whole cohort."""
    found = follow([[10, 20, 30]] * (3 * GROUPS), first_group=first_group)
    assert [report.cohort for report in found] == reported


def test_a_report_is_plain_data() -> None:
    (report,) = follow([[10, 20, 30]] * GROUPS)
    row: dict[str, Any] = report.row()
    assert row["ratio"] == 1.0 and len(row["masked_by_decile"]) == 10 and row["cohort"] == 0
