"""Speed at matched loss: published anchors, a simulated catch-up, and intervals that hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8lab.analysis.comparison import Gap
from fp8lab.analysis.laws import BESIROGLU
from fp8lab.analysis.matched import Estimate, Slope, affordable_gap, loss_matched, token_factor, token_factors
from fp8lab.analysis.slopes import law_slope
from fp8lab.config import MODELS, parameter_count

RATIOS = st.floats(0.5, 2.0)
SLOPES = st.floats(0.05, 1.0)
GAPS = st.floats(-0.05, 0.05)


@pytest.mark.parametrize(("name", "extra"), [("125M", 0.030), ("250M", 0.035), ("350M", 0.038), ("1.5B", 0.056)])
def test_a_quarter_of_a_percent_costs_what_the_published_law_says(name: str, extra: float) -> None:
    n = parameter_count(MODELS[name])
    gap = 0.0025 * float(BESIROGLU(n, 20 * n))
    assert token_factor(gap, law_slope(BESIROGLU, 20 * n)) - 1 == pytest.approx(extra, abs=0.001)


@given(SLOPES, GAPS)
def test_a_run_that_trains_on_by_the_factor_has_made_up_the_gap(slope: float, gap: float) -> None:
    tokens, loss = 1e9, 3.0

    def fp8_loss(d: float) -> float:
        return loss + gap - slope * math.log(d / tokens)

    assert fp8_loss(tokens * token_factor(gap, slope)) == pytest.approx(loss, abs=1e-9)


@given(RATIOS, SLOPES)
def test_a_gap_that_speed_just_pays_for_leaves_no_gain(ratio: float, slope: float) -> None:
    gap = Gap(affordable_gap(ratio, slope), None, 1)
    assert loss_matched(Estimate(ratio), gap, Slope(slope, "")).value == pytest.approx(1)


@given(RATIOS, GAPS, SLOPES)
def test_without_an_interval_of_all_three_there_is_none(ratio: float, gap: float, slope: float) -> None:
    timed, seeds = Estimate(ratio, (0.9 * ratio, 1.1 * ratio)), Gap(gap, (gap - 0.01, gap + 0.01), 3)
    known = Slope(slope, "", (0.8 * slope, 1.2 * slope))
    assert loss_matched(timed, seeds, known).interval is not None
    assert loss_matched(timed, Gap(gap, None, 1), known).interval is None
    assert loss_matched(Estimate(ratio), seeds, known).interval is None
    assert loss_matched(timed, seeds, Slope(slope, "")).interval is None
    # A slope that may be zero puts no bound on what a gap costs.
    assert loss_matched(timed, seeds, Slope(slope, "", (-0.1 * slope, 2.1 * slope))).interval is None


@given(GAPS, SLOPES, st.floats(0.001, 0.02), st.floats(0.01, 0.9))
def test_the_interval_of_the_tokens_is_where_gap_minus_log_tokens_times_slope_may_be_zero(
    gap: float, slope: float, half: float, share: float
) -> None:
    known = Slope(slope, "", (slope * (1 - share), slope * (1 + share)))
    tokens = token_factors(Gap(gap, (gap - half, gap + half), 3), known)
    assert tokens.interval is not None
    low, high = (math.log(end) for end in tokens.interval)
    for end in (low, high):
        assert (gap - end * slope) ** 2 == pytest.approx(half**2 + (end * slope * share) ** 2, rel=1e-6, abs=1e-12)
    assert low < gap / slope < high
    exact = token_factors(Gap(gap, (gap - half, gap + half), 3), Slope(slope, "", (slope, slope))).interval
    assert exact == pytest.approx((token_factor(gap - half, slope), token_factor(gap + half, slope)))


@given(RATIOS, GAPS, SLOPES, st.floats(0.001, 0.02), st.floats(0.01, 0.1))
def test_the_interval_grows_with_every_part(ratio: float, gap: float, slope: float, half: float, spread: float) -> None:
    exact, timed = (
        Estimate(ratio, (ratio, ratio)),
        Estimate(ratio, (ratio * math.exp(-spread), ratio * math.exp(spread))),
    )
    seeds = Gap(gap, (gap - half, gap + half), 3)
    sharp, known = Slope(slope, "", (slope, slope)), Slope(slope, "", (0.7 * slope, 1.3 * slope))
    ends = [
        loss_matched(*parts).interval for parts in ((exact, seeds, sharp), (timed, seeds, sharp), (timed, seeds, known))
    ]
    widths = [math.log(interval[1] / interval[0]) for interval in ends if interval is not None]
    assert widths[0] < widths[1] <= widths[2] + 1e-9
    assert widths[1] < 2 * (half / slope + spread) + 1e-9


@pytest.mark.parametrize("true_gap", [0.02, 0.0, -0.01])
def test_the_interval_covers_the_truth_as_often_as_those_it_is_made_of(true_gap: float) -> None:
    rng = np.random.default_rng(0)
    true_slope, true_ratio, gap_error, ratio_error, slope_error = 0.2, 1.3, 0.004, 0.015, 0.03
    truth = true_ratio * math.exp(-true_gap / true_slope)
    covered = 0
    for _ in range(2000):
        gap, log_ratio = rng.normal(true_gap, gap_error), rng.normal(math.log(true_ratio), ratio_error)
        nats = rng.normal(true_slope, slope_error)
        timed = Estimate(
            math.exp(log_ratio), (math.exp(log_ratio - 1.96 * ratio_error), math.exp(log_ratio + 1.96 * ratio_error))
        )
        seeds = Gap(gap, (gap - 1.96 * gap_error, gap + 1.96 * gap_error), 8)
        slope = Slope(nats, "", (nats - 1.96 * slope_error, nats + 1.96 * slope_error))
        low, high = loss_matched(timed, seeds, slope).interval or (0, 0)
        covered += low <= truth <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)
