"""Ratios from rounds: settled ones count, two prove nothing, and drift is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fp8lab.analysis.rounds import Occasion, SpeedRatio, apart, settled_count, side

RATIOS = st.lists(st.floats(0.5, 2.0), min_size=1, max_size=12).map(tuple)


def test_the_first_rounds_of_a_gpu_that_slows_down_do_not_count() -> None:
    # FP8 began at a clock that it could not keep; the median of all rounds was 1.445, their largest 1.537.
    occasion = Occasion((1.512, 1.537, 1.445, 1.438, 1.421))
    assert occasion.settled == (1.445, 1.438, 1.421)
    assert occasion.value == pytest.approx((1.445 * 1.438 * 1.421) ** (1 / 3))
    assert occasion.interval is not None
    low, high = occasion.interval
    assert low < 1.42
    assert high < 1.47
    assert occasion.is_drifting
    assert occasion.drift == pytest.approx(-0.060, abs=0.001)


@given(RATIOS)
def test_the_estimate_lies_in_its_interval_which_holds_the_last_round_of_a_drifting_occasion(
    ratios: tuple[float, ...],
) -> None:
    occasion = Occasion(ratios)
    assert len(occasion.settled) == min(len(ratios), settled_count(len(ratios)))
    if occasion.interval is None:
        assert len(ratios) < 3
        return
    low, high = occasion.interval
    assert low - 1e-9 <= occasion.value <= high + 1e-9
    if occasion.is_drifting:
        assert low <= ratios[-1] <= high


def test_the_interval_is_students_on_logarithms() -> None:
    logs = [0.10, 0.11, 0.105]
    interval = Occasion(tuple(map(math.exp, logs))).interval
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert interval == pytest.approx(tuple(np.exp([expected.low, expected.high])))


def test_an_occasion_that_is_left_out_drifts_for_no_other() -> None:
    steady, short = Occasion((1.5,) * 6), Occasion((1.6, 1.5))
    assert SpeedRatio((steady, short)).furthest == steady
    assert SpeedRatio((short,)).furthest == short


def test_two_rounds_decide_nothing_and_equal_speeds_seldom_win() -> None:
    assert Occasion((1.2, 1.21)).interval is None
    rng = np.random.default_rng(2)
    wins = 0
    for _ in range(2000):
        interval = Occasion(tuple(np.exp(rng.normal(0, 0.01, 6)))).interval
        assert interval is not None
        wins += side(*interval) == "above"
    assert wins / 2000 == pytest.approx(0.025, abs=0.01)


def test_occasions_are_taken_together_and_their_interval_spans_them() -> None:
    first, second, short = Occasion((1.2, 1.21, 1.2)), Occasion((1.3, 1.31, 1.32)), Occasion((9.0, 9.0))
    both = SpeedRatio((first, second))
    assert both.value == pytest.approx(math.sqrt(first.value * second.value))
    assert first.interval is not None
    assert second.interval is not None
    assert both.interval == (first.interval[0], second.interval[1])
    # An occasion with too few rounds counts where there is no other, and confirms none.
    assert SpeedRatio((first, short)).value == pytest.approx(first.value)
    assert SpeedRatio((first, short)).conclusive == [first]
    assert SpeedRatio((short,)).value == pytest.approx(9.0)
    assert SpeedRatio((short,)).interval is None
    assert SpeedRatio((first, second)).furthest == second


def test_an_interval_lies_on_one_side_or_decides_nothing() -> None:
    assert [side(1.1, 1.2), side(0.8, 0.9), side(0.9, 1.1)] == ["above", "below", "undecided"]
    assert side(math.nan, math.nan) == "undecided"
    assert side(1.3, 1.5, of=1.4) == "undecided"


def at(hour: int) -> str:
    return f"2026-11-27T{hour:02}:00:00+00:00"


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)).map(sorted), max_size=6))
def test_times_that_overlap_are_one(hours: list[list[int]]) -> None:
    covered = {2 * begin + step for begin, end in hours for step in range(2 * (end - begin) + 1)}
    groups = sum(half_hour - 1 not in covered for half_hour in covered)
    assert apart((at(begin), at(end)) for begin, end in hours) == groups
