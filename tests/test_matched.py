"""Speed at matched loss: published anchors, a simulated catch-up, and intervals that hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8lab.comparison import Gap
from fp8lab.config import MODELS, parameter_count
from fp8lab.errors import UserError
from fp8lab.matched import Estimate, affordable_gap, law_slope, loss_matched, measured_slope, token_factor
from fp8lab.scaling import BESIROGLU

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


@given(st.floats(0.02, 0.5), st.floats(0.5, 30.0))
def test_the_slope_of_three_budgets_is_that_of_their_law(exponent: float, scale: float) -> None:
    budgets = [2.5e8, 5e8, 1e9]
    losses = [2 + scale * d**-exponent for d in budgets]
    true = exponent * scale * budgets[-1] ** -exponent
    # Runs of one budget count by their mean, in whatever order they come.
    tokens, noisy = [*budgets, budgets[0]], [losses[0] + 0.01, *losses[1:], losses[0] - 0.01]
    assert measured_slope(tokens, noisy) == pytest.approx(true, rel=0.06)
    assert measured_slope(tokens[::-1], noisy[::-1]) == pytest.approx(measured_slope(tokens, noisy))


def test_one_budget_has_no_slope() -> None:
    with pytest.raises(UserError, match="different numbers of tokens"):
        measured_slope([1e9, 1e9], [3.0, 3.01])


@given(RATIOS, SLOPES)
def test_a_gap_that_speed_just_pays_for_leaves_no_gain(ratio: float, slope: float) -> None:
    gap = Gap(affordable_gap(ratio, slope), None, 1)
    assert loss_matched(Estimate(ratio), gap, slope).value == pytest.approx(1)


@given(RATIOS, GAPS, SLOPES)
def test_without_an_interval_of_both_there_is_none(ratio: float, gap: float, slope: float) -> None:
    known = Estimate(ratio, (0.9 * ratio, 1.1 * ratio))
    assert loss_matched(known, Gap(gap, None, 1), slope).interval is None
    assert loss_matched(Estimate(ratio), Gap(gap, (gap - 0.01, gap + 0.01), 3), slope).interval is None


@given(RATIOS, GAPS, SLOPES, st.floats(0.001, 0.02), st.floats(0.01, 0.1))
def test_the_interval_grows_with_either_part_and_is_never_wider_than_their_sum(
    ratio: float, gap: float, slope: float, half: float, spread: float
) -> None:
    exact = Estimate(ratio, (ratio, ratio))
    timed = Estimate(ratio, (ratio * math.exp(-spread), ratio * math.exp(spread)))
    seeds = Gap(gap, (gap - half, gap + half), 3)
    both = loss_matched(timed, seeds, slope).interval
    gap_alone = loss_matched(exact, seeds, slope).interval
    assert both is not None
    assert gap_alone is not None
    assert both[0] < gap_alone[0] < gap_alone[1] < both[1]
    assert math.log(both[1] / both[0]) < 2 * (half / slope + spread) + 1e-9


def test_the_interval_covers_the_truth_as_often_as_those_it_is_made_of() -> None:
    rng = np.random.default_rng(0)
    slope, true_ratio, true_gap, gap_error, ratio_error = 0.2, 1.3, 0.01, 0.004, 0.015
    truth = true_ratio * math.exp(-true_gap / slope)
    covered = 0
    for _ in range(2000):
        gap, log_ratio = rng.normal(true_gap, gap_error), rng.normal(math.log(true_ratio), ratio_error)
        ends = [math.exp(log_ratio + sign * 1.96 * ratio_error) for sign in (-1, 1)]
        seeds = Gap(gap, (gap - 1.96 * gap_error, gap + 1.96 * gap_error), 8)
        low, high = loss_matched(Estimate(math.exp(log_ratio), (ends[0], ends[1])), seeds, slope).interval or (0, 0)
        covered += low <= truth <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)
